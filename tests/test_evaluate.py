"""evaluate.py: what it prints and writes, and that no network can fool it by learning nothing."""

import functools
import re

import pytest
import torch
from conftest import TINY, call
from PIL import Image
from test_data import lay_out_digits

import evaluate
from processes import NoiseSchedule, snr_pairs
from toolbox import metrics
from toolbox.cats import draw
from toolbox.data import Data, from_uint8, load_data, to_uint8
from toolbox.files import UserError
from toolbox.images import loss_by_level, save_image, to_image
from toolbox.metrics import train_feature_net
from toolbox.models import PRETRAINED, SCHEDULES, model_config, save_model
from toolbox.seeds import sample_seeds
from unet import UNet


@pytest.fixture
def evaluate_here(here, monkeypatch, capsys):
    """evaluate_here("--n", 8) of an untrained network, on 96 cats in two classes: its output."""
    for i, image in enumerate(draw(96, 16)[0]):
        folder = here / "many" / ("cats" if i % 2 else "more cats")
        save_image(to_image(image), folder / f"{i}.png")
    torch.manual_seed(0)
    network = UNet(**TINY)
    checksum = load_data("many", 16).checksum
    config = model_config(network, NoiseSchedule.cosine(), 16, "many", data_checksum=checksum)
    save_model(here / "new.pt", network, config)
    save_model(here / "other.pt", network, config | {"data_checksum": "of others"})
    short = functools.partial(train_feature_net, steps=30, batch=8)
    monkeypatch.setattr(metrics, "train_feature_net", short)
    capsys.readouterr()

    flags = {"--model": "new.pt", "--data": "many", "--n": 8, "--steps": 3, "--device": "cpu"}
    return lambda *words: call(evaluate.main, monkeypatch, capsys, flags, *words)


TABLE = [
    r"model     new.pt, trained on many: 90 .* 6 held out",
    r"loss      NUMBER on 6 held-out images; best linear denoiser NUMBER:",
    r" +it has .*",
    r" +30 samples +6 held-out images",
    r"cleanSHARESHARE",
    r"  near the dataSHARESHARE",
    r"  confident of the classSHARESHARE",
    r"total variation of the class +NUMBER +NUMBER",
    r"KID x 1000 \(our features\) +NUMBER \+- NUMBER +NUMBER \+- NUMBER \(30 real images\)",
    r"copies .* NUMBER of 255 .*,",
    r" .* NUMBER; NUMBER % are nearer than 99 % of those",
    r"wrote evaluation.png",
]


def test_it_prints_a_table_and_writes_a_plot(evaluate_here, here):
    lines = evaluate_here("--n", 30).splitlines()
    assert lines.pop(1).startswith("training a classifier, once for this data")
    for line, expected in zip(lines, TABLE, strict=True):
        expected = expected.replace("NUMBER", r"-?\d+\.\d+").replace("SHARE", r" +\d+\.\d %")
        assert re.fullmatch(expected, line), (line, expected)
    with Image.open("evaluation.png") as image:
        assert image.width > 1000 and image.height > 300
    assert evaluate_here("--n", 30).splitlines() == lines  # the same again
    other = evaluate_here("--model", "other.pt")
    assert "warning: other.pt was trained on other images" in other


@pytest.mark.parametrize("order", [1, 2])
def test_the_flags_reach_the_loop(evaluate_here, monkeypatch, order):
    pairs = snr_pairs(NoiseSchedule.cosine(), 8) if order == 2 else None
    expected = {"steps": 8, "timesteps": pairs, "eta": 0.5, "order": order}

    def generate(predict_noise, shape, seeds, schedule, device, **options):
        assert options == expected and seeds == range(5, 13)
        raise InterruptedError

    monkeypatch.setattr(evaluate, "generate", generate)
    with pytest.raises(InterruptedError):
        evaluate_here("--steps", 8, "--eta", 0.5, "--order", order, "--seed", 5)


def test_samples_are_those_of_their_seeds():
    predict_noise, schedule = lambda x, t: 0.1 * x, NoiseSchedule.cosine()
    options = {"schedule": schedule, "steps": 3, "eta": 1.0}
    images = evaluate.generate(predict_noise, (3, 4, 4), range(7, 42), **options)
    assert images.shape == (35, 3, 4, 4) and images.dtype == torch.uint8
    for i in (0, 31, 32, 34):  # of both batches
        alone = sample_seeds(predict_noise, (3, 4, 4), [7 + i], clip_x0=True, **options)
        assert torch.equal(to_uint8(alone[0]), images[i])


def test_a_network_that_copies_is_noticed(capsys):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (150, 3, 4, 4), dtype=torch.uint8, generator=generator)
    data, held_out = Data("test", images[:100]), Data("test", images[100:])
    neighbours, rms = evaluate.report_copies(data.images[:20].flip(-1), data, held_out)
    assert "is 0.0 of 255 away" in (out := capsys.readouterr().out) and " 100.0 % are nearer" in out
    assert torch.equal(neighbours, data.images[:20].flip(-1))
    assert {name: len(x) for name, x in rms.items()} == {"samples": 20, "held-out images": 20}
    evaluate.report_copies(held_out.images, data, held_out)
    assert float(re.search(r"([\d.]+) % are nearer", capsys.readouterr().out)[1]) <= 2


def test_a_frechet_distance_needs_enough_images(capsys, monkeypatch):
    monkeypatch.setattr(metrics, "FRECHET_FROM", 20)

    class Network:
        extract_features = staticmethod(lambda images: images.flatten(1).float()[:, :6] / 255)

    for n, real, names in ((20, 60, ["KID", "Fré"]), (19, 60, ["KID"]), (20, 38, ["KID"])):
        images = torch.randint(0, 256, (n + real, 3, 4, 4), dtype=torch.uint8)
        evaluate.report_distances(images[:n], Network, Data("test", images[n:]))
        lines = capsys.readouterr().out.splitlines()
        assert [line[:3] for line in lines] == names


# ---- has it learned anything? --------------------------------------------------------------------


@pytest.mark.parametrize("make", SCHEDULES.values())
def test_the_best_linear_denoiser_is_at_the_line(make, capsys):
    """Of normal images of 8 pixels, neighbours alike. It is spoiled by a factor."""
    schedule, generator = make(), torch.Generator().manual_seed(0)
    place = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    covariance = 0.1 * torch.exp(-torch.cdist(place, place) / 3)
    images = torch.randn(6256, 64, generator=generator) @ torch.linalg.cholesky(covariance).T
    images = to_uint8(images.view(-1, 1, 8, 8))
    data, images = Data("smooth", images[:6000]), images[6000:]
    x0 = from_uint8(images)

    def linear(factor):
        def predict_noise(x, t):
            a = schedule.alpha_bar[t[0]]
            total = a * covariance + (1 - a) * torch.eye(64)
            noise = (1 - a).sqrt() * torch.linalg.solve(total, x.flatten(1).T).T
            return factor * noise.view_as(x)

        return predict_noise

    def knows(x, t):
        a = schedule.alpha_bar_at(t, x)
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    def report(levels):
        """The loss, the linear denoiser's, and whether something has been learned."""
        curves = evaluate.report_loss(levels, schedule, data, images)
        assert curves["this network"] == levels
        assert curves["the best linear denoiser"].keys() == levels.keys()
        out = capsys.readouterr().out
        numbers = re.search(r"loss +(\S+) on 256 held-out images; best linear .* (\S+):", out)
        return float(numbers[1]), float(numbers[2]), "NOTHING" not in out

    best, spoiled, perfect = (
        report(loss_by_level(predict_noise, x0, schedule, levels=25))
        for predict_noise in (linear(1.0), linear(0.8), knows)
    )
    line = best[1]
    assert best[0] == pytest.approx(line, rel=0.03) and 0.02 < line < 0.5
    assert spoiled[0] > 1.05 * line and spoiled[1:] == (line, False)
    assert perfect == (0, line, True)

    levels = torch.linspace(0, 999, 25).long()  # of nearly only noise or nearly none: not counted
    judged = [t for t in levels.tolist() if 0.02 < schedule.alpha_bar[t] < 0.98]
    losses = {t: 0.125 if t in judged else 1e6 for t in levels.tolist()}
    errors = metrics.LinearDenoiser(data.images).errors(images, schedule.alpha_bar[judged])
    assert report(losses)[:2] == (0.125, pytest.approx(errors.mean().item(), abs=1e-4))


# ---- bad input -----------------------------------------------------------------------------------


BAD = [
    ("--n", 3, "--n 3: expected 4 or more"),
    *(("--steps", n, f"--steps {n}: expected 1 to 1000") for n in (0, 1001)),
    *(("--eta", eta, f"--eta {eta}: expected 0 to 1") for eta in (2.0, "nan")),
    ("--seed", -1, "--seed -1: expected 0 to"),
    ("--device", "tpu9", "--device tpu9: this machine has no such device"),
    ("--model", "catz", "--model catz: no such model file; did you mean cats"),
    ("--data", None, "new.pt was trained on a folder named many: add --data path/to/many"),
    ("--data", "nowhere", "--data 'nowhere': expected a folder of images"),
    ("--data", "few", "few: 15 images; expected 16 or more"),
    ("--data", "mnist", "new.pt needs 3 channels, mnist has 1"),
    ("--out", "a.jpg", "a.jpg: expected a name that ends in .png"),
    ("--out", "new.pt/evaluation.png", "new.pt/evaluation.png: File exists; check"),
]


def test_bad_input_gets_one_sentence_before_the_work(evaluate_here, here, monkeypatch):
    lay_out_digits("MNIST")
    for i in range(15):
        save_image(Image.new("RGB", (9, 9)), here / f"few/{i}.png")
    monkeypatch.setattr(metrics, "train_feature_net", None)  # any work would crash
    monkeypatch.setattr(evaluate, "loss_by_level", None)
    for flag, value, sentence in BAD:
        with pytest.raises(UserError, match=sentence):
            evaluate_here(flag, value)
    assert not (here / "evaluation.png").exists()


# ---- the pretrained model ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_pretrained_model_has_learned_to_draw_cats(evaluate_here, here):
    """What a newcomer types, with fewer samples. How clean they are: docs/results.md."""
    out = evaluate_here("--model", "cats", "--data", None, "--n", 64, "--steps", 40)
    assert "it has learned more than brightness and smoothness" in out
    assert not (here / "data/features").exists() and (PRETRAINED / "features/cats-32.pt").exists()
    clean = re.search(r"^clean +([\d.]+) % +([\d.]+) %$", out, flags=re.MULTILINE)
    assert float(clean[1]) >= 15 and float(clean[2]) >= 95
    confident = re.findall(r"^  confident of the \w+ +([\d.]+) %", out, flags=re.MULTILINE)
    assert len(confident) == 4 and min(map(float, confident)) >= 80
