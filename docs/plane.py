"""Diffusion in the plane: `python -m docs.plane` learns two moons and draws docs/plane.png.

It uses the repository's own add_noise, sample and guided, on points (B, 2) instead of images.
"""

import argparse
import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_ext.guidance import guided
from processes import NoiseSchedule, add_noise, noise_from_v, noise_from_velocity, sample

BOTH = 2  # the empty label; 0 is the upper moon, 1 the lower


def two_moons(n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Points (n, 2) of about unit size, and the moon of each (n,)."""
    moon = torch.randint(2, (n,), generator=generator)
    angle = torch.rand(n, generator=generator) * torch.pi
    side = 1 - 2 * moon  # the lower moon is the upper one, turned and moved
    x = torch.stack(
        [side * angle.cos() + 0.5 * (2 * moon - 1), side * angle.sin() - 0.25 * side], 1
    )
    return x + 0.06 * torch.randn(n, 2, generator=generator), moon


class MLP(nn.Module):
    """x_t (B, 2), t (B,), label (B,) -> (B, 2)."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.label = nn.Embedding(3, 16)
        widths = [2 + 8 + 16, width, width, width]
        hidden = [(nn.Linear(*pair), nn.SiLU()) for pair in itertools.pairwise(widths)]
        self.layers = nn.Sequential(*itertools.chain(*hidden), nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        waves = torch.cos(torch.pi * t[:, None] / 1000 * torch.arange(1, 9))  # slow ones suffice
        return self.layers(torch.cat([x, waves, self.label(label)], dim=1))


def train(schedule: NoiseSchedule, wrap=noise_from_v, steps: int = 3000, seed: int = 0):
    """predict_noise(x_t, t, label), trained with the plain loss; one label in ten is withheld."""
    torch.manual_seed(seed)
    predict_noise = wrap(network := MLP(), schedule)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for step in range(steps):
        x0, label = two_moons(512)
        label[torch.rand(len(label)) < 0.1] = BOTH
        t = torch.randint(schedule.T, (len(x0),))
        x_t, noise = add_noise(x0, t, schedule)
        loss = F.mse_loss(predict_noise(x_t, t, label), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.step()
    return predict_noise


def paths(predict_noise, schedule: NoiseSchedule, eta: float, n: int = 40) -> Tensor:
    """The paths of n points in 50 steps from noise to data: (51, n, 2)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, generator=generator)
    way, label = [x], torch.full((n,), BOTH)

    def on_step(x: Tensor, t_prev: int, x0: Tensor) -> Tensor:
        way.append(x)
        return x

    options = {"steps": 50, "eta": eta, "generator": generator, "on_step": on_step}
    sample(lambda x, t: predict_noise(x, t, label), x, schedule, **options)
    return torch.stack(way)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default: 3000)")
    parser.add_argument("--out", type=Path, default=Path("docs/plane.png"))
    args = parser.parse_args()
    cosine, flow = NoiseSchedule.cosine(), NoiseSchedule.flow()
    predict_noise = train(cosine, steps=args.steps)
    straight = train(flow, noise_from_velocity, steps=args.steps)

    figure, axes = plt.subplots(2, 4, figsize=(14, 7), layout="constrained")
    x0, _ = two_moons(1500, torch.Generator().manual_seed(0))
    x_t = {t: add_noise(x0, torch.full((len(x0),), t), cosine)[0] for t in (0, 150, 450)}
    for panel, t in zip(axes[0], x_t, strict=False):
        panel.scatter(*x_t[t].T, s=2, alpha=0.4, color="tab:blue")
        panel.set_title(f"add_noise, t = {t}: alpha_bar = {cosine.alpha_bar[t]:.2f}")

    grid = torch.cartesian_prod(*[torch.linspace(-1.9, 1.9, 18)] * 2)
    t, upper = torch.full((len(grid),), 150), torch.zeros(len(grid), dtype=torch.long)
    with torch.no_grad():
        unconditional, conditional = (predict_noise(grid, t, upper + k) for k in (BOTH, 0))
        strong = guided(predict_noise, upper, upper + BOTH, 3.0)(grid, t)
    axes[0, 3].scatter(*x_t[150].T, s=2, alpha=0.3, color="tab:blue")
    axes[0, 3].quiver(*grid.T, *-unconditional.T, angles="xy", scale=60, width=0.004)
    axes[0, 3].set_title("minus the predicted noise, t = 150")

    ways = [
        (predict_noise, cosine, 0.0, 40, "eta = 0: smooth curves (ODE)"),
        (predict_noise, cosine, 1.0, 4, "eta = 1: random walks (SDE)"),
        (straight, flow, 0.0, 40, "flow matching, eta = 0"),
    ]
    for panel, (model, schedule, eta, lines, title) in zip(axes[1], ways, strict=False):
        way = paths(model, schedule, eta)
        if schedule.name == "flow":  # undo the scaling to variance 1: z = (1 - s) x0 + s noise
            s = torch.linspace(1, 0, len(way))[:, None, None]
            way = way * ((1 - s) ** 2 + s**2).sqrt()
        panel.scatter(*x0.T, s=1, alpha=0.15, color="tab:blue")
        panel.plot(way[:, :lines, 0], way[:, :lines, 1], color="grey", linewidth=0.7)
        panel.scatter(*way[0, :lines].T, s=10, color="tab:orange", label="noise")
        panel.scatter(*way[-1].T, s=10, color="tab:blue", label="samples")
        panel.set_title(title)
        panel.legend(loc="upper right")

    axes[1, 3].scatter(*x0.T, s=1, alpha=0.15, color="tab:blue")
    arrows = {"unconditional": unconditional, "upper moon": conditional, "guidance_scale 3": strong}
    for (name, noise), colour in zip(arrows.items(), ("grey", "tab:blue", "tab:red"), strict=True):
        one = (grid.abs() < 1.6).all(dim=1) & (torch.arange(len(grid)) % 2 == 0)
        style = {"angles": "xy", "scale": 50, "width": 0.005, "color": colour, "label": name}
        axes[1, 3].quiver(*grid[one].T, *-noise[one].T, **style)
    axes[1, 3].set_title("guidance as arrows, t = 150")
    axes[1, 3].legend(loc="upper right")
    for panel in axes.flat:
        panel.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[], aspect="equal")
    figure.savefig(args.out, dpi=90)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
