"""A network that is told what to draw, and classifier-free guidance, which makes it listen."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from latent_ext.attention import SpatialTransformer
from unet import UNet


class Answers(nn.ModuleList):
    """Labels (B, questions) long -> context (B, questions, width): an embedding for each question, a token for each answer."""

    def forward(self, labels: Tensor) -> Tensor:
        return torch.stack([embed(label) for embed, label in zip(self, labels.T, strict=True)], dim=1)


class ClassUNet(nn.Module):
    """A U-Net that is told the classes of its picture: x_t, t, labels (B, questions) long -> noise, the shape of x_t.

    classes: {"digit": ("0", "1", ...)} or {"fur": ("black", ...), "eyes": (...), ...}. Each of these questions is one token of
    the context. Label 0 says nothing of it, label k + 1 names its answer k.
    """

    def __init__(self, classes: dict[str, Sequence[str]], context_width: int = 64, **unet: object):
        super().__init__()
        self.unet = UNet(**unet, context_width=context_width, attention_block=SpatialTransformer)
        self.config = self.unet.config | {"classes": {name: list(answers) for name, answers in classes.items()}}
        self.answers = Answers([nn.Embedding(len(answers) + 1, context_width) for answers in classes.values()])

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            labels = torch.zeros(len(x), len(self.answers), dtype=torch.long, device=x.device)
        return self.unet(x, t, self.answers(labels))


def labels_of(prompt: str, classes: dict[str, Sequence[str]]) -> list[int]:
    """ "7" -> [8]; "orange fur, green eyes" -> [4, 0, 1, 0]: the label of each question, 0 where the prompt says nothing.

    Between commas stands an answer, and after it its question's name where several questions have that answer.
    """
    labels = dict.fromkeys(classes, 0)
    for piece in filter(None, (piece.strip() for piece in prompt.split(","))):
        fits = [
            (name, answers.index(answer))
            for name, answers in classes.items()
            for answer in answers
            if piece.lower() in (answer.lower(), f"{answer} {name}".lower())
        ]
        if len(fits) != 1:
            known = "; ".join(f"{name}: {', '.join(answers)}" for name, answers in classes.items())
            meant = " or ".join(f"{piece!r} + {name}" for name, _ in fits)
            why = f"expected {meant}, all of them know it" if fits else "this model has no such class"
            raise ValueError(f"{piece!r}: {why}. Its classes: {known} (several: between commas)")
        name, answer = fits[0]
        if labels[name]:
            raise ValueError(f"{prompt!r}: expected one answer for {name}, got two")
        labels[name] = 1 + answer
    return list(labels.values())


def guided(
    predict_noise: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor, null_context: Tensor, scale: float = 1.0
) -> Callable[[Tensor, Tensor], Tensor]:
    """A predict_noise(x_t, t) for `sample` (Ho & Salimans 2021, eq. 6): nothing + scale * (condition - nothing). math.md (18)

    context (B, ...): what each image shall be; null_context (1 or B, ...): what the network was told where training left
    the condition out, or what an image shall *not* be. scale 1 is no guidance, and 0 ignores the condition; that paper's
    own w is scale - 1.
    """
    null_context = null_context.expand_as(context)
    if scale in (0, 1):  # one of the two answers is all of it: half the work
        return lambda x, t: predict_noise(x, t, context if scale else null_context)
    both = torch.cat([null_context, context])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        nothing, condition = predict_noise(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return nothing + scale * (condition - nothing)

    return predict
