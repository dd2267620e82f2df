"""Draw what a text says: `python -m latent_ext.generate "an orange cat with green eyes"`.

MODEL is a folder in diffusers' layout, Stable Diffusion's single file, a model.pt of
`latent_ext.train classes`, or the name of a pretrained model.
"""

import argparse
from pathlib import Path
from textwrap import shorten

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from latent_ext.guidance import ClassUNet
from latent_ext.pipeline import ClassPipeline, Pipeline, image_to_image, inpaint, text_to_image
from latent_ext.stable_diffusion import load
from toolbox.data import from_uint8, read_image
from toolbox.device import pick_device
from toolbox.files import UserError, check_number, check_writable, user_errors
from toolbox.images import grid, save_gif, save_grid
from toolbox.models import find_model, load_model
from toolbox.seeds import generators

OWN_MODEL = Path("runs/cats-latent")  # of `python -m latent_ext.train all`
BATCH_PIXELS = 2**18  # in one network call: one image of 512x512, or 64 of 64x64
GRID = 1024  # images that fit into one grid


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="what to draw; each prompt gets a row")
    add("--model", help=f"path, or a pretrained model (default: {OWN_MODEL}, else latent-cats)")
    add("--n", type=int, default=4, help="images per prompt (default: 4)")
    add("--guidance", type=float, help="guidance scale (default: 3; Stable Diffusion 7.5)")
    add("--negative", default="", metavar="TEXT", help="what the images must not show")
    add("--size", type=int, help="width and height in pixels (default: as in training)")
    add("--steps", type=int, default=50, help="network calls per image (default: 50)")
    add("--eta", type=float, help="fresh noise: 1 DDPM, 0 DDIM (default: 1; Stable Diffusion 0)")
    add("--init-image", type=Path, metavar="FILE", help="start from this image")
    add("--strength", type=float, help="how much to redraw, 0 to 1 (default: 0.75; 1 with --mask)")
    add("--mask", type=Path, metavar="FILE", help="redraw only where this image is white")
    add("--seed", type=int, default=0, help="image i of a prompt has seed SEED + i (default: 0)")
    out = Path("samples.png")
    add("--out", type=Path, default=out, help=f".png file for the grid (default: {out})")
    add("--gif", type=Path, metavar="FILE", help="also write a GIF (decodes every step: slow)")
    add("--device", help="cpu, cuda or mps (default: the fastest available)")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    check_number("--n", args.n, 1, GRID // len(args.prompts))
    check_number("--seed", args.seed, 0, 2**32 - args.n)
    check_writable(args.out, ".png")
    if args.gif:
        check_writable(args.gif, ".gif")
    for flag, value in (("--mask", args.mask), ("--strength", args.strength)):
        if value is not None and not args.init_image:
            raise UserError(f"{flag} {value} needs an --init-image")

    device, model = pick_device(args.device), args.model or default_model()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipeline = load_pipeline(model, device, dtype)
    stable_diffusion = pipeline.spacing == "leading"  # else a model trained here
    guidance, eta = (7.5, 0.0) if stable_diffusion else (3.0, 1.0)
    strength = 0.75 if args.init_image and not args.mask else 1.0
    parser.set_defaults(guidance=guidance, eta=eta, strength=strength, size=pipeline.size)
    args = parser.parse_args()  # again, with the model's own defaults
    check_number("--guidance", args.guidance, 0, 100)
    check_number("--eta", args.eta, 0, 1)
    check_number("--size", args.size, 1, 4096)
    if args.size % pipeline.downsampling:
        raise UserError(f"--size {args.size}: expected a multiple of {pipeline.downsampling}")
    if pipeline.for_inpainting and not args.mask:
        raise UserError(f"--model {model} is an inpainting model: add --init-image and --mask")
    timesteps = pipeline.timesteps(args.steps, args.strength)
    check_prompts(pipeline, [*args.prompts, args.negative])

    options = {"negative": args.negative, "guidance_scale": args.guidance}
    options |= {"steps": args.steps, "eta": args.eta}
    draw, given = text_to_image, []
    if args.init_image:
        draw, given = image_to_image, [read(args.init_image, args.size, pipeline.image_channels)]
    if args.mask:
        draw, given = inpaint, [*given, read(args.mask, args.size, 1) / 2 + 0.5]
        check_same_shape(args.init_image, args.mask)
    options |= {"strength": args.strength} if given else {"size": args.size}

    seeds = range(args.seed, args.seed + args.n)
    wanted = [(prompt, seed) for prompt in args.prompts for seed in seeds]
    batch = max(1, BATCH_PIXELS // args.size**2)
    batches = [wanted[i : i + batch] for i in range(0, len(wanted), batch)]
    print(f"{len(wanted)} images of {args.size}x{args.size} pixels by {model}")
    images, trajectory = [], []
    with tqdm(total=len(timesteps) * len(batches), unit="step") as bar:

        def on_step(z: Tensor, t_prev: int, x0: Tensor) -> Tensor:
            bar.update()
            if args.gif:
                trajectory.append(pipeline.decode(z).cpu())
            return z

        for prompts, seeds in (zip(*batch, strict=True) for batch in batches):
            copies = [image.expand(len(prompts), -1, -1, -1) for image in given]
            options |= {"generator": generators(seeds), "on_step": on_step}
            images.append(draw(pipeline, prompts, *copies, **options).cpu())

    images, columns = torch.cat(images), args.n if len(args.prompts) > 1 else None
    save_grid(images, args.out, columns)
    if args.gif:
        steps = [torch.cat(trajectory[step :: len(timesteps)]) for step in range(len(timesteps))]
        save_gif([grid(x, columns) for x in [*steps, images]], args.gif)
    print(f"wrote {args.out}" + (f" and {args.gif}" if args.gif else ""))


def default_model() -> str | Path:
    return OWN_MODEL if (OWN_MODEL / "model_index.json").exists() else "latent-cats"


def load_pipeline(
    model: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Pipeline:
    """A model of any kind, by its path or pretrained name. dtype: for Stable Diffusion only."""
    path = find_model(model)
    if path.suffix == ".pt":
        return ClassPipeline(*load_model(path, device, ClassUNet))
    return load(path, device, dtype)


def check_prompts(pipeline: Pipeline, prompts: list[str]) -> None:
    """Warn about words that the model will not read. A class-conditional model refuses them."""
    pipeline.encode_prompts(prompts)
    for text in dict.fromkeys(prompts if pipeline.tokenizer else []):
        shown = repr(shorten(text, 60))
        if lost := pipeline.tokenizer.truncated(text):
            print(f"warning: {shown} is too long for this model: {shorten(lost, 60)!r} is cut off")
        if unknown := shorten(", ".join(pipeline.tokenizer.unknown(text)), 60):
            print(f"warning: {shown} has words this model does not know: {unknown}")


def check_same_shape(image: Path, mask: Path) -> None:
    shapes = [ImageOps.exif_transpose(Image.open(path)).size for path in (image, mask)]
    (width, height), (mask_width, mask_height) = shapes
    if width * mask_height != height * mask_width:
        raise UserError(
            f"--mask {mask}: expected the aspect ratio of {image}, {width}x{height} pixels, "
            f"got {mask_width}x{mask_height}"
        )


def read(path: Path, size: int, channels: int) -> Tensor:
    """A file of any mode and size -> its centre, (1, channels, size, size) in [-1, 1]."""
    image = from_uint8(read_image(path, size))
    return (image if channels == 3 else image.mean(dim=0, keepdim=True))[None]


if __name__ == "__main__":
    with user_errors():
        main()
