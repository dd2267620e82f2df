"""What the second evening's trainings do to data before they begin."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from latent_ext.vae import VAE
from toolbox.data import Data, from_bytes


def left_out(labels: Tensor) -> Tensor:
    """One in seven of the drawn cats' combinations of attributes: nobody trains on them, so that one can ask for the unseen.

    Every single attribute, and every two of them, are still seen.
    """
    return labels.sum(dim=1) % 8 == 4


def select(data: Data, wanted: Tensor) -> Data:
    captions = [
        caption for caption, keep in zip(data.captions, wanted.tolist(), strict=True) if keep
    ]
    return replace(data, images=data.images[wanted], labels=data.labels[wanted], captions=captions)


def phrasings(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """All texts that the U-Net is trained with, the empty one first; and for each caption the indices of eight to choose from.

    At least half of the eight (five for the drawn cats) are the whole caption. The others are its beginning, alone or with
    one of its first two clauses ("with ...", "on ..."): nobody who asks for "an orange cat" says what is behind it.
    """
    texts, rows, known = {"": 0}, [], {}
    for caption in captions:
        if caption not in known:
            head, *clauses = re.split(r" (?=with |on )", caption)
            said = [caption]
            for kept in range(
                2 ** min(len(clauses), 2) - 1
            ):  # its binary digits say which clauses stay
                said.append(
                    " ".join([head, *(clause for i, clause in enumerate(clauses) if kept >> i & 1)])
                )
            known[caption] = [
                texts.setdefault(said[i % len(said) if i >= 4 else 0], len(texts)) for i in range(8)
            ]
        rows.append(known[caption])
    return list(texts), torch.tensor(rows)


@dataclass(frozen=True)
class Latents(Data):
    """Pictures as a VAE has encoded them, times its scale: images (N, C, h, w) float, and those of the mirrored pictures."""

    mirrored: Tensor | None = None

    def batch(self, chosen: Tensor, mirrored: Tensor) -> Tensor:
        return torch.where(
            mirrored[:, None, None, None], self.mirrored[chosen], self.images[chosen]
        )


@torch.no_grad()
def encode(vae: VAE, data: Data) -> Latents:
    """All pictures, once, so that the U-Net's training need not; and sets vae.scale by what comes out.

    Of each picture the mean of its latents: their spread is far smaller than what the decoder notices.
    """
    device = next(vae.parameters()).device
    means: dict[bool, list[Tensor]] = {False: [], True: []}
    for images in tqdm(data.images.split(64), desc="encoding pictures", leave=False):
        for flip in means:
            x = from_bytes(images.flip(-1) if flip else images).to(device)
            means[flip].append(vae.encode(x)[0].cpu())
    images, mirrored = torch.cat(means[False]), torch.cat(means[True])
    vae.scale = 1 / images.std().item()  # Rombach et al. 2022, appendix G
    return Latents(
        data.name,
        images * vae.scale,
        data.classes,
        data.labels,
        data.captions,
        data.mirror,
        mirrored * vae.scale,
    )
