"""Train CLIP: in each batch every image must find its caption, and every caption its image.

Afterwards only the text encoder is used, unchanged: its output is the U-Net's context.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from latent_ext.clip import CLIP, ImageEncoder, TextEncoder, Tokenizer, contrastive_loss
from latent_ext.data import unique_captions
from toolbox.data import Data, from_uint8, load_data
from toolbox.images import plot_training, save_plot, to_image
from train import autocast, gradient_step, start_run, update_ema

STEPS, BATCH = 300, 64
PATCH = 8  # width and height in pixels
TRANSFORMER = {"width": 128, "layers": 4, "heads": 4}  # of both encoders
OTHERS = 63  # an image's own caption is compared with so many others
PREVIEW_CALLS = 17  # cost of a preview in network calls (measured): 512 images, captions, plots


def train(args: argparse.Namespace, data: Data) -> None:
    torch.manual_seed(args.seed)  # the network's first weights
    tokenizer = Tokenizer.of_words(data.captions)
    text = TextEncoder(tokenizer.size, length=tokenizer.length, **TRANSFORMER)
    image = ImageEncoder(data.channels, data.size, PATCH, **TRANSFORMER)
    network = CLIP(text, image, tokenizer.end)
    config = {"network": text.config, "words": tokenizer.rules.to_str()}
    captions, caption_of = unique_captions(data.captions)
    tokens = tokenizer(captions)  # (captions, length)
    example = torch.zeros(1, *data.images.shape[1:]), tokens[:1]
    held_out = load_data(args.data, data.size, held_out=True)
    others = min(OTHERS, len(set(held_out.captions)) - 1)
    folder = args.out / "training" / "clip"
    run = start_run(args, folder, network, data, config, example, preview_calls=PREVIEW_CALLS)

    for x0 in run.batches():
        chosen = caption_of[run.indices]  # (B,)
        with autocast(run.device, run.precision):
            logits = run.model(x0, tokens[chosen].to(run.device))  # (B, B)
        loss = contrastive_loss(logits, chosen.to(run.device))  # math.md (17)
        gradient_step(loss, run.network, run.optimizers, run.step, run.steps, run.precision)
        update_ema(run.ema, run.network, run.step)
        run.log(loss)
        if run.preview_due():
            accuracy = 100 * retrieval_accuracy(run.ema, tokenizer, held_out, others)
            share = f"{accuracy:.1f} % of held-out images fit their own caption best"
            tqdm.write(f"step {run.step}: {share}, among {others} others")
            plot_similarity(run.ema, tokenizer, held_out, run.folder / "similarity.png")
            plot_training(run.history, {}, run.folder / "loss.png")


@torch.no_grad()
def retrieval_accuracy(network: CLIP, tokenizer: Tokenizer, data: Data, others: int) -> float:
    """The share of the first 512 images that fit their own caption better than `others` others.

    The others are drawn at random, but are always the same. Chance: 1 / (1 + others).
    """
    device = network.logit_scale.device
    captions, caption_of = unique_captions(data.captions)
    images = from_uint8(data.images[:512]).split(64)
    images = torch.cat([network.encode_image(x0.to(device)) for x0 in images])
    cosines = (images @ network.encode_text(tokenizer(captions).to(device)).T).cpu()
    generator, correct = torch.Generator().manual_seed(0), 0
    for cosine, own in zip(cosines, caption_of.tolist(), strict=False):
        drawn = torch.randperm(len(captions), generator=generator)
        correct += bool((cosine[own] > cosine[drawn[drawn != own][:others]]).all())
    return correct / len(images)


@torch.no_grad()
def plot_similarity(network: CLIP, tokenizer: Tokenizer, data: Data, path: Path) -> None:
    """The cosine of each of ten images with the caption of each: large on the diagonal."""
    captions, caption_of = unique_captions(data.captions)
    captions, device = captions[:10], network.logit_scale.device
    images = torch.stack([data.images[caption_of == i][0] for i in range(len(captions))])
    images = from_uint8(images).to(device)
    texts = network.encode_text(tokenizer(captions).to(device))
    cosines = (texts @ network.encode_image(images).T).cpu().numpy()  # (captions, images)
    figure, axes = plt.subplots(figsize=(8.5, 5.5), layout="constrained")
    strip = to_image(torch.cat([*images], dim=2))
    axes.imshow(strip, extent=(-0.5, len(captions) - 0.5, -0.6, -1.6), cmap="gray")
    shown = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu", aspect="auto")
    figure.colorbar(shown, label="cosine")
    axes.set(ylim=(len(captions) - 0.5, -1.6), xticks=[])
    axes.set_yticks(range(len(captions)), captions, fontsize=8)
    save_plot(figure, path)
