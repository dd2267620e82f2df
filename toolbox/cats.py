"""Drawn cats: an endless, deterministic dataset with known attributes and captions.

A cat is a stack of shapes, painted one over the other. Each shape is a signed distance (negative
inside). It covers a pixel by how far the pixel's centre lies inside, measured in pixels and clamped
to 0 .. 1. This is anti-aliasing, and the reason why one cat can be drawn at any size.
All cats of a batch are painted at once: each number of a cat has the shape (n, 1, 1), a distance
(n, size, size). Coordinates run from -1 to 1 over the image: x to the right, y down.
"""

import functools
import math
import random

import torch
from torch import Tensor

# Red, green, blue in 0 .. 1. The second colour of a fur is for stripes and patches.
FUR = {
    "black": ((0.13, 0.13, 0.17), (0.55, 0.31, 0.13)),
    "grey": ((0.55, 0.60, 0.68), (0.23, 0.25, 0.33)),
    "white": ((0.97, 0.96, 0.94), (0.82, 0.55, 0.30)),
    "orange": ((0.96, 0.57, 0.12), (0.56, 0.21, 0.03)),
}
PATTERN = ("plain", "tabby", "tuxedo", "patched")
EYES = {"green": (0.40, 0.88, 0.30), "blue": (0.25, 0.66, 1.00), "yellow": (1.00, 0.84, 0.10)}
BACKGROUND = {
    "blue": (0.36, 0.60, 0.92),
    "green": (0.46, 0.80, 0.44),
    "pink": (0.96, 0.58, 0.72),
    "yellow": (0.98, 0.88, 0.38),
}
ATTRIBUTES = {
    "fur": tuple(FUR),
    "pattern": PATTERN,
    "eyes": tuple(EYES),
    "background": tuple(BACKGROUND),
}
INVISIBLE = ("white", "tuxedo")  # a white bib cannot be seen on white fur
COATS = [(fur, pattern) for fur in FUR for pattern in PATTERN if (fur, pattern) != INVISIBLE]
WHITE, PINK, DARK = (0.98, 0.97, 0.95), (0.93, 0.56, 0.58), (0.10, 0.08, 0.10)

# What else varies from cat to cat: name -> (lowest, highest), drawn uniformly.
FREE = {
    "x": (-0.16, 0.16),
    "y": (-0.08, 0.16),
    "scale": (0.88, 0.98),
    "tilt": (-0.12, 0.12),  # radians
    "ear_height": (0.43, 0.54),
    "gaze": (-0.04, 0.04),
    "tail_side": (-1.0, 1.0),
    "tail_curl": (0.7, 1.3),
    "patch_side": (-1.0, 1.0),
    "fur_light": (0.95, 1.05),
    "background_light": (0.95, 1.05),
}


def draw(
    n: int, size: int, seed: int = 0, start: int = 0, **attributes: str
) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """Draw cats `start .. start + n - 1` of a seed; `fur="black", eyes="green"` fixes attributes.

    Returns images (n, 3, size, size), float32 in [-1, 1]; labels, name -> long (n,) of indices into
    ATTRIBUTES[name]; captions. The same seed and index give the same cat at every size.
    """
    for name, value in attributes.items():
        if value not in ATTRIBUTES.get(name, ()):
            raise ValueError(f"{name}={value!r}: expected one of these: {ATTRIBUTES}")
    cats = [describe(seed, index, attributes) for index in range(start, start + n)]
    # 64 at a time fit the processor's cache.
    images = torch.cat([render(cats[i : i + 64], size) for i in range(0, n, 64)])
    labels = {
        name: torch.tensor([values.index(cat[name]) for cat in cats])
        for name, values in ATTRIBUTES.items()
    }
    return images, labels, [caption(cat) for cat in cats]


def describe(seed: int, index: int, wanted: dict[str, str]) -> dict:
    """Everything about one cat: its attributes and its free numbers, by name."""
    rng = random.Random(f"{seed} {index}")
    cat = {name: rng.uniform(low, high) for name, (low, high) in FREE.items()}
    furs = [coat for coat in COATS if wanted.get("fur", coat[0]) == coat[0]]
    coats = [coat for coat in furs if wanted.get("pattern", coat[1]) == coat[1]]
    if not coats:
        raise ValueError("a white bib cannot be seen on white fur: choose another fur or pattern")
    cat["fur"], cat["pattern"] = rng.choice(coats)
    cat["eyes"], cat["background"] = rng.choice(tuple(EYES)), rng.choice(tuple(BACKGROUND))
    return cat | wanted


def caption(cat: dict) -> str:
    """ "an orange tabby cat with green eyes on a blue background" """
    article = "an" if cat["fur"][0] in "aeiou" else "a"
    coat = cat["fur"] if cat["pattern"] == "plain" else f"{cat['fur']} {cat['pattern']}"
    return f"{article} {coat} cat with {cat['eyes']} eyes on a {cat['background']} background"


def render(cats: list[dict], size: int) -> Tensor:
    """Paint cats back to front, background to whiskers: (n, 3, size, size) in [-1, 1]."""

    def colours(rgb: list[tuple]) -> Tensor:
        return torch.tensor(rgb).view(-1, 1, 1, 3)

    def has(pattern: str) -> Tensor:
        return torch.tensor([float(cat["pattern"] == pattern) for cat in cats]).view(-1, 1, 1)

    free = {name: torch.tensor([cat[name] for cat in cats]).view(-1, 1, 1) for name in FREE}
    light = free["fur_light"][..., None]
    fur, second = (colours([FUR[cat["fur"]][i] for cat in cats]) * light for i in (0, 1))
    ink = fur * 0.45
    tabby, tuxedo, patched = has("tabby"), has("tuxedo"), has("patched")
    background = colours([BACKGROUND[cat["background"]] for cat in cats])
    canvas = (background * free["background_light"][..., None]).repeat(1, size, size, 1)

    # Pixel centres, then the cat's own coordinates: moved, turned by the tilt, scaled.
    centre = (torch.arange(size) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    x, y = (x - free["x"]) / free["scale"], (y - free["y"]) / free["scale"]
    cos, sin = free["tilt"].cos(), free["tilt"].sin()
    x, y = cos * x + sin * y, cos * y - sin * x
    pixel = 2 / size / free["scale"]
    side = x.abs()  # a face is symmetric: what is drawn at `side` appears left and right

    def cover(distance: Tensor) -> Tensor:
        return (0.5 - distance / pixel).clamp(0, 1)

    def paint(coverage: Tensor, colour: Tensor | tuple) -> None:
        colour = torch.as_tensor(colour, dtype=torch.float32)
        canvas.lerp_(colour.expand_as(canvas), coverage[..., None].expand_as(canvas))

    def shape(distance: Tensor, colour: Tensor | tuple) -> Tensor:
        """An inked outline, then the inside; returns what the inside covers."""
        inside = cover(distance)
        paint(cover(distance - 0.035), ink)
        paint(inside, colour)
        return inside

    stripes = (y * 2 * math.pi / 0.28).cos() * 0.045  # negative: inside a stripe
    patch_x = x * free["patch_side"].sign()

    # Tail and body, partly behind the head.
    tail_x, tail_start = x * free["tail_side"].sign() - 0.50, free["tail_curl"] * 0.3 - 2.0
    inside = shape(arc(tail_x, y - 0.62, 0.27, tail_start, length=4.0, width=0.09), fur)
    paint(inside * tabby * cover(stripes), second)
    paint(inside * tuxedo * cover(y - 0.42), WHITE)
    inside = shape(ellipse(x, y - 0.85, 0.40, 0.55), fur)
    paint(inside * tabby * cover(stripes) * cover(0.17 - side), second)
    paint(inside * tuxedo * cover(ellipse(x, y - 0.75, 0.24, 0.40)), WHITE)
    paint(inside * patched * cover(ellipse(patch_x + 0.30, y - 0.72, 0.30, 0.30)), second)

    # Ears and head.
    height = free["ear_height"]
    ears = triangle(side, y, (0.10, -0.42), (0.50, -0.38 - height), (0.60, -0.10)) - 0.03
    inside = shape(ears, fur)
    paint(inside * patched * cover(-patch_x), second)
    paint(cover(triangle(side, y, (0.26, -0.36), (0.48, -0.28 - height), (0.52, -0.2))), PINK)
    head = torch.minimum(ellipse(x, y + 0.08, 0.62, 0.48), ellipse(x, y - 0.06, 0.66, 0.32))
    inside = shape(head, fur)
    forehead = cover(y + 0.30) * cover(torch.minimum(side - 0.055, (side - 0.21).abs() - 0.05))
    cheek = cover(0.48 - side) * cover(((y - 0.10).abs() - 0.09).abs() - 0.04)
    paint(inside * tabby * (forehead + cheek).clamp(0, 1), second)
    paint(inside * patched * cover(ellipse(patch_x - 0.36, y + 0.22, 0.40, 0.46)), second)
    muzzle, blaze = ellipse(x, y - 0.26, 0.38, 0.26), ((-0.1, 0.2), (0.0, -0.52), (0.18, 0.2))
    paint(inside * tuxedo * cover(torch.minimum(muzzle, triangle(side, y, *blaze))), WHITE)

    # Face: eyes with iris, pupil and glint; mouth, nose, whiskers.
    radius = 0.19
    eye_x, eye_y = side - 0.265, y + 0.07
    paint(cover(torch.hypot(eye_x, eye_y) - radius - 0.035), DARK)
    inside = cover(torch.hypot(eye_x, eye_y) - radius)
    paint(inside, colours([EYES[cat["eyes"]] for cat in cats]))
    look_x = x - x.sign() * 0.265 - free["gaze"]  # both eyes look the same way, so not mirrored
    paint(inside * cover(ellipse(look_x, eye_y, radius * 0.42, radius * 0.9)), DARK)
    paint(inside * cover(ellipse(look_x + 0.05, eye_y + 0.06, 0.05, 0.05)), WHITE)
    lips = arc(side - 0.07, y - 0.24, 0.07, math.pi / 2 - 1.3, length=2.6, width=0.02)
    paint(cover(torch.minimum(lips, line(x, y, (0.0, 0.18), (0.0, 0.24), width=0.02))), ink)
    paint(cover(triangle(side, y, (-0.1, 0.12), (0.085, 0.12), (0.0, 0.21)) - 0.012), PINK)
    upper = line(side, y, (0.46, 0.18), (0.84, 0.13), width=0.018)
    lower = line(side, y, (0.46, 0.25), (0.82, 0.31), width=0.018)
    paint(cover(torch.minimum(upper, lower)), WHITE)
    return (canvas.clamp(0, 1) * 2 - 1).permute(0, 3, 1, 2).contiguous()


def ellipse(x: Tensor, y: Tensor, radius_x: float, radius_y: float) -> Tensor:
    """Signed distance, first order: the implicit function divided by its gradient's length."""
    value = torch.sqrt((x / radius_x) ** 2 + (y / radius_y) ** 2 + 1e-12)
    slope = torch.sqrt((x / radius_x**2) ** 2 + (y / radius_y**2) ** 2 + 1e-12)
    return value * (value - 1) / slope


def triangle(x: Tensor, y: Tensor, *corners: tuple) -> Tensor:
    """Signed distance (near the corners a lower bound): the largest distance from a side."""
    (ax, ay), (bx, by), (cx, cy) = corners
    turn = torch.as_tensor((bx - ax) * (cy - ay) - (by - ay) * (cx - ax)).sign()
    sides = []
    for (px, py), (qx, qy) in zip(corners, corners[1:] + corners[:1], strict=True):
        dx, dy = torch.as_tensor(qx - px), torch.as_tensor(qy - py)
        sides.append(turn * (dy * (x - px) - dx * (y - py)) / torch.hypot(dx, dy))
    return functools.reduce(torch.maximum, sides)


def line(x: Tensor, y: Tensor, start: tuple, end: tuple, width: float) -> Tensor:
    """Signed distance from a straight line with round ends; `width` is half its thickness."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = (((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return torch.hypot(x - start[0] - along * dx, y - start[1] - along * dy) - width


def arc(x: Tensor, y: Tensor, radius: float, start, length: float, width: float) -> Tensor:
    """Signed distance from an arc around 0 with round ends; `start` and `length` are in radians."""
    middle = torch.as_tensor(start + length / 2)
    angle = torch.atan2(y * middle.cos() - x * middle.sin(), x * middle.cos() + y * middle.sin())
    angle = angle.clamp(-length / 2, length / 2) + middle
    return torch.hypot(x - radius * angle.cos(), y - radius * angle.sin()) - width
