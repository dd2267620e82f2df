"""Draw pictures with a trained model: `python sample.py` makes a grid of cats. This is Algorithm 2 of DDPM as a program."""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from processes import randn, sample, strides, v_to_noise
from toolbox.files import check_number, check_writable, errors_in_one_sentence
from toolbox.models import default_model, load_model
from toolbox.pictures import grid, save, save_gif, save_grid, to_image
from toolbox.run import pick_device

CHUNK = 32  # pictures that go through the network together: on a CPU more of them leave its cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help="a model.pt, or the name of a ready model (default: runs/cats/model.pt if there, else cats)"
    )
    parser.add_argument("--n", type=int, default=64, help="how many pictures")
    parser.add_argument("--steps", type=int, default=40, help="network calls for each picture")
    parser.add_argument("--eta", type=float, default=1.0, help="fresh noise in each step: 1 is DDPM, 0 is DDIM")
    parser.add_argument("--seed", type=int, default=0, help="picture i has the seed SEED + i")
    parser.add_argument(
        "--out", type=Path, default=Path("samples.png"), help="a .png for a grid, else a folder for single pictures"
    )
    parser.add_argument("--gif", type=Path, help="also write how the grid comes out of the noise")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the fastest there is)")
    args = parser.parse_args()
    check_number("--n", args.n, 1)
    check_number("--seed", args.seed, 0, 2**32 - args.n)
    check_number("--eta", args.eta, 0, 1)
    if args.out.suffix.lower() not in ("", ".png"):
        raise ValueError(f"--out {args.out}: expected a name that ends in .png, for a grid, or a folder")

    if args.gif and args.gif.suffix.lower() != ".gif":
        raise ValueError(f"--gif {args.gif}: expected a name that ends in .gif")

    model = args.model or default_model()
    device = pick_device(args.device)
    network, schedule, about = load_model(model, device)
    predict_noise = v_to_noise(network, schedule)
    shape = (about["channels"], about["size"], about["size"])
    check_writable(args.out if args.out.suffix else args.out / f"{args.seed:06}.png")
    if args.gif:
        check_writable(args.gif)
    print(f"{args.n} pictures of {about['size']}x{about['size']} pixels by the model {model}, trained on {about['data']}")

    chunks = range(args.seed, args.seed + args.n, CHUNK)
    bar = tqdm(total=len(strides(schedule.T, args.steps)) * len(chunks), unit="step")
    pictures, trail = [], []

    def on_step(x: Tensor, t_prev: int) -> Tensor:
        bar.update()
        if args.gif:
            trail.append(x.cpu())
        return x

    for first in chunks:
        seeds = range(first, min(first + CHUNK, args.seed + args.n))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # each picture has its own noise, so that
        noise = randn((len(seeds), *shape), generators, device=device)  # it is the same one whatever stands beside it
        x0 = sample(predict_noise, noise, schedule, args.steps, args.eta, clip=True, generator=generators, on_step=on_step)
        pictures.append(x0.cpu())
    bar.close()
    pictures = torch.cat(pictures)

    if args.out.suffix.lower() == ".png":
        save_grid(pictures, args.out)
    else:
        for seed, picture in enumerate(pictures, start=args.seed):
            save(to_image(picture), args.out / f"{seed:06}.png")
    if args.gif:
        save_gif([grid(torch.cat(trail[step :: args.steps])) for step in range(args.steps)], args.gif)
    print(f"wrote {args.out}" + (f" and {args.gif}" if args.gif else ""))


if __name__ == "__main__":
    with errors_in_one_sentence():
        main()
