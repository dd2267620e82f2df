"""What the trainings of the second evening do with the data before they begin."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor
from tqdm import tqdm

from latent_ext.vae import VAE
from toolbox.data import Data, evenly_spaced, from_uint8

VARIANTS = 8  # of each caption


def held_out_combination(labels: Tensor) -> Tensor:
    """(N, attributes) -> (N,) bool: one in seven combinations of the drawn cats' attributes.

    No training sees these combinations, so a prompt can ask for something new. Training does see
    every value and every pair of values.
    """
    return labels.sum(dim=1) % 8 == 4


def select(data: Data, mask: Tensor) -> Data:
    captions = [caption for caption, keep in zip(data.captions, mask.tolist(), strict=True) if keep]
    return replace(data, images=data.images[mask], labels=data.labels[mask], captions=captions)


def preview_indices(data: "Data | Latents") -> Tensor:
    """Indices of 36 evenly spaced images."""
    return evenly_spaced(torch.arange(len(data.images)), 36)


def unique_captions(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct captions, and the index of each image's caption, (N,)."""
    index = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    return list(index), torch.tensor([index[caption] for caption in captions])


def caption_variants(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """The captions that the U-Net is trained with, "" first; each image's indices (N, VARIANTS).

    At least half of an image's variants are its whole caption. The others leave out some of the
    first two clauses ("with ...", "on ..."), so "an orange cat" may get any background.
    """
    texts, rows = {"": 0}, {}
    for caption in dict.fromkeys(captions):
        head, *clauses = re.split(r" (?=with |on )", caption)[:3]
        variants = [caption]
        for kept in range(len(clauses)):
            variants += [" ".join([head, *some]) for some in combinations(clauses, kept)]
        half = VARIANTS // 2
        variants = [caption] * half + [variants[i % len(variants)] for i in range(half)]
        rows[caption] = [texts.setdefault(variant, len(texts)) for variant in variants]
    return list(texts), torch.tensor([rows[caption] for caption in captions])


@dataclass(frozen=True)
class Latents:
    """The latents of Data, for a Run: float32, scaled to a standard deviation of 1."""

    name: str
    images: Tensor  # (N, c, h, w)
    flipped: Tensor  # latents of the flipped images, which are not the flipped latents
    scaling_factor: float
    hflip: bool
    checksum: str  # of Data: latents differ a little between machines

    def batch(self, indices: Tensor, flipped: Tensor) -> Tensor:
        flipped = flipped[:, None, None, None]
        return torch.where(flipped, self.flipped[indices], self.images[indices])


@torch.no_grad()
def encode_data(vae: VAE, data: Data) -> Latents:
    """Encode each image once, so that the U-Net's training need not.

    It keeps the mean of the latents: the decoder would not notice their standard deviation.
    """
    device = next(vae.parameters()).device
    means: dict[bool, list[Tensor]] = {False: [], True: []}
    for images in tqdm(data.images.split(64), desc="encoding images", leave=False):
        for flip in means:
            x0 = from_uint8(images.flip(-1) if flip else images)
            means[flip].append(vae.encode(x0.to(device))[0].cpu())
    images, flipped = torch.cat(means[False]), torch.cat(means[True])
    scale = 1 / images.std().item()  # Rombach et al. 2022, appendix G
    return Latents(data.name, images * scale, flipped * scale, scale, data.hflip, data.checksum)
