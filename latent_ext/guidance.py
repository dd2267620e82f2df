"""Class-conditional networks, and classifier-free guidance, which strengthens a condition."""

import textwrap
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from latent_ext.attention import SpatialTransformer
from processes import Network
from toolbox.files import UserError
from unet import UNet


def guided(
    predict_noise: Network, context: Tensor, null_context: Tensor, guidance_scale: float = 1.0
) -> Network:
    """Turn predict_noise(x_t, t, context) into the predict_noise(x_t, t) that `sample` needs.

    context (B, ...): the condition of each image. null_context (1 or B, ...): the empty condition
    of training, or what an image must not show (a negative prompt). guidance_scale: 1 uses only
    context, 0 only null_context. In Ho & Salimans 2021, eq. 6, w is guidance_scale - 1. The
    equation is math.md (18).
    """
    null_context = null_context.expand_as(context)
    if guidance_scale in (0, 1):  # one prediction suffices: half the work
        return lambda x, t: predict_noise(x, t, context if guidance_scale else null_context)
    both = torch.cat([null_context, context])

    def guided_noise(x: Tensor, t: Tensor) -> Tensor:
        noise = predict_noise(torch.cat([x, x]), torch.cat([t, t]), both)  # in one call
        unconditional, conditional = noise.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return guided_noise


class LabelEmbedding(nn.ModuleList):
    """labels (B, attributes) long -> context (B, attributes, width): one token per attribute."""

    def forward(self, labels: Tensor) -> Tensor:
        tokens = [embed(label) for embed, label in zip(self, labels.T, strict=True)]
        return torch.stack(tokens, dim=1)


class ClassUNet(nn.Module):
    """A class-conditional U-Net: x_t, t, labels (B, attributes) long -> noise, or v, like x_t.

    classes: {"digit": ("0", "1", ...)} or {"fur": ("black", ...), "eyes": (...), ...}. Each
    attribute is one token of the context. Label 0 leaves it open; label k + 1 is value k.
    """

    def __init__(self, classes: dict[str, Sequence[str]], context_width: int = 64, **unet: object):
        super().__init__()
        attention = partial(SpatialTransformer, context_width=context_width)
        self.unet = UNet(**unet, attention_block=attention)
        self.classes = {attribute: list(values) for attribute, values in classes.items()}
        self.config = self.unet.config | {"context_width": context_width, "classes": self.classes}
        self.label_embedding = LabelEmbedding(
            [nn.Embedding(len(values) + 1, context_width) for values in classes.values()]
        )

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            labels = torch.zeros(len(x), len(self.classes), dtype=torch.long, device=x.device)
        return self.unet(x, t, self.label_embedding(labels))


def parse_labels(prompt: str, classes: dict[str, Sequence[str]]) -> list[int]:
    """ "7" -> [8]; "orange fur, green eyes" -> [4, 0, 1, 0]: one label per attribute, 0 for open.

    Commas separate values. A value that several attributes share needs its attribute's name.
    """
    labels = dict.fromkeys(classes, 0)
    for piece in filter(None, map(str.strip, prompt.split(","))):
        found = [
            (attribute, label)
            for attribute, values in classes.items()
            for label, value in enumerate(values, start=1)
            if piece.lower() in (value.lower(), f"{value} {attribute}".lower())
        ]
        shown = textwrap.shorten(piece, 60)
        if len(found) > 1:
            options = " or ".join(f"'{piece} {attribute}'" for attribute, _ in found)
            raise UserError(f"{shown!r} is ambiguous: write {options}")
        if not found:
            known = "; ".join(f"{name}: {', '.join(values)}" for name, values in classes.items())
            raise UserError(f"this model does not know {shown!r}. It knows {known}")
        attribute, label = found[0]
        if labels[attribute]:
            raise UserError(f"two values for {attribute}; the second is {shown!r}: give one")
        labels[attribute] = label
    return list(labels.values())
