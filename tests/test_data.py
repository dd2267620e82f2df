"""Folders of any pictures, decoded once; the drawn cats, drawn once."""

import os

import pytest
import torch
from conftest import command
from PIL import Image

from toolbox import data
from toolbox.cats import draw
from toolbox.data import from_bytes, load_data, to_bytes
from toolbox.pictures import save


def picture(path, mode="RGB", size=(40, 30), colour=(200, 30, 60)):
    image = Image.new("RGB", size, colour).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_pictures_of_any_mode_size_and_depth_of_folder(here):
    for mode, suffix in {"RGB": "jpg", "L": "png", "LA": "png", "P": "gif", "RGBA": "png", "CMYK": "jpg", "1": "bmp"}.items():
        picture(here / "photos" / f"{mode}.{suffix}", mode)
    picture(here / "photos/deep/er/UPPER.JPEG", size=(7, 200))
    (here / "photos/notes.txt").write_text("not a picture")
    loaded = load_data("photos", 16)
    assert loaded.images.shape == (8, 3, 16, 16) and loaded.images.dtype == torch.uint8
    assert loaded.name == "photos" and loaded.size == 16 and loaded.channels == 3
    assert load_data("photos").size == 64
    for image in loaded.images[[names().index("RGB.jpg"), names().index("UPPER.JPEG")]]:
        assert (image.float().mean((1, 2)) - torch.tensor([200.0, 30, 60])).abs().max() < 4


def names():
    return [
        path.name
        for path in sorted(p for p in __import__("pathlib").Path("photos").rglob("*") if p.suffix.lower() in data.SUFFIXES)
    ]


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


def test_a_broken_picture_is_skipped_and_named(here, capsys):
    picture(here / "photos/good.png")
    whole = (here / "photos/good.png").read_bytes()
    (here / "photos/broken.png").write_bytes(whole[: len(whole) // 2])
    (here / "photos/text.jpg").write_text("no picture at all")
    assert len(load_data("photos", 16).images) == 1
    printed = "".join(capsys.readouterr())
    assert "skipped photos/broken.png" in printed.replace(os.sep, "/") and "text.jpg" in printed


def test_it_is_decoded_once_until_the_folder_changes(here, monkeypatch):
    picture(here / "photos/a.png")
    assert load_data("photos", 16).images[0, 0, 0, 0] == 200
    monkeypatch.setattr(data, "pil_to_tensor", None)  # any decoding would now crash
    assert len(load_data("photos", 16).images) == 1
    monkeypatch.undo()
    monkeypatch.chdir(here)
    picture(here / "photos/a.png", colour=(10, 20, 30))
    assert load_data("photos", 16).images[0, 0, 0, 0] == 10
    picture(here / "photos/b.png")
    assert len(load_data("photos", 16).images) == 2
    assert len(list((here / "data").iterdir())) == 1  # what is out of date is not kept


def test_killed_while_decoding_it_leaves_no_half_cache(here, monkeypatch):
    picture(here / "photos/a.png")
    monkeypatch.setattr(data, "pil_to_tensor", lambda image: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load_data("photos", 16)
    assert not list((here / "data").iterdir())


def test_the_drawn_cats_are_the_renderers(here, monkeypatch):
    monkeypatch.setattr(data, "DRAWN_CATS", 512)
    cats = load_data("cats", 16)
    assert cats.name == "cats" and len(cats.images) == 512
    torch.testing.assert_close(from_bytes(cats.images), draw(512, 16)[0], atol=0.51 / 127.5, rtol=0)
    monkeypatch.setattr(data.cats, "draw", None)  # any drawing would now crash
    assert torch.equal(load_data("cats", 16).images, cats.images)


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
    command("train.py", "--data", "photos", "--size", 16, "--steps", 2, "--batch", 2, "--device", "cpu")
    result = command(
        "sample.py", "--model", "runs/photos/model.pt", "--n", 2, "--steps", 2, "--out", "own.png", "--device", "cpu"
    )
    assert "trained on photos" in result.stdout and (photos.parent / "own.png").exists()
    again = command("train.py", "--data", "photos", "--size", 16, "--steps", 2, "--batch", 2, "--device", "cpu")
    assert "finished after 2 steps" in again.stdout
