"""Does it draw what one asks for? `python -m latent_ext.evaluate` lets the classifier of evaluate.py read the cats.

It reads fur, pattern, eyes and background of each picture. Half of the prompts ask for combinations of them that no
training has seen, and each guidance scale draws from the same prompts and the same noise.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from latent_ext.data import left_out
from latent_ext.generate import default_model, find
from latent_ext.pipeline import Pipeline, text_to_image
from latent_ext.train import psnr
from toolbox.cats import ATTRIBUTES
from toolbox.data import SIZES, Data, from_bytes, load_data, to_bytes
from toolbox.files import check_number, errors_in_one_sentence
from toolbox.metrics import FeatureNet, feature_net
from toolbox.run import pick_device

GUIDANCE = (1.0, 2.0, 3.0, 5.0, 7.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="as for latent_ext.generate")
    parser.add_argument("--n", type=int, default=200, help="prompts; every other one asks for an unseen combination")
    parser.add_argument("--steps", type=int, default=50, help="network calls for each picture")
    parser.add_argument("--eta", type=float, default=1.0, help="fresh noise in each step: 1 is DDPM, 0 is DDIM")
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE, help="the scales to compare")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the fastest there is)")
    args = parser.parse_args()
    check_number("--n", args.n, 2)
    pipeline = find(args.model or default_model()).to(pick_device(args.device), torch.float32)
    held_out = load_data("cats", pipeline.size, held_out=True)
    classifier = feature_net(load_data("cats"))  # of 32 pixels: it is shown the pictures at that size

    with torch.no_grad():
        x0 = from_bytes(held_out.images[:256]).to(pipeline.device)
        x = torch.cat([pipeline.vae.decode(pipeline.vae.encode(some)[0]) for some in x0.split(32)])
    print(f"VAE       PSNR {psnr(x, x0):.1f} dB, 256 held-out drawings encoded and decoded again")
    read = answers(classifier, held_out.images)
    exact = 100 * (read == held_out.labels).float().mean(0)
    print(
        "judge     reads held-out drawings right: " + ", ".join(f"{a} {e:.1f}" for a, e in zip(ATTRIBUTES, exact, strict=True))
    )

    prompts, labels, unseen = ask(held_out, args.n)
    print(f"{'':12}{'attributes right':>24}{'whole prompts right':>32}")
    print(f"{'guidance':12}{'seen':>12}{'unseen':>12}{'all':>12}{'seen':>12}{'unseen':>12}{'all':>12}   of 100")
    for scale in args.guidance:
        right = answers(classifier, draw(pipeline, prompts, scale, args)) == labels  # (n, attributes)
        shares = [share for r in (right, right.all(1)) for share in (r[~unseen], r[unseen], r)]
        print(f"{scale:<12}" + "".join(f"{100 * share.float().mean():12.1f}" for share in shares), flush=True)


def ask(held_out: Data, n: int) -> tuple[list[str], Tensor, Tensor]:
    """Captions of n held-out drawings: the prompts, their labels (n, attributes), and which of them nobody trained on."""
    unseen = left_out(held_out.labels)
    chosen = torch.cat([unseen.nonzero()[: n // 2, 0], (~unseen).nonzero()[: n - n // 2, 0]])
    return [held_out.captions[i] for i in chosen.tolist()], held_out.labels[chosen], unseen[chosen]


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
def answers(classifier: FeatureNet, images: Tensor) -> Tensor:
    """What the classifier reads in pictures (N, 3, H, W) of bytes: (N, attributes)."""
    small = F.interpolate(images.float(), SIZES["cats"], mode="area").round().to(torch.uint8)
    scores = classifier.answers(classifier.see(small))
    return torch.stack([scores[name].argmax(1) for name in ATTRIBUTES], dim=1)


if __name__ == "__main__":
    with errors_in_one_sentence():
        main()
