"""Drawn cats: an endless, deterministic dataset with known attributes and captions, rendered by this file alone.

A cat is a stack of shapes, painted one over the other. A shape is a signed distance (negative inside), and it covers
a pixel as far as the pixel's centre lies inside, counted in pixels and clamped to 0 .. 1: that is anti-aliasing, and
why the same cat can be drawn at any size. All cats of a batch are painted at once: a number of a cat has the shape
(n, 1, 1), a distance (n, size, size). Positions are in units of half a picture: x to the right, y down, both -1 .. 1.
"""

import math
import random

import torch
from torch import Tensor

# Red, green, blue in 0 .. 1. Each fur has a second colour, of its stripes and patches, that stands out against it.
FUR = {
    "black": (0.13, 0.13, 0.17),
    "grey": (0.55, 0.60, 0.68),
    "white": (0.97, 0.96, 0.94),
    "orange": (0.96, 0.57, 0.12),
}
SECOND = {
    "black": (0.55, 0.31, 0.13),
    "grey": (0.23, 0.25, 0.33),
    "white": (0.82, 0.55, 0.30),
    "orange": (0.56, 0.21, 0.03),
}
PATTERN = ("plain", "tabby", "tuxedo", "patched")
EYES = {"green": (0.40, 0.88, 0.30), "blue": (0.25, 0.66, 1.00), "yellow": (1.00, 0.84, 0.10)}
BACKGROUND = {
    "blue": (0.36, 0.60, 0.92),
    "green": (0.46, 0.80, 0.44),
    "pink": (0.96, 0.58, 0.72),
    "yellow": (0.98, 0.88, 0.38),
}
ATTRIBUTES = {"fur": tuple(FUR), "pattern": PATTERN, "eyes": tuple(EYES), "background": tuple(BACKGROUND)}
INVISIBLE = {("white", "tuxedo")}  # a white bib cannot be seen on white fur
WHITE, PINK, DARK = (0.98, 0.97, 0.95), (0.93, 0.56, 0.58), (0.10, 0.08, 0.10)

# What varies from cat to cat beside its attributes: name -> (lowest, highest), drawn uniformly.
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


def draw(n: int, size: int, seed: int = 0, start: int = 0, **attributes: str) -> tuple[Tensor, dict, list[str]]:
    """Draw the cats `start .. start + n - 1` of a seed; `fur="black", eyes="green"` asks for cats of these attributes.

    Returns images (n, 3, size, size), float32 in [-1, 1]; attributes, name -> long (n,) of indices into
    ATTRIBUTES[name]; captions. The same seed and index give the same cat at every size.
    """
    check_wish(n, size, attributes)
    cats = [describe(seed, index, attributes) for index in range(start, start + n)]
    images = [render(cats[i : i + 64], size) for i in range(0, n, 64)]  # 64 at a time fit the processor's cache
    labels = {
        name: torch.tensor([values.index(cat[name]) for cat in cats], dtype=torch.long) for name, values in ATTRIBUTES.items()
    }
    return torch.cat([torch.zeros(0, 3, size, size), *images]), labels, [caption(cat) for cat in cats]


def check_wish(n: int, size: int, attributes: dict[str, str]) -> None:
    if n < 0 or size < 1:
        raise ValueError(f"expected n of 0 or more and a size of 1 pixel or more, got n={n}, size={size}")
    for name, value in attributes.items():
        if name not in ATTRIBUTES:
            raise ValueError(f"a drawn cat has no attribute {name!r}: choose from {', '.join(ATTRIBUTES)}")
        if value not in ATTRIBUTES[name]:
            raise ValueError(f"{name} {value!r} is unknown: choose from {', '.join(ATTRIBUTES[name])}")
    if (attributes.get("fur"), attributes.get("pattern")) in INVISIBLE:
        raise ValueError(f"a white bib cannot be seen on {attributes['fur']} fur: choose another fur or pattern")


def describe(seed: int, index: int, wanted: dict[str, str]) -> dict:
    """Everything about one cat: its attributes by name, its free numbers by name."""
    rng = random.Random(f"{seed} {index}")
    cat = {name: rng.uniform(low, high) for name, (low, high) in FREE.items()}
    coats = [(fur, pattern) for fur in FUR for pattern in PATTERN if (fur, pattern) not in INVISIBLE]
    coats = [c for c in coats if wanted.get("fur", c[0]) == c[0] and wanted.get("pattern", c[1]) == c[1]]
    cat["fur"], cat["pattern"] = rng.choice(coats)
    cat["eyes"], cat["background"] = rng.choice(tuple(EYES)), rng.choice(tuple(BACKGROUND))
    return cat | wanted


def caption(cat: dict) -> str:
    """ "an orange tabby cat with green eyes on a blue background" """
    article = "an" if cat["fur"][0] in "aeiou" else "a"
    pattern = "" if cat["pattern"] == "plain" else cat["pattern"] + " "
    return f"{article} {cat['fur']} {pattern}cat with {cat['eyes']} eyes on a {cat['background']} background"


def render(cats: list[dict], size: int) -> Tensor:
    """Paint cats back to front: background, tail, body, ears, head, coat, face. Returns (n, 3, size, size)."""
    free = {name: torch.tensor([cat[name] for cat in cats]).view(-1, 1, 1) for name in FREE}
    fur, second = colours(FUR, cats, "fur"), colours(SECOND, cats, "fur")
    fur, second = fur * free["fur_light"][..., None], second * free["fur_light"][..., None]
    ink = fur * 0.45
    tabby, tuxedo, patched = (torch.tensor([float(cat["pattern"] == p) for cat in cats]).view(-1, 1, 1) for p in PATTERN[1:])

    # Pixel centres, then the cat's own coordinates: moved, turned by the tilt, scaled.
    centre = (torch.arange(size) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    canvas = (colours(BACKGROUND, cats, "background") * free["background_light"][..., None]).repeat(1, size, size, 1)
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
    tail = arc(x * free["tail_side"].sign() - 0.50, y - 0.62, 0.27, free["tail_curl"] * 0.3 - 2.0, length=4.0, width=0.09)
    inside = shape(tail, fur)
    paint(inside * tabby * cover(stripes), second)
    paint(inside * tuxedo * cover(y - 0.42), WHITE)
    inside = shape(ellipse(x, y - 0.85, 0.40, 0.55), fur)
    paint(inside * tabby * cover(stripes) * cover(0.17 - side), second)
    paint(inside * tuxedo * cover(ellipse(x, y - 0.75, 0.24, 0.40)), WHITE)
    paint(inside * patched * cover(ellipse(patch_x + 0.30, y - 0.72, 0.30, 0.30)), second)

    # Ears and head.
    height = free["ear_height"]
    inside = shape(triangle(side, y, (0.10, -0.42), (0.50, -0.38 - height), (0.60, -0.10)) - 0.03, fur)
    paint(inside * patched * cover(-patch_x), second)
    paint(cover(triangle(side, y, (0.26, -0.36), (0.48, -0.28 - height), (0.52, -0.2))), PINK)
    head = torch.minimum(ellipse(x, y + 0.08, 0.62, 0.48), ellipse(x, y - 0.06, 0.66, 0.32))
    inside = shape(head, fur)
    forehead = cover(y + 0.30) * cover(torch.minimum(side - 0.055, (side - 0.21).abs() - 0.05))
    cheek = cover(0.48 - side) * cover(((y - 0.10).abs() - 0.09).abs() - 0.04)
    paint(inside * tabby * (forehead + cheek).clamp(0, 1), second)
    paint(inside * patched * cover(ellipse(patch_x - 0.36, y + 0.22, 0.40, 0.46)), second)
    blaze = torch.minimum(ellipse(x, y - 0.26, 0.38, 0.26), triangle(side, y, (-0.1, 0.2), (0.0, -0.52), (0.18, 0.2)))
    paint(inside * tuxedo * cover(blaze), WHITE)

    # Face: eyes with iris, pupil and glint; mouth, nose, whiskers.
    across = 0.19
    eye_x, eye_y = side - 0.265, y + 0.07
    paint(cover(torch.hypot(eye_x, eye_y) - across - 0.035), DARK)
    inside = cover(torch.hypot(eye_x, eye_y) - across)
    paint(inside, colours(EYES, cats, "eyes"))
    look_x = x - x.sign() * 0.265 - free["gaze"]  # both eyes look the same way, so not mirrored
    paint(inside * cover(ellipse(look_x, eye_y, across * 0.42, across * 0.9)), DARK)
    paint(inside * cover(ellipse(look_x + 0.05, eye_y + 0.06, 0.05, 0.05)), WHITE)
    lips = arc(side - 0.07, y - 0.24, 0.07, math.pi / 2 - 1.3, length=2.6, width=0.02)
    paint(cover(torch.minimum(lips, line(x, y, (0.0, 0.18), (0.0, 0.24), width=0.02))), ink)
    paint(cover(triangle(side, y, (-0.1, 0.12), (0.085, 0.12), (0.0, 0.21)) - 0.012), PINK)
    upper, lower = (
        line(side, y, (0.46, 0.18), (0.84, 0.13), width=0.018),
        line(side, y, (0.46, 0.25), (0.82, 0.31), width=0.018),
    )
    paint(cover(torch.minimum(upper, lower)), WHITE)
    return (canvas.clamp(0, 1) * 2 - 1).permute(0, 3, 1, 2).contiguous()


def colours(palette: dict[str, tuple], cats: list[dict], attribute: str) -> Tensor:
    return torch.tensor([palette[cat[attribute]] for cat in cats]).view(-1, 1, 1, 3)


def ellipse(x: Tensor, y: Tensor, radius_x, radius_y) -> Tensor:
    """Signed distance, first order: the implicit function over the length of its gradient."""
    value = torch.sqrt((x / radius_x) ** 2 + (y / radius_y) ** 2 + 1e-12)
    slope = torch.sqrt((x / radius_x**2) ** 2 + (y / radius_y**2) ** 2 + 1e-12)
    return value * (value - 1) / slope


def triangle(x: Tensor, y: Tensor, *corners: tuple) -> Tensor:
    """Signed distance (a bound outside of the corners): the largest of the distances from the three sides."""
    (ax, ay), (bx, by), (cx, cy) = corners
    turn = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    turn = torch.as_tensor(turn).sign()
    sides = []
    for (px, py), (qx, qy) in zip(corners, corners[1:] + corners[:1], strict=True):
        dx, dy = torch.as_tensor(qx - px), torch.as_tensor(qy - py)
        sides.append(turn * (dy * (x - px) - dx * (y - py)) / torch.hypot(dx, dy))
    return torch.maximum(torch.maximum(sides[0], sides[1]), sides[2])


def line(x: Tensor, y: Tensor, start: tuple[float, float], end: tuple[float, float], width: float) -> Tensor:
    """Signed distance from a straight line with round ends; `width` is half its thickness."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = (((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return torch.hypot(x - start[0] - along * dx, y - start[1] - along * dy) - width


def arc(x: Tensor, y: Tensor, radius: float, start: Tensor | float, length: float, width: float) -> Tensor:
    """Signed distance from a piece of a circle around 0 with round ends, from angle `start` on, `length` radians long."""
    middle = torch.as_tensor(start + length / 2)
    angle = torch.atan2(y * middle.cos() - x * middle.sin(), x * middle.cos() + y * middle.sin())
    angle = angle.clamp(-length / 2, length / 2) + middle
    return torch.hypot(x - radius * angle.cos(), y - radius * angle.sin()) - width
