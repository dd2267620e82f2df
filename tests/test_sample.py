"""`python sample.py`: a grid, single images, a GIF; and bad input of train.py and sample.py."""

import pytest
import torch
from conftest import FLAGS, TINY, call, command, pixels, random_unet, said
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import sample
import train
from processes import NoiseSchedule, snr_pairs, timestep_pairs
from toolbox.files import UserError
from toolbox.images import grid, to_image
from toolbox.models import load_model, model_config, predict_noise_of, save_model
from toolbox.seeds import sample_seeds
from unet import UNet


@pytest.fixture
def draw_here(here, monkeypatch, capsys):
    """draw_here("--n", 3) samples with a tiny, random network; returns what was printed."""
    network = random_unet()
    config = model_config(network, NoiseSchedule.linear(), 8, "nothing")
    save_model(here / "tiny.pt", network, config)
    flags = {"--model": "tiny.pt", "--steps": 4, "--device": "cpu"}
    return lambda *words: call(sample.main, monkeypatch, capsys, flags, *words)


def test_an_image_depends_on_its_seed_alone(draw_here, here, monkeypatch):
    draw_here("--n", 9, "--out", "all")
    draw_here("--n", 1, "--seed", 7, "--out", "one")
    draw_here("--n", 1, "--seed", 7, "--out", "one.png")
    monkeypatch.setattr(sample, "BATCH", 2)
    draw_here("--n", 9, "--out", "again")
    assert sorted(p.name for p in (here / "all").iterdir()) == [f"{i:06}.png" for i in range(9)]
    seven = pixels(here / "all/000007.png")
    for same in ("one/000007.png", "one.png", "again/000007.png"):
        assert (pixels(here / same) - seven).abs().max() <= 1  # to rounding; not enlarged
    assert (pixels(here / "all/000006.png") - seven).abs().max() > 20


@pytest.mark.parametrize(("eta", "order"), [(0, 1), (1, 1), (0, 2)])
def test_the_flags_reach_the_loop(draw_here, here, eta, order):
    words = "--steps", 8, "--eta", eta, "--order", order
    out = draw_here("--n", 1, "--seed", 3, "--out", "one.png", *words)
    assert "1 images of 8x8 pixels by tiny.pt, trained on nothing" in out and "one.png" in out
    network, schedule, config = load_model("tiny.pt")
    pairs = snr_pairs(schedule, 8) if order == 2 else timestep_pairs(1000, 8)
    options = {"timesteps": pairs, "eta": eta, "order": order, "clip_x0": True}
    predict_noise = predict_noise_of(network, schedule, config)
    x0 = sample_seeds(predict_noise, (3, 8, 8), [3], schedule, **options)
    assert torch.equal(pixels(to_image(x0[0])), pixels(here / "one.png"))


def test_a_grid_shows_every_image_enlarged_by_whole_pixels_and_the_gif_ends_with_it(
    draw_here, here
):
    draw_here("--n", 3, "--out", "single", "--gif", "steps.gif")
    draw_here("--n", 3, "--out", "grid.png")
    image, side = Image.open(here / "grid.png"), 96
    assert image.size == (2 * (side + 2) + 2, 2 * (side + 2) + 2)
    for i, (left, top) in enumerate([(2, 2), (side + 4, 2), (2, side + 4)]):
        cell = image.crop((left, top, left + side, top + side)).resize((8, 8), Image.Resampling.BOX)
        assert torch.equal(pixels(cell), pixels(here / f"single/{i:06}.png"))
    with Image.open(here / "steps.gif") as gif:
        assert gif.n_frames == 4 and gif.info["duration"] == 1000 and gif.info["loop"] == 0
        first = pixels(gif)
        gif.seek(3)
        assert gif.info["duration"] == 2000  # the result stays for a moment
        assert (pixels(gif) - pixels(image)).abs().mean() < 12  # a GIF has few colours
        assert (first - pixels(image)).abs().mean() > 20


@pytest.mark.parametrize("channels", [1, 3])
def test_images_keep_their_colours_and_nan_is_no_colour(channels):
    image = torch.linspace(-1, 1, 16 * channels).view(channels, 4, 4)
    back = pil_to_tensor(to_image(image)) / 127.5 - 1
    torch.testing.assert_close(back, image, atol=1 / 255, rtol=0)
    assert grid(image[None]).size == (4, 4) and grid(image[None]).mode in ("L", "RGB")
    assert grid(image.repeat(5, 1, 1, 1)).size == (3 * 98 + 2, 2 * 98 + 2)
    assert grid(image.repeat(5, 1, 1, 1), columns=5).size == (5 * 98 + 2, 98 + 2)
    image[0, 2, 1] = torch.nan
    with pytest.raises(UserError, match="has NaN in it"):
        to_image(image)


def test_own_model_first_and_the_pretrained_model_in_a_fresh_folder(draw_here, here):
    """What a newcomer types first; few steps and images here."""
    result = command("sample.py", "--n", 2, "--steps", 3, "--device", "cpu")
    assert "by cats" in result.stdout and pixels(here / "samples.png").shape == (3, 100, 198)
    (here / "runs/cats").mkdir(parents=True)
    (here / "tiny.pt").rename(here / "runs/cats/model.pt")
    assert "by runs/cats/model.pt" in draw_here("--model", None, "--n", 1)


@pytest.mark.parametrize(
    ("program", "words", "told"),
    [
        *[("both", f"--seed {n}", f"--seed {n}: expected 0 to 42949") for n in (-1, 2**32, 10**30)],
        *[("both", f"--steps {n}", f"--steps {n}: expected 1") for n in (0, -1)],
        ("both", "--device tpu9", "--device tpu9: this machine has no such device"),
        ("both", "--model catz", "--model catz: no such model file; did you mean cats?"),
        ("both", "--model photos/0.png", "0.png: expected a file of torch.save"),
        ("both", "--out a_file/below", "a_file/below"),
        ("train", "--data nowhere", "nowhere"),
        ("train", "--data empty", "empty: 0 images"),
        ("train", "--data broken", "none of the images can be read"),
        ("train", "--size 0", "--size 0: expected 1"),
        ("train", "--batch 0", "--batch 0: expected 1 to 1048576"),
        ("train", f"--batch {2**20 + 1}", "expected 1 to 1048576"),
        ("train", "--out a_file", "a_file: "),
        ("train", "--model grey.pt", "--model grey.pt: expected data of 1 channels, got 3"),
        ("sample", "--steps 1001", "--steps 1001: expected 1 to 1000"),
        *[("sample", f"--n {n}", f"--n {n}: expected 1 to 1024") for n in (0, -1, 1025)],
        ("sample", "--n 5000000000 --out folder", "expected 1 to 2147483648"),
        *[("sample", f"--eta {x}", f"--eta {x}: expected 0 to 1") for x in ("2.0", "-0.1", "nan")],
        ("sample", "--out empty.png", "empty.png: "),
        ("sample", "--gif way.mp4", "way.mp4: expected a name that ends in .gif"),
        ("sample", "--gif a_file/way.gif", "a_file/way.gif"),
        ("sample", "--model empty", "--model empty: no such model file"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(
    draw_here, photos, here, capsys, monkeypatch, program, words, told
):
    for folder in ("empty", "empty.png", "broken"):
        (here / folder).mkdir()
    (here / "broken/cat.png").write_bytes(b"no image")
    (here / "a_file").write_text("kept")
    grey = UNet(1, 1, **TINY)
    save_model(here / "grey.pt", grey, model_config(grey, NoiseSchedule.linear(), 8, "nothing"))
    before = sorted(here.rglob("*"))
    flag, value, *more = words.split(" ")
    for name in ("train", "sample") if program == "both" else (program,):
        main, flags = {
            "train": (train.main, FLAGS | {"--out": "new"}),
            "sample": (sample.main, {"--model": "tiny.pt", "--device": "cpu", "--out": "new.png"}),
        }[name]
        run = lambda: call(main, monkeypatch, capsys, flags, flag, value, *more)  # noqa: B023, E731
        assert told in said(run, capsys)
    after = [path for path in sorted(here.rglob("*")) if "data" not in path.parts]  # the cache
    assert after == before and (here / "a_file").read_text() == "kept"
