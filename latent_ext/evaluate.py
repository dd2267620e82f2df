"""Does it draw what a prompt says? `python -m latent_ext.evaluate`: a classifier reads the images.

Half of the prompts for drawn cats ask for combinations of attributes that no training has seen.
Each guidance scale draws the same prompts from the same noise.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from evaluate import report_distances
from latent_ext.data import held_out_combination
from latent_ext.generate import default_model, load_pipeline
from latent_ext.pipeline import Pipeline, text_to_image
from latent_ext.train_vae import psnr, reconstruct
from toolbox.data import Data, from_uint8, load_data, to_uint8
from toolbox.device import pick_device
from toolbox.files import UserError, check_number, user_errors
from toolbox.metrics import FeatureNet, evenly_spaced, feature_net
from toolbox.seeds import generators

GUIDANCE = (1.0, 2.0, 3.0, 5.0, 7.5)
BATCH = 50  # images that go through the network together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="as for latent_ext.generate")
    add("--data", default="cats", help="the model's training data; needs classes (default: cats)")
    add("--n", type=int, default=200, help="how many prompts (default: 200)")
    add("--steps", type=int, default=50, help="network calls per image (default: 50)")
    add("--eta", type=float, default=1.0, help="fresh noise: 1 DDPM, 0 DDIM (default: 1)")
    add("--guidance", type=float, nargs="+", default=GUIDANCE, help="scales (default: 1 2 3 5 7.5)")
    add("--device", help="cpu, cuda or mps (default: the fastest available)")
    args = parser.parse_args()
    check_number("--n", args.n, 4)  # as in evaluate.py
    check_number("--eta", args.eta, 0, 1)
    for scale in args.guidance:
        check_number("--guidance", scale, 0, 100)
    pipeline = load_pipeline(args.model or default_model(), pick_device(args.device))
    pipeline.timesteps(args.steps)  # refuses too many
    held_out = load_data(args.data, pipeline.size, held_out=True)
    if not held_out.classes:
        raise UserError(f"--data {args.data}: this data has no classes to compare the images with")
    data = load_data(args.data)  # the classifier sees all images at the data's own size
    classifier = feature_net(data)  # first: it may have to be trained

    if pipeline.vae:
        x0 = from_uint8(evenly_spaced(held_out.images, 256)).to(pipeline.weight.device)
        print(f"VAE       PSNR {psnr(reconstruct(pipeline.vae, x0), x0):.1f} dB on held-out images")
    right = read_labels(classifier, held_out.images, data.size) == held_out.labels
    shares = zip(held_out.classes, right.float().mean(0).tolist(), strict=True)
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares)
    print(f"judge     reads held-out images right: {shares}")

    prompts, labels, unseen = choose_prompts(held_out, args.n, by_class=pipeline.vae is None)
    groups = {"all": torch.ones_like(unseen)}
    if unseen.any():
        groups = {"seen": ~unseen, "unseen": unseen} | groups
    print(f"{'guidance':12}{'prompts':12}{'attributes right':>18}{'all of a prompt right':>24}")
    for scale in args.guidance:
        options = {"steps": args.steps, "eta": args.eta, "guidance_scale": scale}
        images = draw(pipeline, prompts, **options)
        right = read_labels(classifier, images, data.size) == labels  # (n, attributes)
        for name, group in groups.items():
            each, whole = (100 * x[group].float().mean() for x in (right, right.all(1)))
            print(f"{scale:<12}{name:12}{each:16.1f} %{whole:22.1f} %", flush=True)
        if pipeline.size == data.size and not unseen.any():  # as large and as mixed as the data
            report_distances(images, classifier, data)


def choose_prompts(held_out: Data, n: int, by_class: bool) -> tuple[list[str], Tensor, Tensor]:
    """Prompts for what n held-out images show, their labels (n, attributes), and which are unseen.

    by_class: "orange fur, plain pattern" rather than a caption.
    """
    unseen = held_out_combination(held_out.labels) & (held_out.name == "cats")  # (N,)
    half = n // 2 if unseen.any() else 0
    picked = (evenly_spaced(unseen.nonzero(), half), evenly_spaced((~unseen).nonzero(), n - half))
    picked = torch.cat(picked)[:, 0]
    prompts, labels = [], held_out.labels[picked]
    for i, row in zip(picked.tolist(), labels.tolist(), strict=True):
        chosen = zip(row, held_out.classes.items(), strict=True)
        named = [f"{values[k]} {attribute}" for k, (attribute, values) in chosen]
        prompts.append(", ".join(named) if by_class else held_out.captions[i])
    return prompts, labels, unseen[picked]


def draw(pipeline: Pipeline, prompts: list[str], **options: object) -> Tensor:
    """An image for each prompt, uint8 (n, C, H, W); image i has the seed i."""
    images = []
    for seeds in tqdm(torch.arange(len(prompts)).split(BATCH), desc="drawing", leave=False):
        texts = [prompts[seed] for seed in seeds]
        x = text_to_image(pipeline, texts, generator=generators(seeds.tolist()), **options)
        images.append(to_uint8(x).cpu())
    return torch.cat(images)


@torch.no_grad()
def read_labels(classifier: FeatureNet, images: Tensor, size: int) -> Tensor:
    """The labels (N, attributes) that the classifier reads, at its own size, in uint8 images."""
    images = F.interpolate(images.float(), size, mode="area").round().to(torch.uint8)
    logits = classifier.answers(classifier.extract_features(images))
    return torch.stack([x.argmax(1) for name, x in logits.items() if name != "corruption"], dim=1)


if __name__ == "__main__":
    with user_errors():
        main()
