"""Pictures to train on, decoded once into a file of bytes that is mapped into memory: drawn cats, or a folder."""

import glob
import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from toolbox import cats
from toolbox.files import whole_file

CACHE = Path("data")  # beside runs/, where the program is started
DRAWN_CATS = (
    16_384  # more would be a few seconds' work; these are enough that a network of this size does not learn them by heart
)
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Data:
    """Pictures, and what is known of each: for `classes` {"fur": ("black", ...), ...} a column of `labels` for each name."""

    name: str
    images: Tensor  # (N, C, size, size), bytes 0 .. 255
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    labels: Tensor | None = None  # (N, len(classes)) long, indices into classes' values
    captions: Sequence[str] = ()  # one for each picture, or none at all
    mirror: bool = True  # may left and right be exchanged? Not in digits

    @property
    def size(self) -> int:
        return self.images.shape[-1]

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def content(self) -> int:
        """A number that other pictures would not have: the checksum of a thousand of them, evenly spread."""
        return zlib.crc32(self.images[:: len(self.images) // 1000 + 1].numpy().tobytes())


def load_data(name: str, size: int | None = None) -> Data:
    """`cats` (32 px unless told), or a folder of pictures, at any depth (64 px unless told: centre-cropped, resized)."""
    if size is not None and size < 1:
        raise ValueError(f"--size {size}: expected 1 pixel or more")
    if name == "cats":
        return load_cats(size or 32)
    if Path(name).is_dir():
        return load_folder(Path(name), size or 64)
    raise ValueError(f"--data {name}: expected the word 'cats' or a folder of pictures, and there is no folder of that name")


def load_cats(size: int) -> Data:
    renderer = hashlib.sha256(Path(cats.__file__).read_bytes()).hexdigest()[:8]  # another renderer, other cats

    def drawings() -> Iterator[Tensor]:
        for start in tqdm(range(0, DRAWN_CATS, 256), desc="drawing cats", leave=False):
            yield from to_bytes(cats.draw(256, size, start=start)[0])

    return Data("cats", cached(f"cats-{size}px-{renderer}", drawings, DRAWN_CATS, (3, size, size)))


def load_folder(folder: Path, size: int) -> Data:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"{folder}: expected pictures ({', '.join(sorted(SUFFIXES))}) in this folder or below, found none")
    listing = "\n".join(f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)
    key = hashlib.sha256(listing.encode()).hexdigest()[:8]  # another file, name, size or date: another key

    def pictures() -> Iterator[Tensor]:
        for path in tqdm(files, desc=f"reading {folder.name}", leave=False):
            try:
                with Image.open(path) as image:
                    image = ImageOps.exif_transpose(image).convert("RGB")
                    yield pil_to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
            except Exception as error:  # Pillow raises nearly anything on a broken file
                tqdm.write(f"skipped {path}: not a readable picture ({error})")

    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    images = cached(f"{folder.resolve().name}-{place}-{size}px-{key}", pictures, len(files), (3, size, size))
    return Data(folder.resolve().name, images)


def cached(name: str, make: Callable[[], Iterator[Tensor]], at_most: int, shape: tuple[int, int, int]) -> Tensor:
    """The pictures that `make()` yields, (N, *shape) bytes, mapped from a file that is written the first time.

    What stands behind the last hyphen of the name is its version; files of other versions are removed.
    """
    path = CACHE / f"{name}.bytes"
    each = shape[0] * shape[1] * shape[2]
    if not path.exists():
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            for picture in make():
                file.write(picture.numpy().tobytes())
        for old in CACHE.glob(f"{glob.escape(name.rpartition('-')[0])}-????????.bytes"):
            if old != path:
                with suppress(OSError):  # Windows keeps a file that another training still reads
                    old.unlink()
    count = path.stat().st_size // each
    if count == 0:
        path.unlink()
        raise ValueError(f"none of the {at_most} files is a readable picture")
    return torch.from_file(str(path), size=count * each, dtype=torch.uint8).view(count, *shape)


def to_bytes(images: Tensor) -> Tensor:
    """[-1, 1] -> 0 .. 255, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """0 .. 255 -> [-1, 1]."""
    return images.float() / 127.5 - 1
