"""Train the networks of the second evening, from scratch: `python -m latent_ext.train PART`.

classes: a class-conditional U-Net in pixels. vae, clip, unet: the three networks of Stable
Diffusion; the U-Net needs the other two. all: these three, in order. Each train_PART.py has the
loop of the core's train.py with a loss of its own.
"""

import argparse
from pathlib import Path

from latent_ext import train_classes, train_clip, train_unet, train_vae
from latent_ext.data import held_out_combination, select
from toolbox.data import SIZES, Data, load_data
from toolbox.device import PROCESSES, distributed, first_process_first, pick_device
from toolbox.files import UserError, check_number, user_errors

PARTS = {"classes": train_classes, "vae": train_vae, "clip": train_clip, "unet": train_unet}
SIZE = 64  # pixels of the images that become latents


def main() -> None:
    steps, batch = (
        ", ".join(f"{getattr(module, number)} for {part}" for part, module in PARTS.items())
        for number in ("STEPS", "BATCH")
    )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("part", choices=[*PARTS, "all"], help="all: vae, clip and unet")
    add("--data", default="cats", help=f"{', '.join(SIZES)}, or a folder of images (default: cats)")
    add("--out", type=Path, help="folder (default: runs/DATA-classes or runs/DATA-latent)")
    add("--size", type=int, help=f"pixels (default: the data's own for classes, otherwise {SIZE})")
    add("--steps", type=int, help=f"total; more continue a run (default: {steps})")
    add("--batch", type=int, help=f"images in a step (default: {batch})")
    add("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    add("--device", help="cpu, cuda or mps (default: the fastest available)")
    add("--precision", choices=["float32", "bfloat16"], help="default: whichever is faster here")
    args = parser.parse_args()

    check_number("--seed", args.seed, 0, 2**32 - 1)
    args.device = pick_device(args.device)
    parts = ["vae", "clip", "unet"] if args.part == "all" else [args.part]
    kind = "classes" if args.part == "classes" else "latent"
    size = SIZE if args.size is None and kind == "latent" else args.size
    with first_process_first():
        data = load_data(args.data, size)
    check(args, parts, data)  # before the first training, not after it
    if data.name == "cats":  # evaluate.py asks for the rest
        data = select(data, ~held_out_combination(data.labels))
    args.out = args.out or Path("runs") / f"{data.name}-{kind}"
    for part in parts:
        module, part_args = PARTS[part], argparse.Namespace(**vars(args))
        part_args.steps = module.STEPS if args.steps is None else args.steps
        part_args.batch = module.BATCH if args.batch is None else args.batch
        module.train(part_args, data)


def check(args: argparse.Namespace, parts: list[str], data: Data) -> None:
    if args.part == "all" and args.steps is not None:
        raise UserError("--steps works for one part only: train vae, clip and unet one by one")
    if args.part == "classes":
        if not data.classes:
            raise UserError(f"--data {args.data}: expected classes, one sub-folder per class")
        return
    if data.size % train_clip.PATCH:
        raise UserError(f"--size {data.size}: expected a multiple of {train_clip.PATCH}")
    if not data.captions and parts != ["vae"]:
        raise UserError(f"--data {args.data}: expected captions: image.txt next to image.jpg")
    if "clip" in parts:  # it compares the images and captions of a batch with each other
        if PROCESSES > 1:
            raise UserError("clip trains in one process only: run it without torchrun")
        if len(set(data.captions)) < 2:
            raise UserError(f"--data {args.data}: expected at least two different captions")
        check_number("--batch", train_clip.BATCH if args.batch is None else args.batch, 2)


if __name__ == "__main__":
    with user_errors(), distributed():
        main()
