"""Pictures of pictures: a grid, a GIF, the plots of a training."""

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from processes import NoiseSchedule, add_noise
from toolbox.data import to_bytes
from toolbox.files import whole_file

matplotlib.use("Agg")  # draw into files, no window
import matplotlib.pyplot as plt

SMALLEST = 96  # pixels: the pictures of a grid are enlarged to at least this, by a whole number


def to_image(picture: Tensor) -> Image.Image:
    """(C, H, W) in [-1, 1], one channel or three -> an image of Pillow's."""
    pixels = to_bytes(picture.cpu()).permute(1, 2, 0)
    return Image.fromarray((pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).numpy())


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """(N, C, H, W) in [-1, 1] -> one picture, about as wide as high; small images are enlarged by whole pixels."""
    images = F.interpolate(images, scale_factor=-(-SMALLEST // images.shape[-1]))
    columns = columns or math.ceil(math.sqrt(len(images)))
    return to_image(make_grid(images.cpu(), nrow=columns, padding=2, pad_value=1.0))


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    save(grid(images, columns), path)


def save(image: Image.Image, path: Path) -> None:
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG")


def save_gif(frames: list[Image.Image], path: Path, seconds: float = 4.0, hold: float = 2.0) -> None:
    """The frames play in `seconds`, the last one stays for `hold`; then it begins anew."""
    durations = [max(20, int(1000 * seconds / len(frames)))] * (len(frames) - 1) + [int(1000 * hold)]
    palette = [frame.convert("RGB").quantize(128) for frame in frames]
    with whole_file(path) as temporary:
        palette[0].save(temporary, format="GIF", save_all=True, append_images=palette[1:], duration=durations, loop=0)


def plot_training(history: list[tuple[int, float]], levels: dict[int, float], path: Path) -> None:
    """Left: the loss as the training went, (step, loss). Right: where it comes from, time step -> loss, if that is known."""
    panels = 2 if levels else 1
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 3.5), layout="constrained", squeeze=False)
    axes[0, 0].plot(*zip(*history, strict=True))
    axes[0, 0].set(xlabel="training step", ylabel="loss (mean squared error of the noise)" if levels else "loss", yscale="log")
    if levels:
        axes[0, 1].plot(list(levels), list(levels.values()), marker="o")
        axes[0, 1].set(
            xlabel="time step t: little noise ... only noise", yscale="log", title="by noise level, averaged weights"
        )
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


def loss_by_level(
    predict_noise: Callable[[Tensor, Tensor], Tensor], x0: Tensor, schedule: NoiseSchedule, levels: int = 10
) -> dict[int, float]:
    """Mean squared error at `levels` time steps, with the same noise each time it is called."""
    result = {}
    generator = torch.Generator().manual_seed(0)
    for level in torch.linspace(0, schedule.T - 1, levels).long().tolist():
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        t = torch.full((len(x0),), level, device=x0.device)
        with torch.no_grad():
            x_t, noise = add_noise(x0, t, schedule, noise)
            result[level] = F.mse_loss(predict_noise(x_t, t), noise).item()
    return result


def plot_evaluation(
    levels: dict[int, float],
    linear: dict[int, float],
    samples: Tensor,
    copies: Tensor,
    distances: dict[str, Tensor],
    path: Path,
) -> None:
    """The loss by noise level; how near training pictures are; and 64 samples, below each the nearest training picture."""
    mosaic = [["loss", "pictures"], ["copies", "pictures"]]
    figure, panels = plt.subplot_mosaic(mosaic, figsize=(16, 8), layout="constrained", width_ratios=(1, 2))
    panels["loss"].plot(list(linear), list(linear.values()), label="the best linear denoiser")
    panels["loss"].plot(list(levels), list(levels.values()), marker="o", markersize=3, label="this network")
    panels["loss"].set(
        xlabel="time step t: little noise ... only noise", yscale="log", title="mean squared error, held-out pictures"
    )
    panels["loss"].set_ylim(bottom=1e-4)  # in pure noise there is nothing to guess, and both lines fall to 0
    for name, distance in distances.items():
        panels["copies"].hist(distance.numpy(), bins=25, alpha=0.5, density=True, label=name)
    panels["copies"].set(
        xlabel="root mean square difference, of 255", yticks=[], title="distance to the nearest training picture"
    )
    for name in ("loss", "copies"):
        panels[name].grid(alpha=0.3)
        panels[name].legend()
    wide = min(16, len(samples))
    whole = min(64, len(samples) // wide * wide)  # full rows only, so that a pair stands in one column
    rows = torch.cat([torch.cat(p) for p in zip(samples[:whole].split(wide), copies[:whole].split(wide), strict=True)])
    panels["pictures"].imshow(to_image(make_grid(rows, nrow=wide, padding=2, pad_value=1.0)), cmap="gray")
    panels["pictures"].set(title="samples, and below each one the nearest training picture")
    panels["pictures"].axis("off")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
