"""A model in one file: it comes back as it was, and what is no such file is one sentence."""

import hashlib
import zipfile

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
    config = model_config(network, NoiseSchedule.linear(100), 8, "nothing", extra=[1])
    save_model(here / "tiny.pt", network, config)
    return here / "tiny.pt"


@pytest.mark.parametrize("prediction", ["noise", "v", "velocity"])
def test_a_model_comes_back_as_it_was_to_half_precision(here, network, prediction):
    schedule = NoiseSchedule.flow(50)
    config = model_config(network, schedule, 8, "nothing", prediction, extra=[1])
    save_model(here / "model.pt", network, config)
    assert (here / "model.pt").stat().st_size < 3 * sum(w.numel() for w in network.parameters())
    again, same, content = load_model("model.pt")
    assert content == config and content["channels"] == 3 and content["size"] == 8
    assert torch.equal(same.alpha_bar, schedule.alpha_bar) and not again.training
    assert {w.dtype for w in again.parameters()} == {torch.float32}
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 40])
    wrap = {"noise": lambda f, _: f, "v": noise_from_v, "velocity": noise_from_velocity}
    expected = wrap[prediction](network, schedule)(x, t)
    got = predict_noise_of(again, same, content)(x, t)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


def test_a_model_of_the_format_before_still_loads(tiny):
    """Format 2 had other names for the same weights in the same order, and no `prediction`."""
    expected = load_model(tiny)[0].state_dict().values()
    content = torch.load(tiny, weights_only=True)
    old = {"channels": "widths", "num_res_blocks": "blocks", "attention_levels": "attention"}
    numbers = {old.get(name, name): value for name, value in content["network"].items()}
    weights = {f"old.{i}": w for i, w in enumerate(content["weights"].values())}
    del content["prediction"]
    new = {"format": 2, "network": numbers | {"context_width": None}, "weights": weights}
    torch.save(content | new | {"classes": []}, tiny)
    network, _, config = load_model(tiny)
    assert all(map(torch.equal, network.state_dict().values(), expected))
    assert config["prediction"] == "v"


@pytest.mark.parametrize("name", ["cats", "real-cats"])
def test_the_ready_models_load_by_name(here, name):
    network, schedule, config = load_model(name)
    assert schedule.T == 1000 and config["channels"] == network.config["in_channels"] == 3


def test_a_changed_unet_is_said_and_a_mistake_in_it_keeps_its_traceback(tiny, monkeypatch):
    def without_time(block, c_in, c_out, t_dim, *numbers, make=unet.ResBlock.__init__):
        make(block, c_in, c_out, None, *numbers)

    def one_more_argument(network, *words, depth):
        pass

    for kind, changed in ((unet.ResBlock, without_time), (UNet, one_more_argument)):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="by another network"):
            patch.setattr(kind, "__init__", changed)
            load_model(tiny)
    monkeypatch.setattr(unet.ResBlock, "__init__", lambda *_: undefined)  # noqa: F821
    with pytest.raises(NameError, match="undefined"):
        load_model(tiny)


def test_what_a_file_cannot_describe_is_refused_before_the_training(network):
    alpha_bar = NoiseSchedule.cosine(10).alpha_bar
    for schedule in (NoiseSchedule("mine", alpha_bar), NoiseSchedule("linear", alpha_bar)):
        with pytest.raises(ValueError, match="cannot describe the schedule"):
            model_config(network, schedule, 8, "nothing")


KIND = "expected a model.pt of this repository"
WHOLE = "expected a file of torch.save; this one is damaged"
DAMAGED = "this file is damaged"
OTHER = "made by another network"
KINDS = "expected another kind of model; use python -m latent_ext.generate for this one"
FILES = {  # what is wrong with a file, as changes to `tiny`'s entries, numbers or weights
    KIND: [[1, 2], torch.zeros(3), {"format": ...}, *({"format": n} for n in (1, 99, None))],
    WHOLE: [b"", b"text\nof two lines", b"a zip", 0.5, 0.999, Evil(), {"network": Evil()}],
    "this file resumes a training; use the model.pt next to it": [{"settings": {}}],
    DAMAGED: [
        *({"size": size} for size in (0, 10**9, "8", 8.5, None, [8])),
        *({"network": numbers} for numbers in (3, None)),
        *({"schedule": {"name": name, "T": 9}} for name in ("__init__", "from_betas", "sine", [])),
        *({"schedule": {"name": "flow", "T": T}} for T in (0, -1, 10**12, "9", None, 9.5)),
        *({name: ...} for name in ("weights", "size", "channels", "schedule", "network")),
        *({"channels": 1}, {"weights": None}, {"prediction": "x0"}, {"attention_block": "exec"}),
        *({name: number} for name in ("heads", "groups") for number in (0, -1)),
        *({"num_res_blocks": number} for number in (10**9, 9_999)),
        *({"levels": levels} for levels in ([10**6] * 2, (10**6,) * 2, [1] * 10**5)),
        lambda w: w * torch.nan,  # of each weight
        lambda w: torch.zeros(1).expand(w.shape),
        lambda w: 3,
    ],
    OTHER: [{"levels": [8, 8]}, {"levels": [10_000] * 2}, {"unknown": 1}, lambda w: w[:1]],
    KINDS: [{"classes": [3]}],
}
NUMBERS = {"heads", "groups", "num_res_blocks", "levels", "unknown", "attention_block", "classes"}


@pytest.mark.parametrize("told", FILES)
def test_a_file_that_is_no_model_is_one_sentence_and_is_never_executed(tiny, here, capsys, told):
    for wrong in FILES[told]:
        content, whole = torch.load(tiny, weights_only=True), tiny.read_bytes()
        if callable(wrong):
            content["weights"] = {name: wrong(w) for name, w in content["weights"].items()}
        elif isinstance(wrong, dict) and wrong.keys() <= NUMBERS:
            numbers = {name.replace("levels", "channels"): wrong[name] for name in wrong}
            content["network"] |= numbers
        elif isinstance(wrong, dict):
            content = {k: v for k, v in (content | wrong).items() if v is not ...}
        else:
            content = whole[: int(wrong * len(whole))] if isinstance(wrong, float) else wrong
        if isinstance(content, bytes):
            (here / "bad.pt").write_bytes(content)
        else:
            torch.save(content, here / "bad.pt")
        if wrong == b"a zip":
            with zipfile.ZipFile(here / "bad.pt", "w") as file:
                file.writestr("a.txt", "text")
        assert f"bad.pt: {told}" in said(lambda: load_model("bad.pt"), capsys), wrong
        assert sorted(file.name for file in here.iterdir()) == ["bad.pt", "tiny.pt"]
    if told == WHOLE:  # the evil file is as bad as it was meant to be
        torch.load(here / "bad.pt", weights_only=False)
        assert (here / "executed").exists()


def test_a_model_that_is_not_there_is_said_with_a_hint(here):
    (here / "folder").mkdir()
    (here / "folder/model.pt").write_text("")
    for name, told in {
        "catz": r"did you mean cats\?",
        "folder": r"did you mean folder.model.pt\?",
        "latent-cats": "use python -m latent_ext.generate",
        "nothing-like-it": "no such model file; ready models: .*real-cats",
    }.items():
        with pytest.raises(UserError, match=told):
            load_model(name)


def test_a_ready_model_that_was_changed_is_refused(tiny, here, monkeypatch, capsys):
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
        assert "this is not the ready model that models/SHA256SUMS lists" in sentence
