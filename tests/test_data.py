"""Folders of any images, decoded once; the drawn cats; known sets as torchvision lays them out."""

import os
import pickle
import re
import struct
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from conftest import Evil
from PIL import Image

from toolbox import data
from toolbox.cats import ATTRIBUTES, draw
from toolbox.data import Data, from_uint8, load_data, read_image, to_uint8
from toolbox.files import UserError

RED = (200, 30, 60)


def save(path, image=None, colour=RED, size=(20, 20), **options):
    """Write an image, by default one of a single colour."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", size, colour)).save(path, **options)
    return path


def colour_of(image):
    return image.float().mean((1, 2)).tolist()


def two(mode, left, right, side=40):
    """A square image of two halves."""
    image = Image.new(mode, (side, side), right)
    image.paste(left, (0, 0, side // 2, side))
    return image


# ---- one image -----------------------------------------------------------------------------------

COLOURS = [("RGB", suffix[1:]) for suffix in (*data.SUFFIXES, ".JPEG")]
COLOURS += [("P", "gif"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("YCbCr", "tif")]
GREYS = [("1", "png", 255, 255), ("L", "png", 130, 130), ("I;16", "png", 130 * 257, 130)]
GREYS += [("I;16", "tif", 65535, 255), ("I;16", "tif", 200, 1), ("I", "tif", 130 * 257, 130)]
GREYS += [("I", "tif", 1_000_000, 255), ("F", "tif", 0.5, 128), ("F", "tif", 130.0, 130)]
GREYS += [("F", "tif", 130.0 * 257, 130), ("F", "tif", 0.0, 0)]


def test_every_kind_and_size_of_file_keeps_its_colour_and_grey_is_scaled_not_clipped(here):
    for mode, suffix in COLOURS:
        path = save(f"a.{suffix}", Image.new("RGB", (40, 30), RED).convert(mode))
        assert colour_of(read_image(path, 16)) == pytest.approx(RED, abs=4), (mode, suffix)
    for mode, suffix, value, expected in GREYS:
        path = save(f"a.{suffix}", Image.new(mode, (20, 20), value))
        assert read_image(path, 16).unique().tolist() == [expected], (mode, suffix, value)
    for size in [(1, 1), (1, 3000), (3000, 1), (7, 200), (3000, 2000)]:
        assert colour_of(read_image(save("a.png", size=size), 16)) == list(RED), size


def test_transparent_pixels_are_white(here):
    half = read_image(save("a.png", two("RGBA", (*RED, 255), (0, 0, 0, 0))), 16)  # black hides
    assert colour_of(half[:, :, :6]) == pytest.approx(RED, abs=2) and half[:, :, 10:].min() > 250
    for path in (
        save("b.png", Image.new("LA", (40, 40), (0, 0))),
        save("b.gif", Image.new("P", (40, 40), 3), transparency=3),
        save("c.png", Image.new("RGB", (40, 40), (1, 2, 3)), transparency=(1, 2, 3)),
    ):
        assert read_image(path, 16).min() == 255
    veil = save("veil.png", Image.new("RGBA", (40, 40), (0, 0, 0, 51)))  # a fifth of black
    assert colour_of(read_image(veil, 16)) == pytest.approx([204] * 3, abs=1)


def test_the_middle_is_kept_rotation_obeyed_and_detail_averaged(here):
    wide = Image.new("RGB", (90, 30), "black")
    wide.paste("white", (30, 0, 60, 30))
    assert read_image(save("wide.png", wide), 8).min() > 230

    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise: what was left is above
    half = two("RGB", "white", "black", 32)
    image = read_image(save("turned.jpg", half, exif=exif, quality=95), 16).float()
    assert image[:, :6].mean() > 240 and image[:, 10:].mean() < 15

    board = Image.new("L", (64, 64))
    board.putdata([255 * ((i + i // 64) % 2) for i in range(64 * 64)])
    image = read_image(save("board.png", board), 16).float()
    assert image.mean() == pytest.approx(127.5, abs=1) and image[:, 4:12, 4:12].std() < 2

    red, blue = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    moving = save("moving.gif", red, save_all=True, append_images=[blue, blue])
    assert colour_of(read_image(moving, 16)) == [255, 0, 0]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_an_image_enlarged_by_whole_pixels_is_reduced_exactly(here, factor):
    pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    side = (64 * factor, 64 * factor)
    image = Image.fromarray(pixels.numpy()).resize(side, Image.Resampling.NEAREST)
    assert torch.equal(read_image(save("a.png", image), 64), pixels.permute(2, 0, 1))
    if factor > 1:  # one pixel that differs in its block: averaged, as any photograph
        image.putpixel((0, 0), tuple(255 - value for value in image.getpixel((0, 0))))
        assert not torch.equal(read_image(save("b.png", image), 64), pixels.permute(2, 0, 1))


def cut(path):
    save(path, Image.effect_noise((99, 99), 9), format="JPEG")
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.write_text("no image at all"), "cannot identify image file"),
        (lambda path: path.write_bytes(b""), "cannot identify image file"),
        (cut, "truncated"),
        (lambda path: save(path, size=(300, 300)), "300 x 300 pixels"),
        (lambda path: save(path, two("F", 1.0, float("nan"))), "or NaN"),
        (lambda path: save(path, two("F", 1.0, float("inf"))), "or NaN"),
        (lambda path: save(path, two("I", 9, -5)), "negative"),
        (lambda path: path.symlink_to("nowhere.tif"), "No such file"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(here, monkeypatch, make, sentence):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_999)
    make(here / "a.tif")
    with pytest.raises(UserError, match=f"a.tif: not a readable image .*{sentence}"):
        read_image(here / "a.tif", 16)


# ---- a folder ------------------------------------------------------------------------------------


def test_a_folder_at_any_depth_without_hidden_files(here, capsys):
    paths = ["UPPER.JPEG", "a.png", "deep/er/b.webp", "deep/er/c.GIF", "deep/est/d.bmp", "z.tiff"]
    for i, path in enumerate(paths):
        save(f"photos/{path}", colour=(i * 40, i * 40, i * 40))
    for path in (".hidden.png", ".thumbnails/a.png", "._a.png"):
        save(f"photos/{path}")
    for name in ("a.HEIC", "b.heic", "c.heic", "notes.\x1b[31m"):
        Path("photos", name).write_bytes(b"of another kind")
    loaded = load_data("photos", 16)
    assert loaded.images.shape == (6, 3, 16, 16) and loaded.images.dtype == torch.uint8
    assert (loaded.name, loaded.size, loaded.channels, loaded.hflip) == ("photos", 16, 3, True)
    for i, image in enumerate(loaded.images):
        assert colour_of(image) == pytest.approx([i * 40] * 3, abs=3)
    out = capsys.readouterr().out
    assert "photos: 6 images; not read: 1 .?[31m, 1 .HEIC, 2 .heic; expected 16 or more" in out
    assert load_data("photos").size == 64
    save("cats/tom.png", colour=(9, 9, 9))  # a folder named like known data
    loaded = load_data("./cats", 8)
    assert loaded.name == "cats-folder" and loaded.images.unique().tolist() == [9]


def test_outputs_of_our_own_are_not_read_as_photographs(here):
    for path in ("a.png", "data/b.png", "runs/cats/c.png", "mine/d.png"):
        save(path)
    for name in ("model.pt", "resume.pt", "model_index.json"):  # folders that were somebody's --out
        save(f"mine/{name[:5]}/e.png")
        save(f"mine/{name[:5]}/deeper/f.png")
        Path(f"mine/{name[:5]}/{name}").touch()
    for _ in range(2):  # its own cache is now there, too
        assert len(load_data(".", 16).images) == 2
    assert len(load_data("data", 16).images) == 1  # unless that is what is asked for
    assert len(load_data("mine/model", 16).images) == 2


def test_broken_images_are_named_and_shift_nothing_and_every_16th_is_held_out(here, capsys):
    for i in range(35):
        path = save(f"photos/{i % 2}/{i:02}.png", colour=(i, i, i))
        path.with_suffix(".txt").write_text(f"image {i}")
    broken = ("0/00.png", "1/05.png")
    for name in broken:
        Path("photos", name).write_text("no image")
    order = [*range(0, 35, 2), *range(1, 35, 2)]
    new = [order[15], order[31]]
    expected = {True: new, False: [i for i in order if i not in (0, 5, *new)]}
    for held_out in (False, True, False):  # two caches
        loaded = load_data("photos", 8, held_out=held_out)
        kept = expected[held_out]
        assert loaded.images[:, 0, 0, 0].tolist() == kept and loaded.classes == {
            "class": ("0", "1")
        }
        assert list(loaded.captions) == [f"image {i}" for i in kept]
        assert loaded.labels[:, 0].tolist() == [i % 2 for i in kept]
    out = capsys.readouterr().out
    assert out.count("skipped photos") == 2 and all(
        f"photos/{name}: not a" in out for name in broken
    )
    for path in Path("photos").rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(UserError, match="none of the images can be read"):
        load_data("photos", 8)
    assert not list(Path("data").glob("*.tmp"))


CAPTIONS = {
    "  ein Kätzchen\nauf dem Dach \n".encode(): "ein Kätzchen auf dem Dach",
    "ein Kätzchen".encode("utf-8-sig"): "ein Kätzchen",  # as Windows' editor saves it
    "ein Kätzchen".encode("utf-16"): "ein Kätzchen",
    b"\xfe\xff" + "ein Kätzchen".encode("utf-16-be"): "ein Kätzchen",
    "ein Kätzchen".encode("latin-1"): "cats",  # as if there were none
    b"a \x1b[31mred\x07 cat": "a ?[31mred? cat",
}


def test_captions_are_texts_next_to_the_images_else_sub_folders(here, capsys):
    save("photos/cats/a.png")
    assert load_data("photos", 8).captions == ("cats",)
    for content, caption in CAPTIONS.items():  # each a change that is noticed
        Path("photos/cats/a.txt").write_bytes(content)
        assert load_data("photos", 8).captions == (caption,)
        assert ("a.txt: not a caption in UTF-8" in capsys.readouterr().out) == (caption == "cats")
    save("alone/a.png")
    assert load_data("alone", 8).captions == ()


def test_sub_folders_are_classes_where_they_hold_all_images(here):
    for name in ("photos/cats/in/1.png", "photos/cats/2.png", "photos/birds/3.png"):
        save(name)
    loaded = load_data("photos", 8)
    assert loaded.classes == {"class": ("birds", "cats")}
    assert loaded.labels.tolist() == [[0], [1], [1]] and loaded.labels.dtype == torch.long
    save("photos/4.png")  # in no sub-folder
    assert load_data("photos", 8).classes == {} and load_data("photos", 8).labels is None
    save("one/cats, dogs/1.png")
    assert load_data("one", 8).classes == {}
    save("one/birds/1.png")
    with pytest.raises(UserError, match="one/cats, dogs: a class cannot have this name"):
        load_data("one", 8)


REFUSED = {(name, None): f"--data '{name}': expected a folder of" for name in ("minst", "a.png")}
REFUSED |= {(name, None): "or: cats, mnist, fashion, cifar10" for name in ("MNIST", "a.zip", "")}
REFUSED |= {(name, n): f"{n}: expected 1 to 512" for name in ("cats", "few") for n in (0, 513)}
REFUSED |= {("cats", 10**9): "--size 1000000000: expected 1 to 512"}
REFUSED |= {("few", None): "few: 15 images; expected 16 or more, .* kinds: "}
REFUSED |= {("none", None): "none: 0 images; not read: 1 .heic; expected 16 or more, .* .*.png"}


def test_words_that_name_no_data_get_one_sentence(here):
    save("a.png")
    save("a.zip", format="PNG")
    save("none/.a.png")
    Path("none/a.heic").touch()
    for i in range(15):
        save(f"few/{i}.png")
    for (name, size), sentence in REFUSED.items():
        with pytest.raises(UserError, match=sentence):
            load_data(name, size, held_out=True)
    assert not Path("data").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_is_not_called_empty(here):
    locked = save("photos/locked/a.png").parent
    locked.chmod(0)
    with pytest.raises(UserError, match="photos/locked: this folder cannot be read"):
        load_data("photos", 8)
    locked.chmod(0o700)


# ---- the cache -----------------------------------------------------------------------------------


def test_it_is_decoded_once_until_the_folder_changes(here, monkeypatch):
    save("photos/a.png")
    assert load_data("photos", 16).images[0, 0, 0, 0] == 200
    with monkeypatch.context() as patched:
        patched.setattr(data, "read_image", None)  # decoding would crash
        assert len(load_data("photos", 16).images) == 1
    save("photos/a.png", colour=(10, 20, 30))
    assert load_data("photos", 16).images[0, 0, 0, 0] == 10
    save("photos/b.png")
    assert len(load_data("photos", 16).images) == 2 and len(list(Path("data").iterdir())) == 2
    load_data("photos", 8)
    save("elsewhere/photos/c.png")
    load_data("elsewhere/photos", 16)
    assert len(list(Path("data").iterdir())) == 6  # other sizes and folders have their own


def rewrite(path, **entries):
    torch.save(torch.load(path) | entries, path)


DAMAGE = [
    lambda pixels, entries: os.truncate(pixels, 0),
    lambda pixels, entries: os.truncate(pixels, 100),
    lambda pixels, entries: os.truncate(pixels, 90 * 10**9),  # sparse: it takes no disk
    lambda pixels, entries: pixels.unlink(),
    lambda pixels, entries: entries.unlink(),
    lambda pixels, entries: entries.write_bytes(entries.read_bytes()[:-99]),
    lambda pixels, entries: entries.write_bytes(b""),
    lambda pixels, entries: entries.write_bytes(pickle.dumps(Evil(), protocol=2)),
    lambda pixels, entries: torch.save([1, 2], entries),
    lambda pixels, entries: rewrite(entries, shape=(10**6, 3, 16, 16)),
    lambda pixels, entries: rewrite(entries, shape="large"),
]


def test_a_damaged_cache_is_made_anew(here):
    save("photos/cats/a.png")
    images = load_data("photos", 16).images.clone()
    for i, damage in enumerate(DAMAGE):
        damage(next(Path("data").glob("*.bytes")), next(Path("data").glob("*.pt")))
        for _ in range(2):
            loaded = load_data("photos", 16)
            assert torch.equal(loaded.images, images) and loaded.captions == ("cats",), i
    assert not Path("executed").exists()


def test_leftovers_of_killed_processes_are_removed(here, monkeypatch):
    save("photos/a.png")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftovers = [Path(f"data/some-16px.bytes.{pid}.tmp") for pid in (dead.pid, os.getppid())]
    Path("data").mkdir()
    for path in leftovers:
        path.touch()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(data, "read_image", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        load_data("photos", 16)
    assert list(Path("data").iterdir()) == leftovers[1:]  # of the living one, and no half cache


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by Linux' /proc")
def test_images_larger_than_the_memory(here):
    """Mapped, not loaded: a file of twice this machine's memory (sparse) costs nothing."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    save("photos/a.png", colour=(7, 7, 7))
    load_data("photos", 64)
    pixels, entries = next(Path("data").glob("*.bytes")), next(Path("data").glob("*.pt"))
    n = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (3 * 64 * 64)
    os.truncate(pixels, n * 3 * 64 * 64)
    rewrite(entries, shape=(n, 3, 64, 64))
    before = resident()
    huge = load_data("photos", 64)
    x0 = huge.batch(torch.tensor([0, n // 2, n - 1]), torch.zeros(3, dtype=torch.bool))
    assert x0[:, 0, 0, 0].tolist() == pytest.approx([7 / 127.5 - 1, -1, -1])
    assert len(huge.images) == n and resident() - before < 100e6


# ---- the drawn cats, and known sets laid out as torchvision stores them --------------------------


def test_the_drawn_cats_are_the_renderers_with_what_is_known_of_them(here, monkeypatch):
    assert data.DRAWN_CATS == 16_384 and data.HELD_OUT_CATS == 2_048 and data.SIZES["cats"] == 32
    monkeypatch.setattr(data, "DRAWN_CATS", 128)
    monkeypatch.setattr(data, "HELD_OUT_CATS", 64)
    training, held_out = load_data("cats"), load_data("cats", held_out=True)
    for cats, start, n in ((training, 0, 128), (held_out, 128, 64)):
        images, labels, captions = draw(n, 32, start=start)
        assert cats.name == "cats" and cats.hflip and cats.classes == ATTRIBUTES
        assert torch.equal(cats.images, to_uint8(images)) and list(cats.captions) == captions
        assert torch.equal(cats.labels, torch.stack([labels[name] for name in ATTRIBUTES], dim=1))
    with monkeypatch.context() as patched:
        patched.setattr(data.cats, "draw", None)  # drawing would crash
        assert torch.equal(load_data("cats").images, training.images)
    monkeypatch.setattr(data, "DRAWN_CATS", 64)  # another number: drawn again
    assert len(load_data("cats").images) == 64


def lay_out_digits(name, side=28):
    """Like MNIST: 6 images to train on, 3 to test; image i has brightness i or 2 i, class i + 1."""
    raw = Path("data") / name / "raw"
    raw.mkdir(parents=True)
    for part, n, step in (("train", 6, 10), ("t10k", 3, 20)):
        pixels = b"".join(bytes([i * step]) * side * side for i in range(n))
        head, labels = struct.pack(">4I", 0x803, n, side, side), struct.pack(">2I", 0x801, n)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels + bytes(range(1, n + 1)))


def test_digits_and_clothes(here):
    for name, folder, kind, first in (
        ("mnist", "MNIST", "digit", "0"),
        ("fashion", "FashionMNIST", "class", "T-shirt/top"),
    ):
        lay_out_digits(folder)
        training, test = load_data(name), load_data(name, held_out=True)
        assert training.images.shape == (6, 1, 28, 28) and test.images.shape == (3, 1, 28, 28)
        assert training.images[:, 0, 9, 9].tolist() == [0, 10, 20, 30, 40, 50]
        assert test.images[:, 0, 9, 9].tolist() == [0, 20, 40]
        assert list(training.classes) == [kind] and len(training.classes[kind]) == 10
        assert training.classes[kind][0] == first
        assert training.labels.tolist() == [[i] for i in range(1, 7)]
        assert list(test.captions) == list(training.classes[kind][1:4])
        assert training.hflip == test.hflip == (name != "mnist") and training.name == name
        assert load_data(name, 32).images.shape == (6, 1, 32, 32)


def test_of_the_pets_only_the_cats(here):
    folder = Path("data/oxford-iiit-pet")
    (folder / "annotations").mkdir(parents=True)
    animals = ["Abyssinian", "american_bulldog", "British_Shorthair", "pug", "Sphynx"]
    for part, blue in (("trainval", 0), ("test", 100)):
        lines = []
        for label, animal in reversed(list(enumerate(animals, start=1))):
            save(folder / f"images/{animal}_{part}.jpg", colour=(label * 40, 0, blue), quality=95)
            # Its name, its class, cat or dog, its breed.
            lines.append(f"{animal}_{part} {label} {1 if animal[0].isupper() else 2} 1")
        (folder / f"annotations/{part}.txt").write_text("\n".join(lines))
    for held_out in (False, True):
        pets = load_data("pets", held_out=held_out)
        assert pets.images.shape == (3, 3, 64, 64) and len(pets.classes["breed"]) == 12
        assert pets.captions == ("Sphynx", "British Shorthair", "Abyssinian")
        assert [pets.classes["breed"][i] for i in pets.labels[:, 0]] == list(pets.captions)
        for image, red in zip(pets.images, (200, 120, 40), strict=True):
            assert colour_of(image) == pytest.approx([red, 0, 100 * held_out], abs=4)


@pytest.mark.parametrize("name", data.TORCHVISION)
def test_without_internet_one_sentence_says_what_to_put_where(here, monkeypatch, name):
    def no_internet(*_, **__):
        raise urllib.error.URLError("no internet")

    monkeypatch.setattr("urllib.request.urlopen", no_internet)
    dataset, *_, folder = data.TORCHVISION[name]
    place = re.escape(str(Path("data", folder)))
    sentence = f"(?s)--data {name}: its download failed .*; .* {dataset.__name__} into {place}$"
    with pytest.raises(UserError, match=sentence):
        load_data(name)


# ---- numbers -------------------------------------------------------------------------------------


def test_uint8_and_back_and_a_batch_is_flipped_where_asked():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(every)), every)
    assert from_uint8(every).min() == -1 and from_uint8(every).max() == 1
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    x0 = Data("any", images).batch(torch.tensor([4, 0]), torch.tensor([False, True]))
    assert torch.equal(x0, from_uint8(torch.stack([images[4], images[0].flip(-1)])))


def test_the_checksum_is_that_of_the_images_but_not_of_their_last_bit():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3000, 3, 8, 8), dtype=torch.uint8, generator=generator)
    checksum = Data("one", images).checksum
    assert Data("other name", images.clone()).checksum == checksum
    rounded, brighter = images.clone(), images.clone()
    rounded[0, 0, 3, 3] ^= 1  # as another processor may round
    brighter[300:310] = 255  # evenly spaced: no ten in a row are left out
    assert Data("one", rounded).checksum == checksum != Data("one", brighter).checksum
