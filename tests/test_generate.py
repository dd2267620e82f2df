"""`python -m latent_ext.generate`: prompts, seeds, pictures to begin with, models of every kind, and mistakes."""

import sys

import pytest
import torch
from conftest import TINY
from PIL import Image
from test_pipeline import LIKE_THE_TOY, tiny_pipeline
from test_sample import pixels
from test_train import said

import sample
import toolbox.models
from latent_ext import generate
from latent_ext.guidance import ClassUNet
from latent_ext.stable_diffusion import save
from processes import NoiseSchedule
from toolbox.data import read_picture
from toolbox.models import card, save_model
from unet import UNet

FACTOR = 96 // 32  # a grid enlarges pictures of 32x32 so


@pytest.fixture
def draw_here(here, monkeypatch, capsys):
    """draw_here("a cat", "--n", 3) draws in this process with a tiny random pipeline of a folder; returns what was printed."""
    save(tiny_pipeline(dtype=torch.float32, **LIKE_THE_TOY), here / "toy")

    def run(*words):
        defaults = {"--model": "toy", "--steps": 4, "--n": 2, "--device": "cpu"}
        given = [word for flag, value in defaults.items() if flag not in words for word in (flag, value)]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, [*words, *given])])
        generate.main()
        return capsys.readouterr().out

    return run


def cells(path, columns, rows):
    """The pictures of a grid, (rows, columns, 3, 32, 32), 0 .. 255."""
    step = 32 * FACTOR + 2
    image = pixels(path)
    if rows == columns == 1:  # torchvision draws no frame around a single picture
        image = torch.nn.functional.pad(image, (2, 2, 2, 2))
    assert image.shape[1:] == (rows * step + 2, columns * step + 2)
    corners = [(2 + step * row, 2 + step * column) for row in range(rows) for column in range(columns)]
    small = [image[:, y : y + 32 * FACTOR : FACTOR, x : x + 32 * FACTOR : FACTOR] for y, x in corners]
    return torch.stack(small).unflatten(0, (rows, columns))


def test_each_prompt_has_a_row_and_each_seed_a_column(draw_here, here):
    draw_here("an orange cat", "a black dog", "--n", 4)
    both = cells(here / "samples.png", 4, 2)  # as one would not arrange eight pictures otherwise
    draw_here("a black dog", "--n", 1, "--seed", 2, "--out", "one.png")
    assert (cells(here / "one.png", 1, 1)[0, 0] - both[1, 2]).abs().max() <= 1  # whoever stands beside it
    assert (both[1, 2] - both[1, 1]).abs().max() > 20
    assert (both[0] - both[1]).abs().max() > 2  # random networks hear a prompt, but it moves them little


def test_the_same_command_makes_the_same_file_in_chunks_of_any_size(draw_here, here, monkeypatch):
    draw_here("an orange cat", "a black dog", "--n", 2, "--out", "a.png", "--gif", "a.gif")
    draw_here("an orange cat", "a black dog", "--n", 2, "--out", "b.png", "--gif", "b.gif")
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    assert (here / "a.gif").read_bytes() == (here / "b.gif").read_bytes()
    monkeypatch.setattr(generate, "PIXELS", 1)
    draw_here("an orange cat", "a black dog", "--n", 2, "--out", "c.png", "--gif", "c.gif")
    assert (cells(here / "a.png", 2, 2) - cells(here / "c.png", 2, 2)).abs().max() <= 1
    with Image.open(here / "a.gif") as a, Image.open(here / "c.gif") as c:
        assert a.n_frames == c.n_frames == 4  # and the result, which is like the last one: Pillow joins these
        for frame in range(4):
            a.seek(frame)
            c.seek(frame)
            assert (pixels(a) - pixels(c)).abs().mean() < 3
        assert (pixels(a) - pixels(here / "a.png")).abs().mean() < 12  # ends with the result; a GIF has few colours


def test_a_ready_folder_of_which_a_file_was_changed_is_refused(draw_here, here, monkeypatch, capsys):
    name = "toy/vae/diffusion_pytorch_model.safetensors"
    (here / "README.md").write_text(f"| `{name}` | a VAE | `{'0' * 64}` |\n")
    draw_here("a cat")
    monkeypatch.setattr(toolbox.models, "READY", here)
    assert f"{name}: expected the ready model that" in said(lambda: draw_here("a cat"), capsys)


@pytest.mark.parametrize(
    ("like", "words", "expected"),
    [
        (LIKE_THE_TOY, [], {"guidance": 3, "eta": 1, "size": 32, "steps": 50, "negative": ""}),
        ({}, [], {"guidance": 7.5, "eta": 0, "size": 32, "steps": 50, "negative": ""}),
        (
            LIKE_THE_TOY,
            ["--guidance", "0", "--eta", "0", "--size", "44", "--negative", "dog", "--steps", "9"],
            {"guidance": 0, "eta": 0, "size": 44, "steps": 9, "negative": "dog"},
        ),
    ],
)
def test_the_defaults_are_those_of_the_model_and_flags_replace_them(here, monkeypatch, like, words, expected):
    heard = {}

    def draw(pipeline, prompts, generator, on_step, **how):
        heard.update(how)
        return torch.zeros(len(prompts), 3, 32, 32)

    monkeypatch.setattr(generate, "text_to_image", draw)
    monkeypatch.setattr(generate, "find", lambda *model: tiny_pipeline(dtype=torch.float32, **like))
    monkeypatch.setattr(sys, "argv", ["generate.py", "a cat", "--device", "cpu", *words])
    generate.main()
    assert heard == expected


@pytest.mark.parametrize(("words", "strength"), [([], 0.75), (["--mask", "grey.png"], 1), (["--strength", "0"], 0)])
def test_a_picture_is_changed_and_a_hole_is_filled(draw_here, here, monkeypatch, words, strength):
    Image.new("L", (40, 30), 200).save(here / "grey.png")
    heard = []
    monkeypatch.setattr(generate, "image_to_image", lambda *begin, strength, **how: heard.append(strength) or begin[2])
    monkeypatch.setattr(generate, "inpaint", lambda *begin, strength, **how: heard.append(strength) or begin[2])
    draw_here("a cat", "--init-image", "grey.png", *words)
    assert heard == [strength]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_kept_pixels_are_those_of_the_file_whatever_its_mode_and_size(draw_here, here, mode):
    image = Image.linear_gradient("L").resize((50, 70))
    image = image.point(lambda value: value * 256, mode="I").convert("I;16") if mode == "I;16" else image.convert(mode)
    image.save(here / ("begin.tif" if mode == "CMYK" else "begin.png"))
    begin = next(here.glob("begin.*"))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 32))  # the upper half
    mask.convert("L" if mode == "CMYK" else mode if mode in ("RGBA", "LA", "1", "P") else "L").save(here / "mask.png")
    draw_here("a cat", "--init-image", begin, "--mask", "mask.png", "--n", 1)
    result, cropped = cells(here / "samples.png", 1, 1)[0, 0], read_picture(begin, 32).float()
    assert torch.equal(result[:, 16:], cropped[:, 16:])
    assert (result[:, :16] - cropped[:, :16]).abs().mean() > 10


def test_strength_says_how_much_is_drawn_anew(draw_here, here):
    Image.radial_gradient("L").save(here / "begin.png")
    for strength in (0, 0.5, 1):
        draw_here("a cat", "--init-image", "begin.png", "--strength", strength, "--out", f"{strength}.png", "--gif", "way.gif")
        with Image.open(here / "way.gif") as gif:
            assert gif.n_frames == max(1, 4 * strength)  # the last one and the result are one, as they are equal
    assert len({(here / f"{strength}.png").read_bytes() for strength in (0, 0.5, 1)}) == 3


def test_it_names_what_it_cut_and_what_it_does_not_know(draw_here):
    printed = draw_here("an orange zebra with green eyes a black dog with a cat", "--negative", "unicorns, dog")
    assert "too long for this model; it is not told: 'dog with a cat'" in printed
    assert "does not know 'zebra'\n" in printed
    assert "'unicorns, dog': this model does not know 'unicorns', ','" in printed
    assert "warning" not in draw_here("an orange cat")


def class_model(here):
    network = ClassUNet({"digit": ["0", "7"]}, 8, in_channels=1, out_channels=1, **TINY)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save_model(here / "digits.pt", network, card(network, NoiseSchedule.cosine(), 16, "mnist"))


def test_a_class_is_a_prompt(draw_here, here):
    class_model(here)
    printed = draw_here("0", "7", "--model", "digits.pt")
    assert "2 pictures of 16x16 pixels by the model digits.pt, for each of 2 prompts" in printed
    assert pixels(here / "samples.png").shape == (3, 2 * 98 + 2, 2 * 98 + 2)
    (here / "seven.png").write_bytes((here / "samples.png").read_bytes())
    draw_here("7", "--model", "digits.pt", "--init-image", "seven.png", "--strength", 0.5)  # the same loop, so this works, too


def test_programs_name_each_other(draw_here, here, monkeypatch, capsys):
    class_model(here)
    assert "digits.pt: this model is told what to draw; it draws with python -m latent_ext.generate" in said(
        lambda: sample.load_model("digits.pt"), capsys
    )
    network = UNet(**TINY)
    save_model(here / "core.pt", network, card(network, NoiseSchedule.cosine(), 16, "cats"))
    told = said(lambda: draw_here("a cat", "--model", "core.pt"), capsys)
    assert "core.pt: this model is not told what to draw; it draws with python sample.py" in told


def test_the_model_trained_here_comes_first(here):
    assert generate.default_model() == "latent-cats"
    (here / generate.OWN).mkdir(parents=True)
    assert generate.default_model() == "latent-cats"  # a training that has no pipeline yet
    (here / generate.OWN / "model_index.json").touch()
    assert generate.default_model() == generate.OWN


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--n", "0"], "--n 0: expected 1 or more"),
        (["--seed", "-1"], "--seed -1: expected 0 to"),
        (["--eta", "2"], "--eta 2.0: expected 0 to 1"),
        (["--guidance", "-1"], "--guidance -1.0: expected 0 or more"),
        (["--guidance", "nan"], "--guidance nan: expected 0 or more"),
        (["--steps", "0"], "expected 1 to 1000 steps"),
        (["--size", "33"], "--size 33: expected a multiple of 4"),
        (["--size", "0"], "--size 0: expected a multiple of 4"),
        (["--mask", "photo.png"], "--mask photo.png: expected an --init-image, too"),
        (["--strength", "0.5"], "--strength 0.5: expected an --init-image, too"),
        (["--init-image", "photo.png", "--strength", "1.5"], "--strength 1.5: expected 0 to 1"),
        (["--init-image", "nowhere.png"], "nowhere.png: expected a picture"),
        (["--init-image", "text.png"], "text.png: expected a picture"),
        (["--init-image", "photo.png", "--mask", "text.png"], "text.png: expected a picture"),
        (["--init-image", "toy"], "toy: expected a picture"),
        (["--out", "cats.jpg"], "cats.jpg: expected a name that ends in .png"),
        (["--gif", "cats.mp4"], "cats.mp4: expected a name that ends in .gif"),
        (["--out", "text.png/cats.png"], "text.png: expected a folder, this is a file; use another name"),
        (["--device", "tpu9"], "--device tpu9: this machine has no such device"),
        (["--model", "catz"], "--model catz: no such file or folder, and no ready model"),
        (["--model", "text.pt"], "text.pt: expected a file that torch.save wrote whole"),
        (["--model", "digits.pt"], "'a cat': this model has no such class. Its classes: digit: 0, 7"),
    ],
)
def test_bad_input_gets_one_sentence(draw_here, here, capsys, words, told):
    class_model(here)
    Image.new("RGB", (20, 30)).save(here / "photo.png")
    (here / "text.png").write_text("no picture")
    (here / "text.pt").write_text("no model")
    before = sorted(path.name for path in here.iterdir())
    assert told in said(lambda: draw_here("a cat", *words), capsys)
    assert sorted(path.name for path in here.iterdir()) == before and (here / "text.png").read_text() == "no picture"


def test_a_network_for_inpainting_asks_for_a_mask(draw_here, here, monkeypatch, capsys):
    monkeypatch.setattr(generate, "find", lambda *model: tiny_pipeline(in_channels=9, dtype=torch.float32))
    assert "was trained for inpainting; it needs --init-image and --mask" in said(lambda: draw_here("a cat"), capsys)
    Image.new("L", (32, 32), 255).save(here / "white.png")
    draw_here("a cat", "--init-image", "white.png", "--mask", "white.png")


def test_transparent_and_grey_of_a_mask(here):
    """What is transparent is white paper, so it is repainted; grey counts as what it is nearer to."""
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(here / "clear.png")
    assert generate.read(here / "clear.png", 16, 1).min() == 1
    Image.new("L", (32, 32), 100).save(here / "grey.png")
    torch.testing.assert_close(generate.read(here / "grey.png", 16, 1), torch.full((1, 1, 16, 16), 100 / 127.5 - 1))
