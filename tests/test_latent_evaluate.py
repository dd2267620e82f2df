"""latent_ext/evaluate.py; and that pretrained models do what the second evening's README says."""

import re
import sys

import pytest
import torch
from conftest import ROOT, said

import latent_ext.evaluate
from latent_ext.data import held_out_combination
from latent_ext.evaluate import choose_prompts, read_labels
from latent_ext.generate import load_pipeline
from latent_ext.guidance import ClassUNet, parse_labels
from latent_ext.pipeline import image_to_image, text_to_image
from processes import NoiseSchedule
from toolbox.cats import ATTRIBUTES, draw
from toolbox.data import Data, to_uint8
from toolbox.metrics import FeatureNet, kernel_distance, questions_of
from toolbox.models import model_config, read, save_model
from toolbox.seeds import generators

OPTIONS = {"guidance_scale": 3.0, "eta": 1.0, "steps": 25}


def cats(n, size):
    images, labels, captions = draw(n, size, seed=7)
    labels = torch.stack([*labels.values()], dim=1)
    return Data("cats", to_uint8(images), ATTRIBUTES, labels, captions)


def pretrained_classifier(data):
    network = FeatureNet(data.channels, questions_of(data))
    stored = read(ROOT / "models" / "features" / f"{data.name}-{data.size}.pt")
    network.load_state_dict(stored["weights"])
    return network.eval()


@pytest.fixture(scope="module")
def classifier():
    return pretrained_classifier(cats(1, 32))


@pytest.mark.parametrize("by_class", [False, True])
def test_half_of_the_prompts_ask_for_unseen_combinations(by_class):
    data = cats(300, 4)
    prompts, labels, unseen = choose_prompts(data, 20, by_class)
    assert len(prompts) == 20 and unseen.sum() == 10
    assert torch.equal(held_out_combination(labels), unseen)
    last = (~held_out_combination(data.labels)).nonzero()[-1, 0]  # evenly spaced: up to the last
    assert torch.equal(labels[-1], data.labels[last])
    if by_class:
        assert [parse_labels(prompt, ATTRIBUTES) for prompt in prompts] == (labels + 1).tolist()
    else:
        assert prompts[-1] == data.captions[last]
        pairs = set(zip(data.captions, map(tuple, data.labels.tolist()), strict=True))
        assert pairs >= set(zip(prompts, map(tuple, labels.tolist()), strict=True))


def test_the_judge_reads_drawings_of_twice_its_size(classifier):
    data = cats(64, 64)
    assert torch.equal(read_labels(classifier, data.images, 32), data.labels)


def test_each_guidance_scale_draws_the_same_prompts_and_seeds(tmp_path, monkeypatch, capsys):
    """Attributes, and, as the model draws the whole data, its distance: at scale 0 of prompt ""."""
    torch.manual_seed(0)
    digits, images = {"digit": ("0", "7")}, torch.randint(0, 256, (64, 1, 8, 8)).to(torch.uint8)
    data = Data("folder", images, digits, torch.arange(64)[:, None] % 2)
    sizes = {"channels": (8, 8), "attention_levels": (False, True)}
    network = ClassUNet(digits, 8, in_channels=1, out_channels=1, **sizes)
    judge = FeatureNet(1, {"digit": 2, "corruption": 6}).eval()
    for p in [*network.parameters(), *judge.parameters()]:
        torch.nn.init.normal_(p, std=0.3)
    model = tmp_path / "model.pt"
    save_model(model, network, model_config(network, NoiseSchedule.sigmoid(), 8, "folder"))
    monkeypatch.setattr(latent_ext.evaluate, "load_data", lambda *a, **k: data)
    monkeypatch.setattr(latent_ext.evaluate, "feature_net", lambda data: judge)
    monkeypatch.setattr(latent_ext.evaluate, "BATCH", 3)
    words = f"evaluate --model {model} --n 8 --steps 2 --guidance 0 1 --device cpu"
    monkeypatch.setattr(sys, "argv", words.split())
    latent_ext.evaluate.main()
    printed = capsys.readouterr().out
    shares = re.findall(r"^([\d.]+) +all +([\d.]+) % +([\d.]+) %$", printed, re.MULTILINE)
    distances = re.findall(r"^KID x 1000 \(our features\) +(-?[\d.]+)", printed, re.MULTILINE)
    assert len(shares) == len(distances) == 2
    asked = [("0.0", [""] * 8), ("1.0", ["0", "7"] * 4)]
    for (scale, prompts), row, distance in zip(asked, shares, distances, strict=True):
        options = {"steps": 2, "eta": 1.0, "guidance_scale": 1.0, "generator": generators(range(8))}
        made = to_uint8(text_to_image(load_pipeline(model), prompts, **options))
        right = (read_labels(judge, made, 8)[:, 0] == torch.arange(8) % 2).float().mean()
        assert row == (scale, f"{100 * right:.1f}", f"{100 * right:.1f}")
        ours, real = judge.extract_features(made), judge.extract_features(images[1::2])
        assert float(distance) == pytest.approx(1000 * kernel_distance(ours, real), abs=0.06)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--n 3", "--n 3: expected 4 or more"),
        ("--guidance nan", "--guidance nan: expected 0"),
        ("--steps 1001", "1001"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(monkeypatch, capsys, words, sentence):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--model", "latent-cats", *words.split()])
    assert sentence in said(latent_ext.evaluate.main, capsys)


# ---- pretrained models ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_pretrained_digits_are_those_of_the_prompts():
    digits = torch.arange(40) % 10
    prompts, options = [str(digit) for digit in digits.tolist()], OPTIONS
    x = text_to_image(load_pipeline("digits"), prompts, generator=generators(range(40)), **options)
    judge = pretrained_classifier(Data("mnist", x, {"digit": range(10)}))
    assert (read_labels(judge, to_uint8(x), 28)[:, 0] == digits).sum() >= 38


@pytest.mark.slow
def test_the_pretrained_pipeline_draws_what_the_prompts_say(classifier):
    prompts, labels, unseen = choose_prompts(cats(300, 4), 40, by_class=False)
    pipeline, options = load_pipeline("latent-cats"), {"generator": generators(range(40))}
    x = text_to_image(pipeline, prompts, **options, **OPTIONS)
    right = read_labels(classifier, to_uint8(x), 32) == labels
    assert right.float().mean() > 0.96 and right.all(1).float().mean() > 0.85
    assert right[unseen].float().mean() > 0.94


@pytest.mark.slow
def test_with_more_strength_an_image_moves_from_its_input_to_its_prompt(classifier):
    pipeline = load_pipeline("latent-cats")
    images = draw(12, 64, seed=7, fur="orange", eyes="green")[0]
    prompts, distances, black = ["a black cat with yellow eyes"] * 12, [], []
    for strength in (0.08, 0.3, 0.6, 1.0):
        options = OPTIONS | {"strength": strength, "generator": generators(range(12))}
        x = image_to_image(pipeline, prompts, images, **options)
        distances.append((x - images).square().mean().item())
        furs = read_labels(classifier, to_uint8(x), 32)[:, 0]  # the first attribute
        black.append((furs == ATTRIBUTES["fur"].index("black")).sum().item())
    assert distances == sorted(distances) and distances[-1] > 3 * distances[0]
    assert black[0] <= 2 and black[-1] >= 11
