"""The trainings of the second evening: what they train on, and what they condition on."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, cats, redraw, said
from torch.distributions import Normal, kl_divergence

import latent_ext.train
import toolbox.data
from latent_ext import train_classes, train_clip, train_unet, train_vae
from latent_ext.data import (
    caption_variants,
    encode_data,
    held_out_combination,
    preview_indices,
    select,
)
from latent_ext.generate import load_pipeline
from latent_ext.pipeline import text_to_image
from latent_ext.train_clip import retrieval_accuracy
from latent_ext.vae import VAE
from processes import NoiseSchedule
from toolbox.cats import draw
from toolbox.data import Data, load_data
from toolbox.images import save_image, to_image
from toolbox.models import read
from toolbox.seeds import generators

FLAGS = "--data photos --size 16 --batch 4 --out out --device cpu --precision float32"
log_samples = train_classes.log_samples


@pytest.fixture
def main(here, monkeypatch):
    """main("vae", "--steps", 2) trains a tiny network on 32 captioned cats in two folders."""
    images, _, captions = draw(32, 16)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        path = here / "photos" / ("left" if i % 2 else "right") / f"{i}.png"
        save_image(to_image(image), path)
        path.with_suffix(".txt").write_text(caption)
    monkeypatch.setattr(train_vae, "CHANNELS", (8, 8, 16))
    monkeypatch.setattr(train_clip, "TRANSFORMER", {"width": 32, "layers": 1, "heads": 2})
    monkeypatch.setattr(train_unet, "UNET", TINY)
    monkeypatch.setattr(train_classes, "CHANNELS", (8, 16, 16, 16))
    for module in (train_classes, train_vae, train_clip, train_unet):
        monkeypatch.setattr(module, "STEPS", 2)
        for plot in ("log_samples", "plot_training", "plot_similarity"):
            monkeypatch.setattr(module, plot, lambda *_: None, raising=False)

    def main(part, *words):
        monkeypatch.setattr(sys, "argv", ["train", part, *FLAGS.split(), *map(str, words)])
        latent_ext.train.main()

    return main


@pytest.fixture
def parts(main):
    """Also, a VAE and a text encoder for the U-Net."""
    main("vae")
    main("clip")
    return main


# ---- data ----------------------------------------------------------------------------------------


def test_few_combinations_are_held_out_and_each_two_attributes_are_still_seen_together():
    data = cats(3000, 1)
    kept = select(data, ~held_out_combination(data.labels))
    some = (data.labels.sum(1) % 8 != 4).nonzero()[:, 0]
    assert torch.equal(kept.images, data.images[some])
    assert torch.equal(kept.labels, data.labels[some])
    assert kept.captions == [data.captions[i] for i in some]
    combinations = data.labels.unique(dim=0)
    held_out = held_out_combination(combinations)
    assert 0.1 < held_out.float().mean() < 0.2
    for a in range(combinations.shape[1]):
        for b in range(a):
            pairs = combinations[:, [a, b]]
            assert len(pairs[~held_out].unique(dim=0)) == len(pairs.unique(dim=0))


def test_caption_variants_leave_out_clauses_in_less_than_half_of_the_cases():
    cat = "an orange cat with blue eyes on a pink background"
    texts, variants = caption_variants([cat, "a dog", cat])
    assert texts[0] == "" and len(texts) == len(set(texts)) and variants.shape == (3, 8)
    first, dog, again = ([texts[i] for i in row] for row in variants.tolist())
    assert first == again and first[:5] == [cat] * 5 and dog == ["a dog"] * 8
    head = "an orange cat"
    assert set(first[5:]) == {head, f"{head} with blue eyes", f"{head} on a pink background"}


def test_latents_have_a_variance_of_one_and_those_of_flipped_images_are_no_flipped_latents():
    torch.manual_seed(0)
    vae, data = VAE(channels=(8, 8, 8)).eval(), cats(6, 32)
    latents = encode_data(vae, data)
    assert latents.images.std() == pytest.approx(1, abs=1e-5)
    assert (latents.hflip, latents.checksum) == (True, data.checksum)
    flipped = vae.encode((data.images.float() / 127.5 - 1).flip(-1))[0] * latents.scaling_factor
    batch = latents.batch(torch.tensor([3, 4]), torch.tensor([True, False]))
    assert torch.allclose(batch[0], flipped[3], atol=1e-5)
    assert torch.equal(batch[1], latents.images[4])
    assert not torch.allclose(latents.images[3].flip(-1), flipped[3], atol=1e-2)


def test_previews_show_images_of_all_folders():
    few, many = (Data("x", torch.zeros(n, 1, 1, 1, dtype=torch.uint8)) for n in (30, 1000))
    assert preview_indices(few).tolist() == list(range(30))
    indices = preview_indices(many).tolist()
    assert len(indices) == 36 and indices[0] == 0 and indices[18] == 513 and indices[35] == 999


# ---- what is learned -----------------------------------------------------------------------------


def test_train_all_makes_a_folder_that_draws_and_is_then_finished(main, monkeypatch, capsys):
    monkeypatch.setattr(train_unet, "log_samples", log_samples)
    main("all")
    pipeline = load_pipeline("out")
    settings = (pipeline.size, pipeline.prediction, pipeline.spacing)
    assert settings == (16, "v_prediction", "trailing")
    ema = read(Path("out/training/unet/model.pt"))["weights"]
    ema = {name: w.float() for name, w in ema.items()}
    torch.testing.assert_close(dict(pipeline.unet.state_dict()), ema, rtol=0, atol=0)
    assert Path("out/training/unet/samples-000002.png").exists()
    images = text_to_image(pipeline, ["an orange cat"], generator=generators([0]), steps=2)
    assert images.shape == (1, 3, 16, 16)
    scaling_factor = encode_data(pipeline.vae, load_data("photos", 16)).scaling_factor
    assert pipeline.vae.scaling_factor == pytest.approx(scaling_factor, rel=1e-3)
    shutil.rmtree("out/unet")  # as if the last save had been prevented
    main("unet")
    assert "finished after 2 steps" in capsys.readouterr().out and Path("out/unet").exists()


def test_the_vae_learns_to_give_back_its_images(main, capsys):
    main("vae", "--steps", 60)
    assert float(re.search(r"PSNR of ([\d.]+) dB", capsys.readouterr().out)[1]) > 13  # at first 7


def test_the_vaes_loss_is_the_squared_error_and_a_share_of_the_kl_divergence(main, monkeypatch):
    losses, seen, forward = [], [], VAE.forward

    def noted(vae, x0, noise):
        seen.append((x0, *forward(vae, x0, noise)))
        return seen[-1][1:]

    monkeypatch.setattr(train_vae, "KL_WEIGHT", 0.5)
    monkeypatch.setattr(train_vae, "gradient_step", lambda loss, *_: losses.append(loss.item()))
    monkeypatch.setattr(VAE, "forward", noted)
    main("vae", "--steps", 1)
    x0, x, mean, logvar = seen[-1]
    kl = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).mean()
    assert losses == [pytest.approx((F.mse_loss(x, x0) + 0.5 * kl).item(), rel=1e-5)]


def test_clip_learns_which_caption_belongs_to_which_image(main, monkeypatch):
    networks = []
    monkeypatch.setattr(train_clip, "retrieval_accuracy", lambda *a: networks.append(a[:2]) or 0.0)
    main("clip", "--steps", 60, "--batch", 32)
    data = load_data("photos", 16)
    assert retrieval_accuracy(*networks[0], data, 20) > 0.5  # by chance 1 of 21
    shifted = replace(data, captions=data.captions[1:] + data.captions[:1])
    assert retrieval_accuracy(*networks[0], shifted, 20) < 0.2


@pytest.mark.parametrize("part", ["vae", "clip", "unet", "classes"])
def test_a_step_is_made_in_the_precision_of_the_run_and_then_averaged(main, monkeypatch, part):
    for needed in ["vae", "clip"] if part == "unet" else []:
        main(needed)
    calls, module = [], latent_ext.train.PARTS[part]
    monkeypatch.setattr(module, "gradient_step", lambda *words: calls.append(words[3:]))
    monkeypatch.setattr(module, "update_ema", lambda *words: calls.append(words[2:]))
    main(part, "--precision", "bfloat16")
    assert calls == [(0, 2, "bfloat16"), (0,), (1, 2, "bfloat16"), (1,)]


def record(monkeypatch, module):
    """x_t, t and the condition of each step of a training that then learns nothing."""
    seen = []

    def noise_from_v(network, schedule):
        return lambda x, t, condition: seen.append((x, t, condition.clone())) or x

    monkeypatch.setattr(module, "gradient_step", lambda *_: None)
    monkeypatch.setattr(module, "noise_from_v", noise_from_v)
    return seen


def one_in_ten(generator):
    return torch.randint(10, (8,), generator=generator) == 0


def test_the_unet_gets_variants_of_a_caption_and_in_one_of_ten_cases_none(parts, monkeypatch):
    seen = record(monkeypatch, train_unet)
    parts("unet", "--steps", 10, "--batch", 8)
    vae, text_encoder, tokenizer, _ = train_unet.load_parts(Path("out/training"), "cpu")
    data = load_data("photos", 16)
    latents, (texts, variants) = encode_data(vae, data), caption_variants(data.captions)
    contexts = text_encoder(tokenizer(texts)).detach()
    for step, inputs in enumerate(seen):
        drawn = redraw(0, step, latents, NoiseSchedule.cosine(), batch=8)
        chosen = variants[drawn.indices, torch.randint(8, (8,), generator=drawn.generator)]
        chosen[one_in_ten(drawn.generator)] = 0
        torch.testing.assert_close(inputs, (drawn.x_t, drawn.t, contexts[chosen]))


@pytest.mark.parametrize("name", ["photos", "cats"])
def test_classes_are_an_images_labels_and_for_one_image_in_ten_left_open(main, monkeypatch, name):
    monkeypatch.setattr(toolbox.data, "DRAWN_CATS", 128)
    seen, shown = record(monkeypatch, train_classes), []
    monkeypatch.setattr(train_classes, "log_samples", lambda *args: shown.append(args[2]))
    main("classes", "--data", name, "--steps", 10, "--batch", 8, "--size", 8)
    data = load_data(name, 8)
    assert load_pipeline("out/model.pt").classes == {k: list(v) for k, v in data.classes.items()}
    if name == "cats":
        data = select(data, ~held_out_combination(data.labels))
    for step, inputs in enumerate(seen):
        drawn = redraw(0, step, data, NoiseSchedule.sigmoid(), batch=8)
        labels = data.labels[drawn.indices] + 1
        labels[one_in_ten(drawn.generator)] = 0
        for attribute in range(4 if name == "cats" else 0):  # of several, single ones, too
            labels[one_in_ten(drawn.generator), attribute] = 0
        torch.testing.assert_close(inputs, (drawn.x_t, drawn.t, labels))
    assert torch.equal(shown[0], data.labels[preview_indices(data)] + 1)


# ---- what cannot be trained, or resumed --------------------------------------------------------


def test_a_unet_resumes_with_its_own_vae_and_clip_only(parts, monkeypatch, capsys):
    """Where latents come out a little differently, as on another machine, it does not mind."""
    parts("unet")
    encode = train_unet.encode_data
    others = lambda *words: replace(x := encode(*words), images=x.images * (1 + 1e-6))  # noqa: E731
    monkeypatch.setattr(train_unet, "encode_data", others)
    parts("unet", "--steps", 3)
    parts("clip", "--steps", 3)
    words = "out/training/unet holds a run with vae and clip = "
    assert words in said(lambda: parts("unet", "--steps", 4), capsys)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("unet", "is missing: first run python -m latent_ext.train vae"),
        ("all --steps 5", "--steps works for one part only"),
        ("vae --size 30", "--size 30: expected a multiple of 8"),
        ("vae --steps 0", "--steps 0: expected 1 or more"),
        ("vae --batch 0", "--batch 0: expected 1"),
        ("clip --batch 1", "--batch 1: expected 2 or more"),
        ("all --batch 1", "--batch 1: expected 2 or more"),
        ("classes --seed -1", "--seed -1: expected 0"),
        ("all --data same", "expected at least two different captions"),
        ("clip --data silent", "expected captions: image.txt next to image.jpg"),
        ("classes --data silent", "expected classes, one sub-folder per class"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_sentence(main, capsys, words, sentence):
    for i, image in enumerate(draw(16, 16)[0]):
        for folder in ("same", "silent"):
            save_image(to_image(image), Path(folder) / f"{i}.png")
        (Path("same") / f"{i}.txt").write_text("a cat")
    assert sentence in said(lambda: main(*words.split()), capsys)
    assert not Path("out").exists()


def test_only_the_vae_needs_no_captions(main):
    for i, image in enumerate(draw(16, 16)[0]):
        save_image(to_image(image), Path("silent") / f"{i}.png")
    main("vae", "--data", "silent", "--steps", "1")
    assert Path("out/training/vae/model.pt").exists()
