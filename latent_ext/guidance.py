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
    """predict_noise(x_t, t, context) -> predict_noise(x_t, t), which `sample` needs. math.md (18)

    context (B, ...): the condition of each image. null_context (1 or B, ...): what stood in its
    place where training dropped it, or what an image must not be (a negative prompt).
    guidance_scale 1 is no guidance, 0 ignores the condition; w of Ho & Salimans 2021, eq. 6, is
    guidance_scale - 1.
    """
    null_context = null_context.expand_as(context)
    if guidance_scale in (0, 1):  # one of the two answers is the result: half the work
        return lambda x, t: predict_noise(x, t, context if guidance_scale else null_context)
    both = torch.cat([null_context, context])

    def guided_noise(x: Tensor, t: Tensor) -> Tensor:
        noise = predict_noise(torch.cat([x, x]), torch.cat([t, t]), both)  # in one call
        unconditional, conditional = noise.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return guided_noise


class LabelEmbedding(nn.ModuleList):
    """labels (B, questions) long -> context (B, questions, width): one token per question."""

    def forward(self, labels: Tensor) -> Tensor:
        tokens = [embed(label) for embed, label in zip(self, labels.T, strict=True)]
        return torch.stack(tokens, dim=1)


class ClassUNet(nn.Module):
    """A class-conditional U-Net: x_t, t, labels (B, questions) long -> noise, or v, like x_t.

    classes: {"digit": ("0", "1", ...)} or {"fur": ("black", ...), "eyes": (...), ...}. Each of
    these questions is one token of the context. Label 0 leaves it open; label k + 1 is answer k.
    """

    def __init__(self, classes: dict[str, Sequence[str]], context_width: int = 64, **unet: object):
        super().__init__()
        attention = partial(SpatialTransformer, context_width=context_width)
        self.unet = UNet(**unet, attention_block=attention)
        self.classes = {question: list(answers) for question, answers in classes.items()}
        self.config = self.unet.config | {"context_width": context_width, "classes": self.classes}
        self.label_embedding = LabelEmbedding(
            [nn.Embedding(len(answers) + 1, context_width) for answers in classes.values()]
        )

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            labels = torch.zeros(len(x), len(self.classes), dtype=torch.long, device=x.device)
        return self.unet(x, t, self.label_embedding(labels))


def parse_labels(prompt: str, classes: dict[str, Sequence[str]]) -> list[int]:
    """ "7" -> [8]; "orange fur, green eyes" -> [4, 0, 1, 0]: one label per question, 0 for open.

    Answers are separated by commas. An answer that several questions share needs its question.
    """
    labels = dict.fromkeys(classes, 0)
    for piece in filter(None, map(str.strip, prompt.split(","))):
        found = [
            (question, label)
            for question, answers in classes.items()
            for label, answer in enumerate(answers, start=1)
            if piece.lower() in (answer.lower(), f"{answer} {question}".lower())
        ]
        shown = textwrap.shorten(piece, 60)
        if len(found) > 1:
            options = " or ".join(f"'{piece} {question}'" for question, _ in found)
            raise UserError(f"{shown!r}: expected {options}: each of them has this answer")
        if not found:
            known = "; ".join(f"{name}: {', '.join(answers)}" for name, answers in classes.items())
            raise UserError(f"{shown!r}: this model has no such class. Its classes: {known}")
        question, label = found[0]
        if labels[question]:
            raise UserError(f"expected one answer for {question}, got a second one: {shown!r}")
        labels[question] = label
    return list(labels.values())
