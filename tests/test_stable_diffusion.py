"""Stable Diffusion's weights under all of their names, judged by diffusers and transformers.

No real weights are needed: the structure is v1.5's with small widths, and the files are laid out
like the published ones. Mostly in float64, with random numbers in every parameter.
"""

import gzip
import io
import json
import os
import pickle
import random
import shutil
import sys
import types
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Evil
from diffusers.loaders import single_file_utils
from oracles import V15_TEXT, V15_UNET, V15_VAE, cross_unet, error, pair
from test_pipeline import SD, TOY, opened_by_diffusers, tiny_pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from latent_ext.clip import END, START, TextEncoder, Tokenizer
from latent_ext.pipeline import text_to_image
from latent_ext.stable_diffusion import PREFIX, V1_5, load, save
from latent_ext.vae import VAE
from latent_ext.weight_names import COMPVIS, DIFFUSERS, name_pairs
from processes import NoiseSchedule
from toolbox.files import UserError
from toolbox.models import PRETRAINED

PARTS = ("unet", "vae", "text_encoder")
MERGES = "t h,th e</w>,a n,an d</w>,c a,ca t,ca t</w>,cat s</w>,o r,an g,or ang,orang e</w>,i n"
MERGES += ",in g</w>,e r,a t</w>,a s,s t,as t,r o,ast ro,n a,na u,nau t</w>,h o,ho r,hor s,e s</w>"
MERGES = [tuple(pair.split()) for pair in MERGES.split(",")]
SMALL_TEXT = {"vocab_size": 514 + len(MERGES), "width": 128, "layers": 2, "heads": 2, "length": 16}
SMALL = {
    "unet": V15_UNET | {"channels": [32, 64, 64, 64], "in_channels": 9},  # for inpainting
    "vae": V15_VAE | {"channels": [32, 32, 64, 64]},
    "text_encoder": SMALL_TEXT,
}
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"
NUMPY_1 = "numpy.core.multiarray", "scalar"
WORDS = (
    "a photo of the orange cat in the garden, the cats' green eyes and an astronaut riding a "
    "horse; it's painting the thing"
)
UNUSUAL = (
    "I'VE don't we'll THEY'RE 's o'clock naïve nai\u0308ve Ångström A\u030angstro\u0308m Straße "
    "ﬁne İstanbul ΣΊΣΥΦΟΣ 日本語の猫 кошка قطة १२३ ½ Ⅷ x² 2024 3.14 1,000,000 4k 😀 👩‍👩‍👧 🐈‍⬛ "
    "❤️ !!! ... #cat @you (a:1.2) [b] --ar &amp; <|endoftext|> <b> \\n _"
)


def our_networks(unet, vae, text_encoder):
    networks = cross_unet(text_encoder["width"], **unet), VAE(**vae), TextEncoder(**text_encoder)
    return dict(zip(PARTS, networks, strict=True))


def state_of(judge):
    """Transformers 4 has a prefix, transformers 5 has not."""
    return {name.removeprefix("text_model."): w for name, w in judge.state_dict().items()}


@torch.no_grad()
def difference(pipeline, unet, vae, text_encoder):
    """The largest, of all networks, in units of the largest number of each."""
    generator = torch.Generator().manual_seed(7)
    randn = partial(torch.randn, dtype=torch.float64, generator=generator)
    x, context, z, image = (
        randn(2, 9, 8, 8),
        randn(2, 5, 128),
        randn(2, 4, 2, 4),
        randn(1, 3, 16, 16),
    )
    t, tokens = torch.tensor([1, 900]), torch.tensor([[3, 500, 7, 7, 100]])
    pairs = [
        (pipeline.unet(x, t, context), unet(x, t, context).sample),
        (torch.cat(pipeline.vae.encode(image), 1), vae.encode(image).latent_dist.parameters),
        (pipeline.vae.decode(z), vae.decode(z).sample),
        (pipeline.text_encoder(tokens), text_encoder(tokens).last_hidden_state),
    ]
    return max(error(ours, theirs) for ours, theirs in pairs)


@pytest.fixture(scope="module")
def judges():
    """Diffusers' and transformers' networks, with random weights that fit into 16 bits."""
    networks = our_networks(**SMALL)
    judges = {part: pair(network)[1].half().double() for part, network in networks.items()}
    judges["unet"].register_to_config(sample_size=64)
    return judges


def write_merges(folder, merges=MERGES):
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), "utf-8")


def original_names(judges):
    """All weights as in the original file, with what else is in it."""
    with torch.device("meta"):
        networks = our_networks(**SMALL)
    tensors = {}
    for part, network in networks.items():
        state = state_of(judges[part])
        names = (name_pairs(part, network, layout) for layout in (DIFFUSERS, COMPVIS))
        for (theirs, _), (original, _) in zip(*names, strict=True):
            w, clip = state[theirs], "text_model." if part == "text_encoder" else ""
            if ".attn_1." in original and w.ndim == 2:
                w = w[:, :, None, None]
            tensors[PREFIX[part] + clip + original] = w.contiguous()
    return tensors | {
        "betas": torch.ones(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(32, 4, 3, 3),
        "first_stage_model.loss.logvar": torch.zeros(()),
        PREFIX["text_encoder"] + "text_model.embeddings.position_ids": torch.arange(16)[None],
    }


class OldNumber:
    """A number as NumPy 1 pickled it."""

    def __reduce__(self):
        scalar = sys.modules["numpy.core.multiarray"].scalar
        return scalar, (np.dtype("float64"), np.float64(0.5).tobytes())


def write_checkpoint(path, tensors):
    """The .ckpt of a training: a class of a library that is not installed, numbers of NumPy."""
    parents = "pytorch_lightning", "pytorch_lightning.callbacks"
    libraries = {name: types.ModuleType(name) for name in parents}
    for module, name in (LIGHTNING, NUMPY_1):
        libraries[module] = types.ModuleType(module)
        setattr(libraries[module], name, type(name, (), {"__module__": module}))
    states = {"best_model_score": OldNumber(), "lr": np.float64(0.5)}
    callbacks = {getattr(libraries[LIGHTNING[0]], LIGHTNING[1]): states}
    with mock.patch.dict(sys.modules, libraries):
        torch.save({"state_dict": tensors, "callbacks": callbacks}, path)
    pickled = zipfile.ZipFile(path).read(f"{path.stem}/data.pkl")
    assert all(f"c{module}\n{name}\n".encode() in pickled for module, name in (LIGHTNING, NUMPY_1))


def make_old(folder, judges):
    """As first published: old names, no scaling_factor, a .bin, weights before their average."""
    unet, vae, text = (folder / part for part in PARTS)
    (unet / "diffusion_pytorch_model.non_ema.safetensors").touch()
    config = json.loads((vae / "config.json").read_text())
    del config["scaling_factor"]
    (vae / "config.json").write_text(json.dumps(config))
    weights = judges["vae"].state_dict()
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in old_names.items():
        weights = {name.replace(f".{new}.", f".{old}."): w for name, w in weights.items()}
    safetensors.torch.save_file(weights, vae / "diffusion_pytorch_model.safetensors")
    weights = {f"text_model.{name}": w for name, w in state_of(judges["text_encoder"]).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    (text / "model.safetensors").unlink()
    torch.save(weights, text / "pytorch_model.bin")


@pytest.fixture
def layout(tmp_path, judges):
    """layout(kind): a path to load, with a tokenizer."""

    def layout(kind):
        path = tmp_path / f"v1-5{kind}"
        write_merges(path / "tokenizer" if kind.endswith("folder") else tmp_path)
        if kind == ".safetensors":
            safetensors.torch.save_file(original_names(judges), path)
        elif kind == ".ckpt":
            write_checkpoint(path, original_names(judges))
        else:
            for part, judge in judges.items():
                judge.save_pretrained(path / part)
            scheduler = diffusers.DDIMScheduler(**COSINE, timestep_spacing="trailing")
            if kind == " old folder":
                make_old(path, judges)
                scheduler = diffusers.PNDMScheduler(**SCALED_LINEAR, steps_offset=1)
            scheduler.save_pretrained(path / "scheduler")
        return path

    return layout


# Names


def test_v1_5_has_diffusers_names_and_shapes_and_the_published_sizes():
    with torch.device("meta"):
        networks = our_networks(V15_UNET, V15_VAE, V15_TEXT)
        judges = {
            "unet": diffusers.UNet2DConditionModel.from_config(V1_5["unet/config.json"]),
            "vae": diffusers.AutoencoderKL.from_config(V1_5["vae/config.json"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**V1_5["text_encoder/config.json"])),
        }
    for part, network in networks.items():
        own = network.state_dict()
        shapes = {theirs: own[ours].shape for theirs, ours in name_pairs(part, network, DIFFUSERS)}
        assert shapes == {name: w.shape for name, w in state_of(judges[part]).items()}
    parameters = [sum(p.numel() for p in network.parameters()) for network in networks.values()]
    assert parameters == [859_520_964, 83_653_863, 123_060_480]
    assert [len(network.state_dict()) for network in networks.values()] == [686, 248, 196]


def test_diffusers_converts_the_original_names_to_its_own(judges):
    tensors = original_names(judges)
    for part in ("unet", "vae"):
        convert = getattr(single_file_utils, f"convert_ldm_{part}_checkpoint")
        converted = convert(dict(tensors), dict(judges[part].config))
        state = judges[part].state_dict()
        assert {name for name in converted if "loss" not in name} == state.keys()
        assert all(torch.equal(converted[name], w) for name, w in state.items())
    for name in ("output_blocks.2.1.conv.bias", "output_blocks.5.2.conv.bias"):
        assert PREFIX["unet"] + name in tensors  # of these diffusers reads any number
    # the text encoder is transformers': its names are the same in both
    names = {PREFIX["text_encoder"] + "text_model." + n for n in state_of(judges["text_encoder"])}
    assert names < tensors.keys()


# Layouts


def parameters(pipeline):
    networks = [getattr(pipeline, part) for part in PARTS]
    return [p for network in networks for p in network.parameters()]


THEN, TODAY = ("scaled_linear", "epsilon", "leading"), ("cosine", "v_prediction", "trailing")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(".safetensors", THEN), (".ckpt", THEN), (" old folder", THEN), (" folder", TODAY)],
)
def test_every_layout_computes_what_diffusers_does_also_once_it_is_saved(
    kind, settings, layout, judges, tmp_path
):
    pipeline = load(layout(kind))
    assert (pipeline.vae.scaling_factor, pipeline.size) == (0.18215, 512)
    assert settings == (pipeline.schedule.name, pipeline.prediction, pipeline.spacing)
    assert pipeline.for_inpainting and not any(p.requires_grad for p in parameters(pipeline))
    assert difference(pipeline, **judges) < 1e-9
    save(pipeline, tmp_path / "saved")
    theirs = opened_by_diffusers(tmp_path / "saved")
    assert difference(pipeline, theirs.unet, theirs.vae, theirs.text_encoder) < 1e-9
    check_same_tokens(pipeline.tokenizer, theirs.tokenizer, varied_texts(50), 16)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux for the addresses")
@pytest.mark.parametrize("kind", [".safetensors", ".ckpt"])
def test_loading_takes_no_memory_beside_the_file(kind, layout):
    """Weights that need no conversion stay in the file, mapped."""
    pipeline, maps = load(layout(kind)), Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in maps if line.endswith(f"v1-5{kind}")]
    mapped = [range(int(start, 16), int(end, 16)) for start, end in ends]
    assert all(any(p.data_ptr() in part for part in mapped) for p in parameters(pipeline))


def check_same_image(pipeline, theirs, prompt, negative):
    """In float64, from the same latents."""
    side = pipeline.size // pipeline.downsampling
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 4, side, side, generator=generator, dtype=torch.float64)
    options = {"negative_prompt": negative, "num_inference_steps": 5, "output_type": "pt"}
    expected = theirs(prompt, latents=latents, guidance_scale=3.0, **options).images
    options = {"negative": negative, "steps": 5, "generator": generator.manual_seed(3)}
    image = text_to_image(pipeline, [prompt], guidance_scale=3.0, **options)
    assert expected.std() > 0.05  # there is something to see
    torch.testing.assert_close(image / 2 + 0.5, expected, atol=1e-5, rtol=0)


OTHER = {"schedule": NoiseSchedule.linear(100), "spacing": "trailing"}


@pytest.mark.parametrize("like", [TOY, SD, OTHER])
def test_what_is_saved_draws_the_same_here_and_in_diffusers(like, tmp_path):
    pipeline = tiny_pipeline(**like)
    save(pipeline, tmp_path)
    theirs = opened_by_diffusers(tmp_path)
    prompt, negative = "An orange cat, with  unheard eyes. " + "cat " * 20, "a black cat"
    for ours in (pipeline, load(tmp_path, dtype=torch.float64)):
        check_same_image(ours, theirs, prompt, negative)

    files = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    again = load(tmp_path)
    save(again, tmp_path)  # over files that are in use
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert {p.dtype for p in parameters(again)} == {torch.float32}  # unless asked for 16 bits
    text = safetensors.torch.load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert all(n.startswith("text_model.") and w.dtype == torch.float16 for n, w in text.items())


def test_the_pretrained_model_draws_what_diffusers_draws():
    folder, prompt = PRETRAINED / "latent-cats", "an orange cat with green eyes"
    ours, theirs = load(folder, dtype=torch.float64), opened_by_diffusers(folder)
    check_same_image(ours, theirs, prompt, "a black cat")


# The tokenizer


def varied_texts(n):
    words = WORDS.split() + UNUSUAL.split(" ")
    spaces = [" ", " ", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", ", ", "", "-"]
    draw = random.Random(0)
    texts = ["", " ", "\n", "a", " ".join(draw.choices(words, k=200)), "word " * 200]
    while len(texts) < n:
        chosen = draw.choices(words, k=draw.randint(1, 25))
        texts.append("".join(word + draw.choice(spaces) for word in chosen))
    return texts


def check_same_tokens(ours, theirs, texts, length=77):
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    rows = zip(ours(texts).tolist(), theirs(texts, **options).input_ids, strict=True)
    assert [text for text, (row, ids) in zip(texts, rows, strict=True) if row != ids] == []


@pytest.mark.parametrize("kind", ["vocab.json and merges.txt", "merges.txt", "tokenizer.json"])
def test_tokens_are_transformers(kind, tmp_path):
    symbols = [*bytes_to_unicode().values()]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, MERGES)]
    if "vocab.json" in kind:
        tokens.reverse()  # another order than CLIP's
    vocabulary = {token: i for i, token in enumerate([*tokens, START, END])}
    theirs = CLIPTokenizer(vocabulary, MERGES)
    if kind == "tokenizer.json":
        theirs.save_pretrained(tmp_path)
    else:
        write_merges(tmp_path)
    if "vocab.json" in kind:
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    check_same_tokens(Tokenizer.load(tmp_path, 77), theirs, varied_texts(1000))


@pytest.mark.skipif("CLIP_MERGES" not in os.environ, reason="names no bpe_simple_vocab_16e6.txt.gz")
def test_clips_own_tokens_are_transformers(tmp_path):
    text = gzip.decompress(Path(os.environ["CLIP_MERGES"]).read_bytes()).decode()
    merges = [tuple(line.split()) for line in text.split("\n")[1 : 49152 - 256 - 2 + 1]]
    write_merges(tmp_path, merges)
    ours = Tokenizer.load(tmp_path, 77)
    ids = [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]  # as published
    assert ours("a photograph of an astronaut riding a horse").tolist() == [ids + [49407] * 67]
    check_same_tokens(ours, CLIPTokenizer(ours.rules.get_vocab(), merges), varied_texts(1000))


# Bad input


UNET_FILE, VAE_FILE, TEXT_FILE = (f"{part}/config.json" for part in PARTS)
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"
WEIGHTS, BIN = (f"vae/diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin"))
BIAS = "encoder.conv_in.bias"


def change_bias(change):
    return lambda weights: weights | {BIAS: change(weights[BIAS])}


def compressed(weights):
    """As a ZIP program may make it."""
    stored, deflated = io.BytesIO(), io.BytesIO()
    torch.save(weights, stored)
    source = zipfile.ZipFile(stored)
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return deflated.getvalue()


BAD = [  # the file; its new content, entries or weights, or None: it is missing; the sentence
    (UNET_FILE, b"{", "is damaged"),
    (UNET_FILE, b"[]", "is damaged"),
    (UNET_FILE, b"[" * 100_000, "is damaged"),
    (UNET_FILE, None, "No such file"),
    (UNET_FILE, {"layers_per_block": 10**8}, "with layers_per_block 2, got 100000000"),
    (UNET_FILE, {"layers_per_block": True}, "with layers_per_block 2, got True"),
    (UNET_FILE, {"block_out_channels": [16] * 1000}, "with block_out_channels"),
    (UNET_FILE, {"block_out_channels": [16, None]}, "with block_out_channels"),
    (UNET_FILE, {"block_out_channels": 16}, "with block_out_channels"),
    (UNET_FILE, {"attention_head_dim": [5, 10, 20, 20]}, "XL differ.* attention_head_dim 8"),
    (UNET_FILE, {"attention_head_dim": 5}, "heads that divide the width 16, got 5"),
    (UNET_FILE, {"norm_num_groups": 0}, "with norm_num_groups 32, got 0"),
    (UNET_FILE, {"use_linear_projection": True}, "with use_linear_projection False"),
    (VAE_FILE, {"scaling_factor": float("nan")}, "with scaling_factor"),
    (VAE_FILE, {"latent_channels": "4"}, "with latent_channels 4, got '4'"),
    (TEXT_FILE, {"num_attention_heads": 5}, "heads that divide the width 16, got 5"),
    (SCHEDULER, {"num_train_timesteps": 10**12}, "with num_train_timesteps"),
    (SCHEDULER, {"beta_schedule": "linear", "beta_end": 0.03}, "expected .* a beta_schedule of"),
    (SCHEDULER, {"prediction_type": "sample"}, "prediction_type epsilon or v_prediction"),
    (SCHEDULER, {"trained_betas": [0.1]}, "with trained_betas None"),
    (TOKENIZER, b"{", "not a tokenizer"),
    (TOKENIZER, {"added_tokens": [], "model": {"type": "WordLevel", "vocab": {}}}, "not a"),
    (TOKENIZER, {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}}, "not a"),
    (TOKENIZER, None, r"not a tokenizer of CLIP or .* merges\.txt"),
    (WEIGHTS, b"<html>not found</html>", "is damaged"),
    (WEIGHTS, None, "expected weights"),
    (WEIGHTS, change_bias(lambda w: w * torch.nan), r"\(8,\) finite numbers"),
    (WEIGHTS, change_bias(lambda w: w / 0), r"\(8,\) finite numbers"),
    (WEIGHTS, change_bias(lambda w: w.long()), r"\(8,\) finite numbers"),
    (WEIGHTS, change_bias(lambda w: w[1:]), r"bias \(7,\) is not \(8,\) finite numbers"),
    (WEIGHTS, lambda weights: weights | {"extra": torch.zeros(1)}, "extra is not known"),
    (WEIGHTS, lambda weights: {BIAS: weights[BIAS]}, "weight is missing; .*; and 148 more"),
    (BIN, lambda weights: b"", "is damaged"),
    (BIN, lambda weights: pickle.dumps({"evil": Evil()}), "is damaged"),
    (BIN, compressed, "is damaged"),  # mmap reads it wrong
    (BIN, lambda weights: [*weights.values()], "is damaged"),
    (BIN, lambda weights: weights | {"evil": Evil()}, "is damaged"),
    (BIN, lambda weights: {"state_dict": Evil()}, "is damaged"),
    (BIN, change_bias(lambda w: torch.zeros(1).expand(8)), r"\(8,\) finite numbers"),
    (BIN, change_bias(lambda w: w.to_sparse()), r"\(8,\) finite numbers"),
    (BIN, change_bias(lambda w: w.to("meta")), r"\(8,\) finite numbers"),
]


def damage(file, change):
    if callable(change):
        weights = file.with_suffix(".safetensors")
        change = change(safetensors.torch.load_file(weights))
        weights.unlink()
    if change is None:
        file.unlink()
    elif isinstance(change, bytes):
        file.write_bytes(change)
    elif file.suffix == ".json":
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    else:
        (safetensors.torch.save_file if file.suffix == ".safetensors" else torch.save)(change, file)


def refused(path, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        load(path)
    assert not Path("executed").exists()
    return str(caught.value)


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    save(tiny_pipeline(**TOY), folder)
    return folder


@pytest.mark.parametrize(("name", "change", "sentence"), BAD)
def test_a_damaged_folder_is_one_sentence_that_names_the_file(
    name, change, sentence, toy_folder, here
):
    shutil.copytree(toy_folder, here / "toy")
    damage(here / "toy" / name, change)
    said = refused(here / "toy", sentence)
    assert str(here / "toy" / name) in said or (change is None and Path(name).parts[0] in said)


def test_parts_that_do_not_fit_together_are_refused(here):
    toy = tiny_pipeline(**TOY)
    changed = tiny_pipeline().unet
    changed.extra = changed.down[0].res.extra = torch.nn.Linear(2, 2)  # a reader's
    for change, sentence in (
        ({"unet": changed}, "resnets.0.extra.weight is not known.*If you changed the networks"),
        ({"vae": VAE(latent_channels=3)}, "its U-Net and its VAE differ"),
        ({"tokenizer": Tokenizer.of_words([WORDS], 12)}, "tokenizer: .* is not one of the text"),
    ):
        save(replace(toy, **change), here / "toy")
        refused(here / "toy", sentence)


def test_a_single_file_that_is_none_is_one_sentence(here):
    path = here / "v1-5.ckpt"
    refused(path, r"v1-5\.ckpt: No such file")
    path.write_bytes(b"<html>not found</html>")
    refused(path, r"v1-5\.ckpt: expected .* is damaged")
    tensors = {"conditioner.embedders.0.model.logit_scale": torch.zeros(1)}
    torch.save(tensors, path)
    refused(path, r"v1-5\.ckpt: .*2.x and XL differ.* is missing")
    for name in ("embeddings.token_embedding", "embeddings.position_embedding"):
        claim = torch.zeros(1).expand(10**12, 768)  # terabytes
        tensors[f"{PREFIX['text_encoder']}{name}.weight"] = claim
    tensors[f"{PREFIX['text_encoder']}encoder.layers.0.mlp.fc1.weight"] = claim
    torch.save(tensors, path)
    refused(path, r"v1-5\.ckpt: expected .* with vocab_size 49408, got 1000000000000")
