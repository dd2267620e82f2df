"""Is it any good? `python evaluate.py` measures a model's loss and its samples, beside what real pictures get."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from processes import NoiseSchedule, randn, sample, strides, v_to_noise
from toolbox.data import SIZES, Data, from_uint8, load_data, to_uint8
from toolbox.files import check_number, check_writable, errors_in_one_sentence
from toolbox.metrics import (
    FID_FROM,
    FeatureNet,
    Inception,
    Judge,
    LinearDenoiser,
    feature_net,
    frechet_distance,
    kernel_distance,
    nearest,
    some,
    two_parts,
    with_error,
)
from toolbox.models import default_model, load_model
from toolbox.pictures import loss_by_level, plot_evaluation
from toolbox.run import pick_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help="a model.pt, or the name of a ready model (default: as for sample.py)"
    )
    parser.add_argument(
        "--data",
        help="what it was trained on (default: the model knows; of a folder it knows only the name)",
    )
    parser.add_argument(
        "--n", type=int, default=256, help=f"samples; from {FID_FROM:,} on their FID is told too"
    )
    parser.add_argument("--steps", type=int, default=40, help="network calls for each sample")
    parser.add_argument(
        "--eta", type=float, default=1.0, help="fresh noise in each step: 1 is DDPM, 0 is DDIM"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="sample i has the seed SEED + i, as in sample.py"
    )
    parser.add_argument(
        "--inception",
        action="store_true",
        help="measure FID on Inception's features (needs torchmetrics)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("evaluation.png"), help="the picture that is written"
    )
    parser.add_argument("--device", help="cpu, cuda or mps (default: the fastest there is)")
    args = parser.parse_args()
    check_number(
        "--n", args.n, 4
    )  # an error bar takes halves, and a distance within a half takes two
    check_number("--seed", args.seed, 0, 2**32 - args.n)
    check_number("--eta", args.eta, 0, 1)

    model = args.model or default_model()
    device = pick_device(args.device)
    network, schedule, about = load_model(model, device)
    predict_noise = v_to_noise(network, schedule)
    strides(
        schedule.T, args.steps
    )  # before the work, not after it: are there so many steps, can the picture be written?
    check_writable(args.out)
    inception = Inception() if args.inception else None
    if not args.data and about["data"] not in SIZES:
        raise ValueError(
            f"{model} was trained on a folder named {about['data']}: say where it is, --data path/to/{about['data']}"
        )
    data, held_out = (
        load_data(args.data or about["data"], about["size"], held_out=part)
        for part in (False, True)
    )
    if data.channels != about["channels"]:
        raise ValueError(
            f"{model} draws pictures of {about['channels']} channels, those of {data.name} have {data.channels}"
        )
    pictures = f"{len(data.images):,} training pictures, {len(held_out.images):,} held out"
    print(f"model     {model}, trained on {about['data']}: {pictures}")

    levels, linear = losses(predict_noise, schedule, data, held_out.images, device)
    shape, seeds = (data.channels, data.size, data.size), range(args.seed, args.seed + args.n)
    samples = draw(predict_noise, schedule, shape, seeds, args.steps, args.eta, device)
    judge(samples, feature_net(data), data, held_out)
    if inception:
        distances(samples, inception, data)
    copies, how_near = look_for_copies(samples, data, held_out.images)
    plot_evaluation(levels, linear, from_uint8(samples), from_uint8(copies), how_near, args.out)
    print(f"wrote {args.out}")


def losses(
    predict_noise: Callable,
    schedule: NoiseSchedule,
    data: Data,
    images: Tensor,
    device: torch.device,
) -> tuple[dict, dict]:
    """Mean squared error on held-out pictures by time step: the network's, and the best linear denoiser's.

    Printed are the means over the levels where 0.02 < alpha_bar < 0.98. They depend on the schedule, too: compare the two
    with each other, not with those of another schedule.
    """
    images = some(images, 256)
    levels = loss_by_level(predict_noise, from_uint8(images).to(device), schedule, levels=25)
    alpha_bar = schedule.alpha_bar[list(levels)]
    linear = LinearDenoiser(data.images).errors(images, alpha_bar)
    judged = (alpha_bar > 0.02) & (alpha_bar < 0.98)
    ours, best = (x[judged].mean().item() for x in (torch.tensor([*levels.values()]), linear))
    verdict = (
        "it has learned more than brightness and smoothness"
        if ours < best
        else "IT HAS LEARNED NOTHING: see docs/lab.md"
    )
    print(
        f"loss      {ours:.4f} on {len(images)} held-out pictures; the best linear denoiser: {best:.4f}; {verdict}"
    )
    return levels, dict(zip(levels, linear.tolist(), strict=True))


def draw(
    predict_noise: Callable,
    schedule: NoiseSchedule,
    shape: tuple,
    seeds: range,
    steps: int,
    eta: float,
    device: torch.device,
) -> Tensor:
    """The pictures of these seeds, as `python sample.py` makes them, in bytes (N, C, H, W)."""
    chunks = torch.tensor(seeds).split(32)
    pictures = []
    with tqdm(total=steps * len(chunks), unit="step", leave=False) as bar:

        def on_step(x: Tensor, t_prev: int) -> Tensor:
            bar.update()
            return x

        for chunk in chunks:
            generators = [torch.Generator().manual_seed(seed) for seed in chunk.tolist()]
            noise = randn((len(chunk), *shape), generators, device=device)
            x0 = sample(
                predict_noise,
                noise,
                schedule,
                steps,
                eta,
                clip=True,
                generator=generators,
                on_step=on_step,
            )
            pictures.append(to_uint8(x0).cpu())
    return torch.cat(pictures)


def judge(samples: Tensor, network: FeatureNet, data: Data, held_out: Data) -> None:
    """The share of clean samples, their variety, KID and FID, each beside what real pictures get."""
    judge = Judge(network, data, held_out)
    features, real = network.see(samples), network.see(some(held_out.images, len(samples)))

    def line(name: str, form: Callable[[Tensor], str]) -> None:
        print(f"{name:26}{form(features):>14}{form(real):>20}")

    def share(truth: Tensor) -> str:
        return f"{100 * truth.float().mean():.1f} of 100"

    print(f"{'':26}{f'{len(samples)} samples':>14}{f'{len(real)} held-out ones':>20}")
    line("clean", lambda x: share(judge.clean(x)))
    line("  near the data", lambda x: share(judge.distance(x) <= judge.reach))
    for name in data.classes:
        line(f"  sure of the {name}", lambda x, name=name: share(judge.sure(x)[name]))
    for name in data.classes:
        line(f"off the data's {name}", lambda x, name=name: f"{judge.variety(x)[name]:.2f}")
    distances(samples, network, data)


def distances(samples: Tensor, network: FeatureNet | Inception, data: Data) -> None:
    """KID and FID to real pictures, beside those between as many real pictures and the same other ones."""
    real, others = two_parts(data.images, len(samples))
    a, floor, b = network.see(samples), network.see(real), network.see(others)
    scores = {f"KID x 1000, {network.name}": lambda a, b: 1000 * kernel_distance(a, b)}
    if min(len(a), len(floor), len(b)) >= FID_FROM:
        scores[f"FID, {network.name}"] = frechet_distance
    for name, distance in scores.items():
        one, error = with_error(distance, a, b)
        zero, zero_error = with_error(distance, floor, b)
        print(
            f"{name:26}{f'{one:.1f} +- {error:.1f}':>14}{f'{zero:.1f} +- {zero_error:.1f}':>20} for {len(floor)} real ones"
        )


def look_for_copies(samples: Tensor, data: Data, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The nearest training pictures, and how near; if samples are nearer than new real pictures are, the network copies."""
    copies, distance = nearest(samples, data)
    usual = nearest(some(real, len(samples)), data)[1]
    nearer = 100 * (distance < usual.quantile(0.01)).float().mean()
    print(
        f"copies    the nearest training picture is {distance.median():.1f} of 255 away (root mean square; median), that of"
    )
    print(
        f"          a held-out picture {usual.median():.1f}; nearer than 99 of 100 of those: {nearer:.1f} of 100 samples"
    )
    return copies, {"samples": distance, "held-out pictures": usual}


if __name__ == "__main__":
    with errors_in_one_sentence():
        main()
