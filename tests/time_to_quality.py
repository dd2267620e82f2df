"""How good after the same minutes? `python tests/time_to_quality.py --minutes 10` trains by diffusers' recipe, and judges.

The recipe is that of diffusers' example for unconditional generation (its README's command): AdamW, a learning rate of 1e-4
that rises for 500 steps and falls as a cosine, batches of 16, the noise itself learned with DDPM's linear schedule, an
average of the weights. How many steps there will be follows from forward and backward alone; the minutes that were really
spent are printed. --network example is that example's U-Net (114 million parameters), --network ours diffusers' U-Net
of our default widths. The drawn cats, the sampler and the judge are those of train.py and evaluate.py.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from benchmark import keep_memory  # sets the path to the repository, too
from diffusers import UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from test_unet import judge_for
from tqdm import tqdm

import evaluate
from processes import NoiseSchedule, add_noise
from toolbox.data import load_data
from toolbox.metrics import feature_net
from unet import UNet


def example() -> UNet2DModel:
    down, up = ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4
    widths = (128, 128, 256, 256, 512, 512)
    return UNet2DModel(32, 3, 3, block_out_channels=widths, layers_per_block=2, down_block_types=down, up_block_types=up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--network", choices=["example", "ours"], default="ours")
    parser.add_argument("--n", type=int, default=256, help="samples")
    parser.add_argument("--steps", type=int, default=40, help="network calls for each sample")
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keep_memory()
    torch.manual_seed(args.seed)
    data, held_out, schedule = load_data("cats"), load_data("cats", held_out=True), NoiseSchedule.linear()
    network = example() if args.network == "example" else judge_for(UNet().config)

    def loss() -> torch.Tensor:
        x0 = data.batch(torch.randint(len(data.images), (16,)), torch.rand(16) < 0.5)
        t = torch.randint(schedule.T, (16,))
        x_t, noise = add_noise(x0, t, schedule)
        return F.mse_loss(network(x_t, t).sample, noise)

    seconds = []
    for _ in range(9):  # how many steps will there be?
        start = time.perf_counter()
        loss().backward()
        network.zero_grad()
        seconds.append(time.perf_counter() - start)
    steps = max(1, int(60 * args.minutes / statistics.median(seconds)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rate = get_cosine_schedule_with_warmup(optimizer, 500, steps)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    losses, start = [], time.perf_counter()
    for _ in (bar := tqdm(range(steps))):
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        losses.append(value.item())
        bar.set_postfix(loss=f"{sum(losses[-200:]) / len(losses[-200:]):.4f}")
    minutes = (time.perf_counter() - start) / 60
    print(
        f"{steps} steps in {minutes:.1f} minutes, {sum(p.numel() for p in network.parameters()) / 1e6:.1f} million parameters"
    )
    average.copy_to(network.parameters())
    how = range(args.seed, args.seed + args.n), args.steps, args.eta, torch.device("cpu")
    samples = evaluate.draw(lambda x, t: network(x, t).sample, schedule, (3, 32, 32), *how)
    evaluate.judge(samples, feature_net(data), data, held_out)


if __name__ == "__main__":
    main()
