"""latent_ext/train.py and latent_ext/data.py: what is trained on, what the networks are told, and that nothing is lost."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import latent_ext.train
import toolbox.run
from latent_ext.data import encode, left_out, phrasings, select
from latent_ext.generate import find
from latent_ext.guidance import ClassUNet
from latent_ext.stable_diffusion import load
from latent_ext.train import finds
from latent_ext.vae import VAE
from toolbox.cats import ATTRIBUTES, draw
from toolbox.data import Data, load_data, to_bytes
from toolbox.models import load_model, read
from toolbox.pictures import save, to_image

TINY = {"classes": 2, "vae": 2, "clip": 2, "unet": 2}


@pytest.fixture
def captioned(here):
    """32 drawn cats of 32x32 in two folders, each with its caption beside it."""
    images, _, captions = draw(32, 32)
    for i, (picture, caption) in enumerate(zip(images, captions, strict=True)):
        path = here / "photos" / ("left" if i % 2 else "right") / f"{i}.png"
        save(to_image(picture), path)
        path.with_suffix(".txt").write_text(caption)
    return here / "photos"


@pytest.fixture
def train_here(captioned, monkeypatch, capsys):
    """train_here("vae", "--steps", 2) trains on them, in this process; small, and without pictures on the way."""
    monkeypatch.setattr(toolbox.run, "SAVE_EVERY", 0)
    monkeypatch.setattr(toolbox.run, "PICTURES", 1)
    monkeypatch.setattr(latent_ext.train, "STEPS", TINY)
    monkeypatch.setattr(latent_ext.train, "show_unet", lambda *_: None)

    def run(*arguments):
        words = [
            "--data",
            "photos",
            "--size",
            "32",
            "--batch",
            "4",
            "--out",
            "out",
            "--device",
            "cpu",
            "--precision",
            "float32",
        ]
        monkeypatch.setattr(sys, "argv", ["train.py", *words, *map(str, arguments)])
        latent_ext.train.main()
        return capsys.readouterr().out

    return run


# ---- data -------------------------------------------------------------------------------------------------------------


def test_left_out_combinations_are_few_and_each_two_attributes_are_still_seen_together():
    _, labels, _ = draw(4000, 1)
    labels = torch.stack([*labels.values()], dim=1)
    combinations = labels.unique(dim=0)
    assert len(combinations) == 180 and left_out(combinations).sum() == 27
    seen = combinations[~left_out(combinations)]
    for a in range(4):
        for b in range(a):
            assert len(seen[:, [a, b]].unique(dim=0)) == len(combinations[:, [a, b]].unique(dim=0))


def test_select_keeps_pictures_labels_and_captions_together():
    images, labels, captions = draw(20, 8)
    data = Data("cats", to_bytes(images), ATTRIBUTES, torch.stack([*labels.values()], dim=1), captions)
    wanted = ~left_out(data.labels)
    kept = select(data, wanted)
    where = wanted.nonzero()[:, 0].tolist()
    assert 0 < len(where) < 20
    assert torch.equal(kept.images, data.images[where]) and torch.equal(kept.labels, data.labels[where])
    assert kept.captions == [captions[i] for i in where]


@pytest.mark.parametrize("part", ["classes", "vae", "clip", "unet"])
def test_no_training_sees_a_combination_that_is_left_out(train_here, monkeypatch, part):
    given = []
    monkeypatch.setattr(toolbox.data, "DRAWN_CATS", 100)
    monkeypatch.setattr(latent_ext.train, f"train_{part}", lambda args, data: given.append(data))
    train_here(part, "--data", "cats", "--size", 16)
    every = load_data("cats", 16)
    assert len(given[0].images) < len(every.images) == 100 and left_out(every.labels).any()
    assert not left_out(given[0].labels).any()


def test_phrasings_are_the_caption_and_what_is_left_without_its_clauses():
    captions = [
        "an orange cat with blue eyes on a pink background",
        "a dog",
        "an orange cat with blue eyes on a pink background",
    ]
    texts, versions = phrasings(captions)
    assert texts[0] == "" and len(texts) == len(set(texts)) and versions.shape == (3, 8)
    said = [[texts[i] for i in row] for row in versions.tolist()]
    assert said[0] == said[2] and said[0][:5] == captions[:1] * 5
    assert set(said[0][5:]) == {"an orange cat", "an orange cat with blue eyes", "an orange cat on a pink background"}
    assert said[1] == ["a dog"] * 8


def test_latents_have_a_variance_of_one_and_mirrored_ones_are_those_of_mirrored_pictures():
    torch.manual_seed(0)
    vae, images = VAE(widths=(8, 8, 8)).eval(), to_bytes(draw(6, 32)[0])
    latents = encode(vae, Data("cats", images, captions=["a cat"] * 6))
    assert latents.images.shape == (6, 4, 8, 8) and latents.images.std() == pytest.approx(1, abs=1e-5)
    assert latents.size == 8 and latents.channels == 4 and latents.captions == ["a cat"] * 6
    with torch.no_grad():
        mirrored = vae.encode((images.float() / 127.5 - 1).flip(-1))[0] * vae.scale
    got = latents.batch(torch.tensor([3, 4]), torch.tensor([True, False]))
    assert torch.allclose(got[0], mirrored[3], atol=1e-5) and torch.equal(got[1], latents.images[4])
    assert not torch.allclose(latents.images[3].flip(-1), mirrored[3], atol=1e-2)  # latents of a mirrored picture are others


# ---- the trainings ----------------------------------------------------------------------------------------------------


def test_train_all_makes_a_folder_that_loads_and_a_finished_part_says_so(train_here):
    train_here("all")
    pipeline = load("out")
    assert pipeline.size == 32 and pipeline.prediction == "v_prediction" and pipeline.spacing == "trailing"
    trained = read(Path("out/training/unet/model.pt"))["weights"]
    for name, w in pipeline.unet.state_dict().items():
        assert torch.equal(w, trained[name].float())
    assert "finished after 2 steps" in train_here("unet")
    tokens = pipeline.tokenizer("an orange cat with blue eyes")
    assert pipeline.text_encoder(tokens).shape == (1, pipeline.tokenizer.length, 128)


def test_the_vae_learns_to_give_back_its_pictures(train_here):
    shown = train_here("vae", "--steps", 80)
    assert float(re.search(r"PSNR of ([\d.]+) dB", shown)[1]) > 14  # after 2 steps: 9


def test_clip_learns_which_caption_belongs_to_which_picture(train_here, monkeypatch):
    trained = []
    monkeypatch.setattr(latent_ext.train, "finds", lambda network, tokenizer, *_: trained.append((network, tokenizer)) or 0.0)
    train_here("clip", "--steps", 40, "--batch", 32)
    data = load_data("photos", 32)
    assert finds(*trained[0], data, 63) > 0.3  # one of 30 by chance
    mixed = replace(data, captions=data.captions[1:] + data.captions[:1])
    assert finds(*trained[0], mixed, 63) < 0.2


def test_the_unet_is_told_a_caption_without_some_clauses_or_one_time_in_ten_nothing(train_here, monkeypatch):
    told = []

    class Spy(nn.Module):
        """Remembers what it was told."""

        def __init__(self, in_channels, out_channels, **_):
            super().__init__()
            self.config, self.conv = {}, nn.Conv2d(in_channels, out_channels, 1)
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x, t, context):
            told.append(context)
            return self.conv(x) + self.w

    train_here("vae")
    train_here("clip")
    monkeypatch.setattr(latent_ext.train, "UNet", Spy)
    monkeypatch.setattr(latent_ext.train, "save", lambda *_: None)
    monkeypatch.setattr(latent_ext.train, "STEPS", TINY | {"unet": 200})
    monkeypatch.setattr(toolbox.run, "SAVE_EVERY", 1000)
    train_here("unet")

    _, text, tokenizer = latent_ext.train.load_parts(Path("out/training"), torch.device("cpu"))
    data = load_data("photos", 32)
    texts, _ = phrasings(data.captions)
    states = text(tokenizer(texts)).detach()
    told = torch.stack(told[-200:])  # (steps, batch, length, width); before them the timing of a step
    which = torch.cdist(told.flatten(0, 1).flatten(1), states.flatten(1)).argmin(1).view(200, 4)
    assert (told - states[which]).abs().max() < 1e-5
    nothing = which == 0
    assert 0.06 < nothing.float().mean() < 0.14  # 800 times one in ten: 0.1 +- 0.011
    assert (nothing.any(1) & ~nothing.all(1)).any()  # by picture, not by batch
    full = torch.isin(which, torch.tensor([texts.index(caption) for caption in set(data.captions)]))
    assert 0.5 < full.float().mean() < 0.63  # nine in ten of five in eight


def test_a_training_that_is_stopped_goes_on_bit_by_bit(train_here, monkeypatch):
    train_here("vae")
    train_here("clip")
    train_here("unet", "--steps", 4)
    whole = read(Path("out/training/unet/resume.pt"))
    for file in Path("out/training/unet").iterdir():
        file.unlink()
    step = toolbox.run.Run.step

    def stop_after_two(run, loss):
        step(run, loss)
        run.stop_asked = run.k == 2

    monkeypatch.setattr(toolbox.run.Run, "step", stop_after_two)
    with pytest.raises(SystemExit):
        train_here("unet", "--steps", 4)
    monkeypatch.setattr(toolbox.run.Run, "step", step)
    train_here("unet", "--steps", 4)
    again = read(Path("out/training/unet/resume.pt"))
    assert again["k"] == 4 and again["history"] == whole["history"]
    for kind in ("network", "averaged"):
        assert all(torch.equal(w, whole[kind][name]) for name, w in again[kind].items())


def test_a_unet_goes_on_with_the_vae_and_the_texts_that_it_began_with(train_here, captioned, monkeypatch):
    """The same ones, even where latents come out a little differently, as on another machine; no others."""
    train_here("vae")
    train_here("clip")
    train_here("unet")
    monkeypatch.setattr(latent_ext.train, "encode", lambda vae, data: almost(encode(vae, data)))
    train_here("unet", "--steps", 3)
    train_here("clip", "--steps", 3)
    with pytest.raises(ValueError, match="out/training/unet holds a run with vae and clip = "):
        train_here("unet", "--steps", 4)


def almost(latents):
    return replace(latents, images=latents.images * (1 + 1e-6))


def test_captions_that_are_all_the_same_cannot_be_told_apart(train_here, captioned):
    for text in captioned.rglob("*.txt"):
        text.write_text("a cat")
    with pytest.raises(ValueError, match="expected two different captions or more among its held-out pictures"):
        train_here("clip")


def test_no_steps_and_no_batch_are_refused(train_here):
    for flag in ("--steps", "--batch"):
        with pytest.raises(ValueError, match=f"{flag} 0: expected 1 or more"):
            train_here("vae", flag, 0)


def test_looks_are_at_pictures_of_all_folders(captioned):
    few = load_data("photos", 16)
    many = replace(few, images=torch.zeros(1000, 1, 1, 1, dtype=torch.uint8))
    assert latent_ext.train.seen_at_looks(few).tolist() == list(range(30))
    looks = latent_ext.train.seen_at_looks(many)
    assert len(looks) == 36 and looks[0] == 0 and looks[18] == pytest.approx(514, abs=1) and looks[35] == 999


@pytest.mark.parametrize("part", ["unet", "classes"])
def test_a_batch_in_two_parts_trains_the_same(train_here, part):
    for needed in ("vae", "clip") if part == "unet" else ():
        train_here(needed)
    folder = Path("out/training/unet" if part == "unet" else "out")
    train_here(part, "--steps", 1)
    whole = read(folder / "resume.pt")["network"]
    for file in folder.glob("*.pt"):
        file.unlink()
    train_here(part, "--steps", 1, "--accumulate", 2)
    parts = read(folder / "resume.pt")["network"]
    assert all(torch.allclose(w, parts[name], atol=1e-5) for name, w in whole.items())


def test_classes_are_told_by_the_labels_and_left_out_by_picture(train_here, monkeypatch):
    told = []
    forward = ClassUNet.forward
    monkeypatch.setattr(
        ClassUNet, "forward", lambda self, x, t, labels=None: told.append(labels) or forward(self, x, t, labels)
    )
    monkeypatch.setattr(latent_ext.train, "STEPS", TINY | {"classes": 30})
    monkeypatch.setattr(toolbox.run, "SAVE_EVERY", 1000)
    train_here("classes")
    labels = torch.cat(told[3:])  # after the timing of a step
    assert labels.shape == (120, 1) and set(labels.flatten().tolist()) == {0, 1, 2}
    assert 0.02 < (labels == 0).float().mean() < 0.2
    _, _, about = load_model("out/model.pt", make=ClassUNet)
    assert about["network"]["classes"] == {"class": ["left", "right"]}
    assert find("out/model.pt").size == 32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("unet",), "before the U-Net come the other two"),
        (("all", "--steps", 5), "one part"),
        (("vae", "--accumulate", 2), "trained by one process"),
        (("clip", "--accumulate", 2), "trained by one process"),
        (("vae", "--size", 30), "a multiple of 8"),
    ],
)
def test_what_cannot_be_trained_gets_one_sentence(train_here, arguments, words):
    with pytest.raises(ValueError, match=words):
        train_here(*arguments)


def test_pictures_without_captions_or_classes_get_one_sentence(train_here, captioned):
    for text in captioned.rglob("*.txt"):
        text.unlink()
    for path in captioned.rglob("*.png"):
        path.rename(captioned / path.name)
    with pytest.raises(ValueError, match="no captions; write picture"):
        train_here("vae")
    with pytest.raises(ValueError, match="no classes"):
        train_here("classes")
