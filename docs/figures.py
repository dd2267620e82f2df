"""The figures that explain: `python -m docs.figures [NAME ...]` draws all or some of them.

They are drawn by the repository's own functions and ready models, into docs/figures/.
Each is 900 pixels wide on a web page, and saved with one and a half times as many.
"""

import argparse
import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from torch import Tensor, nn

from docs.plane import two_moons
from latent_ext.generate import load_pipeline
from latent_ext.guidance import guided
from latent_ext.pipeline import image_to_image, inpaint, text_to_image
from processes import NoiseSchedule, add_noise, generators, sample, sample_seeds
from toolbox import cats
from toolbox.data import from_uint8, load_data
from toolbox.files import UserError, user_errors
from toolbox.images import grid, loss_by_level, save_gif, save_plot, to_image
from toolbox.metrics import LinearDenoiser
from toolbox.models import SCHEDULES, load_model, predict_noise_of
from unet import UNet

FOLDER = Path(__file__).parent / "figures"
USED_BY = {
    "linear": "DDPM",
    "scaled_linear": "Stable Diffusion",
    "cosine": "Improved DDPM",
    "sigmoid": "train.py's default",
    "flow": "flow matching",
}
WIDTH = 9.0  # inches, at 100 pixels each
INK, GREY, BLUE, ORANGE, GREEN = "#24292f", "#6e7781", "#0969da", "#bc4c00", "#1a7f37"
PALE = {GREY: "#eef0f2", BLUE: "#ddf0ff", ORANGE: "#ffe9d6", GREEN: "#d9f5df"}  # to fill boxes
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 2,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


# ---- helpers -------------------------------------------------------------------------------------


def show(axes: plt.Axes, image: Tensor, above: str = "", below: str = "") -> None:
    """One image (C, H, W) in [-1, 1], with text above and below."""
    axes.imshow(to_image(image), cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[], title=above, xlabel=below)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def rows_of_images(rows: list[Tensor], left: list[str], above: list[str], height: float):
    """A figure of images in rows (columns, C, H, W); returns the figure and its axes."""
    columns = max(map(len, rows))
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(WIDTH, height), layout="constrained", squeeze=False
    )
    for panels, images, label in zip(axes, rows, left, strict=True):
        for panel, image in zip(panels, images, strict=True):
            show(panel, image)
        panels[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for panel, text in zip(axes[0], above, strict=True):
        panel.set_title(text)
    return figure, axes


def canvas(width: float, height: float) -> tuple[plt.Figure, plt.Axes]:
    """An empty sheet for a diagram, `width` units wide: WIDTH inches."""
    figure = plt.figure(figsize=(WIDTH, WIDTH * height / width))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: plt.Axes, x: float, y: float, w: float, h: float, text: str, colour=GREY) -> None:
    """A box whose centre is (x, y)."""
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "ec": colour, "fc": PALE[colour]}
    axes.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, **style))
    axes.text(x, y, text, ha="center", va="center", linespacing=1.35)


def arrow(axes: plt.Axes, *points: tuple[float, float], colour=INK, style="solid") -> None:
    """A line through the points, with a head at the last one."""
    axes.plot(*zip(*points[:-1], strict=True), color=colour, lw=1.2, ls=style)
    options = {"arrowstyle": "-|>", "color": colour, "lw": 1.2, "ls": style, "shrinkA": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=options | {"shrinkB": 1})


def dot(axes: plt.Axes, x: float, y: float, text: str) -> None:
    axes.scatter(x, y, s=190, color=ORANGE, zorder=3)
    axes.annotate(text, (x, y), color="white", ha="center", va="center_baseline", zorder=4)


def thumbnail(axes: plt.Axes, image: Tensor, x: float, y: float, side: float, text="") -> None:
    """An image whose centre is (x, y), with text below."""
    extent = (x - side / 2, x + side / 2, y - side / 2, y + side / 2)
    axes.imshow(to_image(image), extent=extent, zorder=2)
    axes.text(x, y - side / 2 - 0.1, text, ha="center", va="top", linespacing=1.35)


def ready_cats():
    """The ready model `cats`: predict_noise, its schedule, the shape of an image."""
    network, schedule, config = load_model("cats")
    shape = config["channels"], config["size"], config["size"]
    return predict_noise_of(network, schedule, config), schedule, shape


def noised(x0: Tensor, t: int, schedule: NoiseSchedule, seed: int = 0) -> Tensor:
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    return add_noise(x0, torch.full((len(x0),), t), schedule, noise)[0]


# ---- the first evening ---------------------------------------------------------------------------


def forward() -> plt.Figure:
    """One drawn cat under more and more noise."""
    schedule, x0 = NoiseSchedule.sigmoid(), cats.draw(1, 32)[0]
    times = [0, 200, 400, 500, 600, 700, 850, 999]
    figure, axes = plt.subplots(1, len(times), figsize=(WIDTH, 1.75), layout="constrained")
    for panel, t in zip(axes, times, strict=True):
        below = f"alpha_bar\n{schedule.alpha_bar[t]:.2f}"
        show(panel, noised(x0, t, schedule)[0], f"t = {t}", below)
    return figure


def schedules() -> plt.Figure:
    """alpha_bar of every schedule, and the signal-to-noise ratio, which shows the two ends."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4), layout="constrained")
    for name, make in SCHEDULES.items():
        alpha_bar = make().alpha_bar.double()
        left.plot(alpha_bar)
        right.plot(alpha_bar / (1 - alpha_bar), label=f"{name}: {USED_BY.get(name, '')}")
    left.set(xlabel="time step t", title="alpha_bar: the share of the variance that is data")
    right.set(xlabel="time step t", title="signal to noise: alpha_bar / (1 - alpha_bar)")
    right.set(yscale="log", ylim=(1e-6, 1e5))
    right.legend(loc="lower left")
    return figure


def unet() -> plt.Figure:
    """The U-Net: each block with the shape of its output, skip connections, t and attention."""
    network, size = UNet(), 32
    config, shapes = network.config, {}

    def record(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        shapes[module] = output.shape[1:]

    for module in network.modules():
        module.register_forward_hook(record)
    network(torch.zeros(1, config["in_channels"], size, size), torch.zeros(1, dtype=torch.long))

    # A row for each level, and one for the middle; the way up mirrors the way down.
    w, h, dx, dy, indent = 1.34, 0.8, 1.6, 1.3, 0.55  # a box; distances
    levels, in_row = len(config["channels"]), config["num_res_blocks"] + 1
    middle = 0.9 + (levels - 1) * indent + in_row * dx
    top, bottom = levels * dy + 0.6, 0.6
    figure, axes = canvas(2 * middle, top + 1.6)
    rows = [divmod(i, in_row) for i in range(levels * in_row)]
    left = [(0.9 + row * indent + i * dx, top - row * dy) for row, i in rows]
    right = [(2 * middle - x, y) for x, y in reversed(left)]
    places = [*left, (middle - dx / 2, bottom), (middle + dx / 2, bottom), *right]

    modules = [network.conv_in, *network.down, *network.mid, *network.up]
    for module, (x, y) in zip(modules, places, strict=True):
        res, attn = getattr(module, "res", None), getattr(module, "attn", None)
        kind = "ResBlock" if res else "Conv 3x3" if module is network.conv_in else "Conv, halve"
        kind += "\n+ attention" if attn else ""
        channels, height, width = shapes[attn or res or module]
        colour = GREEN if attn else BLUE if res else GREY
        box(axes, x, y, w, h, f"{kind}\n{channels} ch, {height}x{width}", colour)
        if res:
            dot(axes, x - w / 2, y + h / 2, "t")

    for (x0, y0), (x1, y1) in itertools.pairwise(places):
        between = max(y0, y1) - dy / 2 + 0.04
        if y0 == y1:
            arrow(axes, (x0 + w / 2, y0), (x1 - w / 2, y1))
        elif y0 > y1:
            arrow(axes, (x0, y0 - h / 2), (x0, between), (x1, between), (x1, y1 + h / 2))
        else:
            x0 += 0.3  # where no skip connection ends
            arrow(axes, (x0, y0 + h / 2), (x0, between), (x1, between), (x1, y1 - h / 2))
            if y0 > bottom:
                axes.text(x0 + 0.12, between, "Upsample", va="center")
    for (_, i), (x0, y), (x1, _) in zip(rows, left, reversed(right), strict=True):
        above = y + h / 2 + 0.13 * (in_row - 1 - i)
        ends = [(x0 + 0.3, y + h / 2), (x0 + 0.3, above), (x1 - 0.3, above), (x1 - 0.3, y + h / 2)]
        if i == in_row - 1:
            ends = [(x0 + w / 2, y), (x1 - w / 2, y)]
        arrow(axes, *ends, colour=GREY, style="dashed")

    x, y = left[0][0], top + 1.3
    channels = config["in_channels"]
    arrow(axes, (x, y - 0.15), (x, top + h / 2))
    axes.text(x, y, f"$x_t$: {channels} ch, {size}x{size}", ha="center", va="center")
    x = right[-1][0]
    arrow(axes, (x, top + h / 2), (x, y - 0.15))
    axes.text(x - 0.1, top + h / 2 + 0.37, "Conv 3x3", ha="right", va="center")
    axes.text(x, y, "noise, or v", ha="center", va="center")
    axes.text(middle, top + 0.12, "skip connections (concatenated)", color=GREY, ha="center")
    dot(axes, 0.4, bottom + 0.15, "t")
    dim, t_dim = network.t_mlp[0].in_features, network.t_mlp[0].out_features
    lines = f"timestep_embedding: {dim} numbers\nt_mlp: {t_dim}, for every ResBlock"
    axes.text(0.65, bottom + 0.15, lines, va="center", linespacing=1.4)
    parameters = sum(w.numel() for w in network.parameters()) / 1e6
    lines = f"{parameters:.1f} million\nparameters"
    axes.text(2 * middle - 0.2, bottom + 0.15, lines, ha="right", va="center", linespacing=1.4)
    return figure


def step() -> plt.Figure:
    """Three of ten sampling steps: x_t, the predicted noise, the estimate of x0, the next x_t."""
    predict_noise, schedule, shape = ready_cats()
    rows, labels = [], []

    def record(x: Tensor, t: Tensor) -> Tensor:
        noise = predict_noise(x, t)
        rows.append([x[0], noise[0]])
        labels.append(f"t = {t[0]}")
        return noise

    def on_step(x: Tensor, t_prev: int, x0: Tensor) -> Tensor:
        rows[-1] += [x0[0], x[0]]
        return x

    sample_seeds(record, shape, [4], schedule, steps=10, clip_x0=True, on_step=on_step)
    some = [1, 5, 8]
    titles = ["$x_t$", "predicted noise", "estimate of $x_0$: (8)", "$x_{t-100}$: (9)"]
    rows, labels = [torch.stack(rows[i]) for i in some], [labels[i] for i in some]
    return rows_of_images(rows, labels, titles, 6.4)[0]


def many_answers() -> plt.Figure:
    """Cats that one noised image may come from, their mean, and what the network answers."""
    predict_noise, schedule, _ = ready_cats()
    x0 = from_uint8(load_data("cats").images)
    generator, rows, labels = torch.Generator().manual_seed(0), [], []
    for t in (980, 940, 850):
        x_t = noised(x0[:1], t, schedule)
        alpha_bar = schedule.alpha_bar[t]
        squares = torch.stack([(x_t[0] - alpha_bar.sqrt() * image).square().sum() for image in x0])
        weights = torch.softmax(
            -squares / (2 * (1 - alpha_bar)), dim=0
        )  # Bayes: all equally likely
        drawn = torch.multinomial(weights, 5, replacement=True, generator=generator)
        mean = torch.einsum("n,nchw->chw", weights, x0)
        with torch.no_grad():
            noise = predict_noise(x_t, torch.tensor([t]))
        answer = (x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        rows.append(torch.cat([x_t, x0[drawn], mean[None], answer]))
        labels.append(f"t = {t}")
    titles = ["$x_t$", "", "", "cats that it may come from", "", "", "their mean", "the network"]
    return rows_of_images(rows, labels, titles, 3.4)[0]


def trajectory() -> plt.Figure:
    """x_t and the estimate of x0 along the 40 steps of two cats."""
    predict_noise, schedule, shape = ready_cats()
    xs, estimates = [], []

    def on_step(x: Tensor, t_prev: int, x0: Tensor) -> Tensor:
        xs.append(x)
        estimates.append(x0)
        return x

    sample_seeds(predict_noise, shape, [1, 4], schedule, clip_x0=True, on_step=on_step)
    some = [0, 4, 9, 14, 19, 24, 29, 34, 39]
    rows = [torch.stack([one[i][cat] for i in some]) for cat in (0, 1) for one in (xs, estimates)]
    titles = [f"step {i + 1}" for i in some]
    return rows_of_images(rows, ["$x_t$", "estimate\nof $x_0$"] * 2, titles, 4.0)[0]


def loss() -> plt.Figure:
    """The error by time step: of the noise, which is trained, and of the image that it implies."""
    predict_noise, schedule, _ = ready_cats()
    held_out, data = load_data("cats", held_out=True), load_data("cats")
    network = loss_by_level(predict_noise, from_uint8(held_out.images[:256]), schedule, levels=26)
    t = torch.tensor(list(network)[:-1])  # at the last one there is no image left
    alpha_bar = schedule.alpha_bar[t].double()
    linear = LinearDenoiser(data.images).errors(held_out.images, alpha_bar)
    losses = {
        "always 0": torch.ones(len(t)),
        "the best linear denoiser": linear,
        "the ready model cats": torch.tensor([network[i] for i in t.tolist()]),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4), layout="constrained")
    for (name, loss), colour in zip(losses.items(), (GREY, ORANGE, BLUE), strict=True):
        left.plot(t, loss, color=colour, label=name)
        right.plot(t, (loss * (1 - alpha_bar) / alpha_bar).sqrt(), color=colour)
    left.set(xlabel="time step t", yscale="log", title="loss: mean squared error of the noise")
    right.set(xlabel="time step t", ylim=(0, 1), title="RMS error of the implied image")
    left.legend()
    return figure


def moving_cats() -> list[Image.Image]:
    """16 cats come out of the noise: the README's first image."""
    predict_noise, schedule, shape = ready_cats()
    frames = []

    def on_step(x: Tensor, t_prev: int, x0: Tensor) -> Tensor:
        frames.append(grid(x, columns=8))
        return x

    sample_seeds(predict_noise, shape, range(16), schedule, clip_x0=True, on_step=on_step)
    return frames[:16:2] + frames[16:]  # hardly anything can be seen at first


def guidance() -> plt.Figure:
    """Guidance in the plane, with exact answers: arrows at one point, and samples."""
    schedule = NoiseSchedule.cosine()
    x0, moon = two_moons(1000, torch.Generator().manual_seed(0))

    def predict_noise(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Of the points blurred by 0.06: the mean noise, with label 2 of both moons."""
        alpha_bar = schedule.alpha_bar_at(t, x)
        variance = 1 - alpha_bar + alpha_bar * 0.06**2
        distances = (x[:, None] - alpha_bar[:, None].sqrt() * x0).square().sum(2)
        possible = (label[:, None] == 2) | (label[:, None] == moon)
        weights = torch.softmax((-distances / (2 * variance)).where(possible, -torch.inf), dim=1)
        return (x - alpha_bar.sqrt() * weights @ x0) * (1 - alpha_bar).sqrt() / variance

    def labels(x: Tensor, label: int) -> Tensor:
        return torch.full((len(x),), label)

    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.2), layout="constrained")
    x_t, t = torch.tensor([[0.95, 0.75]]), torch.tensor([400])
    sigma = (1 - schedule.alpha_bar[t]).sqrt()
    both, upper = (x_t - sigma * predict_noise(x_t, t, labels(x_t, i)) for i in (2, 0))
    strong = both + 3 * (upper - both)
    arrows = [
        (both, GREY, "unconditional", (0.08, 0)),
        (upper, BLUE, "conditional", (-0.62, -0.14)),
        (strong, ORANGE, "guidance_scale 3", (-0.1, 0.13)),
    ]
    for end, colour, name, (dx, dy) in arrows:
        arrow(axes[0], x_t[0].tolist(), end[0].tolist(), colour=colour)
        axes[0].text(end[0, 0] + dx, end[0, 1] + dy, name, color=colour)
    axes[0].text(x_t[0, 0] + 0.04, x_t[0, 1] + 0.02, "$x_t$")
    axes[0].set_title("minus the predicted noise")
    for panel, scale in zip(axes[1:], (1.0, 3.0), strict=True):
        noise = torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
        model = guided(predict_noise, labels(noise, 0), labels(noise, 2), scale)
        samples = sample(model, noise, schedule, eta=0.0)
        panel.scatter(*samples.T, s=5, color=ORANGE if scale > 1 else BLUE, zorder=3)
        panel.set_title(f"samples, guidance_scale {scale:.0f}")
    for panel in axes:
        panel.scatter(*x0.T, s=3, color="#d4d8dc")
        panel.set(xlim=(-1.8, 1.8), ylim=(-1, 1.1), aspect="equal")
        panel.axis("off")
    axes[0].set(xlim=(-0.7, 1.7), ylim=(-0.2, 1.2))
    return figure


# ---- the second evening --------------------------------------------------------------------------


def rgb(z: Tensor) -> Tensor:
    """Latents (4, h, w) as an image: three of their channels."""
    return (z[:3] / 2.5).clamp(-1, 1)


def pipeline() -> plt.Figure:
    """From a text to an image, with the shapes of the toy and of Stable Diffusion v1.5."""
    model, prompt = load_pipeline("latent-cats"), "an orange cat with green eyes"
    latents = []

    def on_step(z: Tensor, t_prev: int, z0: Tensor) -> Tensor:
        latents.append(z[0])
        return z

    options = {"guidance_scale": 3.0, "eta": 1.0, "generator": generators([1])}
    image = text_to_image(model, [prompt], on_step=on_step, **options)[0]
    start = torch.randn(latents[0].shape, generator=generators([1])[0])
    tokens = model.tokenizer([prompt])
    context = model.encode_prompts([prompt])

    def shapes(ours: Tensor, v1_5: str) -> str:
        return f"{'x'.join(map(str, ours.shape))}\n({v1_5})"

    figure, axes = canvas(13, 6.3)
    axes.text(1.5, 5.5, f'"{prompt}"'.replace("cat ", "cat\n"), ha="center", va="center")
    arrow(axes, (2.9, 5.5), (3.6, 5.5))
    box(axes, 4.4, 5.5, 1.6, 0.8, "Tokenizer")
    arrow(axes, (5.2, 5.5), (8.3, 5.5))
    note = {"ha": "center", "linespacing": 1.35}
    axes.text(6.7, 5.62, "token numbers", va="bottom", **note)
    axes.text(6.7, 5.38, shapes(tokens[0], "77"), va="top", **note)
    box(axes, 9.3, 5.5, 2, 0.8, "TextEncoder\n(of CLIP)")
    arrow(axes, (9.3, 5.1), (9.3, 4.15), (5.0, 4.15), (5.0, 3.1), colour=BLUE)
    axes.text(9.45, 4.6, "context: " + shapes(context[0], "77x768").replace("\n", " "), va="center")

    thumbnail(axes, rgb(start), 1.5, 2.4, 1.7, "$z_T$, noise\n" + shapes(start, "4x64x64"))
    arrow(axes, (2.45, 2.4), (3.2, 2.4))
    box(axes, 5.0, 2.4, 3.6, 1.9, "")
    axes.text(5.0, 1.63, "sample: a loop of 50 steps", ha="center")
    box(axes, 5.0, 2.55, 3.1, 1.1, "U-Net, cross-attention,\nguided: predict the noise", BLUE)
    arrow(axes, (6.8, 2.4), (7.25, 2.4))
    thumbnail(axes, rgb(latents[-1]), 8.2, 2.4, 1.7, "$z_0$\n" + shapes(start, "4x64x64"))
    arrow(axes, (9.15, 2.4), (9.55, 2.4))
    box(axes, 10.15, 2.4, 1.2, 0.9, "VAE\ndecoder")
    arrow(axes, (10.75, 2.4), (11.15, 2.4))
    thumbnail(axes, image, 12.05, 2.4, 1.7, "image\n" + shapes(image, "3x512x512"))
    axes.text(0.3, 0.1, "Shapes for one image: latent-cats (Stable Diffusion v1.5)", color=GREY)
    return figure


def tasks() -> plt.Figure:
    """Text to image, image to image, inpainting: one loop, and in colour what differs."""
    model = load_pipeline("latent-cats")
    images, _, _ = cats.draw(1, model.size, seed=3, fur="orange", pattern="plain", eyes="blue")
    mask = torch.zeros(1, 1, model.size, model.size)
    mask[:, :, 22:42, 12:54] = 1
    noise = torch.randn(4, 16, 16, generator=generators([1])[0])
    text, again, eyes = "a black cat", "a grey tabby cat", "an orange cat with green eyes"

    def options() -> dict:
        return {"guidance_scale": 3.0, "eta": 1.0, "generator": generators([1])}

    results = [
        text_to_image(model, [text], **options())[0],
        image_to_image(model, [again], images, strength=0.6, **options())[0],
        inpaint(model, [eyes], images, mask, **options())[0],
    ]
    calls = [
        f'text_to_image: "{text}"',
        f'image_to_image: "{again}", strength 0.6',
        f'inpaint: "{eyes}", where the mask is white',
    ]
    figure, axes = canvas(13, 8)
    for i, (result, call) in enumerate(zip(results, calls, strict=True)):
        y = 6.5 - 2.6 * i
        axes.text(0.3, y + 1.05, call, weight="bold")
        arrow(axes, (8.7, y), (9.3, y))
        box(axes, 9.95, y, 1.3, 0.9, "VAE\ndecoder")
        arrow(axes, (10.6, y), (11.1, y))
        thumbnail(axes, result, 12, y, 1.7)
        if i > 0:
            shown = images[0] if i == 1 else torch.where(mask[0] > 0, 1.0, images[0])
            thumbnail(axes, shown, 1.15, y, 1.7)
            arrow(axes, (2.05, y), (2.6, y), colour=ORANGE)
            box(axes, 3.25, y, 1.3, 0.9, "VAE\nencoder", ORANGE)
        if i != 1:
            thumbnail(axes, rgb(noise), 5.15, y, 1.2)
            arrow(axes, (5.8, y), (6.4, y))
    y = 6.5
    box(axes, 7.55, y, 2.3, 0.9, "sample\n50 steps")
    y = 3.9
    arrow(axes, (3.9, y), (4.4, y), colour=ORANGE)
    box(axes, 5.15, y, 1.5, 0.9, "add_noise\n60 % of T", ORANGE)
    arrow(axes, (5.9, y), (6.4, y), colour=ORANGE)
    box(axes, 7.55, y, 2.3, 0.9, "sample\nlast 30 of 50 steps", ORANGE)
    y = 1.3
    arrow(
        axes, (3.25, y - 0.45), (3.25, y - 0.95), (7.55, y - 0.95), (7.55, y - 0.45), colour=ORANGE
    )
    axes.text(5.3, y - 0.88, "$z_0$, known outside the mask", ha="center", color=ORANGE)
    box(axes, 7.55, y, 2.3, 0.9, "sample: 50 steps,\neach puts $z_0$ back", ORANGE)
    return figure


FIGURES = {
    "forward": forward,
    "schedules": schedules,
    "unet": unet,
    "step": step,
    "many-answers": many_answers,
    "trajectory": trajectory,
    "loss": loss,
    "guidance": guidance,
    "pipeline": pipeline,
    "tasks": tasks,
    "cats": moving_cats,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(FIGURES)}")
    names = parser.parse_args().names or list(FIGURES)
    if unknown := set(names) - set(FIGURES):
        raise UserError(f"{', '.join(sorted(unknown))}: expected some of {', '.join(FIGURES)}")
    for name in names:
        with plt.rc_context(STYLE):
            figure = FIGURES[name]()
            path = FOLDER / f"{name}.{'gif' if isinstance(figure, list) else 'png'}"
            save_gif(figure, path) if path.suffix == ".gif" else save_plot(figure, path, dpi=150)
        print(f"wrote {path}")


if __name__ == "__main__":
    with user_errors():
        main()
