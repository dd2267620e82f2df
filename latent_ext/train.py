"""Train the second evening: `python -m latent_ext.train all` makes a whole Stable Diffusion, from scratch.

classes: a U-Net in pixels that is told what to draw. vae, clip, unet: the three networks of Stable Diffusion, each on top
of those before; all: these three. After each look at the U-Net a folder is ready that `latent_ext.generate` draws with.
"""

import argparse
import zlib
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Rules
from torch import Tensor, nn
from tqdm import tqdm

from latent_ext.attention import SpatialTransformer
from latent_ext.clip import CLIP, ImageEncoder, TextEncoder, Tokenizer, contrast
from latent_ext.data import encode, left_out, phrasings, select
from latent_ext.guidance import ClassUNet, guided
from latent_ext.pictures import plot_similarity
from latent_ext.pipeline import Pipeline
from latent_ext.stable_diffusion import save
from latent_ext.vae import VAE, kl
from processes import NoiseSchedule, add_noise, randn, sample, v_to_noise
from toolbox.data import SIZES, Data, from_bytes, load_data
from toolbox.files import check_number, errors_in_one_sentence
from toolbox.metrics import some
from toolbox.models import card, read
from toolbox.pictures import loss_by_level, plot_training, save_grid
from toolbox.run import PROCESSES, RANK, Run, all_processes, first_process_first, pick_device
from unet import UNet

STEPS = {"classes": 2200, "vae": 4500, "clip": 300, "unet": 1800}
BATCH = {"classes": 16, "vae": 4, "clip": 64, "unet": 16}
KL_WEIGHT = 1e-6  # small: the latents shall be compact, but above all the picture
UNTOLD = 10  # one picture in so many is learned without its condition, which guidance needs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["classes", "vae", "clip", "unet", "all"])
    parser.add_argument(
        "--data", default="cats", help=f"{', '.join(SIZES)}, or a folder of pictures"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where the result goes (default: runs/DATA-classes, runs/DATA-latent)",
    )
    parser.add_argument(
        "--size", type=int, help="pixels (default: classes: the data's own; else 64)"
    )
    parser.add_argument("--steps", type=int, help=f"training steps of this part (default: {STEPS})")
    parser.add_argument("--batch", type=int, help=f"pictures in a step (default: {BATCH})")
    parser.add_argument(
        "--accumulate",
        type=int,
        default=1,
        help="classes and unet: work on a batch in so many parts",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda or mps (default: the fastest there is)")
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16"], help="(default: the faster one)"
    )
    args = parser.parse_args()
    check_number("--seed", args.seed, 0, 2**32 - 1)
    if args.part == "all" and args.steps is not None:
        raise ValueError(
            "--steps are those of one part: train vae, clip and unet one after the other"
        )
    args.device = pick_device(args.device)

    latent = args.part != "classes"
    with first_process_first():
        data = load_data(args.data, 64 if latent and args.size is None else args.size)
    if latent and data.size % 8:
        raise ValueError(
            f"--size {data.size}: expected a multiple of 8, as CLIP looks at squares of 8 x 8 pixels"
        )
    args.out = args.out or Path("runs") / f"{data.name}-{'latent' if latent else 'classes'}"
    if data.name == "cats":
        data = select(data, ~left_out(data.labels))
    if latent and not data.captions:
        raise ValueError(
            f"--data {args.data}: its pictures have no captions; write picture.txt beside picture.jpg"
        )
    if not latent and not data.classes:
        raise ValueError(
            f"--data {args.data}: its pictures have no classes; put those of each class into a folder of its own"
        )
    if args.part == "classes":
        train_classes(args, data)
    if args.part in ("vae", "all"):
        train_vae(args, data)
    if args.part in ("clip", "all"):
        train_clip(args, data)
    if args.part in ("unet", "all"):
        train_unet(args, data)


# ---- pixels, told a class ---------------------------------------------------------------------------------------------


def train_classes(args: argparse.Namespace, data: Data) -> None:
    torch.manual_seed(args.seed)
    widths = (
        32,
        64,
        96,
        128,
    )  # what listening adds is taken from the third level: as many weights as train.py's
    network = ClassUNet(
        data.classes, in_channels=data.channels, out_channels=data.channels, widths=widths
    )
    schedule = NoiseSchedule.sigmoid()
    about = card(network, schedule, data.size, data.name, list(data.classes))
    untold = torch.zeros(1, len(data.classes), dtype=torch.long)
    run = begin(args, "classes", network, data, about, [*picture_and_time(data), untold])
    predict_noise = v_to_noise(run.fast(run.network), schedule)
    for x0 in run.batches():
        t = run.randint(schedule.T)
        x_t, noise = add_noise(x0, t, schedule, run.randn_like(x0))
        labels = (data.labels[run.chosen] + 1).to(run.device)  # (B, questions)
        labels[run.randint(UNTOLD) == 0] = 0  # nothing is said of some pictures,
        for question in range(labels.shape[1] if labels.shape[1] > 1 else 0):
            labels[run.randint(UNTOLD) == 0, question] = 0  # and something less of others
        loss = F.mse_loss(predict_noise(x_t, t, labels), noise)  # math.md (7)
        run.step(loss)
        if run.pictures_due():
            show_unet(
                run,
                schedule,
                (data.labels[seen_at_looks(data)] + 1).to(run.device),
                untold.to(run.device),
            )


# ---- Stable Diffusion's three networks ---------------------------------------------------------------------------------


def train_vae(args: argparse.Namespace, data: Data) -> None:
    torch.manual_seed(args.seed)
    network = VAE(data.channels, widths=(16, 32, 64))
    latents = torch.zeros(1, 4, data.size // network.factor, data.size // network.factor)
    run = begin(
        args,
        "vae",
        network,
        data,
        {"network": network.config},
        [picture_and_time(data)[0], latents],
    )
    held_out = load_data(args.data, data.size, held_out=True)
    autoencode = run.fast(run.network)
    for x0 in run.batches():
        x, mean, logvar = autoencode(x0, run.randn_like(latents))
        loss = F.mse_loss(x.float(), x0) + KL_WEIGHT * kl(
            mean.float(), logvar.float()
        )  # math.md (16)
        run.step(loss)
        if run.pictures_due():
            x0 = from_bytes(some(held_out.images, 32)).to(run.device)
            with torch.no_grad():
                x = run.averaged.decode(run.averaged.encode(x0)[0])
            tqdm.write(
                f"step {run.k}: pictures encoded and decoded again differ by a PSNR of {psnr(x, x0):.1f} dB"
            )
            save_grid(
                torch.stack([x0, x], dim=1).flatten(0, 1), run.folder / f"pairs-{run.k:06}.png"
            )
            plot_training(run.history, {}, run.folder / "loss.png")


def train_clip(args: argparse.Namespace, data: Data) -> None:
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.of_words(data.captions)
    text = TextEncoder(tokenizer.size, width=128, layers=4, heads=4, length=tokenizer.length)
    network = CLIP(
        text,
        ImageEncoder(data.channels, data.size, patch=8, width=128, layers=4, heads=4),
        tokenizer.end,
    )
    about = {"network": text.config, "words": tokenizer.rules.to_str()}
    number = {text: i for i, text in enumerate(dict.fromkeys(data.captions))}
    tokens = tokenizer(number)  # (texts, length)
    caption = torch.tensor(
        [number[caption] for caption in data.captions]
    )  # which of the texts is each picture's
    run = begin(args, "clip", network, data, about, [picture_and_time(data)[0], tokens[:1]])
    held_out = load_data(args.data, data.size, held_out=True)
    others = min(63, len(set(held_out.captions)) - 1)
    if others < 1:
        raise ValueError(
            f"--data {args.data}: expected two different captions or more among its held-out pictures"
        )
    fit = run.fast(run.network)
    for x0 in run.batches():
        captions = caption[run.chosen]  # (B,)
        scores = fit(x0, tokens[captions].to(run.device)).float()  # (B, B)
        loss = contrast(scores, captions.to(run.device))  # math.md (17)
        run.step(loss)
        if run.pictures_due():
            found = 100 * finds(run.averaged, tokenizer, held_out, others)
            tqdm.write(
                f"step {run.k}: {found:.1f} of 100 held-out pictures fit their own caption better than {others} others"
            )
            plot_similarity(run.averaged, tokenizer, held_out, run.folder / "similarity.png")
            plot_training(run.history, {}, run.folder / "loss.png")


def train_unet(args: argparse.Namespace, data: Data) -> None:
    vae, text, tokenizer = load_parts(args.out / "training", args.device)
    texts, versions = phrasings(data.captions)
    with torch.no_grad():
        states = torch.cat(
            [text(part.to(args.device)) for part in tokenizer(texts).split(256)]
        )  # (texts, length, width)
    parts = [args.out / "training" / part / "model.pt" for part in ("vae", "clip")]
    made_of = {
        "their content": data.content,
        "vae and clip": [zlib.crc32(path.read_bytes()) for path in parts],
    }
    data = encode(
        vae, data
    )  # its last bits differ from machine to machine, so the run remembers the content of before

    torch.manual_seed(args.seed)
    network = UNet(
        data.channels,
        data.channels,
        widths=(64, 128, 160),
        attention=(False, True, False),
        heads=4,
        context_width=states.shape[2],
        attention_block=SpatialTransformer,
    )
    schedule = NoiseSchedule.cosine()
    pipeline = Pipeline(
        network, vae, text, tokenizer, schedule, data.size * vae.factor, "v_prediction", "trailing"
    )
    run = begin(
        args,
        "unet",
        network,
        data,
        {"network": network.config},
        [*picture_and_time(data), states[:1]],
        made_of,
    )
    predict_noise = v_to_noise(run.fast(run.network), schedule)
    for x0 in run.batches():
        t = run.randint(schedule.T)
        x_t, noise = add_noise(x0, t, schedule, run.randn_like(x0))
        choices = versions[run.chosen].to(run.device)  # (B, 8)
        said = choices.gather(1, run.randint(8)[:, None])[:, 0]  # (B,): which of the texts
        said[run.randint(UNTOLD) == 0] = 0  # the empty one
        loss = F.mse_loss(predict_noise(x_t, t, states[said]), noise)  # math.md (7)
        run.step(loss)
        if run.pictures_due():
            show_unet(run, schedule, states[versions[seen_at_looks(data), 0]], states[:1], vae)
            save(replace(pipeline, unet=run.averaged), args.out)
    if RANK == 0:
        save(
            replace(pipeline, unet=run.averaged), args.out
        )  # the last look may have been cut short
    print(
        f"{args.out} is a Stable Diffusion: python -m latent_ext.generate 'A TEXT' --model {args.out}"
    )


@torch.no_grad()
def finds(network: CLIP, tokenizer: Tokenizer, data: Data, others: int) -> float:
    """The share of pictures that fit their own caption better than any of so many others, drawn at random, all different."""
    device, number = (
        network.sharpness.device,
        {text: i for i, text in enumerate(dict.fromkeys(data.captions))},
    )
    images = torch.cat(
        [network.images(from_bytes(part).to(device)) for part in data.images[:512].split(64)]
    )
    fits = (images @ network.texts(tokenizer(number).to(device)).T).cpu()  # (pictures, texts)
    generator, found = torch.Generator().manual_seed(0), 0
    for fit, caption in zip(fits, data.captions, strict=False):
        own = number[caption]
        drawn = torch.randperm(len(number), generator=generator)
        found += bool((fit[own] > fit[drawn[drawn != own][:others]]).all())
    return found / len(fits)


def load_parts(folder: Path, device: torch.device) -> tuple[VAE, TextEncoder, Tokenizer]:
    """What `train vae` and `train clip` have made."""
    found = {}
    for part in ("vae", "clip"):
        path = folder / part / "model.pt"
        if not path.exists():
            raise ValueError(
                f"{path}: no such file; before the U-Net come the other two: python -m latent_ext.train {part}"
            )
        found[part] = read(path)
    vae, text = VAE(**found["vae"]["network"]), TextEncoder(**found["clip"]["network"])
    vae.load_state_dict(found["vae"]["weights"])
    tower = {
        name.removeprefix("text."): w
        for name, w in found["clip"]["weights"].items()
        if name.startswith("text.")
    }
    text.load_state_dict(tower)
    tokenizer = Tokenizer(Rules.from_str(found["clip"]["words"]), text.config["length"])
    return vae.to(device).eval(), text.to(device).eval(), tokenizer


# ---- what all of them need ---------------------------------------------------------------------------------------------


def begin(
    args: argparse.Namespace,
    part: str,
    network: nn.Module,
    data: Data,
    about: dict,
    example: list[Tensor],
    made_of: dict | None = None,
) -> Run:
    """A run, as the core's, in a folder of its own."""
    steps = STEPS[part] if args.steps is None else args.steps
    if part in ("vae", "clip") and (PROCESSES > 1 or args.accumulate > 1):
        raise ValueError(
            f"{part} is trained by one process, each batch as a whole: without torchrun and --accumulate"
        )
    run = Run(
        folder=args.out if part == "classes" else args.out / "training" / part,
        network=network,
        data=data,
        card=about,
        settings={"part": part, "pictures": len(data.images)}
        | (made_of or {"their content": data.content}),
        steps=steps,
        batch=BATCH[part] if args.batch is None else args.batch,
        seed=args.seed,
        device=args.device,
        precision=args.precision,
        accumulate=args.accumulate,
        example=example,
    )
    if run.k >= steps:
        print(f"{run.folder} holds this training, finished after {run.k} steps")
    else:
        run.announce()
    return run


def seen_at_looks(data: Data) -> Tensor:
    """The indices of 36 pictures, spread over all, since a folder of classes is sorted."""
    return some(torch.arange(len(data.images)), 36)


def picture_and_time(data: Data) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, *data.images.shape[1:]), torch.zeros(1, dtype=torch.long)


def psnr(x: Tensor, x0: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels: 20 where the error is a tenth of the way from black to white, 40: a hundredth."""
    return -10 * (x.clamp(-1, 1) / 2 - x0 / 2).square().mean().log10().item()


def show_unet(
    run: Run, schedule: NoiseSchedule, context: Tensor, nothing: Tensor, vae: VAE | None = None
) -> None:
    """What the averaged network makes of 36 pieces of noise and as many conditions; and where its loss comes from."""
    predict_noise = v_to_noise(run.fast(run.averaged), schedule)
    generators = [torch.Generator().manual_seed(i) for i in range(len(context))]
    noise = randn((len(context), *run.data.images.shape[1:]), generators, device=run.device)
    x = sample(
        guided(predict_noise, context, nothing, 3),
        noise,
        schedule,
        clip=vae is None,
        generator=generators,
    )
    with torch.no_grad():
        save_grid(
            x if vae is None else vae.decode(x / vae.scale), run.folder / f"samples-{run.k:06}.png"
        )
    x0 = run.data.batch(seen_at_looks(run.data), torch.zeros(len(context), dtype=torch.bool)).to(
        run.device
    )
    plot_training(
        run.history,
        loss_by_level(guided(predict_noise, context, nothing, 1), x0, schedule),
        run.folder / "loss.png",
    )


if __name__ == "__main__":
    with errors_in_one_sentence(), all_processes():
        main()
