"""A model in one file: it comes back as it was, and what is no such file is one sentence."""

import hashlib
import zipfile

import pytest
import torch
from conftest import TINY, Evil, said

import toolbox.models
import unet
from processes import NoiseSchedule, noise_from_v, noise_from_velocity
from toolbox.files import UserError
from toolbox.models import (
    PRETRAINED,
    find_model,
    load_model,
    model_config,
    predict_noise_of,
    save_model,
)
from unet import UNet


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = UNet(**TINY)
    for w in network.parameters():
        torch.nn.init.normal_(w, std=0.1)
    return network


@pytest.fixture
def tiny(here, network):
    schedule = NoiseSchedule.linear(100)
    save_model(here / "tiny.pt", network, model_config(network, schedule, 8, "nothing", extra=[1]))
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
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 40])
    wrap = {"noise": lambda f, _: f, "v": noise_from_v, "velocity": noise_from_velocity}
    expected = wrap[prediction](network, schedule)(x, t)
    got = predict_noise_of(again, same, content)(x, t)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    assert {w.dtype for w in again.parameters()} == {torch.float32}


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
    assert schedule.T == 1000 and config["channels"] == network.config["in_channels"]


def test_a_changed_unet_is_said_and_a_mistake_in_it_keeps_its_traceback(tiny, monkeypatch):
    def without_time(block, c_in, c_out, t_dim, *numbers, make=unet.ResBlock.__init__):
        make(block, c_in, c_out, None, *numbers)

    def one_more_argument(network, *words, depth, make=UNet.__init__):
        make(network, *words)

    def mistaken(*_):
        return undefined  # noqa: F821

    for kind, changed in ((unet.ResBlock, without_time), (UNet, one_more_argument)):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "__init__", changed)
            with pytest.raises(UserError, match=r"tiny.pt: made by another network than unet.py"):
                load_model(tiny)
    monkeypatch.setattr(unet.ResBlock, "__init__", mistaken)
    with pytest.raises(NameError, match="undefined"):
        load_model(tiny)


def test_what_a_file_cannot_describe_is_refused_before_the_training(network):
    alpha_bar = NoiseSchedule.cosine(10).alpha_bar
    for schedule in (NoiseSchedule("mine", alpha_bar), NoiseSchedule("linear", alpha_bar)):
        with pytest.raises(ValueError, match="cannot describe the schedule"):
            model_config(network, schedule, 8, "nothing")


KIND, WHOLE, DAMAGED, OTHER = (
    "expected a model.pt of this repository",
    "expected a file of torch.save",
    "this file is damaged",
    "made by another network",
)


def changed(**entries):
    return lambda content: content | entries


def network_with(**entries):
    return lambda content: content | {"network": content["network"] | entries}


def weights(change):
    def each(content):
        return content | {"weights": {name: change(w) for name, w in content["weights"].items()}}

    return each


def without(name):
    return lambda content: {other: value for other, value in content.items() if other != name}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", WHOLE),
        (b"some text\nof two lines", WHOLE),
        (lambda whole: whole[: len(whole) // 2], WHOLE),
        (lambda whole: whole[:-1], WHOLE),
        ("a zip", WHOLE),
        (Evil(), WHOLE),
        ({"weights": Evil()}, WHOLE),
        ([1, 2], KIND),
        ({"weight": torch.zeros(3)}, KIND),
        ({"settings": {}}, "this file resumes a training; use the model.pt next to it"),
        *[(changed(format=number), KIND) for number in (1, 99, None)],
        *[(changed(size=size), DAMAGED) for size in (0, 10**9, "8", 8.5, None, [8])],
        *[(changed(network=numbers), DAMAGED) for numbers in (3, [], None)],
        (changed(channels=1), DAMAGED),
        (changed(weights=None), DAMAGED),
        (changed(prediction="x0"), DAMAGED),
        (network_with(num_res_blocks=10**9), DAMAGED),
        (network_with(channels=[10**6, 10**6]), DAMAGED),
        (network_with(channels=(10**6, 10**6)), DAMAGED),
        (network_with(channels=[1] * 10**5), DAMAGED),
        (network_with(heads=0), DAMAGED),
        (network_with(groups=0), DAMAGED),
        (network_with(channels=[8, 8]), OTHER),
        (network_with(channels=[10_000, 10_000]), OTHER),
        (network_with(unknown=1), OTHER),
        (network_with(attention_block="exec"), DAMAGED),
        (network_with(classes=[3]), "expected another kind of model; use python -m latent_ext"),
        (weights(lambda w: w * torch.nan), DAMAGED),
        (weights(lambda w: w[:1]), OTHER),
        (weights(lambda w: torch.zeros(1).expand(w.shape)), DAMAGED),
        (weights(lambda w: 3), DAMAGED),
        *[
            (changed(schedule={"name": name, "T": 9}), DAMAGED)
            for name in ("__init__", "from_betas", "sine", [])
        ],
        *[
            (changed(schedule={"name": "linear", "T": T}), DAMAGED)
            for T in (0, -1, 10**12, "9", None, 9.5)
        ],
        *[(without(name), DAMAGED) for name in ("weights", "size", "channels", "schedule")],
    ],
)
def test_a_file_that_is_no_model_gets_one_sentence_and_is_never_executed(
    tiny, here, capsys, content, told
):
    path = here / "bad.pt"
    if content == "a zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.txt", "text")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif told == WHOLE and callable(content):
        path.write_bytes(content(tiny.read_bytes()))
    else:
        whole = torch.load(tiny, weights_only=True)
        torch.save(content(whole) if callable(content) else content, path)
    assert f"bad.pt: {told}" in said(lambda: load_model("bad.pt"), capsys)
    assert sorted(file.name for file in here.iterdir()) == ["bad.pt", "tiny.pt"]


def test_the_evil_file_is_as_bad_as_it_was_meant_to_be(here):
    torch.save(Evil(), here / "evil.pt")
    torch.load(here / "evil.pt", weights_only=False)
    assert (here / "executed").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("catz", "did you mean cats?"),
        ("folder", "did you mean folder/model.pt?"),
        ("latent-cats", "use python -m latent_ext.generate"),
        ("nothing-like-it", "no such model file"),
    ],
)
def test_a_model_that_is_not_there_is_said_with_a_hint(here, name, told):
    (here / "folder").mkdir()
    (here / "folder/model.pt").write_text("")
    with pytest.raises(UserError) as error:
        load_model(name)
    assert told in str(error.value)
    assert find_model("cats") == PRETRAINED / "cats.pt"


def test_a_ready_model_that_was_changed_is_refused(tiny, here, monkeypatch, capsys):
    """Whole and well-formed, but not the listed file. One that is not listed is the user's own."""
    monkeypatch.setattr(toolbox.models, "PRETRAINED", here.resolve())
    (here / "own.pt").write_bytes(tiny.read_bytes())
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
