"""Does it draw what one asks for? `python -m latent_ext.evaluate` lets the classifier of evaluate.py read the pictures.

Of drawn cats, half of the prompts ask for combinations of attributes that no training has seen. Each guidance scale draws
from the same prompts and the same noise.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from evaluate import distances
from latent_ext.clip import Tokenizer
from latent_ext.data import left_out
from latent_ext.generate import default_model, find
from latent_ext.pipeline import Pipeline, text_to_image
from latent_ext.train import psnr
from toolbox.data import Data, from_bytes, load_data, to_bytes
from toolbox.files import check_number, errors_in_one_sentence
from toolbox.metrics import FeatureNet, Inception, feature_net, some
from toolbox.run import pick_device

GUIDANCE = (1.0, 2.0, 3.0, 5.0, 7.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="as for latent_ext.generate")
    parser.add_argument(
        "--data", default="cats", help="what it was trained on: drawn cats, or data with classes"
    )
    parser.add_argument("--n", type=int, default=200, help="prompts")
    parser.add_argument("--steps", type=int, default=50, help="network calls for each picture")
    parser.add_argument(
        "--eta", type=float, default=1.0, help="fresh noise in each step: 1 is DDPM, 0 is DDIM"
    )
    parser.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        default=GUIDANCE,
        help="scales to compare; 0 does not listen",
    )
    parser.add_argument(
        "--inception",
        action="store_true",
        help="FID on Inception's features, too (needs torchmetrics)",
    )
    parser.add_argument("--device", help="cpu, cuda or mps (default: the fastest there is)")
    args = parser.parse_args()
    check_number("--n", args.n, 4)  # as in evaluate.py
    check_number("--eta", args.eta, 0, 1)
    for scale in args.guidance:
        check_number("--guidance", scale, 0)
    pipeline = find(args.model or default_model(), pick_device(args.device))
    pipeline.walk(args.steps)  # before the work, not after it: are there so many steps?
    inception = Inception() if args.inception else None
    held_out = load_data(args.data, pipeline.size, held_out=True)
    if not held_out.classes:
        raise ValueError(
            f"--data {args.data}: its pictures have no classes, so nobody knows what is right"
        )
    data = load_data(
        args.data
    )  # of its own size: the classifier is shown all pictures at that size
    classifier, size = feature_net(data), data.size

    if pipeline.vae.factor > 1:
        with torch.no_grad():
            x0 = from_bytes(some(held_out.images, 256)).to(pipeline.device)
            x = torch.cat(
                [pipeline.vae.decode(pipeline.vae.encode(part)[0]) for part in x0.split(32)]
            )
        print(
            f"VAE       PSNR {psnr(x, x0):.1f} dB: 256 held-out pictures, encoded and decoded again"
        )
    exact = 100 * (answers(classifier, held_out.images, size) == held_out.labels).float().mean(0)
    told = ", ".join(
        f"{name} {share:.1f}" for name, share in zip(held_out.classes, exact.tolist(), strict=True)
    )
    print(f"judge     of 100 held-out pictures it reads right: {told}")

    prompts, labels, unseen = ask(held_out, args.n, pipeline)
    groups = {"seen": ~unseen, "unseen": unseen} if unseen.any() else {}
    groups["all"] = torch.ones(len(prompts), dtype=torch.bool)
    wide = 12 * len(groups)
    print(f"{'of 100':12}{'attributes right':>{wide}}{'whole prompts right':>{wide + 12}}")
    print(f"{'guidance':12}" + (" " * 12).join(["".join(f"{name:>12}" for name in groups)] * 2))
    for scale in args.guidance:
        pictures = draw(pipeline, prompts, scale, args)
        right = answers(classifier, pictures, size) == labels  # (n, questions)
        halves = [
            "".join(f"{100 * r[group].float().mean():12.1f}" for group in groups.values())
            for r in (right, right.all(1))
        ]
        print(f"{scale:<12}" + (" " * 12).join(halves), flush=True)
        if pipeline.size == size and not unseen.any():  # as large and as mixed as the data
            distances(pictures, classifier, data)
            if inception:
                distances(pictures, inception, data)


def ask(held_out: Data, n: int, pipeline: Pipeline) -> tuple[list[str], Tensor, Tensor]:
    """What n held-out pictures show: the prompts, their labels (n, questions), and which of them nobody trained on."""
    unseen = left_out(held_out.labels) & (held_out.name == "cats")
    half = n // 2 if unseen.any() else 0
    chosen = torch.cat(
        [some(unseen.nonzero()[:, 0], half), some((~unseen).nonzero()[:, 0], n - half)]
    )
    labels = held_out.labels[chosen]
    if isinstance(pipeline.tokenizer, Tokenizer):
        return [held_out.captions[i] for i in chosen.tolist()], labels, unseen[chosen]
    questions = held_out.classes.items()  # a model of classes: "orange fur, plain pattern, ..."
    prompts = [
        ", ".join(f"{values[k]} {name}" for k, (name, values) in zip(row, questions, strict=True))
        for row in labels.tolist()
    ]
    return prompts, labels, unseen[chosen]


def draw(pipeline: Pipeline, prompts: list[str], scale: float, args: argparse.Namespace) -> Tensor:
    """A picture for each prompt, as bytes; picture i begins with the noise of seed i."""
    pictures = []
    for chunk in tqdm(torch.arange(len(prompts)).split(50), desc=f"guidance {scale}", leave=False):
        generators = [torch.Generator().manual_seed(i) for i in chunk.tolist()]
        wanted = [prompts[i] for i in chunk.tolist()]
        how = {"steps": args.steps, "eta": args.eta, "guidance": scale, "generator": generators}
        pictures.append(to_bytes(text_to_image(pipeline, wanted, **how)).cpu())
    return torch.cat(pictures)


@torch.no_grad()
def answers(classifier: FeatureNet, images: Tensor, size: int) -> Tensor:
    """What the classifier reads in pictures (N, 3, H, W) of bytes: (N, questions)."""
    small = F.interpolate(images.float(), size, mode="area").round().to(torch.uint8)
    scores = classifier.answers(classifier.see(small))
    return torch.stack(
        [score.argmax(1) for name, score in scores.items() if name != "damage"], dim=1
    )


if __name__ == "__main__":
    with errors_in_one_sentence():
        main()
