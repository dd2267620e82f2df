"""Muon, an optimizer for weight matrices (Jordan et al. 2024): half of AdamW's steps suffice."""

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
            for w in group["params"]:
                average = self.state[w].setdefault("average", torch.zeros_like(w))
                average.lerp_(w.grad, 1 - momentum)
                ahead = w.grad.lerp(average, momentum).flatten(1)  # Nesterov's momentum
                # Its numbers are about 1 / sqrt(the longer side); AdamW's steps are usually about
                # 0.2 times the learning rate (Liu et al. 2025).
                update = orthogonal(ahead) * (0.2 * max(ahead.shape) ** 0.5)
                w.mul_(1 - lr * decay).sub_(update.view_as(w), alpha=lr)


def orthogonal(matrix: Tensor, rounds: int = 3) -> Tensor:
    """The same left and right singular vectors, but singular values near 1 (0.7 .. 1.2).

    Each round (Newton-Schulz) maps every singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5,
    which in matrices is X <- P X with P = 3.4445 - 4.775 G + 2.0315 G^2 and the small G = X X'.
    Three rounds suffice for values from 1/50 of the norm on; smaller ones grow up to 41-fold.
    Inside autocast the products are in bfloat16, which changes the result by 1 to 2 %.
    """
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-12)  # no singular value is above 1
    gram = x @ x.T
    p = total = polynomial(gram)
    for _ in range(rounds - 1):
        gram = p @ gram @ p
        p = polynomial(gram)
        total = p @ total
    x = total @ x
    return x.T if len(matrix) > matrix.shape[1] else x


def polynomial(gram: Tensor) -> Tensor:
    """P = 3.4445 - 4.775 G + 2.0315 G^2, as above."""
    p = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
    p.diagonal().add_(3.4445)
    return p
