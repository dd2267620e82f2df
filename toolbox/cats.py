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
    "black": (0.18, 0.18, 0.22),
    "grey": (0.52, 0.55, 0.61),
    "white": (0.97, 0.96, 0.94),
    "cream": (0.97, 0.84, 0.62),
    "orange": (0.95, 0.56, 0.16),
    "brown": (0.50, 0.32, 0.19),
}
SECOND = {
    "black": (0.46, 0.46, 0.52),
    "grey": (0.27, 0.29, 0.36),
    "white": (0.60, 0.60, 0.66),
    "cream": (0.78, 0.52, 0.28),
    "orange": (0.66, 0.29, 0.05),
    "brown": (0.24, 0.13, 0.07),
}
PATTERN = ("plain", "tabby", "tuxedo", "patched")
EYES = {"green": (0.45, 0.88, 0.30), "blue": (0.25, 0.66, 1.00), "yellow": (1.00, 0.84, 0.10)}
BACKGROUND = {
    "blue": (0.45, 0.68, 0.88),
    "green": (0.56, 0.78, 0.52),
    "pink": (0.96, 0.66, 0.74),
    "yellow": (0.97, 0.87, 0.45),
    "purple": (0.66, 0.56, 0.84),
}
ATTRIBUTES = {"fur": tuple(FUR), "pattern": PATTERN, "eyes": tuple(EYES), "background": tuple(BACKGROUND)}
INVISIBLE = {("white", "tuxedo"), ("cream", "tuxedo")}  # a white bib cannot be seen on these furs
WHITE, PINK, DARK = (0.98, 0.97, 0.95), (0.93, 0.56, 0.58), (0.10, 0.08, 0.10)

# What varies from cat to cat beside its attributes: name -> (lowest, highest), drawn uniformly.
FREE = {
    "x": (-0.10, 0.10),
    "y": (-0.06, 0.08),
    "scale": (0.88, 1.06),
    "tilt": (-0.16, 0.16),  # radians
    "ear_width": (0.9, 1.1),
    "ear_height": (0.40, 0.58),
    "eye_size": (0.14, 0.17),
    "eye_open": (0.75, 1.0),
    "eye_gap": (0.23, 0.27),
    "gaze": (-0.04, 0.04),
    "pupil": (0.35, 0.7),
    "cheeks": (0.0, 1.0),
    "tail_side": (-1.0, 1.0),
    "tail_curl": (0.5, 1.5),
    "patch_side": (-1.0, 1.0),
    "stripe_shift": (-0.03, 0.03),
    "fur_light": (0.96, 1.03),
    "background_light": (0.97, 1.03),
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
        name: torch.tensor([values.index(cat[name]) for cat in cats], dtype=torch.long)
        for name, values in ATTRIBUTES.items()
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
    tabby, tuxedo, patched = (
        torch.tensor([float(cat["pattern"] == p) for cat in cats]).view(-1, 1, 1) for p in PATTERN[1:]
    )

    # Pixel centres, then the cat's own coordinates: moved, turned by the tilt, scaled.
    centre = (torch.arange(size) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    canvas = colours(BACKGROUND, cats, "background") * free["background_light"][..., None]
    canvas = (canvas * (1.04 - 0.08 * (y + 1) / 2)[..., None]).clone()
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

    stripes = (((y + free["stripe_shift"]) * 2 * math.pi / 0.26).cos() - 0.1) * 0.04  # negative: inside a stripe

    # Tail and body, partly behind the head.
    way = free["tail_side"].sign()
    curl = free["tail_curl"]
    tail = arc(x * way - 0.50, y - 0.62, radius=0.27, start=-2.0 + curl * 0.3, width=0.085)
    inside = shape(tail, fur)
    paint(inside * tabby * cover(stripes), second)
    paint(inside * tuxedo * cover(y - 0.42), WHITE)
    body = ellipse(x, y - 0.85, 0.40, 0.55)
    inside = shape(body, fur)
    paint(inside * tabby * cover(stripes) * cover(0.2 - side), second)
    paint(inside * tuxedo * cover(ellipse(x, y - 0.75, 0.20, 0.36)), WHITE)
    patch_way = free["patch_side"].sign()
    paint(inside * patched * cover(ellipse(x * patch_way + 0.32, y - 0.72, 0.26, 0.26)), second)

    # Ears and head.
    tip = (0.50 * free["ear_width"], -0.38 - free["ear_height"])
    ear = triangle(side, y, (0.10, -0.42), tip, (0.60, -0.10)) - 0.03
    inside = shape(ear, fur)
    paint(inside * patched * cover(-x * patch_way), second)
    paint(cover(triangle(side, y, (0.26, -0.36), (0.48 * free["ear_width"], -0.28 - free["ear_height"]), (0.52, -0.2))), PINK)
    head = torch.minimum(ellipse(x, y + 0.08, 0.62, 0.48), ellipse(x, y - 0.06, 0.62 + 0.08 * free["cheeks"], 0.32))
    inside = shape(head, fur)
    forehead = cover(y + 0.28) * (cover(side - 0.045) + cover((side - 0.17).abs() - 0.04)).clamp(0, 1)
    cheek = cover(0.46 - side) * cover(((y - 0.06).abs() - 0.07).abs() - 0.03)
    paint(inside * tabby * (forehead + cheek).clamp(0, 1), second)
    paint(inside * patched * cover(ellipse(x * patch_way - 0.36, y + 0.24, 0.36, 0.40)), second)
    blaze = torch.minimum(ellipse(x, y - 0.24, 0.34, 0.24), triangle(side, y, (-0.1, 0.2), (0.0, -0.48), (0.16, 0.2)))
    paint(inside * tuxedo * cover(blaze), WHITE)

    # Face: eyes with iris, pupil and glint; nose, mouth, whiskers.
    size_, lid = free["eye_size"], free["eye_open"]
    eye_x, eye_y = side - free["eye_gap"], y + 0.08
    paint(cover(ellipse(eye_x, eye_y, size_ + 0.035, size_ * lid + 0.035)), DARK)
    inside = cover(ellipse(eye_x, eye_y, size_, size_ * lid))
    paint(inside, colours(EYES, cats, "eyes"))
    gaze_x = x - x.sign() * free["eye_gap"] - free["gaze"]
    paint(inside * cover(ellipse(gaze_x, eye_y, size_ * free["pupil"] * 0.75, size_ * 0.85)), DARK)
    paint(inside * cover(ellipse(gaze_x + 0.05, eye_y + 0.05, 0.04, 0.04)), WHITE)
    mouth = torch.minimum(arc(side - 0.07, y - 0.22, 0.07, math.pi / 2 - 1.3, 0.014, 2.6), capsule(x, y, 0.0, 0.16, 0.0, 0.22, 0.012))
    paint(cover(mouth), ink)
    paint(cover(triangle(side, y, (-0.1, 0.10), (0.085, 0.10), (0.0, 0.19)) - 0.01), PINK)
    whiskers = torch.minimum(capsule(side, y, 0.42, 0.14, 0.82, 0.08, 0.011), capsule(side, y, 0.42, 0.20, 0.80, 0.26, 0.011))
    paint(cover(whiskers), WHITE)
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


def capsule(x: Tensor, y: Tensor, ax: float, ay: float, bx: float, by: float, width: float) -> Tensor:
    """Signed distance from a thick line with round ends; `width` is half its thickness."""
    along = (((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2)).clamp(0, 1)
    return torch.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay)) - width


def arc(x: Tensor, y: Tensor, radius: float, start, width: float, length: float = 4.0) -> Tensor:
    """Signed distance from a thick piece of a circle with round ends, from angle `start` on, `length` radians."""
    middle = torch.as_tensor(start + length / 2)
    along = torch.atan2(y * middle.cos() - x * middle.sin(), x * middle.cos() + y * middle.sin())
    angle = along.clamp(-length / 2, length / 2) + middle
    return torch.hypot(x - radius * angle.cos(), y - radius * angle.sin()) - width
