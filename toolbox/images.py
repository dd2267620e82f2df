"""Image files: single images, grids, GIFs, and the plots of a training."""

import math
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from processes import Network, NoiseSchedule, add_noise
from toolbox.data import to_uint8
from toolbox.files import UserError, atomic_write

matplotlib.use("Agg")  # draw into files, without a window
import matplotlib.pyplot as plt

Levels = dict[int, float]  # time step -> loss
MIN_PIXELS = 96  # grids enlarge images to at least this size, by a whole factor
LOWEST_LOSS = 1e-4  # on plots: in pure noise there is nothing to predict, and the loss falls to 0


def to_image(image: Tensor) -> Image.Image:
    """(C, H, W) in [-1, 1], one channel or three -> a Pillow image."""
    if not image.isfinite().all():
        raise UserError("the sampled image has NaN in it: are the model's weights damaged?")
    return to_pil_image(to_uint8(image.cpu()))


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """(N, C, H, W) in [-1, 1] -> one image, about square; a single one stays as it is."""
    if len(images) == 1:
        return to_image(images[0])
    images = F.interpolate(images.cpu(), scale_factor=-(-MIN_PIXELS // images.shape[-1]))
    columns = columns or math.ceil(math.sqrt(len(images)))
    return to_image(make_grid(images, nrow=columns, padding=2, pad_value=1.0))


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    save_image(grid(images, columns), path)


def save_image(image: Image.Image, path: Path, format: str = "PNG", **options: object) -> None:
    with atomic_write(path) as temporary:
        image.save(temporary, format, **options)


def save_gif(frames: list[Image.Image], path: Path) -> None:
    """The frames play in 4 seconds; the last one stays for 2 more; then it starts again."""
    first, *rest = (frame.convert("RGB").quantize(128) for frame in frames)
    milliseconds = [max(20, 4000 // len(frames))] * len(rest) + [2000]
    options = {"append_images": rest, "duration": milliseconds}
    save_image(first, path, "GIF", save_all=True, loop=0, **options)


def save_plot(figure: plt.Figure, path: Path, dpi: int = 100) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    plt.close(figure)


def plot_training(history: list[tuple[int, float]], levels: Levels, path: Path) -> None:
    """Left: the loss during training, (step, loss). Right, if known: the loss by noise level."""
    figure = plt.figure(figsize=(10, 3.5), layout="constrained")
    left = figure.add_subplot(1, 2 if levels else 1, 1)
    left.plot(*zip(*history, strict=True))
    left.set(xlabel="training step", ylabel="loss", yscale="log")
    left.grid(alpha=0.3)
    if levels:
        right = figure.add_subplot(1, 2, 2)
        plot_levels(right, {"this network": levels}, "loss by noise level, EMA weights")
    save_plot(figure, path)


def plot_levels(axes: plt.Axes, curves: dict[str, Levels], title: str) -> None:
    for name, levels in curves.items():
        axes.plot(list(levels), list(levels.values()), marker="o", markersize=3, label=name)
    axes.set(xlabel="time step t (0: clean, T: pure noise)", yscale="log", title=title)
    axes.set_ylim(bottom=LOWEST_LOSS)
    axes.grid(alpha=0.3)
    axes.legend()


@torch.no_grad()
def loss_by_level(predict_noise: Network, x0: Tensor, schedule: NoiseSchedule, levels=10) -> Levels:
    """Mean squared error at `levels` time steps; every call uses the same noise."""
    result, generator = {}, torch.Generator().manual_seed(0)
    for level in torch.linspace(0, schedule.T - 1, levels).long().tolist():
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        t = torch.full((len(x0),), level, device=x0.device)
        x_t, noise = add_noise(x0, t, schedule, noise)
        result[level] = F.mse_loss(predict_noise(x_t, t), noise).item()
    return result


def plot_evaluation(
    levels: dict[str, Levels],
    samples: Tensor,
    neighbours: Tensor,
    distances: dict[str, Tensor],
    path: Path,
) -> None:
    """Plot losses by level, distances to the training data, and samples with their neighbours."""
    mosaic = [["loss", "images"], ["copies", "images"]]
    options = {"figsize": (16, 8), "layout": "constrained", "width_ratios": (1, 2)}
    figure, panels = plt.subplot_mosaic(mosaic, **options)
    plot_levels(panels["loss"], levels, "mean squared error, held-out images")
    for name, distance in distances.items():
        panels["copies"].hist(distance.numpy(), bins=25, alpha=0.5, density=True, label=name)
    panels["copies"].set(title="distance to the nearest training image", yticks=[])
    panels["copies"].set_xlabel("RMS difference, of 255")
    panels["copies"].legend()
    columns = min(16, len(samples))
    n = min(64, len(samples) // columns * columns)  # full rows only, so that pairs share a column
    pairs = [x[:n].unflatten(0, (-1, columns)) for x in (samples, neighbours)]
    image = to_image(make_grid(torch.stack(pairs, dim=1).flatten(0, 2), nrow=columns, pad_value=1))
    panels["images"].imshow(image)
    panels["images"].set(title="samples, and below each one the nearest training image")
    panels["images"].axis("off")
    save_plot(figure, path, dpi=110)
