"""Flow matching or not: `python -m benchmarks.schedules` trains the default network in four ways.

All see the same images, noises and time steps, and are judged by the classifier of evaluate.py.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from tqdm import tqdm

from evaluate import generate
from processes import NoiseSchedule, add_noise
from toolbox import metrics
from toolbox.data import load_data
from toolbox.device import tune
from toolbox.models import PREDICTIONS
from toolbox.run import generator_for
from train import autocast, gradient_step, make_optimizers, update_ema
from unet import UNet

WAYS = {  # schedule, what the network predicts, what the loss compares
    "sigmoid, v, loss on the noise (the default)": ("sigmoid", "v", "noise"),
    "flow, v, loss on the noise": ("flow", "v", "noise"),
    "flow, velocity, loss on the noise": ("flow", "velocity", "noise"),
    "flow, velocity, loss on the velocity": ("flow", "velocity", "velocity"),
}
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=660, help="steps of each training (default: 660)")
    add("--n", type=int, default=256, help="samples per model (default: 256)")
    add("--precision", default="bfloat16", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    tune(CPU)
    data, held_out = (load_data("cats", held_out=part) for part in (False, True))
    classifier = metrics.feature_net(data)
    judge = metrics.Judge(classifier, data, held_out)
    real = classifier.extract_features(metrics.split(data.images, args.n)[1])

    print("| | KID x 1000 | confident of all | distance to the data |\n|---|---|---|---|")
    for name, (schedule, prediction, target) in WAYS.items():
        schedule = getattr(NoiseSchedule, schedule)()
        predict_noise = train(data, schedule, prediction, target, args.steps, args.precision)
        with autocast(CPU, args.precision):
            shape = data.images.shape[1:]
            images = generate(predict_noise, shape, range(args.n), schedule=schedule, device="cpu")
        features = classifier.extract_features(images)
        kid, error = metrics.jackknife(metrics.kernel_distance, features, real)
        confident = torch.stack([*judge.confident(features).values()]).all(0).float().mean()
        distance = judge.distance(features).median()
        print(f"| {name} | {1000 * kid:.0f} +- {1000 * error:.0f} ", end="")
        print(f"| {100 * confident:.0f} % | {distance:.2f} |", flush=True)


def train(data, schedule, prediction: str, target: str, steps: int, precision: str):
    """predict_noise of the EMA, after `steps` steps of 16 images; the same seeds every time."""
    torch.manual_seed(0)
    network = UNet()
    ema = copy.deepcopy(network).requires_grad_(False).eval()
    optimizers = make_optimizers(network)
    predict_noise = PREDICTIONS[prediction](network, schedule)
    for step in tqdm(range(steps), leave=False):
        generator = generator_for(0, step)
        indices = torch.randint(len(data.images), (16,), generator=generator)
        x0 = data.batch(indices, torch.rand(16, generator=generator) < 0.5)
        t = torch.randint(schedule.T, (16,), generator=generator)
        x_t, noise = add_noise(x0, t, schedule, torch.randn(x0.shape, generator=generator))
        with autocast(CPU, precision):
            if target == "velocity":
                loss = F.mse_loss(network(x_t, t), noise - x0)
            else:
                loss = F.mse_loss(predict_noise(x_t, t), noise)
        gradient_step(loss, network, optimizers, step, steps, precision)
        update_ema(ema, network, step)
    return PREDICTIONS[prediction](ema, schedule)


if __name__ == "__main__":
    main()
