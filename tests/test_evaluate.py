"""`python evaluate.py`: what it prints and writes, and that it cannot be fooled by a network that has learned nothing."""

import functools
import re
import shutil
import sys

import pytest
import torch
from conftest import TINY, command
from PIL import Image
from test_data import lay_out_digits
from test_train import said
from torchvision.transforms.functional import pil_to_tensor

import evaluate
import sample
from processes import NoiseSchedule, v_to_noise
from toolbox import metrics
from toolbox.cats import draw
from toolbox.data import Data, from_bytes, load_data, to_bytes
from toolbox.metrics import train_feature_net
from toolbox.models import READY, SCHEDULES, card, load_model, save_model
from toolbox.pictures import loss_by_level, save, to_image
from unet import UNet


@pytest.fixture
def many(here):
    """A folder of 96 small pictures, sorted into two classes."""
    for i, picture in enumerate(draw(96, 16)[0]):
        save(to_image(picture), here / "many" / ("cats" if i % 2 else "more cats") / f"{i}.png")
    return here / "many"


@pytest.fixture
def evaluate_here(many, monkeypatch, capsys):
    """evaluate_here("--n", 8) in this process, by default of a network as it is before the first step; what it printed."""
    torch.manual_seed(0)
    network = UNet(**TINY)
    save_model(many.parent / "new.pt", network, card(network, NoiseSchedule.cosine(), 16, "many"))
    monkeypatch.setattr(metrics, "train_feature_net", functools.partial(train_feature_net, steps=30, batch=8))

    def run(*arguments):
        flags = ["--inception"] if "--inception" in arguments else []
        arguments = [word for word in arguments if word not in flags]
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        defaults = {"--model": "new.pt", "--data": "many", "--n": 8, "--steps": 3, "--device": "cpu"}
        pairs = [pair for pair in (defaults | given).items() if pair[1] is not None]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *(str(word) for pair in pairs for word in pair), *flags])
        evaluate.main()
        return capsys.readouterr().out

    return run


NUMBER = r"-?\d+\.\d+"


def test_a_trained_model_gets_its_table_and_its_picture(evaluate_here, train_here, here):
    train_here("--data", "many", "--steps", 3)
    shown = evaluate_here("--model", "run/model.pt", "--n", 30)
    lines = shown.splitlines()
    assert lines[0] == "model     run/model.pt, trained on many: 90 training pictures, 6 held out"
    assert re.fullmatch(r"loss +0\.\d{4} on 6 held-out pictures; the best linear denoiser: 0\.\d{4}; .+", lines[1])
    assert lines[2].split("  ")[-1].strip() == "6 held-out ones" and "30 samples" in lines[2]
    table = {line[:26].strip(): line[26:] for line in lines[3:7]}
    assert list(table) == ["clean", "near the data", "sure of the class", "off the data's class"]
    for name in ("clean", "near the data", "sure of the class"):
        assert re.fullmatch(r" +[\d.]+ of 100 +[\d.]+ of 100", table[name])
    assert re.fullmatch(r" +[01]\.\d\d +[01]\.\d\d", table["off the data's class"])
    kid = rf"KID x 1000, our features +{NUMBER} \+- {NUMBER} +{NUMBER} \+- {NUMBER} for 30 real ones"
    assert re.fullmatch(kid, lines[7])
    assert lines[8].startswith("copies    the nearest training picture is ") and lines[-1] == "wrote evaluation.png"
    assert "nan" not in shown.replace("nearest", "") and "FID" not in shown  # of so few pictures it would say little
    with Image.open("evaluation.png") as image:
        pixels = pil_to_tensor(image.convert("RGB")).float()
    assert pixels.shape[1] > 300 and pixels.shape[2] > 1000 and pixels.std() > 20
    assert sorted(p.name for p in here.iterdir()) == ["data", "evaluation.png", "many", "new.pt", "photos", "run"]
    assert not list(here.rglob("*.tmp"))


def test_the_figures_recur_and_the_words_reach_their_places(evaluate_here, here):
    first = evaluate_here("--out", "a.png")
    assert evaluate_here("--out", "b.png").replace("b.png", "a.png") == first
    for words in (["--seed", 8], ["--steps", 4], ["--eta", 0.5]):
        other = evaluate_here("--out", "a.png", *words)
        assert other.splitlines()[:2] == first.splitlines()[:2] and other.splitlines()[7] != first.splitlines()[7]
    assert (here / "a.png").exists() and (here / "b.png").exists()


def test_the_samples_are_those_of_sample_py_and_each_copy_is_its_nearest(evaluate_here, here, monkeypatch):
    drawn = []
    plot = evaluate.plot_evaluation
    monkeypatch.setattr(evaluate, "plot_evaluation", lambda *arguments: (drawn.append(arguments), plot(*arguments)))
    evaluate_here("--n", 35, "--seed", 3, "--eta", 0.5)
    words = {"--model": "new.pt", "--n": 35, "--seed": 3, "--eta": 0.5, "--steps": 3, "--out": "drawn", "--device": "cpu"}
    monkeypatch.setattr(sys, "argv", ["sample.py", *(str(word) for pair in words.items() for word in pair)])
    sample.main()
    _, _, samples, copies, how_near, _ = drawn[0]
    assert samples.shape == copies.shape == (35, 3, 16, 16)
    for i, picture in enumerate(samples):
        with Image.open(here / f"drawn/{i + 3:06}.png") as image:
            assert ((pil_to_tensor(image).float() - to_bytes(picture)).abs() <= 1).all()
    training = from_bytes(load_data("many", 16).images)
    both = torch.cat([training, training.flip(-1)])
    assert {name: len(distance) for name, distance in how_near.items()} == {"samples": 35, "held-out pictures": 6}
    for picture, copy in zip(samples, copies, strict=True):
        nearest = both[(both - picture).square().mean((1, 2, 3)).argmin()]
        assert torch.equal(nearest, copy)


def test_a_network_that_copies_is_noticed(evaluate_here, many, monkeypatch, capsys):
    """Samples that are training pictures are nearer to them than new pictures are."""
    data, held_out = load_data("many", 16), load_data("many", 16, held_out=True)
    evaluate.look_for_copies(data.images[:20], data, held_out.images)
    said = capsys.readouterr().out
    assert "is 0.0 of 255 away" in said and "nearer than 99 of 100 of those: 100.0 of 100 samples" in said
    evaluate.look_for_copies(held_out.images, data, held_out.images)
    said = capsys.readouterr().out
    assert float(re.search(r"those: ([\d.]+) of 100 samples", said)[1]) <= 17  # the nearest of the 6 alone, at most


def test_fid_is_told_of_enough_pictures_only(capsys, monkeypatch):
    """And only if there are as many real ones."""
    monkeypatch.setattr(evaluate, "FID_FROM", 20)

    class Seen:
        name = "our features"
        see = staticmethod(lambda images: images.flatten(1).float()[:, :6] / 255)

    def lines(n, real):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (n + real, 3, 4, 4), dtype=torch.uint8, generator=generator)
        evaluate.distances(images[:n], Seen, Data("test", images[n:]))
        return capsys.readouterr().out.splitlines()

    assert [line[:3] for line in lines(20, 60)] == ["KID", "FID"]
    assert [line[:3] for line in lines(19, 60)] == [line[:3] for line in lines(20, 38)] == ["KID"]


# ---- the line that says whether it has learned anything -----------------------------------------------------------------


def test_a_network_that_answers_nothing_is_called_out(evaluate_here):
    """As it is before the first step, its answer is 0 everywhere."""
    assert "IT HAS LEARNED NOTHING" in evaluate_here().splitlines()[1]


@functools.cache
def smooth_pictures():
    """Pictures of 8 pixels whose numbers are normal, and neighbours alike; twice: to learn from, and held out."""
    generator = torch.Generator().manual_seed(0)
    place = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    covariance = 0.1 * torch.exp(-torch.cdist(place, place) / 3)
    pictures = torch.randn(6256, 64, generator=generator) @ torch.linalg.cholesky(covariance).T
    images = to_bytes(pictures.view(-1, 1, 8, 8))
    return Data("smooth", images[:6000]), images[6000:], covariance


def linear_network(schedule, covariance, size=1.0):
    """v, from the best guess that a covariance allows; `size` spoils it."""

    def network(x, t):
        a = schedule.alpha_bar[t[0]]
        total = a * covariance + (1 - a) * torch.eye(len(covariance))
        noise = (1 - a).sqrt() * torch.linalg.solve(total, x.flatten(1).T).T.view_as(x) * size
        return (noise - (1 - a).sqrt() * x) / a.sqrt()

    return network


def measured(network, schedule, capsys):
    data, held_out, _ = smooth_pictures()
    levels, linear = evaluate.losses(v_to_noise(network, schedule), schedule, data, held_out, torch.device("cpu"))
    assert list(levels) == list(linear) and len(levels) == 25
    line = capsys.readouterr().out
    ours, best = map(float, re.search(r"loss +(\S+) on 256 held-out pictures; the best linear denoiser: (\S+);", line).groups())
    return ours, best, line


@pytest.mark.parametrize("make", SCHEDULES.values())
def test_the_best_linear_denoiser_is_at_the_line(make, capsys):
    schedule = make()
    ours, best, _ = measured(linear_network(schedule, smooth_pictures()[2]), schedule, capsys)
    assert ours == pytest.approx(best, rel=0.03) and 0.02 < best < 0.5
    worse, same, line = measured(linear_network(schedule, smooth_pictures()[2], size=0.8), schedule, capsys)
    assert same == best and worse > 1.05 * best and "IT HAS LEARNED NOTHING" in line
    # One that looks at each pixel alone, and one that knows the pictures.
    assert "LEARNED NOTHING" in measured(linear_network(schedule, 0.1 * torch.eye(64)), schedule, capsys)[2]


def test_one_that_knows_the_pictures_has_learned_more(capsys, monkeypatch):
    schedule = NoiseSchedule.cosine()
    x0 = from_bytes(smooth_pictures()[1])

    def knows(x, t):
        a = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    data, held_out, _ = smooth_pictures()
    evaluate.losses(knows, schedule, data, held_out, torch.device("cpu"))
    assert "loss      0.0000 on" in (line := capsys.readouterr().out) and "it has learned more than" in line


@pytest.mark.parametrize("make", SCHEDULES.values())
def test_levels_of_nearly_only_noise_or_nearly_none_are_not_judged(make, capsys, monkeypatch):
    schedule = make()

    def extreme(predict_noise, x0, schedule, levels):
        found = loss_by_level(lambda x, t: x, x0[:2], schedule, levels)
        assert len(found) == 25 and min(found) == 0 and max(found) == 999
        return {t: 0.125 if 0.02 < schedule.alpha_bar[t] < 0.98 else 1e6 for t in found}

    monkeypatch.setattr(evaluate, "loss_by_level", extreme)
    ours, best, _ = measured(None, schedule, capsys)
    assert ours == 0.125
    judged = [t for t in torch.linspace(0, 999, 25).long().tolist() if 0.02 < schedule.alpha_bar[t] < 0.98]
    data, held_out, _ = smooth_pictures()
    errors = evaluate.LinearDenoiser(data.images).errors(held_out, schedule.alpha_bar[judged])
    assert best == pytest.approx(errors.mean().item(), abs=1e-4) and 10 <= len(judged) < 25


# ---- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--n", "1"], "--n 1: expected 4 or more"),
        (["--n", "3"], "--n 3: expected 4 or more"),
        (["--steps", "0"], "expected 1 to 1000 steps"),
        (["--steps", "1001"], "expected 1 to 1000 steps"),
        (["--eta", "2"], "--eta 2.0: expected 0 to 1"),
        (["--eta", "nan"], "--eta nan: expected 0 to 1"),
        (["--seed", "-1"], "--seed -1: expected 0 to"),
        (["--device", "tpu9"], "--device tpu9: this machine has no such device"),
        (["--model", "catz"], "--model catz: no such file and no ready model"),
        (["--model", "many"], "--model many: expected a file, this is a folder"),
        (["--model", "many/cats/1.png"], "1.png: expected a file that torch.save wrote whole"),
        (["--data", None], "new.pt was trained on a folder named many: say where it is, --data path/to/many"),
        (["--data", "nowhere"], "--data nowhere: no such folder and no data of that name"),
        (["--data", "few"], "few: every 16th picture is held out, and there are only 15"),
        (["--data", "mnist"], "new.pt draws pictures of 3 channels, those of mnist have 1"),
        (["--out", "many"], "many: expected a file, this is a folder; use another name"),
        (["--out", "a_file/evaluation.png"], "a_file: expected a folder, this is a file; use another name"),
    ],
)
def test_bad_input_gets_one_sentence_before_the_work(evaluate_here, many, here, monkeypatch, capsys, words, told):
    lay_out_digits("MNIST")
    (here / "few").mkdir()
    for i in range(15):
        shutil.copy(next(many.glob("*/*.png")), here / f"few/{i}.png")
    (here / "a_file").write_text("kept")
    monkeypatch.setattr(evaluate, "losses", None)  # any work would now crash
    assert told in said(lambda: evaluate_here(*words), capsys)
    assert (here / "a_file").read_text() == "kept" and not (here / "evaluation.png").exists()
    assert sorted(p.name for p in here.iterdir() if p.name != "data") == ["a_file", "few", "many", "new.pt"]


def test_without_inception_it_is_told_before_the_work(evaluate_here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    monkeypatch.setattr(evaluate, "losses", None)
    assert "--inception: expected torchmetrics" in said(lambda: evaluate_here("--inception"), capsys)


def test_inception_gets_a_line_of_its_own(evaluate_here, monkeypatch):
    class Network:
        name, see = "Inception", staticmethod(lambda images: images.flatten(1).float()[:, :20] / 255)

    monkeypatch.setattr(evaluate, "Inception", Network)
    lines = [line for line in evaluate_here("--inception").splitlines() if line.startswith("KID")]
    assert [re.split(r"  |, ", line)[1] for line in lines] == ["our features", "Inception"]


@pytest.mark.parametrize("file", ["evaluation.png", "deep/er/evaluation.png"])
def test_a_picture_is_whole_or_not_there(evaluate_here, here, monkeypatch, file):
    evaluate_here("--out", file)
    before = (here / file).read_bytes()

    def full(figure, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError):
        evaluate_here("--out", file, "--seed", 8)
    assert (here / file).read_bytes() == before and not list(here.rglob("*.tmp"))


# ---- the ready model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_ready_model_has_learned_and_draws_cats(here):
    """What a newcomer types: the whole table, in minutes; and no training of a classifier, it is there.

    The aim is 90 of 100 clean ones; what is reached, and why not more: docs/results.md.
    """
    result = command("evaluate.py", "--n", 64, "--device", "cpu")
    assert "it has learned more than brightness and smoothness" in result.stdout
    assert not (here / "data/features").exists() and (READY / "features/cats-32.pt").exists()
    clean = re.search(r"^clean +([\d.]+) of 100 +([\d.]+) of 100$", result.stdout, flags=re.MULTILINE)
    assert float(clean[1]) >= 15 and float(clean[2]) >= 95
    sure = re.findall(r"^  sure of the \w+ +([\d.]+) of 100", result.stdout, flags=re.MULTILINE)
    assert len(sure) == 4 and min(map(float, sure)) >= 80
    assert (here / "evaluation.png").stat().st_size > 20_000 and load_model("cats")[2]["format"] == 2
