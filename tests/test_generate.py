"""`python -m latent_ext.generate`: prompts, seeds, images to start from, models of every kind."""

import sys

import pytest
import torch
from conftest import TINY, pixels, said
from oracles import randomise
from PIL import Image
from test_pipeline import TOY, tiny_pipeline

from latent_ext import generate
from latent_ext.guidance import ClassUNet
from latent_ext.stable_diffusion import save
from processes import NoiseSchedule
from toolbox.models import model_config, save_model
from unet import UNet

ENLARGED = 96 // 32  # a grid enlarges images of 32x32 so


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with tiny random models of every kind, and files that are none."""
    here = tmp_path_factory.mktemp("models")
    pipelines = {"toy": tiny_pipeline(**TOY), "sd": tiny_pipeline(), "inpaints": tiny_pipeline(9)}
    for name, pipeline in pipelines.items():
        save(pipeline, here / name)
    digits = ClassUNet({"digit": ["0", "7"]}, 8, in_channels=1, out_channels=1, **TINY)
    for path, network in {"digits.pt": digits, "runs/model.pt": UNet(**TINY)}.items():
        config = model_config(network, NoiseSchedule.cosine(), 16, "noise")
        save_model(here / path, randomise(network), config)
    for name, size in {"a.png": (20, 30), "wide.png": (40, 30)}.items():
        Image.new("RGB", size).save(here / name)
    for name in ("text.png", "text.pt"):
        (here / name).write_text("neither an image nor a model")
    return here


@pytest.fixture
def draw_here(here, models, monkeypatch, capsys):
    """draw_here("a cat", "--n", 3) is the program, with the toy; returns what it printed."""

    def run(*words):
        flags = ["--model", models / "toy", "--steps", 4, "--n", 2, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["generate", *map(str, [*flags, *words])])
        generate.main()
        return capsys.readouterr().out

    return run


def test_each_prompt_has_a_row_and_each_seed_a_column_in_batches_of_any_size(
    draw_here, here, monkeypatch
):
    prompts = "an orange cat", "a black dog"
    draw_here(*prompts, "--n", 3, "--out", "a.png", "--gif", "a.gif")
    draw_here(*prompts, "--n", 3, "--out", "again.png", "--gif", "again.gif")
    monkeypatch.setattr(generate, "BATCH_PIXELS", 1)
    draw_here(*prompts, "--n", 3, "--out", "b.png", "--gif", "b.gif")
    for kind in ("png", "gif"):
        assert (here / f"a.{kind}").read_bytes() == (here / f"again.{kind}").read_bytes()
        assert (pixels(here / f"a.{kind}") - pixels(here / f"b.{kind}")).abs().mean() < 1
    grid, step = pixels(here / "a.png"), 32 * ENLARGED + 2
    assert grid.shape == (3, 2 * step + 2, 3 * step + 2)
    with Image.open(here / "a.gif") as gif:
        assert gif.n_frames == 4  # and the result, which is like the last one: Pillow joins these
        gif.seek(3)
        assert (pixels(gif) - grid).abs().mean() < 12  # a GIF has few colours

    draw_here("a black dog", "--n", 1, "--seed", 2, "--out", "one.png")
    one = pixels(here / "one.png")
    assert one.shape == (3, 32, 32)  # as it is, so that it can be the next command's input
    corners = (step + 2, 2 * step + 2), (2, 2)
    same, other = (grid[:, y::ENLARGED, x::ENLARGED][:, :32, :32] for y, x in corners)
    assert (one - same).abs().max() <= 1 and (one - other).abs().max() > 20


@pytest.mark.parametrize(
    ("model", "given", "defaults"),
    [
        ("toy", [], ["--guidance", 3, "--eta", 1, "--size", 32, "--seed", 0]),
        ("sd", [], ["--guidance", 7.5, "--eta", 0]),
        ("toy", ["--init-image", "a.png"], ["--strength", 0.75]),
        ("toy", ["--init-image", "a.png", "--mask", "a.png"], ["--strength", 1]),
    ],
)
def test_the_defaults_are_those_of_the_model(draw_here, here, models, model, given, defaults):
    Image.linear_gradient("L").save(here / "a.png")
    given = ["a cat", "--model", models / model, "--n", 1, *given]
    draw_here(*given, "--out", "short.png")
    draw_here(*given, *defaults, "--out", "long.png")
    assert (here / "short.png").read_bytes() == (here / "long.png").read_bytes()
    for flag in set(defaults) & {"--guidance", "--eta", "--strength"}:
        draw_here(*given, flag, 0.4, "--out", "x.png")
        assert (here / "x.png").read_bytes() != (here / "short.png").read_bytes()


@pytest.mark.parametrize("enlarged", [1, 3])
def test_the_output_of_one_command_is_the_input_of_the_next(draw_here, here, enlarged):
    """As it is, or enlarged by whole pixels, as grids are: what is outside of a mask is kept."""
    draw_here("a cat", "--n", 1, "--out", "first.png")
    first = Image.open(here / "first.png")
    first.resize((32 * enlarged, 32 * enlarged), Image.Resampling.NEAREST).save(here / "first.png")
    mask = Image.new("RGBA", (64, 64), (120, 120, 120, 255))  # grey is what it is nearer to: black
    mask.paste((0, 0, 0, 0), (8, 8, 18, 60))  # what is transparent is white, as paper is
    mask.save(here / "mask.png")
    draw_here("a cat", "--n", 1, "--init-image", "first.png", "--mask", "mask.png", "--seed", 5)
    changed = (pixels(here / "samples.png") - pixels(first)).abs().amax(0) > 0
    assert changed[4:30, 4:9].float().mean() > 0.9
    changed[4:30, 4:9] = False
    assert not changed.any()


def test_it_names_what_it_cuts_off_and_what_it_does_not_know(draw_here):
    printed = draw_here("an orange zebra with green eyes a black dog with a cat", "--negative", "x")
    assert "too long for this model: 'dog with a cat' is cut off" in printed
    assert "words this model does not know: zebra\n" in printed and "'x' has words" in printed
    assert "warning" not in draw_here("an orange cat")
    assert max(map(len, draw_here("a cat and a zebra " * 500).splitlines())) < 250


def test_a_value_is_a_prompt(draw_here, here, models):
    model = "--model", models / "digits.pt"
    assert "4 images of 16x16 pixels by" in draw_here("0", "7", *model, "--guidance", 9)
    grid = pixels(here / "samples.png")
    assert grid.shape == (3, 198, 198) and (grid[:, :98] - grid[:, 100:]).abs().max() > 20
    draw_here("7", *model, "--n", 1, "--out", "7.png")
    kept = "--init-image", "7.png", "--strength", 0, "--gif", "7.gif"  # of no step at all
    draw_here("7", *model, "--n", 1, *kept)
    assert torch.equal(pixels(here / "samples.png"), pixels(here / "7.png"))
    Image.new("RGB", (16, 16), (0, 60, 240)).save(here / "7.png")
    draw_here("7", *model, "--n", 1, *kept)
    assert (pixels(here / "samples.png") == 100).all()  # its grey


def test_the_pipeline_trained_here_comes_first(here):
    (here / generate.OWN_MODEL).mkdir(parents=True)
    assert generate.default_model() == "latent-cats"  # a training that has no pipeline yet
    (here / generate.OWN_MODEL / "model_index.json").touch()
    assert generate.default_model() == generate.OWN_MODEL


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--n 100000", "--n 100000: expected 1 to"),
        ("--seed -1", "--seed -1: expected 0 to 4294967294"),
        ("--eta 2", "--eta 2.0: expected 0 to 1"),
        ("--guidance nan", "--guidance nan: expected 0 to 100"),
        ("--steps 0", "--steps 0: expected 1 to 1000"),
        ("--size 33", "--size 33: expected a multiple of 4"),
        ("--size 100000", "--size 100000: expected 1 to"),
        ("--mask a.png", "--mask a.png needs an --init-image"),
        ("--strength 0.5", "--strength 0.5 needs an --init-image"),
        ("--init-image a.png --strength 1.5", "--strength 1.5: expected 0 to 1"),
        ("--init-image none.png", "none.png: not a readable image"),
        ("--init-image text.png", "text.png: not a readable image"),
        ("--init-image a.png --mask text.png", "text.png: not a readable image"),
        ("--init-image a.png --mask wide.png", "expected the aspect ratio of a.png"),
        ("--out cats.jpg", "cats.jpg: expected a name that ends in .png"),
        ("--gif cats.mp4", "cats.mp4: expected a name that ends in .gif"),
        ("--out text.png/cats.png", "error: text.png/cats.png: "),
        ("--device tpu9", "--device tpu9: this machine has no such device"),
        ("--model latent-catz", "did you mean latent-cats?"),
        ("--model runs", "did you mean runs/model.pt?"),
        ("--model text.pt", "text.pt: expected a file of torch.save"),
        ("--model digits.pt", "this model does not know 'a cat'"),
        ("--model runs/model.pt", "runs/model.pt: expected another kind of model; use python"),
        ("--model inpaints", "inpaints is an inpainting model: add --init-image and"),
    ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(
    draw_here, models, monkeypatch, capsys, words, sentence
):
    monkeypatch.chdir(models)
    before = sorted(models.rglob("*"))
    assert sentence in said(lambda: draw_here("a cat", *words.split()), capsys)
    assert sorted(models.rglob("*")) == before and "neither" in (models / "text.png").read_text()
