"""Images to train on: drawn cats, well-known sets, or a folder of your own.

They are decoded once, into a file in CACHE that is mapped into memory.
"""

import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from toolbox import cats
from toolbox.files import UserError, atomic_write, check_number, printable, remove_leftovers

CACHE = Path("data")  # in the current folder, like runs/
OUTPUTS = {"model.pt", "resume.pt", "model_index.json"}  # files that mark a program's output
SIZES = {"cats": 32, "mnist": 28, "fashion": 28, "cifar10": 32, "pets": 64}  # pixels, by default
FOLDER_SIZE, MAX_SIZE = 64, 512
DRAWN_CATS = 16_384  # enough that a small network does not memorize them
HELD_OUT_CATS = 2_048  # the cats after those
HELD_OUT_EVERY = 16  # one in 16 of a folder's images
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CAT_BREEDS = (  # the other 25 breeds of these pets are dogs
    *("Abyssinian", "Bengal", "Birman", "Bombay", "British Shorthair", "Egyptian Mau"),
    *("Maine Coon", "Persian", "Ragdoll", "Russian Blue", "Siamese", "Sphynx"),
)
TORCHVISION = {  # torchvision's class, the name and the values of its labels, a folder in CACHE
    "mnist": (datasets.MNIST, "digit", "0123456789", "MNIST/raw"),
    "fashion": (datasets.FashionMNIST, "class", datasets.FashionMNIST.classes, "FashionMNIST/raw"),
    "cifar10": (datasets.CIFAR10, "class", OBJECTS, "."),
    "pets": (datasets.OxfordIIITPet, "breed", CAT_BREEDS, "oxford-iiit-pet"),
}
Classes = dict[str, tuple[str, ...]]  # attributes and their values: {"fur": ("black", ...), ...}
Sample = tuple[Tensor, Sequence[int], str]  # (C, size, size) uint8, label per attribute, caption
Source = tuple[Classes, Iterator[Sample], str]  # the str changes when the samples do


@dataclass(frozen=True)
class Data:
    """Images and what is known about them; `labels` has a column of indices for each attribute."""

    name: str
    images: Tensor  # (N, C, size, size) uint8
    classes: Classes = field(default_factory=dict)
    labels: Tensor | None = None  # (N, len(classes)) long
    captions: Sequence[str] = ()  # one for each image, or none at all
    hflip: bool = True  # does a mirrored image look as real? Digits do not

    @property
    def size(self) -> int:
        return self.images.shape[-1]

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def checksum(self) -> str:
        """CRC-32 of the mean colours of a thousand images: other rounding does not change it."""
        colours = from_uint8(evenly_spaced(self.images, 1000)).mean((2, 3))
        return f"{zlib.crc32((32 * colours).round().short().numpy().tobytes()):08x}"

    def batch(self, indices: Tensor, flipped: Tensor) -> Tensor:
        """A training batch: float32 (B, C, size, size) in [-1, 1]. flipped: (B,) bool."""
        x0 = from_uint8(self.images[indices])
        return torch.where(flipped[:, None, None, None], x0.flip(-1), x0)


def load_data(name: str, size: int | None = None, held_out: bool = False) -> Data:
    """A data set by its name in SIZES, or a folder of images ("./cats" if it has such a name).

    held_out: images of the same kind that are never trained on, to measure generalization.
    """
    size = SIZES.get(name, FOLDER_SIZE) if size is None else size
    check_number("--size", size, 1, MAX_SIZE)
    known_as = file_name = name
    if name == "cats":
        source = drawn_cats(size, held_out)
    elif name in TORCHVISION:
        source = known_set(name, size, held_out)
    elif name and Path(name).is_dir():
        source = image_folder(Path(name), size, held_out)
        place = Path(os.path.abspath(name))  # a link keeps the name that was typed
        known_as = f"{place.name}-folder" if place.name in SIZES else printable(place.name)
        file_name = f"{place.name}-{zlib.crc32(os.fsencode(place)):08x}"  # others have this name
    else:
        raise UserError(f"--data {name!r}: expected a folder of images, or: {', '.join(SIZES)}")
    path = CACHE / f"{file_name}{'-held-out' if held_out else ''}-{size}px.cache"
    return Data(known_as, **cached(path, *source), hflip=name != "mnist")


def drawn_cats(size: int, held_out: bool) -> Source:
    """Captions name all of their attributes: fur, pattern, eyes, background."""
    indices = range(DRAWN_CATS, DRAWN_CATS + HELD_OUT_CATS) if held_out else range(DRAWN_CATS)

    def samples() -> Iterator[Sample]:
        for start in tqdm(indices[::64], desc="drawing cats", leave=False):
            images, labels, captions = cats.draw(64, size, start=start)
            rows = torch.stack([*labels.values()], dim=1).tolist()
            yield from zip(to_uint8(images), rows, captions, strict=True)

    return cats.ATTRIBUTES, samples(), f"{indices} {Path(cats.__file__).read_text('utf-8')}"


def known_set(name: str, size: int, held_out: bool) -> Source:
    """What torchvision downloads, or finds in CACHE. Its test set is held out."""
    dataset, kind, values, folder = TORCHVISION[name]
    split = "test" if held_out else "trainval"
    part = {"split": split} if name == "pets" else {"train": not held_out}

    def samples() -> Iterator[Sample]:
        try:
            pairs = dataset(CACHE, download=True, **part)
        except Exception as error:  # network, archive, file: nearly anything can fail
            sentence = f"its download failed ({error}); without internet, put the files of"
            place = f"torchvision's {dataset.__name__} into {CACHE / folder}"
            raise UserError(f"--data {name}: {sentence} {place}") from error
        for image, label in tqdm(pairs, desc=f"reading {name}", leave=False):
            caption = pairs.classes[label].split(" - ")[0]  # MNIST's are "0 - zero", ...
            if caption in values:
                image = pil_to_tensor(center_crop_resize(image, size))
                yield image, [values.index(caption)], caption

    return {kind: tuple(values)}, samples(), ""


def image_folder(folder: Path, size: int, held_out: bool) -> Source:
    """Images at any depth, every 16th of them held out.

    Two or more sub-folders are classes if every image is in one. A caption is the text of cat.txt
    next to cat.jpg, else the name of the sub-folder.
    """
    files = list_files(folder)
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    others = Counter(p.suffix for p in files if p.suffix.lower() not in {*SUFFIXES, ".txt"})
    counts = ", ".join(f"{n} {suffix}" for suffix, n in sorted(others.items()))
    found = f"{folder}: {len(images)} images" + (f"; not read: {counts}" if counts else "")
    if len(images) < HELD_OUT_EVERY:
        found += f"; expected {HELD_OUT_EVERY} or more, to hold one out"
        if held_out or not images:
            raise UserError(f"{found}, of these kinds: {', '.join(sorted(SUFFIXES))}")
    sub_folders = {path: path.parts[0] if len(path.parts) > 1 else "" for path in images}
    names = tuple(sorted({*sub_folders.values()}))
    classes = {"class": names} if len(names) > 1 and "" not in names else {}
    for name in names if classes else ():
        if "," in name or not name.isprintable():
            raise UserError(f"{folder / name}: a class cannot have this name; rename the folder")

    def samples() -> Iterator[Sample]:
        if not held_out:
            tqdm.write(printable(found))
        part = [p for i, p in enumerate(images, 1) if (i % HELD_OUT_EVERY == 0) == held_out]
        for path in tqdm(part, desc="reading images", leave=False):
            name, text = sub_folders[path], path.with_suffix(".txt")
            try:
                image = read_image(folder / path, size)
            except UserError as error:
                tqdm.write(printable(f"skipped {error}"))
                continue
            caption = read_caption(folder / text, name) if text in stats else name
            yield image, [names.index(name)], printable(caption)

    stats = {path: (folder / path).stat() for path in files}
    version = "\n".join(f"{path} {s.st_size} {s.st_mtime_ns}" for path, s in stats.items())
    return classes, samples(), version


def list_files(folder: Path) -> list[Path]:
    """All files below the folder, sorted, without hidden ones and our own programs' outputs."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename}: this folder cannot be read ({error.strerror})")

    outputs, files = [CACHE.resolve(), Path("runs").resolve()], []
    for parent, folders, names in os.walk(folder, onerror=unreadable):
        path = Path(parent)
        ours = path.resolve() in outputs or OUTPUTS & {*names}
        if path != folder and (ours or path.name.startswith(".")):
            folders.clear()  # go no deeper
        else:
            files += [path / name for name in names if not name.startswith(".")]
    return sorted(file.relative_to(folder) for file in files if file.is_file())


def read_caption(path: Path, default: str) -> str:
    """Read UTF-8, or UTF-16 with a byte-order mark."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return " ".join(content.decode(encoding).split())
    except UnicodeDecodeError:
        tqdm.write(printable(f"{path}: not a caption in UTF-8; its image is used without it"))
        return default


def read_image(path: Path, size: int) -> Tensor:
    """Any file that Pillow reads -> an upright square, (3, size, size) uint8."""
    try:
        with Image.open(path) as file:
            if file.mode == "F" or (file.mode == "I" and file.getextrema()[0] < 0):
                raise ValueError("fractions and negative values have no standard brightness")
            image = ImageOps.exif_transpose(file)
    except Exception as error:  # Pillow raises nearly anything on a broken file
        raise UserError(f"{path}: not a readable image ({error})") from error
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8, not scale
        image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    image = center_crop_resize(image.convert("RGBA"), size)
    # The colours behind transparent pixels may be anything, often black or noise: use white.
    white = Image.new("RGBA", image.size, "white")
    return pil_to_tensor(Image.alpha_composite(white, image).convert("RGB"))


def center_crop_resize(image: Image.Image, size: int) -> Image.Image:
    """The central square, resized by averaging; a block of equal pixels becomes exactly one."""
    small = image.resize((size, size), Image.Resampling.NEAREST)
    enlarged = small.resize(image.size, Image.Resampling.NEAREST)
    if image.width == image.height >= size and image.tobytes() == enlarged.tobytes():
        return small
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def cached(path: Path, classes: Classes, samples: Iterable[Sample], version: str) -> dict:
    """Data's images, classes, labels and captions, from a file that is made when needed.

    It is made if it is missing, damaged or of another version. Its images are mapped: they are
    read when used, and their memory is given back when others need it.
    """
    with suppress(Exception):  # a missing file, or anything that damaged bytes raise
        fields = torch.load(path, mmap=True, weights_only=True)
        if fields.pop("version") == version:
            return fields
    remove_leftovers(CACHE)
    with atomic_write(path) as temporary:
        rows = list(samples)
        if not rows:
            raise UserError("none of the images can be read")
        images, labels, captions = zip(*rows, strict=True)
        fields = {
            "images": torch.stack(images),
            "classes": classes,
            "labels": torch.tensor(labels) if classes else None,
            "captions": captions if any(captions) else (),
        }
        torch.save(fields | {"version": version}, temporary)
    return fields


def evenly_spaced(images: Tensor, at_most: int) -> Tensor:
    """Evenly spaced images, so of all classes: a folder is sorted by class."""
    return images[torch.linspace(0, len(images) - 1, min(at_most, len(images))).long()]


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0 .. 255, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """0 .. 255 -> [-1, 1]."""
    return images.float() / 127.5 - 1
