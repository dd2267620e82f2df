"""Folders of any images, decoded once; the drawn cats; known sets as torchvision lays them out."""

import os
import re
import struct
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
GREYS = [("1", "png", 255, 255), ("L", "png", 130, 130), ("I;16", "png", 130 * 257 + 100, 130)]
GREYS += [("I;16", "tif", 65535, 255), ("I;16", "tif", 200, 1), ("I", "tif", 130 * 257, 130)]
GREYS += [("I", "tif", 1_000_000, 255)]


def test_every_kind_and_size_of_file_keeps_its_colour_and_grey_is_scaled_not_clipped(here):
    for mode, suffix in COLOURS:
        path = save(f"a.{suffix}", Image.new("RGB", (40, 30), RED).convert(mode))
        assert colour_of(read_image(path, 16)) == pytest.approx(RED, abs=4), (mode, suffix)
    for mode, suffix, value, expected in GREYS:
        path = save(f"a.{suffix}", Image.new(mode, (20, 20), value))
        assert read_image(path, 16).unique().tolist() == [expected], (mode, suffix, value)
    for size in [(1, 1), (1, 3000), (3000, 2000)]:
        assert colour_of(read_image(save("a.png", size=size), 16)) == list(RED), size


def test_transparent_pixels_are_white(here):
    half = read_image(save("a.png", two("RGBA", (*RED, 255), (0, 0, 0, 0))), 16)  # black hides
    assert colour_of(half[:, :, :6]) == pytest.approx(RED, abs=2) and half[:, :, 10:].min() > 250
    palette = save("b.gif", Image.new("P", (40, 40), 3), transparency=3)
    assert read_image(palette, 16).min() == 255
    veil = save("veil.png", Image.new("RGBA", (40, 40), (0, 0, 0, 51)))  # a fifth of black
    assert colour_of(read_image(veil, 16)) == pytest.approx([204] * 3, abs=1)


def test_the_middle_is_kept_rotation_obeyed_and_detail_averaged(here):
    wide = Image.new("RGB", (90, 30), "black")
    wide.paste("white", (30, 0, 60, 30))
    assert read_image(save("wide.png", wide), 9).min() > 230

    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise: what was left is above
    half = two("RGB", "white", "black", 32)
    image = read_image(save("turned.jpg", half, exif=exif, quality=95), 16).float()
    assert image[:, :6].mean() > 240 and image[:, 10:].mean() < 15

    board = Image.new("L", (64, 64))
    board.putdata([255 * ((i + i // 64) % 2) for i in range(64 * 64)])
    image = read_image(save("board.png", board), 16).float()
    assert image.mean() == pytest.approx(127.5, abs=1) and image[:, 4:12, 4:12].std() < 2


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


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.write_text("no image at all"), "cannot identify image file"),
        (cut, "truncated"),
        (lambda path: save(path, two("F", 1.0, 0.5)), "fractions"),
        (lambda path: save(path, two("I", 9, -5)), "negative"),
        (lambda path: path.symlink_to("nowhere.tif"), "No such file"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(here, make, sentence):
    make(here / "a.tif")
    with pytest.raises(UserError, match=f"a.tif: not a readable image .*{sentence}"):
        read_image(here / "a.tif", 16)


# ---- a folder ------------------------------------------------------------------------------------


def test_a_folder_at_any_depth_without_hidden_files_or_outputs_of_our_own(here, capsys):
    paths = ["UPPER.JPEG", "a.png", "deep/er/b.webp", "deep/er/c.GIF", "z.tiff"]
    for i, path in enumerate(paths):
        save(f"photos/{path}", colour=(i * 40, i * 40, i * 40))
    for path in (".hidden.png", ".thumbnails/a.png", "model/a.png", "resume/in/a.png"):
        save(f"photos/{path}")
    for name in ("a.HEIC", "b.heic", "c.heic", "notes.\x1b[31m", "model/model.pt"):
        Path("photos", name).write_bytes(b"of another kind")
    Path("photos/resume/resume.pt").touch()  # a folder that was somebody's --out
    loaded = load_data("photos", 16)
    assert loaded.images.shape == (5, 3, 16, 16) and loaded.images.dtype == torch.uint8
    assert (loaded.name, loaded.size, loaded.channels, loaded.hflip) == ("photos", 16, 3, True)
    assert loaded.captions == ("", "", "deep", "deep", "")
    assert loaded.classes == {} and loaded.labels is None
    for i, image in enumerate(loaded.images):
        assert colour_of(image) == pytest.approx([i * 40] * 3, abs=3)
    out = capsys.readouterr().out
    assert "photos: 5 images; not read: 1 .?[31m, 1 .HEIC, 2 .heic; expected 16 or more" in out
    assert len(load_data("photos/model").images) == 1 and load_data("photos").size == 64
    save("cats/tom.png", colour=(9, 9, 9))  # a folder named like known data
    loaded = load_data("./cats", 8)
    assert loaded.name == "cats-folder" and loaded.images.unique().tolist() == [9]
    assert loaded.captions == ()
    save("data/a.png")
    save("runs/other/a.png")
    assert len(load_data(".", 16).images) == 6  # photos, cats


def test_broken_images_are_named_and_shift_nothing_and_every_16th_is_held_out(here, capsys):
    for i in range(35):
        path = save(f"photos/{i % 2}/in/{i:02}.png", colour=(i, i, i))
        path.with_suffix(".txt").write_text(f"image {i}")
    for name in ("0/in/00.png", "1/in/05.png"):
        Path("photos", name).write_text("no image")
    order = [*range(0, 35, 2), *range(1, 35, 2)]
    new = [order[15], order[31]]
    expected = {True: new, False: [i for i in order if i not in (0, 5, *new)]}
    for held_out in (False, True, False):  # two caches
        loaded, kept = load_data("photos", 8, held_out=held_out), expected[held_out]
        assert loaded.images[:, 0, 0, 0].tolist() == kept
        assert loaded.classes == {"class": ("0", "1")} and loaded.labels.dtype == torch.long
        assert list(loaded.captions) == [f"image {i}" for i in kept]
        assert loaded.labels[:, 0].tolist() == [i % 2 for i in kept]
    skipped = re.findall(r"skipped photos(.*): not a readable image", capsys.readouterr().out)
    assert [Path(path).name for path in skipped] == ["00.png", "05.png"]
    save("photos/in-no-sub-folder.png")
    assert load_data("photos", 8).classes == {}
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
    assert load_data("photos", 8).captions == ("cats",) and load_data("photos", 8).classes == {}
    for content, caption in CAPTIONS.items():  # each a change that is noticed
        Path("photos/cats/a.txt").write_bytes(content)
        assert load_data("photos", 8).captions == (caption,)
        assert ("a.txt: not a caption in UTF-8" in capsys.readouterr().out) == (caption == "cats")


REFUSED = [
    *((name, None, f"--data '{name}': expected a folder of") for name in ("minst", "a.png", "")),
    ("MNIST", None, "or: cats, mnist, fashion, cifar10"),
    *((name, size, f"{size}: expected 1 to 512") for name in ("cats", "few") for size in (0, 513)),
    ("few", None, "few: 15 images; expected 16 or more, .* kinds: "),
    ("none", None, "none: 0 images; not read: 1 .heic; expected 16 or more, .* .*.png"),
    ("two", None, "two/cats, dogs: a class cannot have this name"),
]


def test_words_that_name_no_data_get_one_sentence(here):
    save("a.png")
    save("none/.a.png")
    Path("none/a.heic").touch()
    for i in range(15):
        save(f"few/{i}.png")
        save(f"two/cats, dogs/{i}.png")
    save("two/birds/a.png")
    for name, size, sentence in REFUSED:
        with pytest.raises(UserError, match=sentence):
            load_data(name, size, held_out=True)
    with pytest.raises(UserError, match="none: 0 images"):
        load_data("none")
    assert not Path("data").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_is_not_called_empty(here):
    locked = save("photos/locked/a.png").parent
    locked.chmod(0)
    with pytest.raises(UserError, match="photos/locked: this folder cannot be read"):
        load_data("photos", 8)
    locked.chmod(0o700)


# ---- the cache -----------------------------------------------------------------------------------


def test_it_is_decoded_once_until_the_folder_changes_or_the_cache_is_damaged(here, monkeypatch):
    decoded, decode = [], data.read_image
    note = lambda path, size: decoded.append(path) or decode(path, size)  # noqa: E731
    monkeypatch.setattr(data, "read_image", note)

    def load(folder="photos/", size=16):
        before = len(decoded)
        shades = load_data(folder, size).images[:, 0, 0, 0].tolist()
        assert load_data(folder, size).images[:, 0, 0, 0].tolist() == shades
        return shades, len(decoded) - before

    save("photos/a.png")
    assert load() == ([200], 1)
    save("photos/a.png", colour=(10, 20, 30))
    assert load() == ([10], 1)
    save("photos/b.png")
    assert load() == ([10, 200], 2)
    whole = next(Path("data").iterdir()).read_bytes()
    torch.save(Evil(), "evil")
    for damaged in (b"", whole[:100], whole[:-1], Path("evil").read_bytes()):
        next(Path("data").iterdir()).write_bytes(damaged)
        assert load() == ([10, 200], 2) and load() == ([10, 200], 0)
    assert not Path("executed").exists()
    Path("data/left.by-a-killed-process.tmp").touch()
    save("elsewhere/photos/c.png", colour=(5, 5, 5))
    assert load(size=8) == ([10, 200], 2) and load("elsewhere/photos") == ([5], 1)
    assert len(list(Path("data").iterdir())) == 3  # each has its own


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


@pytest.mark.parametrize(
    ("name", "folder", "kind", "first"),
    [("mnist", "MNIST", "digit", "0"), ("fashion", "FashionMNIST", "class", "T-shirt/top")],
)
def test_digits_and_clothes(here, name, folder, kind, first):
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
    rounded, brighter = images.clone(), images.clone()
    rounded[0, 0, 3, 3] ^= 1  # as another processor may round
    brighter[300:310] = 255  # evenly spaced: no ten in a row are left out
    assert Data("other name", rounded).checksum == checksum != Data("one", brighter).checksum
