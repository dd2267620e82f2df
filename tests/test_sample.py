"""`python sample.py`: a grid, single pictures, a GIF; the same seed gives the same picture, whoever stands beside it."""

import hashlib
import sys
import zipfile

import pytest
import torch
from conftest import TINY, command
from PIL import Image
from test_train import Evil, said
from torchvision.transforms.functional import pil_to_tensor

import sample
import toolbox.models
from processes import NoiseSchedule
from toolbox.models import READY, card, load_model, save_model
from toolbox.pictures import grid, to_image
from unet import UNet


@pytest.fixture
def draw_here(here, monkeypatch, capsys):
    """draw_here("--n", 3) draws with a tiny, random network in this process; returns what was printed."""
    torch.manual_seed(0)
    network = UNet(**TINY)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save_model(here / "tiny.pt", network, card(network, NoiseSchedule.linear(), 8, "nothing"))

    def run(*arguments):
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        defaults = {"--model": "tiny.pt", "--steps": 4, "--device": "cpu"}
        monkeypatch.setattr(sys, "argv", ["sample.py", *(str(word) for pair in (defaults | given).items() for word in pair)])
        sample.main()
        return capsys.readouterr().out

    return run


def pixels(image):
    """(3, height, width), 0 .. 255, of a file or of an opened image."""
    image = image if isinstance(image, Image.Image) else Image.open(image)
    return pil_to_tensor(image.convert("RGB")).float()


def test_same_seed_same_file_and_another_seed_another(draw_here, here):
    draw_here("--n", 5, "--out", "a.png", "--gif", "a.gif")
    draw_here("--n", 5, "--out", "b.png", "--gif", "b.gif")
    draw_here("--n", 5, "--out", "c.png", "--seed", 5)
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes() != (here / "c.png").read_bytes()
    assert (here / "a.gif").read_bytes() == (here / "b.gif").read_bytes()


def test_a_picture_is_the_same_whatever_n_seed_and_chunk(draw_here, here, monkeypatch):
    draw_here("--n", 9, "--out", "all")
    draw_here("--n", 1, "--seed", 7, "--out", "one")
    monkeypatch.setattr(sample, "CHUNK", 2)
    draw_here("--n", 9, "--out", "chunks")
    assert sorted(p.name for p in (here / "all").iterdir()) == [f"{i:06}.png" for i in range(9)]
    assert (pixels(here / "all/000007.png") - pixels(here / "one/000007.png")).abs().max() <= 1  # to rounding
    for i in range(9):
        assert (pixels(here / f"all/{i:06}.png") - pixels(here / f"chunks/{i:06}.png")).abs().max() <= 1
    assert (pixels(here / "all/000007.png") - pixels(here / "all/000006.png")).abs().max() > 20


def test_a_grid_shows_every_picture_enlarged_by_whole_pixels(draw_here, here):
    draw_here("--n", 3, "--out", "grid.png")
    draw_here("--n", 3, "--out", "single")
    image = Image.open(here / "grid.png")
    factor = 96 // 8
    assert image.size == (2 * (8 * factor + 2) + 2, 2 * (8 * factor + 2) + 2)
    for i, (left, top) in enumerate([(2, 2), (8 * factor + 4, 2), (2, 8 * factor + 4)]):
        cell = image.crop((left, top, left + 8 * factor, top + 8 * factor)).resize((8, 8), Image.Resampling.NEAREST)
        assert torch.equal(pixels(cell), pixels(here / f"single/{i:06}.png"))


def test_the_gif_goes_from_noise_to_the_grid(draw_here, here):
    draw_here("--n", 4, "--steps", 6, "--out", "grid.png", "--gif", "way.gif")
    with Image.open(here / "way.gif") as gif:
        assert gif.n_frames == 6
        gif.seek(5)
        last = pixels(gif)
        assert gif.info["duration"] == 2000  # the result stays for a moment
    assert (last - pixels(here / "grid.png")).abs().mean() < 12  # a GIF has few colours


def test_steps_and_eta_reach_the_loop(draw_here, here):
    for name, words in {"a": [], "b": ["--steps", 8], "c": ["--eta", 0]}.items():
        draw_here("--n", 2, "--out", f"{name}.png", *words)
    files = {(here / f"{name}.png").read_bytes() for name in "abc"}
    assert len(files) == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_keep_their_colours(channels):
    picture = torch.linspace(-1, 1, 16 * channels).view(channels, 4, 4)
    back = pil_to_tensor(to_image(picture)) / 127.5 - 1
    torch.testing.assert_close(back, picture, atol=1 / 255, rtol=0)
    assert grid(picture.repeat(5, 1, 1, 1)).size == (3 * 98 + 2, 2 * 98 + 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--n", "0"], "--n 0: expected 1 or more"),
        (["--n", "-1"], "--n -1: expected 1 or more"),
        (["--steps", "0"], "expected 1 to 1000 steps"),
        (["--steps", "2000"], "expected 1 to 1000 steps, as the schedule has 1000, got 2000"),
        (["--eta", "2"], "--eta 2.0: expected 0 to 1"),
        (["--eta", "nan"], "--eta nan: expected 0 to 1"),
        (["--seed", "-1"], "--seed -1: expected 0 to"),
        (["--seed", str(2**32)], f"--seed {2**32}: expected 0 to"),
        (["--device", "tpu9"], "--device tpu9: this machine has no such device"),
        (["--out", "cats.jpg"], "--out cats.jpg: expected a name that ends in .png"),
        (["--out", "folder.png"], "folder.png: expected a file, this is a folder; use another name"),
        (["--out", "a_file"], "a_file: expected a folder, this is a file; use another name"),
        (["--out", "a_file/cats.png"], "a_file: expected a folder, this is a file; use another name"),
        (["--gif", "way.mp4"], "--gif way.mp4: expected a name that ends in .gif"),
        (["--gif", "a_file/way.gif"], "a_file: expected a folder, this is a file; use another name"),
        (["--model", "catz"], "--model catz: no such file and no ready model; did you mean cats?"),
        (["--model", "folder.png"], "--model folder.png: expected a file, this is a folder; is it folder.png/model.pt?"),
    ],
)
def test_bad_input_gets_one_sentence(draw_here, here, capsys, words, told):
    (here / "folder.png").mkdir()
    (here / "a_file").write_text("kept")
    assert told in said(lambda: draw_here("--out", "out.png", *words), capsys)
    assert sorted(path.name for path in here.iterdir()) == ["a_file", "folder.png", "tiny.pt"]
    assert (here / "a_file").read_text() == "kept" and not list((here / "folder.png").iterdir())


def changed(**entries):
    return lambda content: content | entries


def without(name):
    return lambda content: {other: entry for other, entry in content.items() if other != name}


def network(**entries):
    return lambda content: content | {"network": content["network"] | entries}


def weights(change):
    return lambda content: content | {"weights": {name: change(w) for name, w in content["weights"].items()}}


KIND, WHOLE, FIT = (
    "expected a model.pt of this project",
    "expected a file that torch.save wrote whole",
    "its entries do not fit",
)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", WHOLE),
        (b"some text\nof two lines", WHOLE),
        (b"\x89PNG\r\n\x1a\n and so on", WHOLE),
        (lambda whole: whole[: len(whole) // 2], WHOLE),
        (lambda whole: whole[:-1], WHOLE),
        ("a zip", WHOLE),
        ({"weight": torch.zeros(3)}, KIND),
        ([1, 2], KIND),
        (torch.zeros(3), KIND),
        ({"format": torch.zeros(3), "network": {}}, KIND),
        ({"settings": {}}, "expected a model.pt, this is what a run goes on from; use the model.pt beside it"),
        (changed(format=99), KIND),
        (changed(format=1), KIND),  # its network predicted the noise, not v
        (changed(network=3), FIT),
        (network(widths=[8, 8]), FIT),
        (network(widths=[10**6, 10**6]), FIT),  # would need 36 TB
        (network(widths=[]), FIT),
        (network(heads=0), FIT),
        (network(groups=0), FIT),
        (network(unknown=1), FIT),
        (network(attention_block="exec"), FIT),
        (changed(channels=1), FIT),
        (changed(size=0), FIT),
        (changed(size="8"), FIT),
        (changed(weights=None), FIT),
        (weights(lambda w: w * float("nan")), FIT),
        (weights(lambda w: w[:1]), FIT),
        *[(changed(schedule={"name": name, "T": 9}), FIT) for name in ("__init__", "__class__", "from_betas", "sine", [])],
        *[(changed(schedule={"name": "linear", "T": T}), FIT) for T in (0, -1, 10**12, "9", None)],
        *[(without(name), FIT) for name in ("weights", "size", "channels", "schedule")],
        (without("network"), KIND),
    ],
)
def test_a_file_that_is_no_model_gets_one_sentence(draw_here, here, capsys, content, told):
    path, tiny = here / "bad.pt", here / "tiny.pt"
    if content == "a zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.txt", "text")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif callable(content) and told == WHOLE:
        path.write_bytes(content(tiny.read_bytes()))
    else:
        torch.save(content(torch.load(tiny, weights_only=True)) if callable(content) else content, path)
    assert f"bad.pt: {told}" in said(lambda: draw_here("--model", "bad.pt"), capsys)
    assert sorted(file.name for file in here.iterdir()) == ["bad.pt", "tiny.pt"]


def test_nothing_that_a_file_contains_is_executed(draw_here, here, capsys):
    torch.save(Evil(), here / "evil.pt")
    assert f"evil.pt: {WHOLE}" in said(lambda: draw_here("--model", "evil.pt"), capsys)
    assert not (here / "executed").exists()
    torch.load(here / "evil.pt", weights_only=False)
    assert (here / "executed").exists()  # so the file is as bad as it was meant to be


def test_the_ready_model_draws_at_once_in_a_fresh_folder(here):
    """What a newcomer types first; few steps and pictures here, the default is timed in benchmark.py."""
    result = command("sample.py", "--n", 2, "--steps", 3, "--device", "cpu")
    assert "by the model cats" in result.stdout and (here / "samples.png").exists()
    network, schedule, about = load_model("cats")
    assert about["size"] == 32 and about["data"] == "cats" and schedule.T == 1000
    assert network.config == UNet().config  # the default toy
    assert (READY / "cats.pt").stat().st_size < 16e6


def test_a_ready_model_that_was_changed_is_refused(draw_here, here, monkeypatch, capsys):
    """Whole and well-formed, but not the file whose checksum is listed. A file that is not listed is the user's own."""
    ready = here / "models"
    ready.mkdir()
    model = (here / "tiny.pt").read_bytes()
    (ready / "README.md").write_text(
        f"| file | checksum |\n|---|---|\n| `kitten.pt` | a cat | `{hashlib.sha256(model).hexdigest()}` |\n"
    )
    monkeypatch.setattr(toolbox.models, "READY", ready)
    for name in ("kitten.pt", "own.pt"):
        (ready / name).write_bytes(model)
    draw_here("--model", "kitten")
    content = torch.load(here / "tiny.pt", weights_only=True)
    content["weights"]["conv.bias"] += 1
    for name in ("kitten.pt", "own.pt"):
        torch.save(content, ready / name)
    for way in ("kitten", "models/kitten.pt"):
        assert "kitten.pt: expected the ready model that" in said(lambda way=way: draw_here("--model", way), capsys)
    draw_here("--model", "own")
