"""A model in one file: it comes back as it was, and what is no such file is one sentence."""

import hashlib

import pytest
import torch
from conftest import Evil, random_unet, said

import toolbox.models
import unet
from processes import NoiseSchedule, noise_from_v, noise_from_velocity
from toolbox.files import UserError
from toolbox.models import load_model, model_config, predict_noise_of, save_model
from unet import UNet


@pytest.fixture
def network():
    return random_unet()


@pytest.fixture
def tiny(here, network):
    config = model_config(network, NoiseSchedule.linear(100), 8, "nothing")
    save_model(here / "tiny.pt", network, config)
    return here / "tiny.pt"


@pytest.mark.parametrize("prediction", ["noise", "v", "velocity"])
def test_a_model_comes_back_as_it_was_to_half_precision(here, network, prediction):
    schedule = NoiseSchedule.flow(50)
    config = model_config(network, schedule, 8, "nothing", prediction, extra=[1])
    save_model(here / "model.pt", network, config)
    assert (here / "model.pt").stat().st_size < 3 * sum(w.numel() for w in network.parameters())
    again, same, content = load_model("model.pt")
    assert content == config and content["extra"] == [1]
    assert content["channels"] == 3 and content["size"] == 8
    assert torch.equal(same.alpha_bar, schedule.alpha_bar) and not again.training
    assert {w.dtype for w in again.parameters()} == {torch.float32}
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 40])
    wrap = {"noise": lambda f, _: f, "v": noise_from_v, "velocity": noise_from_velocity}
    expected = wrap[prediction](network, schedule)(x, t)
    got = predict_noise_of(again, same, content)(x, t)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


def test_a_model_of_the_format_before_loads(tiny):
    """Format 2 had other names for the same weights in the same order, and no `prediction`."""
    stored = torch.load(tiny, weights_only=True)
    names = {"channels": "widths", "num_res_blocks": "blocks", "attention_levels": "attention"}
    numbers = {names.get(name, name): number for name, number in stored["network"].items()}
    weights = {f"old.{i}": w for i, w in enumerate(stored["weights"].values())}
    stored |= {"format": 2, "network": numbers | {"context_width": None}, "weights": weights}
    del stored["prediction"]
    expected = load_model(tiny)[0].state_dict()
    torch.save(stored, tiny)
    network, schedule, config = load_model(tiny)
    assert all(torch.equal(w, expected[name]) for name, w in network.state_dict().items())
    assert schedule.T == 100 and config["prediction"] == "v"


def test_a_changed_unet_is_said_and_a_mistake_in_it_keeps_its_traceback(tiny, monkeypatch):
    def without_time(block, c_in, c_out, t_dim, *numbers, make=unet.ResBlock.__init__):
        make(block, c_in, c_out, None, *numbers)

    def one_more_argument(network, *words, depth):
        pass

    for kind, changed in ((unet.ResBlock, without_time), (UNet, one_more_argument)):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="by another network"):
            patch.setattr(kind, "__init__", changed)
            load_model(tiny)
    for mistake in (NameError, TypeError, ValueError, RuntimeError, KeyError):
        raises = lambda *_, error=mistake: (_ for _ in ()).throw(error("mine"))  # noqa: E731
        monkeypatch.setattr(unet.ResBlock, "__init__", raises)
        with pytest.raises(mistake, match="mine"):
            load_model(tiny)


def test_what_a_file_cannot_describe_is_refused_before_the_training(network):
    alpha_bar = NoiseSchedule.cosine(10).alpha_bar
    for schedule in (NoiseSchedule("mine", alpha_bar), NoiseSchedule("linear", alpha_bar)):
        with pytest.raises(ValueError, match="cannot describe the schedule"):
            model_config(network, schedule, 8, "nothing")


KIND = "expected a model.pt of this repository"
WHOLE = "expected a file of torch.save with named entries; this one is damaged"
DAMAGED = "this file is damaged (it has NaN in it)"
OTHER = "made by another network"
CLASSES = "expected another kind of model; use python -m latent_ext.generate for this one"


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        *((wrong, WHOLE) for wrong in (b"", b"text", -1000, Evil(), [1, 2], torch.zeros(3))),
        (lambda c: c | {"network": Evil()}, WHOLE),
        ({"settings": {}, "step": 3}, KIND),
        (lambda c: c | {"format": 99}, KIND),
        (lambda c: c | {"network": c["network"] | {"channels": [8, 8]}}, OTHER),
        (lambda c: c | {"network": c["network"] | {"depth": 1}}, OTHER),
        (lambda c: c | {"schedule": {"name": "mine", "T": 9}}, OTHER),
        (lambda c: c | {"weights": {k: w * torch.nan for k, w in c["weights"].items()}}, DAMAGED),
        (lambda c: c | {"network": c["network"] | {"classes": [3]}}, CLASSES),
    ],
)
def test_a_file_that_is_no_model_is_one_sentence_and_is_never_executed(
    tiny, here, capsys, wrong, sentence
):
    """wrong: what is done to a good model, or is in the file instead, or where it is cut off."""
    content = wrong(torch.load(tiny, weights_only=True)) if callable(wrong) else wrong
    torch.save(content, here / "bad.pt")
    if isinstance(wrong, bytes | int):
        (here / "bad.pt").write_bytes(tiny.read_bytes()[:wrong] if wrong == -1000 else wrong)
    assert f"bad.pt: {sentence}" in said(lambda: load_model("bad.pt"), capsys)
    assert not (here / "executed").exists()


def test_a_model_that_is_not_there_is_said_with_a_hint(here):
    (here / "folder").mkdir()
    (here / "folder/model.pt").write_text("")
    for name, sentence in {
        "catz": r"did you mean cats\?",
        "folder": r"did you mean folder.model.pt\?",
        "latent-cats": "use python -m latent_ext.generate",
        "nothing-like-it": "no such model file; pretrained models: .*, latent-cats, real-cats",
    }.items():
        with pytest.raises(UserError, match=sentence):
            load_model(name)


def test_a_pretrained_model_that_was_changed_is_refused(tiny, here, monkeypatch, capsys):
    """Whole and well-formed, but not the listed file. One that is not listed is the user's own."""
    monkeypatch.setattr(toolbox.models, "PRETRAINED", here.resolve())
    checksum = hashlib.sha256(tiny.read_bytes()).hexdigest()
    (here / "SHA256SUMS").write_text(f"{checksum}  tiny.pt\n{64 * '0'}  folder/other.pt\n")
    load_model("tiny")
    content = torch.load(tiny, weights_only=True)
    content["weights"]["conv_out.bias"] += 1
    for name in ("tiny.pt", "own.pt"):
        torch.save(content, here / name)
    load_model("own")
    for name in ("tiny", "tiny.pt"):
        sentence = said(lambda name=name: load_model(name), capsys)
        assert "this is not the pretrained model that models/SHA256SUMS lists" in sentence
