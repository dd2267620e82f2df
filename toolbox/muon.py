"""Muon, an optimizer for weight matrices (Jordan et al. 2024): here it needs half of AdamW's steps (docs/results.md)."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Gradient descent with momentum, but each step turns the matrix in all its directions equally far.

    A gradient consists mostly of a few strong directions; the weak ones, of rarer things to learn, would wait for long.
    A convolution's kernel is the matrix (c_out, c_in * height * width).
    """

    def __init__(self, weights: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for w in group["params"]:
                if w not in self.state:
                    self.state[w]["average"] = torch.zeros_like(w)
                average = self.state[w]["average"]
                average.lerp_(w.grad, 1 - momentum)
                ahead = w.grad.lerp(average, momentum).flatten(1)  # Nesterov: where the average is going
                # Its numbers are about 1 / sqrt(the longer side); 0.2 is the usual size of AdamW's (Liu et al. 2025).
                turn = orthogonal(ahead) * (0.2 * max(ahead.shape) ** 0.5)
                w.mul_(1 - lr * decay).sub_(turn.view_as(w), alpha=lr)


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The same left and right singular vectors, but all singular values near 1 (0.7 .. 1.2).

    Each round (Newton-Schulz) maps every singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5, by products of matrices
    alone: s^3 belongs to (X X') X, s^5 to (X X')^2 X. The rounds need only the small square matrix X X'.
    """
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-12)  # no singular value is above 1
    square = x @ x.T
    one = total = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(rounds):
        p = 3.4445 * one - 4.775 * square + 2.0315 * square @ square
        total, square = p @ total, p @ square @ p
    x = total @ x
    return x.T if len(matrix) > matrix.shape[1] else x
