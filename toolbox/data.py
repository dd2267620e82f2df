"""Pictures to train on, decoded once into a file of bytes that is mapped into memory: drawn cats, known sets, or a folder."""

import difflib
import glob
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from toolbox import cats
from toolbox.files import UserError, atomic_write

CACHE = Path("data")  # beside runs/, where the program is started
DRAWN_CATS = 16_384  # more are a few seconds' work; these are enough that so small a network does not learn them by heart
HELD_OUT_CATS = 2_048  # the cats after them
SIZES = {
    "cats": 32,
    "mnist": 28,
    "fashion": 28,
    "cifar10": 32,
    "pets": 64,
}  # of the data that has a name
FOLDER_SIZE = 64
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

MNIST_FILES = [
    f"{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]
TORCHVISION = {  # torchvision's data, what its classes are, where it is fetched, and which files belong into which folder
    "mnist": (datasets.MNIST, "digit", datasets.MNIST.mirrors[0], MNIST_FILES, "MNIST/raw"),
    "fashion": (
        datasets.FashionMNIST,
        "class",
        datasets.FashionMNIST.mirrors[0],
        MNIST_FILES,
        "FashionMNIST/raw",
    ),
    "cifar10": (
        datasets.CIFAR10,
        "class",
        "https://www.cs.toronto.edu/~kriz/",
        ["cifar-10-python.tar.gz"],
        "",
    ),
    "pets": (
        datasets.OxfordIIITPet,
        "breed",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/data/",
        ["images.tar.gz", "annotations.tar.gz"],
        "oxford-iiit-pet",
    ),
}
CAT_BREEDS = (  # the other 25 breeds of these pets are dogs
    *("Abyssinian", "Bengal", "Birman", "Bombay", "British Shorthair", "Egyptian Mau"),
    *("Maine Coon", "Persian", "Ragdoll", "Russian Blue", "Siamese", "Sphynx"),
)
Classes = dict[str, tuple[str, ...]]
Sample = tuple[
    Tensor, Sequence[int], str
]  # a picture (C, size, size) in bytes, a label for each of the classes, a caption


@dataclass(frozen=True)
class Data:
    """Pictures, and what is known of each: for `classes` {"fur": ("black", ...), ...} a column of `labels` for each name."""

    name: str
    images: Tensor  # (N, C, size, size), bytes 0 .. 255
    classes: Classes = field(default_factory=dict)
    labels: Tensor | None = None  # (N, len(classes)) long, indices into classes' values
    captions: Sequence[str] = ()  # one for each picture, or none at all
    hflip: bool = True  # may left and right be exchanged? Not in digits

    @property
    def size(self) -> int:
        return self.images.shape[-1]

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def checksum(self) -> int:
        """A number that other pictures would not have: the checksum of a thousand of them, evenly spread."""
        return zlib.crc32(self.images[:: len(self.images) // 1000 + 1].numpy().tobytes())

    def batch(self, chosen: Tensor, flipped: Tensor) -> Tensor:
        """The chosen pictures in [-1, 1], some of them flipped: two tensors (B,), indices and flags."""
        x0 = from_uint8(self.images[chosen])
        return torch.where(flipped[:, None, None, None], x0.flip(-1), x0)


def load_data(name: str, size: int | None = None, held_out: bool = False) -> Data:
    """Data by its name (SIZES has them all), or a folder of pictures (if it is called so too: "./cats").

    held_out gives pictures of the same kind that are never trained on: to see whether a network only knows its own by heart.
    """
    if size is not None and size < 1:
        raise UserError(f"--size {size}: expected 1 pixel or more")
    size = size or SIZES.get(name, FOLDER_SIZE)
    if name == "cats":
        return load_cats(size, held_out)
    if name in TORCHVISION:
        return load_torchvision(name, size, held_out)
    if Path(name).is_dir():
        return load_folder(Path(name), size, held_out)
    if Path(name).exists():
        raise UserError(
            f"--data {name}: expected a folder of pictures, this is a file (if it is an archive, unpack it first)"
        )
    near = difflib.get_close_matches(name, SIZES, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise UserError(
        f"--data {name}: no such folder and no data of that name{hint} Known: {', '.join(SIZES)}"
    )


def load_cats(size: int, held_out: bool) -> Data:
    """Their classes are all that a drawing's caption tells: fur, pattern, eyes, background."""
    indices = range(DRAWN_CATS, DRAWN_CATS + HELD_OUT_CATS) if held_out else range(DRAWN_CATS)

    def samples() -> Iterator[Sample]:
        for chunk in tqdm(
            [indices[i : i + 256] for i in range(0, len(indices), 256)],
            desc="drawing cats",
            leave=False,
        ):
            images, labels, captions = cats.draw(len(chunk), size, start=chunk.start)
            yield from zip(
                to_uint8(images),
                torch.stack([*labels.values()], dim=1).tolist(),
                captions,
                strict=True,
            )

    renderer = Path(cats.__file__).read_text(encoding="utf8")  # another renderer, other cats
    return Data(
        "cats",
        **cached(
            "cats", size, held_out, f"{indices} {renderer}", lambda: (cats.ATTRIBUTES, samples())
        ),
    )


def load_torchvision(name: str, size: int, held_out: bool) -> Data:
    """What torchvision downloads into CACHE, or finds there; held out is its test set. The caption is the class's name."""
    dataset, kind, source, files, folder = TORCHVISION[name]
    part = (
        {"split": "test" if held_out else "trainval"} if name == "pets" else {"train": not held_out}
    )

    def make() -> tuple[Classes, Iterator[Sample]]:
        try:
            pictures = dataset(CACHE, download=True, **part)
        except Exception as error:  # of the network, of archives, of files: nearly anything
            raise UserError(
                f"--data {name}: fetching it from {source} failed ({' '.join(str(error).split())}); "
                f"by hand: put {', '.join(files)} from there into the folder {CACHE / folder}"
            ) from error
        names = [name.split(" - ")[0] for name in pictures.classes]  # MNIST's are "0 - zero", ...
        wanted = CAT_BREEDS if name == "pets" else tuple(names)

        def samples() -> Iterator[Sample]:
            for image, label in tqdm(pictures, desc=f"reading {name}", leave=False):
                if names[label] in wanted:
                    yield (
                        pil_to_tensor(center_crop_resize(image, size)),
                        [wanted.index(names[label])],
                        names[label],
                    )

        return {kind: wanted}, samples()

    return Data(
        name, **cached(name, size, held_out, torchvision.__version__, make), hflip=name != "mnist"
    )


def load_folder(folder: Path, size: int, held_out: bool) -> Data:
    """Pictures at any depth. Every 16th is held out. Two or more sub-folders are classes, if all pictures are in one.

    A caption is the text of picture.txt beside picture.jpg, else the name of the (first) sub-folder.
    """
    inside = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES | {".txt"} and path.is_file()
    ]
    inside = sorted(path.relative_to(folder) for path in inside)
    inside = [
        path for path in inside if not any(part.startswith(".") for part in path.parts)
    ]  # hidden, as macOS' "._1.jpg"
    files = [path for path in inside if path.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(
            f"{folder}: expected pictures ({', '.join(sorted(SUFFIXES))}) in this folder or below, found none"
        )
    part = [path for i, path in enumerate(files) if (i % 16 == 15) == held_out]
    if not part:
        raise UserError(
            f"{folder}: every 16th picture is held out, and there are only {len(files)}"
        )

    sub_folders = {path: path.parts[0] if len(path.parts) > 1 else "" for path in files}
    names = tuple(sorted(set(sub_folders.values())))
    classes = {"class": names} if len(names) > 1 and "" not in names else {}
    texts = {path for path in inside if path.suffix == ".txt"}

    def samples() -> Iterator[Sample]:
        skipped = 0
        for path in tqdm(part, desc=f"reading {folder.name}", leave=False):
            text = path.with_suffix(".txt")
            try:
                image = read_image(folder / path, size)
                words = (
                    (folder / text).read_text(encoding="utf-8-sig").split()
                    if text in texts
                    else [sub_folders[path]]
                )
            except Exception as error:  # Pillow raises nearly anything on a broken file
                skipped += 1
                tqdm.write(f"skipped {folder / path}: not a readable picture ({error})")
            else:
                yield image, [names.index(sub_folders[path])] if classes else [], " ".join(words)
        if skipped:
            tqdm.write(f"skipped {skipped} of {len(part)} files")
        if skipped == len(part):
            raise UserError(f"{folder}: none of the {len(part)} files is a readable picture")

    stats = [
        (path, (folder / path).stat()) for path in inside
    ]  # another file, name, size or date: another version
    version = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    place = Path(
        os.path.abspath(folder)
    )  # two folders may have the same name; a link keeps the one that was typed
    name = f"{place.name}-{short_hash(str(place))}"
    known_as = (
        f"{place.name}-folder" if place.name in SIZES else place.name
    )  # a folder named cats is not the drawn cats
    return Data(known_as, **cached(name, size, held_out, version, lambda: (classes, samples())))


def read_image(path: Path, size: int) -> Tensor:
    """A file in any of Pillow's modes, as (3, size, size) bytes: turned as the camera was held, the middle, resized."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = to_8_bits(image)
    image = center_crop_resize(image.convert("RGBA"), size)
    # What is transparent is laid on white, as on a page: the colours hidden there may be anything, often black or noise.
    white = Image.new("RGBA", image.size, "white")
    return pil_to_tensor(Image.alpha_composite(white, image).convert("RGB"))


def center_crop_resize(image: Image.Image, size: int) -> Image.Image:
    """The middle of it, resized."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Grey in 16 bits or in fractions, which Pillow would not scale but clip: nearly all of it would be white."""
    grey = image.convert("F")
    brightest = grey.getextrema()[1]
    whites = (
        (1, 255, 65535) if image.mode == "F" else (65535,)
    )  # what a file calls white; fractions know no rule
    white = next((value for value in whites if brightest <= value), brightest)
    return grey.point(lambda value: value * (255 / white) + 0.5).convert("L")


def cached(
    name: str,
    size: int,
    held_out: bool,
    version: str,
    make: Callable[[], tuple[Classes, Iterable[Sample]]],
) -> dict[str, object]:
    """Data's images, classes, labels and captions, as `make()` gives them; from two files that are written the first time.

    Another version makes new files, and removes those of the old one.
    """
    stem = f"{name}-held-out-{size}px" if held_out else f"{name}-{size}px"
    path = CACHE / f"{stem}-{short_hash(version)}.bytes"
    about_path = path.with_suffix(".pt")
    if not (path.exists() and about_path.exists()):
        classes, samples = make()
        labels, captions = [], []
        with atomic_write(path) as temporary:
            with open(temporary, "wb") as file:
                for picture, label, caption in samples:
                    file.write(picture.numpy().tobytes())
                    labels.append(label)
                    captions.append(caption)
            about = {
                "shape": (len(captions), *picture.shape),
                "classes": classes,
                "labels": torch.tensor(labels) if classes else None,
                "captions": captions if any(captions) else (),
            }
            with atomic_write(
                about_path
            ) as about_temporary:  # before the bytes: where they are, all is there
                torch.save(about, about_temporary)
        for old in CACHE.glob(f"{glob.escape(stem)}-????????.*"):
            if (
                old not in (path, about_path) and old.suffix != ".tmp"
            ):  # another process may be writing that one
                with suppress(OSError):  # Windows keeps a file that another training still reads
                    old.unlink()
    about = torch.load(about_path, weights_only=True)
    shape = about.pop("shape")
    # A mapped file is read where it is looked at, and what memory it takes is given back when others need it. Shared, so
    # that the system need not set memory aside for changes: a file larger than the memory could else not be mapped.
    images = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.uint8).view(
        shape
    )
    return {"images": images} | about


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:8]


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0 .. 255, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """0 .. 255 -> [-1, 1]."""
    return images.float() / 127.5 - 1
