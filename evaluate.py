"""Is it any good? `python evaluate.py` measures a model's loss and samples, next to real images."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from processes import Network, NoiseSchedule, snr_pairs
from toolbox import metrics
from toolbox.data import SIZES, Data, from_uint8, load_data, to_uint8
from toolbox.device import pick_device
from toolbox.files import UserError, check_number, check_writable, printable, user_errors
from toolbox.images import loss_by_level, plot_evaluation
from toolbox.metrics import FeatureNet, evenly_spaced
from toolbox.models import default_model, load_model, predict_noise_of
from toolbox.seeds import sample_seeds

BATCH = 32  # images in one network call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="a model.pt or a pretrained model (default: as for sample.py)")
    add("--data", help="its training data (default: as the model says, unless it was a folder)")
    add("--n", type=int, default=256, help="samples; 2,000 add the Fréchet distance (default: 256)")
    add("--steps", type=int, default=40, help="network calls per sample (default: 40)")
    add("--eta", type=float, default=1.0, help="fresh noise: 1 DDPM, 0 DDIM (default: 1)")
    add("--order", type=int, default=1, choices=[1, 2], help="2: second order, for photographs")
    add("--seed", type=int, default=0, help="sample i has the seed SEED + i (default: 0)")
    add("--out", type=Path, default="evaluation.png", help="the plots (default: evaluation.png)")
    add("--device", help="cpu, cuda or mps (default: the fastest available)")
    args = parser.parse_args()
    check_number("--n", args.n, 4)  # an error bar takes halves; a distance needs two images in each
    check_number("--seed", args.seed, 0, 2**32 - args.n)
    check_number("--eta", args.eta, 0, 1)
    model, device = args.model or default_model(), pick_device(args.device)
    network, schedule, config = load_model(model, device)
    check_number("--steps", args.steps, 1, schedule.T)
    check_writable(args.out, ".png")

    name = config["data"] if args.data is None else args.data
    if args.data is None and name not in SIZES:
        raise UserError(f"{model} was trained on a folder named {name}: add --data path/to/{name}")
    data, held_out = (load_data(name, config["size"], held_out=part) for part in (False, True))
    if data.channels != config["channels"]:
        raise UserError(f"{model} needs {config['channels']} channels, {name} has {data.channels}")
    print(f"model     {model}, trained on {printable(config['data'])}:", end=" ")
    print(f"{len(data.images):,} training images, {len(held_out.images):,} held out")
    if config.get("data_checksum", data.checksum) != data.checksum:
        print(f"warning: {model} was trained on other images than {name} now has")
    classifier = metrics.feature_net(data)  # first: it may have to be trained

    predict_noise = predict_noise_of(network, schedule, config)
    images = evenly_spaced(held_out.images, 256)
    loss = loss_by_level(predict_noise, from_uint8(images).to(device), schedule, levels=25)
    levels = report_loss(loss, schedule, data, images)
    pairs = snr_pairs(schedule, args.steps) if args.order == 2 else None
    options = {"schedule": schedule, "device": device, "steps": args.steps, "timesteps": pairs}
    options |= {"eta": args.eta, "order": args.order}
    seeds = range(args.seed, args.seed + args.n)
    samples = generate(predict_noise, data.images.shape[1:], seeds, **options)
    report_quality(samples, classifier, data, held_out)
    report_distances(samples, classifier, data)
    neighbours, rms = report_copies(samples, data, held_out)
    plot_evaluation(levels, from_uint8(samples), from_uint8(neighbours), rms, args.out)
    print(f"wrote {args.out}")


def report_loss(levels: dict, schedule: NoiseSchedule, data: Data, images: Tensor) -> dict:
    """Squared error by time step on these images: of the network, and of the best linear denoiser.

    It prints the means over 0.02 < alpha_bar < 0.98. They depend on the schedule, too: compare
    the two with each other, not with those of another schedule.
    """
    alpha_bar = schedule.alpha_bar[[*levels]]
    linear = metrics.LinearDenoiser(data.images).errors(images, alpha_bar)
    judged = (alpha_bar > 0.02) & (alpha_bar < 0.98)
    ours, best = (x[judged].mean() for x in (torch.tensor([*levels.values()]), linear))
    verdict = "more than brightness and smoothness" if ours < best else "NOTHING: see docs/lab.md"
    print(f"loss      {ours:.4f} on {len(images)} held-out images;", end=" ")
    print(f"best linear denoiser {best:.4f}:\n          it has learned {verdict}")
    baseline = dict(zip(levels, linear.tolist(), strict=True))
    return {"the best linear denoiser": baseline, "this network": levels}


def generate(predict_noise: Network, shape: Sequence[int], seeds: range, **options) -> Tensor:
    """Draw the images of these seeds, as sample.py does: uint8 (N, *shape)."""
    batches, images = [seeds[i : i + BATCH] for i in range(0, len(seeds), BATCH)], []
    for batch in tqdm(batches, desc="sampling", leave=False):
        x0 = sample_seeds(predict_noise, shape, batch, clip_x0=True, **options)
        images.append(to_uint8(x0).cpu())
    return torch.cat(images)


def report_quality(samples: Tensor, network: FeatureNet, data: Data, held_out: Data) -> None:
    """Print which share is clean and how the classes are mixed, also for held-out images."""
    judge = metrics.Judge(network, data, held_out)
    real = evenly_spaced(held_out.images, len(samples))
    rows = {"": [f"{len(samples)} samples", f"{len(real)} held-out images"]}
    for features in map(network.extract_features, (samples, real)):
        near = judge.distance(features) <= judge.radius
        shares = {"clean": judge.clean(features), "  near the data": near}
        shares |= {f"  confident of the {name}": x for name, x in judge.confident(features).items()}
        for name, share in shares.items():
            rows.setdefault(name, []).append(f"{100 * share.float().mean():.1f} %")
        for name, distance in judge.total_variation(features).items():
            rows.setdefault(f"total variation of the {name}", []).append(f"{distance:.2f}")
    for name, (ours, theirs) in rows.items():
        print(f"{name:34}{ours:>16}{theirs:>24}")


def report_distances(samples: Tensor, network: FeatureNet, data: Data) -> None:
    """Print KID and Fréchet distance to real images, also for as many other real images."""
    real, others = metrics.split(data.images, len(samples))
    ours, theirs, b = (network.extract_features(images) for images in (samples, real, others))
    distances = {"KID x 1000": lambda a, b: 1000 * metrics.kernel_distance(a, b)}
    if min(len(ours), len(b)) >= metrics.FRECHET_FROM:
        distances["Fréchet distance"] = metrics.frechet_distance
    for name, distance in distances.items():
        results = (metrics.jackknife(distance, a, b) for a in (ours, theirs))
        one, zero = (f"{value:.1f} +- {error:.1f}" for value, error in results)
        print(f"{f'{name} (our features)':34}{one:>16}{zero:>24} ({len(theirs)} real images)")


def report_copies(samples: Tensor, data: Data, held_out: Data) -> tuple[Tensor, dict[str, Tensor]]:
    """Nearest training images, and distances; samples nearer than new images would be copies."""
    neighbours, ours = metrics.nearest_neighbours(samples, data)
    theirs = metrics.nearest_neighbours(evenly_spaced(held_out.images, len(samples)), data)[1]
    nearer = 100 * (ours < theirs.quantile(0.01)).float().mean()
    print(f"copies    the nearest training image is {ours.median():.1f} of 255 away (RMS, median),")
    print(f"          of held-out images {theirs.median():.1f};", end=" ")
    print(f"{nearer:.1f} % are nearer than 99 % of those")
    return neighbours, {"samples": ours, "held-out images": theirs}


if __name__ == "__main__":
    with user_errors():
        main()
