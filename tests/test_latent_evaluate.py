"""latent_ext/evaluate.py; and that the ready pipeline does what the second evening's README says of it."""

import re
import sys

import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline

import latent_ext.evaluate
import latent_ext.pipeline
from latent_ext.data import left_out
from latent_ext.evaluate import answers, ask
from latent_ext.generate import find
from latent_ext.guidance import ClassUNet, labels_of
from latent_ext.pipeline import image_to_image, inpaint, text_to_image
from processes import NoiseSchedule
from toolbox.cats import ATTRIBUTES, draw
from toolbox.data import Data, to_bytes
from toolbox.metrics import FeatureNet, kernel_distance
from toolbox.models import card, read, save_model

READY = ROOT / "models" / "latent-cats"
HOW = {"guidance": 3.0, "eta": 1.0, "steps": 25}
EYES = list(ATTRIBUTES).index("eyes")
FUR = list(ATTRIBUTES).index("fur")


def drawn(n, size, **wanted):
    images, labels, captions = draw(n, size, seed=7, **wanted)
    return Data("cats", to_bytes(images), ATTRIBUTES, torch.stack([*labels.values()], dim=1), captions)


def seeds(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


@pytest.fixture(scope="module")
def classifier():
    stored = read(ROOT / "models" / "features" / "cats-32.pt")
    network = FeatureNet(**stored["network"])
    network.load_state_dict({name: w.float() for name, w in stored["weights"].items()})
    return network.eval()


def test_half_of_the_prompts_ask_for_what_nobody_trained_on():
    data = drawn(300, 4)
    prompts, labels, unseen = ask(data, 20, find(READY))
    assert len(prompts) == 20
    assert unseen.sum() == 10 and torch.equal(left_out(labels), unseen)
    assert prompts[-1] == data.captions[(~left_out(data.labels)).nonzero()[-1]]  # spread over all: folders are sorted
    for prompt, row in zip(prompts, labels.tolist(), strict=True):
        assert row in data.labels[[i for i, caption in enumerate(data.captions) if caption == prompt]].tolist()


def test_a_model_of_classes_is_asked_in_its_own_words():
    class Classes:
        tokenizer = None

    prompts, labels, _ = ask(drawn(100, 4), 12, Classes())
    assert [labels_of(prompt, ATTRIBUTES) for prompt in prompts] == (labels + 1).tolist()


class Half:
    name = "half"

    def __init__(self, classifier):
        self.see = lambda images: classifier.see(images) / 2


def test_guidance_0_draws_as_if_nothing_was_asked_and_is_compared_with_the_data_too(tmp_path, monkeypatch, capsys):
    """So one model of classes is both: told what to draw, and the simple one."""
    torch.manual_seed(0)
    images, digits = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8), {"digit": ("0", "7")}
    data = Data("folder", images, digits, torch.arange(64)[:, None] % 2)
    network = ClassUNet(digits, 8, in_channels=1, out_channels=1, widths=(8, 8), attention=(False, True))
    classifier = FeatureNet(1, {"digit": 2, "damage": 6}).eval()
    for p in [*network.parameters(), *classifier.parameters()]:
        torch.nn.init.normal_(p, std=0.3)
    save_model(tmp_path / "model.pt", network, card(network, NoiseSchedule.sigmoid(), 8, "folder"))
    monkeypatch.setattr(latent_ext.evaluate, "load_data", lambda *a, **k: data)
    monkeypatch.setattr(latent_ext.evaluate, "feature_net", lambda data: classifier)
    monkeypatch.setattr(latent_ext.evaluate, "Inception", lambda: Half(classifier))  # stands for another scale
    words = ["evaluate", "--model", str(tmp_path / "model.pt"), "--n", "8", "--steps", "2", "--guidance", "0", "1"]
    words.append("--inception")
    monkeypatch.setattr(sys, "argv", words)
    latent_ext.evaluate.main()
    printed = capsys.readouterr().out
    halves = re.findall(r"KID x 1000, half +(-?[\d.]+)", printed)
    printed = re.findall(r"KID x 1000, our features +(-?[\d.]+)", printed)

    def distance(prompts):
        how = {"steps": 2, "eta": 1.0, "guidance": 1.0, "generator": seeds(8)}
        pictures = to_bytes(text_to_image(find(tmp_path / "model.pt"), prompts, **how))
        return 1000 * kernel_distance(classifier.see(pictures), classifier.see(images[1::2]))

    expected = [distance([""] * 8), distance(["0", "7"] * 4)]
    assert [float(x) for x in printed] == pytest.approx(expected, abs=0.06) and abs(expected[0] - expected[1]) > 0.5
    assert len(halves) == 2 and all(0 < float(half) < float(whole) for half, whole in zip(halves, printed, strict=True))


def test_the_judge_reads_drawings_of_twice_its_size(classifier):
    data = drawn(64, 64)
    assert torch.equal(answers(classifier, data.images, 32), data.labels)


def test_diffusers_opens_the_ready_pipeline_and_draws_the_same_picture(monkeypatch):
    theirs = StableDiffusionPipeline.from_pretrained(READY, safety_checker=None, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    prompts, noise = (
        ["an orange tabby cat with green eyes", "a black cat"],
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
    )
    expected = theirs(
        prompts, latents=noise, num_inference_steps=5, guidance_scale=3.0, eta=0.0, output_type="pt", height=64, width=64
    ).images
    monkeypatch.setattr(latent_ext.pipeline, "randn", lambda *_: noise)
    got = text_to_image(find(READY), prompts, steps=5, guidance=3.0, eta=0.0)
    difference = (
        (got + 1) / 2 - expected
    ).abs()  # of 0 .. 1. In the first step 1/sqrt(alpha_bar) is 20,000: math.md, section 6
    assert difference.mean() < 5e-4 and difference.max() < 0.02


@pytest.mark.slow
def test_the_ready_digits_are_the_asked_ones():
    stored = read(ROOT / "models" / "features" / "mnist-28.pt")
    judge = FeatureNet(**stored["network"])
    judge.load_state_dict({name: w.float() for name, w in stored["weights"].items()})
    asked = torch.arange(40) % 10
    made = text_to_image(find("digits"), [str(digit) for digit in asked.tolist()], generator=seeds(40), **HOW)
    assert (answers(judge.eval(), to_bytes(made), 28)[:, 0] == asked).sum() >= 38


@pytest.mark.slow
def test_the_ready_pipeline_draws_what_it_is_asked_for(classifier):
    prompts, labels, unseen = ask(drawn(300, 4), 40, find(READY))
    got = answers(classifier, to_bytes(text_to_image(find(READY), prompts, generator=seeds(40), **HOW)), 32) == labels
    assert got.float().mean() > 0.96 and got.all(1).float().mean() > 0.85
    assert got[unseen].float().mean() > 0.94


@pytest.mark.slow
def test_with_more_strength_a_picture_is_farther_from_its_input_and_nearer_to_its_text(classifier):
    pipeline, data = find(READY), drawn(12, 64, fur="orange", eyes="green")
    images = data.images.float() / 127.5 - 1
    prompts = ["a black cat with yellow eyes"] * 12
    distances, black = [], []
    for strength in (0.08, 0.3, 0.6, 1.0):
        made = image_to_image(pipeline, prompts, images, strength=strength, generator=seeds(12), **HOW)
        distances.append((made - images).square().mean().item())
        black.append((answers(classifier, to_bytes(made), 32)[:, FUR] == ATTRIBUTES["fur"].index("black")).sum().item())
    assert distances == sorted(distances) and distances[-1] > 3 * distances[0]
    assert black[0] <= 2 and black[-1] >= 11


@pytest.mark.slow
def test_inpainting_keeps_what_is_black_in_the_mask_and_paints_the_text_where_it_is_white(classifier):
    pipeline, data = find(READY), drawn(12, 64, eyes="green", pattern="plain")
    images = data.images.float() / 127.5 - 1
    masks = torch.zeros(12, 1, 64, 64)
    masks[:, :, 8:44] = 1
    furs = [ATTRIBUTES["fur"][k] for k in data.labels[:, FUR]]
    prompts = [f"{'an' if fur == 'orange' else 'a'} {fur} cat with blue eyes" for fur in furs]
    made = inpaint(pipeline, prompts, images, masks, generator=seeds(12), **HOW)
    assert torch.equal(made[:, :, :8], images[:, :, :8]) and torch.equal(made[:, :, 44:], images[:, :, 44:])
    assert (answers(classifier, to_bytes(made), 32)[:, EYES] == ATTRIBUTES["eyes"].index("blue")).sum() >= 10
