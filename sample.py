"""Draw images with a trained model: `python sample.py` makes a grid (Algorithm 2 of DDPM)."""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from processes import snr_pairs
from toolbox.device import pick_device
from toolbox.files import check_number, check_writable, printable, user_errors
from toolbox.images import grid, save_gif, save_grid, save_image, to_image
from toolbox.models import default_model, load_model, predict_noise_of
from toolbox.seeds import sample_seeds

BATCH = 32  # images in one network call; on a CPU more would overflow its cache
GRID = 1024  # images that fit into one grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", help="a model.pt or pretrained model (default: runs/cats/model.pt, else cats)")
    add("--n", type=int, default=64, help="how many images (default: 64)")
    add("--steps", type=int, default=40, help="network calls per image (default: 40)")
    add("--eta", type=float, default=1.0, help="fresh noise: 1 DDPM, 0 DDIM (default: 1)")
    add("--order", type=int, default=1, choices=[1, 2], help="2: second order, for photographs")
    add("--seed", type=int, default=0, help="image i has the seed SEED + i (default: 0)")
    add("--out", default="samples.png", help=".png for a grid, or a folder (default: samples.png)")
    add("--gif", type=Path, help="also write an animation of the grid")
    add("--device", help="cpu, cuda or mps (default: the fastest available)")
    args = parser.parse_args()

    out, as_grid = Path(args.out), args.out.lower().endswith(".png")
    check_number("--n", args.n, 1, GRID if as_grid or args.gif else 2**31)
    check_number("--seed", args.seed, 0, 2**32 - args.n)
    check_number("--eta", args.eta, 0, 1)
    model, device = args.model or default_model(), pick_device(args.device)
    network, schedule, config = load_model(model, device)
    check_number("--steps", args.steps, 1, schedule.T)
    check_writable(out if as_grid else out / f"{args.seed:06}.png")
    if args.gif:
        check_writable(args.gif, ".gif")

    size, data = config["size"], printable(config["data"])
    shape = config["channels"], size, size
    print(f"{args.n} images of {size}x{size} pixels by {model}, trained on {data}")
    pairs = snr_pairs(schedule, args.steps) if args.order == 2 else None
    calls = len(pairs) if pairs else args.steps
    seeds = range(args.seed, args.seed + args.n)
    batches = [seeds[i : i + BATCH] for i in range(0, args.n, BATCH)]
    images, trajectory = [], []
    with tqdm(total=calls * len(batches), unit="step") as bar:

        def on_step(x: Tensor, t_prev: int, x0: Tensor) -> Tensor:
            bar.update()
            if args.gif:
                trajectory.append(x.cpu())  # `calls` per batch
            return x

        options = {"steps": args.steps, "timesteps": pairs, "eta": args.eta, "order": args.order}
        options |= {"device": device, "clip_x0": True, "on_step": on_step}
        predict_noise = predict_noise_of(network, schedule, config)
        for batch in batches:
            x0 = sample_seeds(predict_noise, shape, batch, schedule, **options).cpu()
            if as_grid:
                images.append(x0)
                continue
            for seed, image in zip(batch, x0, strict=True):
                save_image(to_image(image), out / f"{seed:06}.png")
    if as_grid:
        save_grid(torch.cat(images), out)
    if args.gif:
        save_gif([grid(torch.cat(trajectory[step::calls])) for step in range(calls)], args.gif)
    print(f"wrote {args.out}" + (f" and {args.gif}" if args.gif else ""))


if __name__ == "__main__":
    with user_errors():
        main()
