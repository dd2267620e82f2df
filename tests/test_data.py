"""Folders of any pictures, decoded once; the drawn cats, drawn once; known sets, as torchvision lays them out."""

import hashlib
import os
import pickle
import struct
import sys
import tarfile
import urllib.error
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import checkpoint, command
from PIL import Image
from torchvision import datasets

import train
from toolbox import data
from toolbox.cats import ATTRIBUTES, draw
from toolbox.data import cached, from_bytes, load_data, to_bytes
from toolbox.pictures import save
from unet import UNet


def picture(path, mode="RGB", size=(40, 30), colour=(200, 30, 60), **options):
    image = Image.new("RGB", size, colour).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def colour_of(image):
    """The mean of a picture (C, H, W)."""
    return image.float().mean((1, 2)).tolist()


# ---- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_at_any_depth_in_the_order_of_its_names(here):
    for i, path in enumerate(["UPPER.JPEG", "a.png", "deep/er/b.webp", "deep/er/c.GIF", "deep/est/d.bmp", "z.tiff"]):
        picture(here / "photos" / path, colour=(i * 40, i * 40, i * 40))
    (here / "photos/notes.md").write_text("not a picture")
    picture(here / "photos/.hidden.png")
    picture(here / "photos/.thumbnails/a.png")
    (here / "photos/._a.png").write_bytes(b"what macOS leaves on other systems' disks")
    loaded = load_data("photos", 16)
    assert loaded.images.shape == (6, 3, 16, 16) and loaded.images.dtype == torch.uint8
    assert loaded.name == "photos" and loaded.size == 16 and loaded.channels == 3 and loaded.mirror
    for i, image in enumerate(loaded.images):
        assert colour_of(image) == pytest.approx([i * 40] * 3, abs=3)
    assert load_data("photos").size == 64


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "jpg"), ("P", "gif"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("YCbCr", "tif"), ("RGBA", "webp")],
)
def test_every_mode_keeps_its_colour(here, mode, suffix):
    picture(here / f"photos/a.{suffix}", mode)
    assert colour_of(load_data("photos", 16).images[0]) == pytest.approx([200, 30, 60], abs=4)


@pytest.mark.parametrize(
    ("mode", "suffix", "value", "expected"),
    [
        ("1", "png", 255, 255),
        ("L", "png", 130, 130),
        ("I;16", "png", 130 * 257, 130),
        ("I;16", "tif", 65535, 255),
        ("I;16", "tif", 200, 1),  # dark, not bright in 8 bits
        ("I", "tif", 130 * 257, 130),
        ("I", "tif", 1_000_000, 255),
        ("F", "tif", 0.5, 128),
        ("F", "tif", 130.0, 130),
        ("F", "tif", 130.0 * 257, 130),
        ("F", "tif", 0.0, 0),
    ],
)
def test_grey_of_any_depth_is_scaled_not_clipped(here, mode, suffix, value, expected):
    (here / "photos").mkdir()
    Image.new(mode, (20, 20), value).save(here / f"photos/a.{suffix}")
    assert load_data("photos", 16).images.unique().tolist() == [expected]


def test_grey_of_16_bits_with_the_high_byte_first(here):
    tags = [(256, 2), (257, 2), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, 8)]  # a TIFF by hand
    head = b"MM\0*" + struct.pack(">I", 16) + struct.pack(">4H", *[130 * 257] * 4) + struct.pack(">H", len(tags))
    (here / "photos").mkdir()
    (here / "photos/a.tif").write_bytes(head + b"".join(struct.pack(">HHIHH", tag, 3, 1, n, 0) for tag, n in tags) + bytes(4))
    assert load_data("photos", 16).images.unique().tolist() == [130]


def test_what_is_transparent_is_white(here):
    (here / "photos").mkdir()
    half = Image.new("RGBA", (40, 40), (0, 0, 0, 0))  # black hides in what is not seen
    half.paste((200, 30, 60, 255), (0, 0, 20, 40))
    half.save(here / "photos/a.png")
    Image.new("LA", (40, 40), (0, 0)).save(here / "photos/b.png")
    Image.new("P", (40, 40), 3).save(here / "photos/c.gif", transparency=3)
    Image.new("RGB", (40, 40), (1, 2, 3)).save(here / "photos/d.png", transparency=(1, 2, 3))
    Image.new("RGBA", (40, 40), (0, 0, 0, 51)).save(here / "photos/e.png")  # a fifth of black
    first, *others, veil = load_data("photos", 16).images
    assert colour_of(first[:, :, :6]) == pytest.approx([200, 30, 60], abs=2) and first[:, :, 10:].min() > 250
    assert len(others) == 3 and all(image.min() == 255 for image in others)
    assert colour_of(veil) == pytest.approx([204] * 3, abs=1)


def test_of_an_animation_the_first_frame(here):
    (here / "photos").mkdir()
    red, blue = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
    red.save(here / "photos/a.gif", save_all=True, append_images=[blue, blue])
    assert colour_of(load_data("photos", 16).images[0]) == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (7, 200), (3000, 2000)])
def test_every_size(here, size):
    picture(here / "photos/a.png", size=size)
    assert colour_of(load_data("photos", 16).images[0]) == [200, 30, 60]


def test_a_smaller_picture_is_a_mean_not_a_choice_of_pixels(here):
    (here / "photos").mkdir()
    board = Image.new("L", (64, 64))
    board.putdata([255 * ((i + i // 64) % 2) for i in range(64 * 64)])
    board.save(here / "photos/a.png")
    image = load_data("photos", 16).images[0].float()
    assert image.mean() == pytest.approx(127.5, abs=1) and image[:, 4:12, 4:12].std() < 2


def test_the_middle_is_kept_and_rotation_is_obeyed(here):
    wide = Image.new("RGB", (90, 30), "black")
    wide.paste("white", (30, 0, 60, 30))
    (here / "photos").mkdir()
    wide.save(here / "photos/wide.png")
    assert load_data("photos", 8).images.min() > 230

    (here / "turned").mkdir()
    half = Image.new("RGB", (32, 32), "black")
    half.paste("white", (0, 0, 16, 32))  # left half white; turned by 90 degrees clockwise it is the upper half
    exif = Image.Exif()
    exif[0x0112] = 6
    half.save(here / "turned/photo.jpg", exif=exif, quality=95)
    image = load_data("turned", 16).images[0].float()
    assert image[:, :6].mean() > 240 and image[:, 10:].mean() < 15


def test_a_broken_picture_is_skipped_and_named_and_shifts_nothing(here, capsys, monkeypatch):
    for name in "abcdefg":
        picture(here / f"photos/{name in 'efg'}/{name}.png")
        (here / f"photos/{name in 'efg'}/{name}.txt").write_text(f"picture {name}")
    whole = (here / "photos/False/a.png").read_bytes()
    (here / "photos/False/a.png").write_bytes(whole[: len(whole) // 2])
    (here / "photos/False/c.png").write_text("no picture at all")
    (here / "photos/True/e.png").write_bytes(b"")
    (here / "photos/True/f.txt").write_bytes("Kätzchen".encode("latin-1"))
    picture(here / "photos/True/bomb.png", size=(300, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)  # Pillow refuses twice as many
    for _ in range(2):  # decoded, then from the cache
        loaded = load_data("photos", 16)
        assert list(loaded.captions) == ["picture b", "picture d", "picture g"] and len(loaded.images) == 3
        assert loaded.classes == {"class": ("False", "True")} and loaded.labels.tolist() == [[0], [0], [1]]
    printed = "".join(capsys.readouterr()).replace(os.sep, "/")
    for name in ("False/a.png", "False/c.png", "True/e.png", "True/f.png", "True/bomb.png"):
        assert f"skipped photos/{name}: not a readable picture (" in printed
    assert "decompression bomb" in printed and "skipped 5 of 8 files" in printed


def test_captions_are_the_texts_beside_the_pictures_else_the_sub_folders(here):
    for name in ("flat/a.png", "some/a.png", "some/b.jpg", "nested/cats/deep/a.png", "nested/dogs/b.png"):
        picture(here / name)
    (here / "some/b.txt").write_text("  ein Kätzchen\nauf dem Dach \n", encoding="utf-8-sig")  # as Windows' editor saves it
    (here / "nested/dogs/b.txt").write_text("a dog")
    assert load_data("flat", 8).captions == ()
    assert list(load_data("some", 8).captions) == ["", "ein Kätzchen auf dem Dach"]
    assert list(load_data("nested", 8).captions) == ["cats", "a dog"]
    (here / "nested/dogs/b.txt").write_text("an old dog")
    assert list(load_data("nested", 8).captions) == ["cats", "an old dog"]
    (here / "nested/dogs/b.txt").unlink()
    assert list(load_data("nested", 8).captions) == ["cats", "dogs"]


def test_a_folder_named_like_known_data_is_not_that_data(here):
    (here / "cats").mkdir()
    Image.new("RGB", (9, 9)).save(here / "cats" / "tom.png")
    assert load_data("./cats", 8).name == "cats-folder"


def test_sub_folders_are_classes_where_they_sort_all_pictures(here):
    for name in ("photos/cats/in/1.png", "photos/cats/2.png", "photos/birds/3.png"):
        picture(here / name)
    loaded = load_data("photos", 8)
    assert loaded.classes == {"class": ("birds", "cats")}
    assert loaded.labels.tolist() == [[0], [1], [1]] and loaded.labels.dtype == torch.long
    picture(here / "photos/4.png")  # one that is in no sub-folder
    assert load_data("photos", 8).classes == {} and load_data("photos", 8).labels is None
    picture(here / "single/cats/1.png")
    assert load_data("single", 8).classes == {} and list(load_data("single", 8).captions) == ["cats"]


def test_every_16th_file_is_held_out(here):
    for i in range(35):
        picture(here / f"photos/{'cats' if i < 20 else 'dogs'}/{i:02}.png", colour=(i, i, i))
    training, held_out = load_data("photos", 8), load_data("photos", 8, held_out=True)
    assert held_out.images[:, 0, 0, 0].tolist() == [15, 31]
    assert training.images[:, 0, 0, 0].tolist() == [i for i in range(35) if i not in (15, 31)]
    assert held_out.classes == training.classes and held_out.labels.tolist() == [[0], [1]]
    assert torch.equal(load_data("photos", 8).images, training.images)  # one cache does not take the other's place

    for i in range(15):
        picture(here / f"few/{i}.png")
    assert len(load_data("few", 8).images) == 15
    with pytest.raises(ValueError, match="few: every 16th picture is held out, and there are only 15"):
        load_data("few", 8, held_out=True)


# ---- the cache --------------------------------------------------------------------------------------------------------


def test_it_is_decoded_once_until_the_folder_changes(here, monkeypatch):
    picture(here / "photos/a.png")
    assert load_data("photos", 16).images[0, 0, 0, 0] == 200
    with monkeypatch.context() as patched:
        patched.setattr(data, "read_picture", None)  # any decoding would now crash
        assert len(load_data("photos", 16).images) == 1
    another = here / "data" / f"{next((here / 'data').glob('*.bytes')).name}.123.tmp"
    another.touch()  # of a process that is just writing
    picture(here / "photos/a.png", colour=(10, 20, 30))
    assert load_data("photos", 16).images[0, 0, 0, 0] == 10
    picture(here / "photos/b.png")
    assert len(load_data("photos", 16).images) == 2
    another.unlink()  # it was let alone
    assert sorted(path.suffix for path in (here / "data").iterdir()) == [".bytes", ".pt"]  # what is out of date is not kept
    load_data("photos", 8)
    picture(here / "elsewhere/photos/c.png")
    load_data("elsewhere/photos", 16)
    assert len(list((here / "data").iterdir())) == 6  # other sizes and folders are


def test_the_content_is_that_of_the_pictures(here):
    picture(here / "photos/a.png")
    picture(here / "same/other.png")
    picture(here / "other/a.png", colour=(200, 30, 61))
    photos, same, other = (load_data(folder, 16).content for folder in ("photos", "same", "other"))
    assert photos == same != other
    many = torch.zeros(5000, 1, 2, 2, dtype=torch.uint8)
    changed = many.clone()
    changed[600:610] = 1  # what it looks at is spread evenly: no ten in a row escape it
    assert data.Data("many", many).content != data.Data("many", changed).content


def test_killed_while_decoding_it_leaves_no_half_cache(here, monkeypatch):
    picture(here / "photos/a.png")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(data, "read_picture", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        load_data("photos", 16)
    assert not list((here / "data").iterdir())


def test_where_the_bytes_are_all_is_there(here, monkeypatch):
    """Killed at the worst moment, or one file lost: both are made again."""
    picture(here / "photos/cats/a.png")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        load_data("photos", 16)
    assert not list((here / "data").iterdir())
    assert list(load_data("photos", 16).captions) == ["cats"]
    next((here / "data").glob("*.pt")).unlink()
    assert list(load_data("photos", 16).captions) == ["cats"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems measure memory differently, or have no sparse files")
def test_pictures_larger_than_the_memory(here):
    """Mapped, not loaded: a file of twice this machine's memory (sparse: it takes no disk) costs nothing to train from."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    shape = (3, 64, 64)
    n = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (3 * 64 * 64)
    one = torch.full(shape, 7, dtype=torch.uint8)
    cached("huge", 64, False, "1", lambda: ({}, [(one, [], "a"), (one, [], "b")]))
    file, about_file = next((here / "data").glob("*.bytes")), next((here / "data").glob("*.pt"))
    os.truncate(file, n * 3 * 64 * 64)
    torch.save(torch.load(about_file) | {"shape": (n, *shape)}, about_file)

    before = resident()
    huge = data.Data("huge", **cached("huge", 64, False, "1", None))
    assert huge.images.shape == (n, *shape)
    assert from_bytes(huge.images[torch.tensor([0, 1, n // 2, n - 1])])[:, 0, 0, 0].tolist() == pytest.approx(
        [7 / 127.5 - 1, 7 / 127.5 - 1, -1, -1]
    )
    assert resident() - before < 100e6


# ---- the drawn cats ---------------------------------------------------------------------------------------------------


def test_the_drawn_cats_are_the_renderers_with_what_they_show(here, monkeypatch):
    monkeypatch.setattr(data, "DRAWN_CATS", 512)
    monkeypatch.setattr(data, "HELD_OUT_CATS", 300)
    training, held_out = load_data("cats", 16), load_data("cats", 16, held_out=True)
    for cats, start, n in ((training, 0, 512), (held_out, 512, 300)):
        images, labels, captions = draw(n, 16, start=start)
        assert cats.name == "cats" and len(cats.images) == n and cats.mirror
        torch.testing.assert_close(from_bytes(cats.images), images, atol=0.51 / 127.5, rtol=0)
        assert cats.classes == ATTRIBUTES and list(cats.classes) == ["fur", "pattern", "eyes", "background"]
        assert torch.equal(cats.labels, torch.stack([labels[name] for name in ATTRIBUTES], dim=1))
        assert list(cats.captions) == captions
    monkeypatch.setattr(data.cats, "draw", None)  # any drawing would now crash
    assert torch.equal(load_data("cats", 16).images, training.images)
    assert torch.equal(load_data("cats", 16, held_out=True).labels, held_out.labels)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(data, "DRAWN_CATS", 256)  # another number is another cache
    assert len(load_data("cats", 16).images) == 256


def test_how_many_cats_and_how_large_unless_told(here, monkeypatch):
    chunks = []

    def nothing(n, size, start):
        chunks.append(range(start, start + n))
        return torch.zeros(n, 3, size, size), {name: torch.zeros(n).long() for name in ATTRIBUTES}, ["a cat"] * n

    monkeypatch.setattr(data.cats, "draw", nothing)
    assert load_data("cats").images.shape == (16_384, 3, 32, 32)
    assert load_data("cats", held_out=True).images.shape == (2_048, 3, 32, 32)
    assert [i for chunk in chunks for i in chunk] == list(range(16_384 + 2_048))


# ---- what torchvision fetches -----------------------------------------------------------------------------------------


def lay_out_digits(name, side=28):
    """Files as MNIST's are: 6 pictures to train on, 3 to test, picture i of brightness 10 i or 20 i and class i + 1."""
    raw = Path("data") / name / "raw"
    raw.mkdir(parents=True)
    for part, n, step in (("train", 6, 10), ("t10k", 3, 20)):
        pixels = b"".join(bytes([i * step]) * side * side for i in range(n))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, n, side, side) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, n) + bytes(range(1, n + 1)))


@pytest.mark.parametrize(
    ("name", "folder", "kind", "first", "last", "mirror"),
    [("mnist", "MNIST", "digit", "0", "9", False), ("fashion", "FashionMNIST", "class", "T-shirt/top", "Ankle boot", True)],
)
def test_digits_and_clothes(here, monkeypatch, name, folder, kind, first, last, mirror):
    lay_out_digits(folder)
    training, test = load_data(name), load_data(name, held_out=True)
    assert training.images.shape == (6, 1, 28, 28) and test.images.shape == (3, 1, 28, 28)
    assert training.images[:, 0, 9, 9].tolist() == [0, 10, 20, 30, 40, 50] and test.images[:, 0, 9, 9].tolist() == [0, 20, 40]
    assert list(training.classes) == [kind] and len(training.classes[kind]) == 10
    assert training.classes[kind][0] == first and training.classes[kind][-1] == last
    assert training.labels.tolist() == [[1], [2], [3], [4], [5], [6]] and training.labels.dtype == torch.long
    assert list(test.captions) == list(training.classes[kind][1:4])
    assert training.mirror == test.mirror == mirror and training.name == name
    assert load_data(name, 32).images.shape == (6, 1, 32, 32)
    monkeypatch.setitem(data.TORCHVISION, name, (None, *data.TORCHVISION[name][1:]))  # any reading would now crash
    assert torch.equal(load_data(name).images, training.images) and load_data(name).captions == training.captions


def test_cifar10_from_the_archive_that_was_put_there_by_hand(here, monkeypatch):
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    planes = torch.tensor([200, 30, 60], dtype=torch.uint8).repeat_interleave(1024)  # red, green, blue
    folder, md5 = here / "data/cifar-10-batches-py", {}
    folder.mkdir(parents=True)
    batches = {f"data_batch_{i}": [i, i] for i in range(1, 6)} | {"test_batch": [9]}
    contents = {name: {"data": planes.repeat(len(own), 1).numpy(), "labels": own} for name, own in batches.items()}
    for name, content in (contents | {"batches.meta": {"label_names": names}}).items():
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    archive = here / "data/cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    for file in folder.iterdir():
        file.unlink()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, md5[name]] for name in batches if "data" in name])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", md5["batches.meta"])

    training, test = load_data("cifar10"), load_data("cifar10", held_out=True)
    assert training.images.shape == (10, 3, 32, 32) and test.images.shape == (1, 3, 32, 32)
    assert colour_of(training.images[0]) == [200, 30, 60]
    assert training.classes == test.classes == {"class": tuple(names)} and training.mirror
    assert training.labels.flatten().tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5] and list(test.captions) == ["truck"]


def test_of_the_pets_only_the_cats(here):
    folder = here / "data/oxford-iiit-pet"
    animals = ["Abyssinian", "american_bulldog", "British_Shorthair", "pug", "Sphynx"]
    for part in ("trainval", "test"):
        lines = []
        for label, animal in reversed(list(enumerate(animals, start=1))):
            colour = (label * 40, 0, 100 if part == "test" else 0)
            picture(folder / f"images/{animal}_{part}.jpg", size=(90, 60), colour=colour, quality=95)
            lines.append(f"{animal}_{part} {label} {1 if animal[0].isupper() else 2} 1")  # name, class, cat or dog, breed
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / f"annotations/{part}.txt").write_text("\n".join(lines))
    for held_out in (False, True):
        pets = load_data("pets", held_out=held_out)
        assert pets.images.shape == (3, 3, 64, 64) and list(pets.captions) == ["Sphynx", "British Shorthair", "Abyssinian"]
        assert [round(colour_of(image)[0], -1) for image in pets.images] == [200, 120, 40]
        assert all(colour_of(image)[2] == pytest.approx(100 * held_out, abs=4) for image in pets.images)
        assert list(pets.classes) == ["breed"] and len(pets.classes["breed"]) == 12
        assert [pets.classes["breed"][i] for i in pets.labels[:, 0]] == list(pets.captions)
    assert len(list((here / "data").glob("pets*.bytes"))) == 2


@pytest.mark.parametrize(
    ("name", "source", "file", "folder"),
    [
        ("mnist", "https://ossci-datasets", "t10k-labels-idx1-ubyte.gz", "data/MNIST/raw"),
        ("fashion", "http://fashion-mnist", "t10k-labels-idx1-ubyte.gz", "data/FashionMNIST/raw"),
        ("cifar10", "https://www.cs.toronto.edu", "cifar-10-python.tar.gz", "data"),
        ("pets", "https://www.robots.ox.ac.uk", "images.tar.gz, annotations.tar.gz", "data/oxford-iiit-pet"),
    ],
)
def test_without_internet_one_sentence_says_what_to_put_where(here, monkeypatch, name, source, file, folder):
    def no_internet(*_, **__):
        raise urllib.error.URLError("no internet")

    monkeypatch.setattr("urllib.request.urlopen", no_internet)
    with pytest.raises(ValueError) as error:
        load_data(name)
    sentence = str(error.value).replace(os.sep, "/")
    assert sentence.startswith(f"--data {name}: fetching it from {source}") and "\n" not in sentence
    assert "no internet" in sentence and f"{file} from there into the folder {folder}" in sentence + " "
    assert sentence.endswith(folder) and not list((here / "data").glob("*.bytes"))


# ---- words that name no data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("minst", r"--data minst: no such folder and no data of that name; did you mean mnist\? Known: cats, mnist, fashion,"),
        ("holiday", r"--data holiday: no such folder and no data of that name\. Known: cats,"),
        ("a.png", r"--data a.png: expected a folder of pictures, this is a file"),
        ("a.zip", r"--data a.zip: expected a folder of pictures, this is a file \(if it is an archive, unpack it first\)"),
        ("empty", "empty: expected pictures .* found none"),
    ],
)
def test_a_name_that_is_none(here, name, sentence):
    picture(here / "a.png")
    zipfile.ZipFile(here / "a.zip", "w").close()
    (here / "empty").mkdir()
    (here / "empty/.a.png").write_bytes((here / "a.png").read_bytes())
    with pytest.raises(ValueError, match=sentence):
        load_data(name)


def test_a_folder_that_is_called_like_data_can_be_had(here):
    picture(here / "cats/a.png")
    assert len(load_data("./cats", 8).images) == 1


# ---- the network that fits --------------------------------------------------------------------------------------------


def test_digits_of_28_pixels_train_with_one_channel(train_here):
    lay_out_digits("MNIST")
    train_here("--data", "mnist", "--size", 28, "--steps", 1, "--batch", 2)
    network = checkpoint("run")["settings"]["network"]
    assert network["in_channels"] == network["out_channels"] == 1


@pytest.mark.parametrize("size", [24, 28, 30])
def test_any_size_trains_with_the_default_network(train_here, monkeypatch, size):
    monkeypatch.setattr(train, "UNet", UNet)
    train_here("--size", size, "--steps", 1, "--batch", 1)
    assert checkpoint("run")["settings"]["network"] == UNet().config


def test_64_pixels_get_a_level_more(train_here, monkeypatch):
    monkeypatch.setattr(train, "UNet", UNet)
    train_here("--size", 64, "--steps", 1, "--batch", 1)
    assert checkpoint("run")["settings"]["network"]["widths"] == [16, 32, 64, 128, 192]


def test_a_model_of_other_channels_is_refused(train_here):
    lay_out_digits("MNIST")
    train_here("--steps", 1)
    with pytest.raises(ValueError, match=r"model.pt draws pictures of 3 channels, and those of --data mnist have 1: train "):
        train_here("--data", "mnist", "--model", "run/model.pt", "--out", "other")
    assert not Path("other").exists()


# ---- bytes and files --------------------------------------------------------------------------------------------------


def test_bytes_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(every)), every)
    assert from_bytes(every).min() == -1 and from_bytes(every).max() == 1
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_a_file_is_whole_or_not_there(here):
    class Full:
        def save(self, path, format):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    save(Image.new("RGB", (2, 2)), here / "out/a.png")
    before = (here / "out/a.png").read_bytes()
    with pytest.raises(OSError, match="No space"):
        save(Full(), here / "out/a.png")
    assert (here / "out/a.png").read_bytes() == before and [p.name for p in (here / "out").iterdir()] == ["a.png"]


def test_a_folder_trains_and_draws_from_the_command_line(photos):
    """What a user with own pictures types, small."""
    command("train.py", "--data", "photos", "--size", 16, "--steps", 1, "--batch", 2, "--device", "cpu")
    result = command(
        "sample.py", "--model", "runs/photos/model.pt", "--n", 2, "--steps", 2, "--out", "own.png", "--device", "cpu"
    )
    assert "trained on photos" in result.stdout and (photos.parent / "own.png").exists()
