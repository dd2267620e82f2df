"""How good after the same minutes? `python -m benchmarks.quality --minutes 10` trains and judges.

It trains like diffusers' example of unconditional generation (by its README's command): AdamW
with a learning rate of 1e-4 that rises for 500 steps and falls as a cosine, batches of 16, the
noise predicted directly, DDPM's linear schedule, an EMA. --network example is that example's U-Net
(114 million parameters), --network ours diffusers' U-Net of our default's size. The drawn cats, the
sampler and the judge are those of train.py and evaluate.py. The time of forward
and backward sets the number of steps; the minutes really spent are printed.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from tqdm import tqdm

import evaluate
from benchmarks.speed import diffusers_unet
from processes import NoiseSchedule, add_noise
from toolbox.data import load_data
from toolbox.device import tune
from toolbox.metrics import feature_net


def example_unet() -> UNet2DModel:
    down = [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"]
    return UNet2DModel(
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=down,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="of training (default: 10)")
    parser.add_argument("--network", choices=["example", "ours"], default="ours")
    parser.add_argument("--n", type=int, default=256, help="samples (default: 256)")
    args = parser.parse_args()
    tune(torch.device("cpu"))
    torch.manual_seed(0)
    data, held_out = (load_data("cats", held_out=part) for part in (False, True))
    schedule = NoiseSchedule.linear()
    network = example_unet() if args.network == "example" else diffusers_unet()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, (0.95, 0.999), weight_decay=1e-6)
    ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, power=0.75)

    def backward() -> float:
        x0 = data.batch(torch.randint(len(data.images), (16,)), torch.rand(16) < 0.5)
        t = torch.randint(schedule.T, (16,))
        x_t, noise = add_noise(x0, t, schedule)
        loss = F.mse_loss(network(x_t, t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        return loss.item()

    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        backward()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    steps = max(1, int(60 * args.minutes / statistics.median(seconds)))
    learning_rate = get_cosine_schedule_with_warmup(optimizer, 500, steps)
    losses, start = [], time.perf_counter()
    for _ in (bar := tqdm(range(steps))):
        losses = [*losses[-199:], backward()]
        optimizer.step()
        learning_rate.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
    minutes, parameters = (time.perf_counter() - start) / 60, network.num_parameters() / 1e6
    print(f"{steps} steps in {minutes:.1f} minutes, {parameters:.1f} million parameters")
    ema.copy_to(network.parameters())
    network.eval()
    predict_noise, shape = lambda x, t: network(x, t).sample, data.images.shape[1:]
    samples = evaluate.generate(predict_noise, shape, range(args.n), schedule=schedule)
    classifier = feature_net(data)
    evaluate.report_quality(samples, classifier, data, held_out)
    evaluate.report_distances(samples, classifier, data)


if __name__ == "__main__":
    main()
