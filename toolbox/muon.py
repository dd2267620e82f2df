"""Muon, an optimizer for weight matrices (Jordan et al. 2024): half of AdamW's steps suffice."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Gradient descent with momentum whose steps are equally long in all directions of a matrix.

    A gradient consists mostly of a few strong directions. The weak ones, for rarer things to learn,
    would hardly move. A convolution's kernel is the matrix (c_out, c_in * height * width).
    """

    def __init__(self, weights: Iterable[Tensor], lr: float, momentum=0.95, weight_decay=0.01):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            ahead = defaultdict(list)  # by shape: one product for many matrices takes less time
            for w in group["params"]:
                average = self.state[w].setdefault("average", torch.zeros_like(w))
                average.lerp_(w.grad, 1 - momentum)
                nesterov = w.grad.lerp(average, momentum).flatten(1)
                ahead[nesterov.shape].append((w, nesterov))
            for (rows, columns), pairs in ahead.items():
                weights, matrices = zip(*pairs, strict=True)
                # Its numbers are about 1 / sqrt(the longer side); AdamW's steps are usually about
                # 0.2 times the learning rate (Liu et al. 2025).
                updates = orthogonal(torch.stack(matrices)) * (0.2 * max(rows, columns) ** 0.5)
                for w, update in zip(weights, updates, strict=True):
                    w.mul_(1 - lr * decay).sub_(update.view_as(w), alpha=lr)


def orthogonal(matrices: Tensor, rounds: int = 3) -> Tensor:
    """(..., rows, columns): the same singular vectors, but singular values near 1 (0.7 .. 1.2).

    Each round (Newton-Schulz) maps every singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5,
    which in matrices is X <- P X with P = 3.4445 - 4.775 G + 2.0315 G^2 and the small G = X X'.
    Three rounds suffice for values from 1/50 of the norm on; smaller ones grow up to 41-fold.
    Inside autocast the products are in bfloat16, which changes the result by 1 to 2 %.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)  # no singular value is above 1
    gram = x @ x.mT
    p = total = polynomial(gram)
    for _ in range(rounds - 1):
        gram = p @ gram @ p
        p = polynomial(gram)
        total = p @ total
    x = total @ x
    return x.mT if tall else x


def polynomial(gram: Tensor) -> Tensor:
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return 3.4445 * one - 4.775 * gram + 2.0315 * gram @ gram
