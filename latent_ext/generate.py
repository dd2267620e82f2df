"""Draw what a text says: `python -m latent_ext.generate "an orange cat with green eyes"`. See pipeline.py for how."""

import argparse
import difflib
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from latent_ext.guidance import ClassUNet
from latent_ext.pipeline import Pipeline, image_to_image, inpaint, of_classes, text_to_image
from latent_ext.stable_diffusion import load
from toolbox.data import from_bytes, read_picture
from toolbox.files import check_number, check_writable, errors_in_one_sentence
from toolbox.models import READY, load_model
from toolbox.pictures import grid, save_gif, save_grid
from toolbox.run import pick_device

OWN = Path("runs/cats-latent")  # of `python -m latent_ext.train all`
PIXELS = 2**18  # go through the networks together, those of one picture of 512x512: more would need more memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw; several make a row of pictures each")
    parser.add_argument(
        "--model",
        help="a folder as diffusers writes it, Stable Diffusion's single file, a model.pt of `latent_ext.train classes`, or "
        f"the name of a ready model (default: {OWN} if there, else latent-cats)",
    )
    parser.add_argument("--n", type=int, default=4, help="how many pictures of each prompt")
    parser.add_argument("--guidance", type=float, help="how closely to follow the prompt; 1 is what the model says by itself")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what the pictures shall not be")
    parser.add_argument("--size", type=int, help="pixels (default: as the model was trained)")
    parser.add_argument("--steps", type=int, default=50, help="network calls for each picture")
    parser.add_argument("--eta", type=float, help="fresh noise in each step: 1 is DDPM, 0 is DDIM")
    parser.add_argument("--init-image", type=Path, metavar="FILE", help="begin with this picture")
    parser.add_argument("--strength", type=float, help="how much of it is drawn anew, from 0 to 1 (default: 0.75; 1 in a mask)")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="a picture that is white where the other is drawn anew")
    parser.add_argument("--seed", type=int, default=0, help="picture i of a prompt has the seed SEED + i")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="a .png: all pictures in a grid")
    parser.add_argument("--gif", type=Path, help="also write how the grid comes out of the noise")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the fastest there is)")
    args = parser.parse_args()
    check_number("--n", args.n, 1)
    check_number("--seed", args.seed, 0, 2**32 - args.n)
    for flag, given in (("--mask", args.mask), ("--strength", args.strength)):
        if given is not None and not args.init_image:
            raise ValueError(f"{flag} {given}: expected an --init-image, too, the picture that is to be changed")
    for path, suffix in ((args.out, ".png"), (args.gif, ".gif")):
        if path and path.suffix.lower() != suffix:
            raise ValueError(f"{path}: expected a name that ends in {suffix}")
        if path:
            check_writable(path)

    device = pick_device(args.device)
    model = args.model or default_model()
    pipeline = find(model, device, torch.float16 if device.type == "cuda" else torch.float32)
    defaults = {"guidance": 7.5, "eta": 0.0} if pipeline.spacing == "leading" else {"guidance": 3.0, "eta": 1.0}
    defaults |= {"size": pipeline.size, "strength": 1.0 if args.mask or not args.init_image else 0.75}
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    check_number("--guidance", args.guidance, 0)
    check_number("--eta", args.eta, 0, 1)
    check_number("--strength", args.strength, 0, 1)
    if args.size < 1 or args.size % pipeline.vae.factor:
        raise ValueError(
            f"--size {args.size}: expected a multiple of {pipeline.vae.factor}, as this model's latents are smaller"
        )
    if pipeline.unet.config["in_channels"] > pipeline.vae.config["latent_channels"] and not args.mask:
        raise ValueError(f"--model {model}: this one was trained for inpainting; it needs --init-image and --mask")
    for text in dict.fromkeys([*args.prompts, args.negative]):
        if left_out := pipeline.tokenizer.left_out(text):
            print(f"warning: {text!r} is too long for this model; it is not told: {left_out!r}")
        if unknown := pipeline.tokenizer.unknown(text):
            print(f"warning: {text!r}: this model does not know {', '.join(map(repr, unknown))}")

    begin = []  # what there is to begin with
    if args.init_image:
        begin.append(read(args.init_image, args.size, pipeline.vae.config["channels"]))
    if args.mask:
        begin.append((read(args.mask, args.size, 1) + 1) / 2)
    make = (text_to_image, image_to_image, inpaint)[len(begin)]
    how = {name: getattr(args, name) for name in ("negative", "steps", "guidance", "eta")}
    how |= {"strength": args.strength} if begin else {"size": args.size}
    walk = pipeline.walk(args.steps, args.strength)
    print(f"{args.n} pictures of {args.size}x{args.size} pixels by the model {model}, for each of {len(args.prompts)} prompts")

    wanted = [(prompt, seed) for prompt in args.prompts for seed in range(args.seed, args.seed + args.n)]
    together = max(1, PIXELS // args.size**2)
    chunks = [wanted[i : i + together] for i in range(0, len(wanted), together)]
    bar = tqdm(total=len(walk) * len(chunks), unit="step")
    pictures, trail = [], []

    def on_step(z: Tensor, t_prev: int) -> Tensor:
        bar.update()
        if args.gif:
            trail.append(pipeline.decode(z).cpu())
        return z

    for chunk in chunks:
        prompts, seeds = zip(*chunk, strict=True)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        begun = [image.expand(len(chunk), -1, -1, -1) for image in begin]
        pictures.append(make(pipeline, prompts, *begun, generator=generators, on_step=on_step, **how).cpu())
    bar.close()

    pictures, columns = torch.cat(pictures), args.n if len(args.prompts) > 1 else None
    save_grid(pictures, args.out, columns)
    if args.gif:
        frames = [torch.cat(trail[step :: len(walk)]) for step in range(len(walk))] + [pictures]
        save_gif([grid(frame, columns) for frame in frames], args.gif)
    print(f"wrote {args.out}" + (f" and {args.gif}" if args.gif else ""))


def default_model() -> str | Path:
    return OWN if (OWN / "model_index.json").exists() else "latent-cats"


def find(model: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Pipeline:
    """By its path or its ready name, of whichever kind."""
    path = Path(model)
    ready = {index.parent.name: index.parent for index in sorted(READY.glob("*/model_index.json"))}
    ready |= {file.stem: file for file in sorted(READY.glob("*.pt"))}
    if not path.exists():
        if str(model) not in ready:
            near = difflib.get_close_matches(str(model), ready, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"--model {model}: no such file or folder, and no ready model; {hint}ready models: {', '.join(ready) or 'none'}"
            )
        path = ready[str(model)]
    if path.suffix != ".pt":
        return load(path, device, dtype)
    network, schedule, about = load_model(path, device, ClassUNet)
    return of_classes(network, schedule, about["size"])


def read(path: Path, size: int, channels: int) -> Tensor:
    """A file of any mode and size -> its middle, (1, channels, size, size) in [-1, 1]."""
    try:
        image = from_bytes(read_picture(path, size))
    except Exception as error:  # Pillow raises nearly anything on a broken file
        raise ValueError(f"{path}: expected a picture ({error})") from error
    return (image if channels == 3 else image.mean(dim=0, keepdim=True))[None]


if __name__ == "__main__":
    with errors_in_one_sentence():
        main()
