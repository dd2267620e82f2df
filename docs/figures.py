"""The figures that explain: `python -m docs.figures [NAME ...]` draws all or some of them.

The repository's own functions and pretrained models draw them, into docs/figures/.
Each fits a page 900 pixels wide, and is saved at one and a half times that width.
"""

import argparse
import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from torch import Tensor

from docs.plane import BOTH, train, two_moons
from latent_ext.generate import load_pipeline
from latent_ext.guidance import guided
from latent_ext.pipeline import image_to_image, inpaint, text_to_image
from processes import NoiseSchedule, add_noise, randn_like, sample
from toolbox import cats
from toolbox.data import from_uint8, load_data
from toolbox.files import UserError, user_errors
from toolbox.images import grid, loss_by_level, save_gif, save_plot, to_image
from toolbox.metrics import LinearDenoiser
from toolbox.models import SCHEDULES, load_model, predict_noise_of
from toolbox.seeds import generators
from unet import UNet

FOLDER = Path("docs/figures")
WIDTH = 9.0  # inches, of 100 pixels on a page and 150 in the file
INK, GREY, BLUE, ORANGE, GREEN = "#24292f", "#6e7781", "#0969da", "#bc4c00", "#1a7f37"
FILL = {GREY: "#eef0f2", BLUE: "#ddf0ff", ORANGE: "#ffe9d6", GREEN: "#d9f5df"}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "lines.linewidth": 2,
    "legend.frameon": False,
    "image.interpolation": "nearest",
    "image.cmap": "gray",
}
USED_BY = {
    "linear": "linear: DDPM",
    "scaled_linear": "scaled_linear: Stable Diffusion",
    "cosine": "cosine: Improved DDPM",
    "sigmoid": "sigmoid: the default of train.py",
    "flow": "flow: flow matching",
}


# ---- helpers -------------------------------------------------------------------------------------


def panels(columns: int, height: float, rows: int = 1):
    """A figure `height` inches high, and its axes."""
    return plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained")


def show(axes: plt.Axes, image: Tensor, above: str = "", below: str = "") -> None:
    """One image (C, H, W) in [-1, 1], with text above and below."""
    axes.imshow(to_image(image))
    axes.set(xticks=[], yticks=[], title=above, xlabel=below)
    axes.spines[:].set_visible(False)


def rows_of_images(rows: list[Tensor], left: list[str], above: list[str], height: float):
    """Rows of images (columns, C, H, W), with text to the left of each row, above each column."""
    figure, axes = panels(len(above), height, len(rows))
    for row, images, label in zip(axes, rows, left, strict=True):
        for panel, image in zip(row, images, strict=True):
            show(panel, image)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for panel, text in zip(axes[0], above, strict=True):
        panel.set_title(text)
    return figure


def canvas(width: float, height: float) -> tuple[plt.Figure, plt.Axes]:
    """An empty sheet for a diagram, `width` units wide."""
    figure = plt.figure(figsize=(WIDTH, WIDTH * height / width))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def write(axes: plt.Axes, x: float, y: float, text: str, ha="center", va="center", **style) -> None:
    axes.text(x, y, text, ha=ha, va=va, linespacing=1.35, **style)


def box(axes: plt.Axes, x: float, y: float, w: float, h: float, text="", colour=GREY) -> None:
    """A box with text, centred at (x, y)."""
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "ec": colour, "fc": FILL[colour]}
    axes.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, **style))
    write(axes, x, y, text)


def arrow(axes: plt.Axes, *points: tuple[float, float], colour=INK, style="solid") -> None:
    """A line through the points, with a head at the last one."""
    axes.plot(*zip(*points[:-1], strict=True), color=colour, lw=1.2, ls=style)
    head = {"arrowstyle": "-|>", "color": colour, "lw": 1.2, "ls": style, "shrinkA": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=head | {"shrinkB": 1})


def dot(axes: plt.Axes, x: float, y: float, text: str) -> None:
    axes.scatter(x, y, s=190, color=ORANGE, zorder=3)
    axes.text(x, y, text, color="white", ha="center", va="center_baseline", zorder=4)


def thumbnail(axes: plt.Axes, image: Tensor, x: float, y: float, side: float, text="") -> None:
    """An image (C, H, W), or latents, centred at (x, y), with text below."""
    if len(image) == 4:
        image = (image[:3] / 2.5).clamp(-1, 1)  # three of the channels as red, green and blue
    extent = (x - side / 2, x + side / 2, y - side / 2, y + side / 2)
    axes.imshow(to_image(image), extent=extent, zorder=2)
    write(axes, x, y - side / 2 - 0.1, text, va="top")


def pretrained_cats():
    """predict_noise of the pretrained model `cats`, and its schedule."""
    network, schedule, config = load_model("cats")
    return predict_noise_of(network, schedule, config), schedule


def noised(x0: Tensor, t: int, schedule: NoiseSchedule) -> Tensor:
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    return add_noise(x0, torch.full((len(x0),), t), schedule, noise)[0]


def follow(seeds, steps: int = 40) -> tuple[list[Tensor], list[Tensor]]:
    """Cats of these seeds: x before the first step and after each, and each estimate of x0."""
    predict_noise, schedule = pretrained_cats()
    generator = generators(seeds)
    xs, estimates = [randn_like(torch.empty(len(seeds), 3, 32, 32), generator)], []

    def on_step(x: Tensor, t_prev: int, x0: Tensor) -> Tensor:
        xs.append(x)
        estimates.append(x0)
        return x

    options = {"clip_x0": True, "generator": generator, "on_step": on_step}
    sample(predict_noise, xs[0], schedule, steps, **options)
    return xs, estimates


# ---- the first evening ---------------------------------------------------------------------------


def moving_cats() -> list[Image.Image]:
    """16 cats come out of the noise: the README's first image."""
    frames = [grid(x, columns=8) for x in follow(range(16))[0]]
    return frames[:16:2] + frames[16:]  # at first, hardly anything can be seen


def forward() -> plt.Figure:
    """One drawn cat under more and more noise."""
    schedule, x0 = NoiseSchedule.sigmoid(), cats.draw(1, 32)[0]
    times = [0, 200, 400, 500, 600, 700, 850, 999]
    figure, axes = panels(len(times), 1.75)
    for panel, t in zip(axes, times, strict=True):
        below = f"alpha_bar\n{schedule.alpha_bar[t]:.2f}"
        show(panel, noised(x0, t, schedule)[0], f"t = {t}", below)
    return figure


def schedules() -> plt.Figure:
    """alpha_bar of every schedule, and the signal-to-noise ratio, which shows the two ends."""
    figure, (left, right) = panels(2, 3.4)
    for name, make in SCHEDULES.items():
        alpha_bar = make().alpha_bar.double()
        left.plot(alpha_bar)
        right.plot(alpha_bar / (1 - alpha_bar), label=USED_BY.get(name, name))
    left.set(xlabel="time step t", title="alpha_bar: the share of the variance that is data")
    right.set(xlabel="time step t", title="signal to noise: alpha_bar / (1 - alpha_bar)")
    right.set(yscale="log", ylim=(1e-6, 1e5))
    right.legend(loc="lower left")
    for panel in (left, right):
        panel.grid()
    return figure


def unet() -> plt.Figure:
    """The U-Net: each block with the shape of its output, skip connections, t and attention."""
    network, size = UNet(), 32
    levels, in_row = len(network.config["channels"]), network.config["num_res_blocks"] + 1

    # A row for each level, and one for the middle; the way up mirrors the way down.
    w, h, dx, dy, indent = 1.34, 0.8, 1.6, 1.3, 0.55  # a box, and distances
    middle = 0.9 + (levels - 1) * indent + in_row * dx
    top, bottom = levels * dy + 0.6, 0.6
    figure, axes = canvas(2 * middle, top + 1.6)
    rows = [divmod(i, in_row) for i in range(levels * in_row)]
    left = [(0.9 + row * indent + i * dx, top - row * dy) for row, i in rows]
    right = [(2 * middle - x, y) for x, y in reversed(left)]
    places = [*left, (middle - dx / 2, bottom), (middle + dx / 2, bottom), *right]

    modules = [network.conv_in, *network.down, *network.mid, *network.up]
    for module, (x, y) in zip(modules, places, strict=True):
        side = size >> min(round((top - y) / dy), levels - 1)
        if getattr(module, "res", None):
            channels, colour = module.res.conv2.out_channels, GREEN if module.attn else BLUE
            kind = "ResBlock\n+ attention" if module.attn else "ResBlock"
        else:
            conv, colour = getattr(module, "resample", module), GREY
            kind, channels = "Conv, halve" if conv.stride[0] == 2 else "Conv", conv.out_channels
        box(axes, x, y, w, h, f"{kind}\n{channels} ch, {side}x{side}", colour)
        if colour != GREY:
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
                write(axes, x0 + 0.12, between, "Upsample", ha="left")
    for (_, i), (x0, y), (x1, _) in zip(rows, left, reversed(right), strict=True):
        above = y + h / 2 + 0.13 * (in_row - 1 - i)
        line = [(x0 + 0.3, y + h / 2), (x0 + 0.3, above), (x1 - 0.3, above), (x1 - 0.3, y + h / 2)]
        if i == in_row - 1:
            line = [(x0 + w / 2, y), (x1 - w / 2, y)]
        arrow(axes, *line, colour=GREY, style="dashed")

    (x0, _), (x1, _) = left[0], right[-1]
    arrow(axes, (x0, top + 1.15), (x0, top + h / 2))
    write(axes, x0, top + 1.3, f"$x_t$: {network.conv_in.in_channels} ch, {size}x{size}")
    arrow(axes, (x1, top + h / 2), (x1, top + 1.15))
    write(axes, x1 - 0.1, top + 0.77, "Conv", ha="right")
    write(axes, x1, top + 1.3, "noise, or v")
    write(axes, middle, top + 0.2, "skip connections (concatenated)", color=GREY)
    dim, t_dim = network.t_mlp[0].in_features, network.t_mlp[0].out_features
    lines = f"timestep_embedding: {dim} numbers\nt_mlp: {t_dim}, for every ResBlock"
    dot(axes, 0.4, bottom + 0.15, "t")
    write(axes, 0.65, bottom + 0.15, lines, ha="left")
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    write(axes, x1, bottom + 0.15, f"{millions:.1f} million\nparameters")
    return figure


def loss() -> plt.Figure:
    """The error by time step: of the noise, as trained, and of the image that this implies."""
    predict_noise, schedule = pretrained_cats()
    held_out = load_data("cats", held_out=True).images
    network = loss_by_level(predict_noise, from_uint8(held_out[:256]), schedule, levels=26)
    t = torch.tensor(list(network)[:-1])  # at the last one there is no image left
    alpha_bar = schedule.alpha_bar[t].double()
    losses = {
        "always 0": (torch.ones(len(t)), GREY),
        "the best linear denoiser": (
            LinearDenoiser(load_data("cats").images).errors(held_out, alpha_bar),
            ORANGE,
        ),
        "the pretrained model cats": (torch.tensor([network[i] for i in t.tolist()]), BLUE),
    }
    figure, (left, right) = panels(2, 3.4)
    for name, (loss, colour) in losses.items():
        left.plot(t, loss, color=colour, label=name)
        right.plot(t, (loss * (1 - alpha_bar) / alpha_bar).sqrt(), color=colour)
    left.set(xlabel="time step t", yscale="log", title="loss: mean squared error of the noise")
    right.set(xlabel="time step t", ylim=(0, 1), title="RMS error of the implied image")
    left.legend()
    for panel in (left, right):
        panel.grid()
    return figure


def many_answers() -> plt.Figure:
    """Cats that one noised image may come from, their mean, and the network's answer."""
    predict_noise, schedule = pretrained_cats()
    x0 = from_uint8(load_data("cats").images)
    generator, rows, times = torch.Generator().manual_seed(0), [], (980, 940, 850)
    for t in times:
        x_t, alpha_bar = noised(x0[:1], t, schedule), schedule.alpha_bar[t]
        squares = torch.stack([(x_t[0] - alpha_bar.sqrt() * image).square().sum() for image in x0])
        weights = torch.softmax(-squares / (2 * (1 - alpha_bar)), dim=0)  # p(x0 | x_t), by Bayes
        drawn = torch.multinomial(weights, 5, replacement=True, generator=generator)
        mean = torch.einsum("n,nchw->chw", weights, x0)
        with torch.no_grad():
            noise = predict_noise(x_t, torch.tensor([t]))
        answer = (x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        rows.append(torch.cat([x_t, x0[drawn], mean[None], answer]))
    above = ["$x_t$", "", "", "cats that it may come from", "", "", "their mean", "the network"]
    return rows_of_images(rows, [f"t = {t}" for t in times], above, 3.4)


def step() -> plt.Figure:
    """Three of ten sampling steps: x_t, the predicted noise, the estimate of x0, the next x_t."""
    xs, estimates = follow([4], steps=10)
    rows, times, alpha_bar = [], (899, 499, 199), NoiseSchedule.sigmoid().alpha_bar
    for t in times:
        i = (999 - t) // 100
        noise = (xs[i] - alpha_bar[t].sqrt() * estimates[i]) / (1 - alpha_bar[t]).sqrt()
        rows.append(torch.cat([xs[i], noise, estimates[i], xs[i + 1]]))
    above = ["$x_t$", "predicted noise", "estimate of $x_0$: (8)", "$x_{t-100}$: (9)"]
    return rows_of_images(rows, [f"t = {t}" for t in times], above, 6.4)


def trajectory() -> plt.Figure:
    """x_t and the estimate of x0 along the 40 steps of two cats."""
    xs, estimates = follow([1, 4])
    some = [0, 4, 9, 14, 19, 24, 29, 34, 39]
    steps = [torch.stack([images[i] for i in some], 1) for images in (xs[1:], estimates)]
    rows = [row for pair in zip(*steps, strict=True) for row in pair]
    return rows_of_images(
        rows, ["$x_t$", "estimate\nof $x_0$"] * 2, [f"step {i + 1}" for i in some], 4
    )


# ---- the second evening --------------------------------------------------------------------------


def guidance() -> plt.Figure:
    """Guidance in the plane: the arrows at one point, and what they do to samples."""
    schedule, scale = NoiseSchedule.cosine(), 3
    predict_noise = train(schedule)

    def model(scale: float, n: int = 1):
        upper, both = torch.full((n,), 0), torch.full((n,), BOTH)
        return torch.no_grad()(guided(predict_noise, upper, both, scale))

    figure, axes = panels(3, 2.2)
    x_t, t = torch.tensor([[0.95, 0.75]]), torch.tensor([400])
    sigma = (1 - schedule.alpha_bar[t]).sqrt()
    labels = [
        (0, GREY, "unconditional", (0.08, 0)),
        (1, BLUE, "conditional", (-0.62, -0.14)),
        (scale, ORANGE, f"guidance_scale {scale}", (-0.1, 0.13)),
    ]
    for guidance_scale, colour, name, (dx, dy) in labels:
        x, y = (x_t - sigma * model(guidance_scale)(x_t, t))[0].tolist()
        arrow(axes[0], x_t[0].tolist(), (x, y), colour=colour)
        write(axes[0], x + dx, y + dy, name, ha="left", va="baseline", color=colour)
    write(axes[0], 1.05, 0.8, "$x_t$")
    axes[0].set_title("minus the predicted noise")
    for panel, guidance_scale, colour in ((axes[1], 1, BLUE), (axes[2], scale, ORANGE)):
        noise = torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
        samples = sample(model(guidance_scale, 300), noise, schedule, eta=0.0)
        panel.scatter(*samples.T, s=5, color=colour, zorder=3)
        panel.set_title(f"samples, guidance_scale {guidance_scale}")
    for panel in axes:
        panel.scatter(*two_moons(1000, torch.Generator().manual_seed(0))[0].T, s=3, color="#d4d8dc")
        panel.set(xlim=(-1.8, 1.8), ylim=(-1, 1.1), aspect="equal")
        panel.axis("off")
    axes[0].set(xlim=(-0.7, 1.7), ylim=(-0.2, 1.2))
    return figure


def options() -> dict:
    return {"guidance_scale": 3.0, "eta": 1.0, "generator": generators([1])}


def pipeline() -> plt.Figure:
    """From a text to an image, with the shapes of the toy and of Stable Diffusion v1.5."""
    model, prompt = load_pipeline("latent-cats"), "an orange cat with green eyes"
    latents = []

    def on_step(z: Tensor, t_prev: int, z0: Tensor) -> Tensor:
        latents.append(z[0])
        return z

    image = text_to_image(model, [prompt], on_step=on_step, **options())[0]
    noise = torch.randn(latents[0].shape, generator=generators([1])[0])
    tokens, context = model.tokenizer([prompt])[0], model.encode_prompts([prompt])[0]

    def shapes(ours: Tensor, v1_5: str) -> str:
        return f"{'x'.join(map(str, ours.shape))}\n({v1_5})"

    figure, axes = canvas(13, 6.3)
    write(axes, 1.5, 5.5, '"an orange cat\nwith green eyes"')
    arrow(axes, (2.9, 5.5), (3.6, 5.5))
    box(axes, 4.4, 5.5, 1.6, 0.8, "Tokenizer")
    arrow(axes, (5.2, 5.5), (8.3, 5.5))
    write(axes, 6.7, 5.62, "tokens", va="bottom")
    write(axes, 6.7, 5.38, shapes(tokens, "77"), va="top")
    box(axes, 9.3, 5.5, 2, 0.8, "TextEncoder\n(of CLIP)")
    arrow(axes, (9.3, 5.1), (9.3, 4.15), (5.0, 4.15), (5.0, 3.1), colour=BLUE)
    write(axes, 9.5, 4.5, "context\n" + shapes(context, "77x768"), ha="left")

    thumbnail(axes, noise, 1.5, 2.4, 1.7, "$z_T$, noise\n" + shapes(noise, "4x64x64"))
    arrow(axes, (2.45, 2.4), (3.2, 2.4))
    box(axes, 5.0, 2.4, 3.6, 1.9)
    write(axes, 5.0, 1.7, "sample: a loop of 50 steps")
    box(axes, 5.0, 2.55, 3.1, 1.1, "U-Net, cross-attention,\nguided: predict the noise", BLUE)
    arrow(axes, (6.8, 2.4), (7.25, 2.4))
    thumbnail(axes, latents[-1], 8.2, 2.4, 1.7, "$z_0$\n" + shapes(noise, "4x64x64"))
    arrow(axes, (9.15, 2.4), (9.55, 2.4))
    box(axes, 10.15, 2.4, 1.2, 0.9, "VAE\ndecoder")
    arrow(axes, (10.75, 2.4), (11.15, 2.4))
    thumbnail(axes, image, 12.05, 2.4, 1.7, "image\n" + shapes(image, "3x512x512"))
    write(axes, 0.3, 0.2, "Shapes: latent-cats (Stable Diffusion v1.5)", ha="left", color=GREY)
    return figure


def tasks() -> plt.Figure:
    """Text to image, image to image, inpainting: one loop, and in colour what differs."""
    model = load_pipeline("latent-cats")
    images = cats.draw(1, model.size, seed=3, fur="orange", pattern="plain", eyes="blue")[0]
    mask = torch.zeros(1, 1, model.size, model.size)
    mask[:, :, 22:42, 12:54] = 1
    noise = torch.randn(4, 16, 16, generator=generators([1])[0])
    text, other, eyes = "a white cat", "a grey tabby cat", "an orange cat with green eyes"
    rows = [  # what is called, what it starts from, its result, where it is drawn
        (f'text_to_image: "{text}"', None, text_to_image(model, [text], **options()), 6.5),
        (
            f'image_to_image: "{other}", strength 0.6',
            images,
            image_to_image(model, [other], images, strength=0.6, **options()),
            3.9,
        ),
        (
            f'inpaint: "{eyes}", where the mask is white',
            torch.where(mask > 0, 1.0, images),
            inpaint(model, [eyes], images, mask, **options()),
            1.3,
        ),
    ]
    figure, axes = canvas(13, 8)
    for title, start, result, y in rows:
        write(axes, 0.3, y + 1.13, title, ha="left", weight="bold")
        arrow(axes, (8.7, y), (9.3, y))
        box(axes, 9.95, y, 1.3, 0.9, "VAE\ndecoder")
        arrow(axes, (10.6, y), (11.1, y))
        thumbnail(axes, result[0], 12, y, 1.7)
        if start is not None:
            thumbnail(axes, start[0], 1.15, y, 1.7)
            arrow(axes, (2.05, y), (2.6, y), colour=ORANGE)
            box(axes, 3.25, y, 1.3, 0.9, "VAE\nencoder", ORANGE)
        if y != 3.9:
            thumbnail(axes, noise, 5.15, y, 1.2)
            arrow(axes, (5.8, y), (6.4, y))
    box(axes, 7.55, 6.5, 2.3, 0.9, "sample\n50 steps")

    t = model.timesteps(50, strength=0.6)[0][0]
    arrow(axes, (3.9, 3.9), (4.4, 3.9), colour=ORANGE)
    box(axes, 5.15, 3.9, 1.5, 0.9, f"add_noise\nt = {t}", ORANGE)
    arrow(axes, (5.9, 3.9), (6.4, 3.9), colour=ORANGE)
    box(axes, 7.55, 3.9, 2.3, 0.9, "sample\nlast 30 of 50 steps", ORANGE)

    arrow(axes, (3.25, 0.85), (3.25, 0.35), (7.55, 0.35), (7.55, 0.85), colour=ORANGE)
    write(axes, 5.3, 0.5, "$z_0$, known outside the mask", color=ORANGE)
    box(axes, 7.55, 1.3, 2.3, 0.9, "sample: 50 steps,\neach puts $z_0$ back", ORANGE)
    write(axes, 9.95, 0.5, "known pixels are kept", color=ORANGE)
    return figure


FIGURES = {
    "cats": moving_cats,
    "forward": forward,
    "schedules": schedules,
    "unet": unet,
    "loss": loss,
    "many-answers": many_answers,
    "step": step,
    "trajectory": trajectory,
    "guidance": guidance,
    "pipeline": pipeline,
    "tasks": tasks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    names = parser.parse_args().names or list(FIGURES)
    if unknown := [name for name in names if name not in FIGURES]:
        raise UserError(f"{', '.join(unknown)}: expected some of {', '.join(FIGURES)}")
    for name in names:
        with plt.rc_context(STYLE):
            drawn = FIGURES[name]()
            if isinstance(drawn, list):
                save_gif(drawn, path := FOLDER / f"{name}.gif")
            else:
                save_plot(drawn, path := FOLDER / f"{name}.png", dpi=150)
        print(f"wrote {path}")


if __name__ == "__main__":
    with user_errors():
        main()
