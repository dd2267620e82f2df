"""Stable Diffusion's weights under all of their names, judged by diffusers and transformers.

No real weights are needed: the structure is v1.5's with small widths, and the files are laid out
like the published ones. In float64, with random numbers in every parameter.
"""

import collections
import gzip
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import types
import zipfile
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from oracles import (
    V15_TEXT,
    V15_UNET,
    V15_VAE,
    error,
    randomise,
    their_text_config,
    their_unet,
    their_vae,
)
from tokenizers import Tokenizer as Rules
from tokenizers import models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latent_ext.attention import SpatialTransformer
from latent_ext.clip import TextEncoder, Tokenizer
from latent_ext.pipeline import Pipeline, text_to_image
from latent_ext.stable_diffusion import PREFIX, V1_5, load, save
from latent_ext.vae import VAE
from latent_ext.weight_names import COMPVIS, DIFFUSERS, name_pairs
from processes import NoiseSchedule
from toolbox.files import UserError
from toolbox.models import PRETRAINED
from unet import UNet

ROOT = Path(__file__).parent.parent
PARTS = ("unet", "vae", "text_encoder")
WORDS = (
    "a photo of the orange cat in the garden, the cats' green eyes and an astronaut riding a "
    "horse; it's painting the thing"
)
SMALL = {  # v1.5's structure
    "unet": V15_UNET | {"channels": [32, 64, 64, 64]},
    "vae": V15_VAE | {"channels": [32, 32, 64, 64]},
    "text_encoder": {
        "vocab_size": 664,
        "width": 128,
        "layers": 2,
        "heads": 2,
        "length": 16,
        "hidden": 512,
    },
}
CONTEXT = SMALL["text_encoder"]["width"]


PUBLISHED_KEYS = set(  # of the unet/config.json and vae/config.json of 2022: no scaling_factor
    "act_fn attention_head_dim block_out_channels center_input_sample cross_attention_dim "
    "down_block_types downsample_padding flip_sin_to_cos freq_shift in_channels latent_channels "
    "layers_per_block mid_block_scale_factor norm_eps norm_num_groups out_channels sample_size "
    "up_block_types".split()
)


def our_networks(unet, vae, text_encoder):
    attention = partial(SpatialTransformer, context_width=text_encoder["width"])
    return {
        "unet": UNet(**unet, attention_block=attention),
        "vae": VAE(**vae),
        "text_encoder": TextEncoder(**text_encoder),
    }


def judges_of(networks, context_width):
    judges = {
        "unet": their_unet(networks["unet"].config, context_width),
        "vae": their_vae(networks["vae"].config),
        "text_encoder": CLIPTextModel(their_text_config(networks["text_encoder"].config)),
    }
    judges["unet"].register_to_config(sample_size=64)
    return {part: judge.eval().requires_grad_(False) for part, judge in judges.items()}


@pytest.fixture(scope="module")
def judges():
    with torch.device("meta"):
        networks = our_networks(**SMALL)
    judges = judges_of(networks, CONTEXT)
    return {
        part: randomise(judge.double(), seed) for seed, (part, judge) in enumerate(judges.items())
    }


@pytest.fixture(scope="module")
def merges():
    """A small vocabulary by CLIP's rules, learned from one sentence."""
    rules = Rules(models.BPE(end_of_word_suffix="</w>"))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), to_bytes])
    trainer = trainers.BpeTrainer(vocab_size=150, end_of_word_suffix="</w>", show_progress=False)
    rules.train_from_iterator([WORDS], trainer)
    return [" ".join(pair) for pair in json.loads(rules.to_str())["model"]["merges"]]


@pytest.fixture(scope="module")
def vocabulary(merges):
    """CLIP's list of bytes and then its order, written down once more."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    visible += range(ord("®"), ord("ÿ") + 1)
    symbols = [*map(chr, visible), *(chr(256 + i) for i in range(256 - len(visible)))]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(m.replace(" ", "") for m in merges)]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def write_tokenizer(folder, vocabulary, merges, kind="vocab.json and merges.txt"):
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "tokenizer.json":
        CLIPTokenizer(vocabulary, [tuple(m.split()) for m in merges]).save_pretrained(folder)
        return
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    if kind == "vocab.json and merges.txt":
        (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")


class OldNumber:
    """A number as NumPy 1 pickled it."""

    def __reduce__(self):
        scalar = sys.modules["numpy.core.multiarray"].scalar
        return scalar, (np.dtype("float64"), np.float64(0.5).tobytes())


def write_checkpoint(path, tensors):
    """The original .ckpt: with a class of a library that is not installed, and NumPy's numbers."""
    libraries = {name: types.ModuleType(name) for name in ("pytorch_lightning", "callbacks")}
    for module, name in (
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("numpy.core.multiarray", "scalar"),
    ):
        libraries[module] = types.ModuleType(module)
        setattr(libraries[module], name, type(name, (), {"__module__": module}))
    libraries["pytorch_lightning.callbacks"] = libraries.pop("callbacks")
    callback = libraries["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint
    content = {
        "global_step": 840000,
        "state_dict": collections.OrderedDict(tensors),
        "callbacks": {callback: {"best_model_score": OldNumber(), "lr": np.float64(0.5)}},
    }
    with mock.patch.dict(sys.modules, libraries):
        torch.save(content, path)
    pickled = zipfile.ZipFile(path).read(f"{path.stem}/data.pkl")
    assert b"cnumpy.core.multiarray\nscalar" in pickled
    assert b"model_checkpoint\nModelCheckpoint" in pickled


def single_file(judges):
    """All weights as in the original file, with what else lies in it."""
    with torch.device("meta"):
        networks = our_networks(**SMALL)
    tensors = {}
    for part, network in networks.items():
        state = {
            name.removeprefix("text_model."): w for name, w in judges[part].state_dict().items()
        }
        names = (name_pairs(part, network, layout) for layout in (DIFFUSERS, COMPVIS))
        for (theirs, _), (compvis, _) in zip(*names, strict=True):
            w = state[theirs]
            if part == "vae" and ".attn_1." in compvis and w.ndim == 2:
                w = w[:, :, None, None].contiguous()
            clip = "text_model." if part == "text_encoder" else ""
            tensors[PREFIX[part] + clip + compvis] = w
    return tensors | {
        "betas": torch.ones(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(32, 4, 3, 3),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4),
        PREFIX["text_encoder"] + "text_model.embeddings.position_ids": torch.arange(16)[None],
    }


def write(kind, folder, judges):
    """The same weights in one of the layouts."""
    if kind == "single file":
        safetensors.torch.save_file(single_file(judges), folder / "v1-5.safetensors")
        return folder / "v1-5.safetensors"
    if kind == "checkpoint":
        write_checkpoint(folder / "v1-5.ckpt", single_file(judges))
        return folder / "v1-5.ckpt"
    for part, judge in judges.items():
        judge.save_pretrained(folder / part)
    PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    for part in () if kind == "present day" else PARTS:
        file = next((folder / part).glob("*.safetensors"))
        state = safetensors.torch.load_file(file)
        if part == "vae":
            for new, old in {"to_q": "query", "to_k": "key", "to_v": "value"}.items():
                state = {name.replace(f".{new}.", f".{old}."): w for name, w in state.items()}
            state = {name.replace(".to_out.0.", ".proj_attn."): w for name, w in state.items()}
        if part == "text_encoder":  # transformers 5 has dropped the prefix
            state = {f"text_model.{n.removeprefix('text_model.')}": w for n, w in state.items()}
            state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        else:
            config = json.loads((folder / part / "config.json").read_text())
            config = {key: config[key] for key in config.keys() & PUBLISHED_KEYS}
            (folder / part / "config.json").write_text(json.dumps(config))
        file.unlink()
        if kind == "bin":
            torch.save(state, file.with_name(f"{file.stem}.bin"))
        elif kind == "fp16":
            state = {name: w.half() if w.is_floating_point() else w for name, w in state.items()}
            safetensors.torch.save_file(state, file.with_name(f"{file.stem}.fp16.safetensors"))
        else:
            safetensors.torch.save_file(state, file)
            safetensors.torch.save_file({}, file.with_name(f"{file.stem}.non_ema.safetensors"))
    return folder


@pytest.fixture
def layout(tmp_path, judges, vocabulary, merges):
    """layout(kind): a path to load, with a tokenizer."""

    def layout(kind):
        path = write(kind, tmp_path, judges)
        write_tokenizer(path / "tokenizer" if path.is_dir() else tmp_path, vocabulary, merges)
        return path

    return layout


@torch.no_grad()
def difference(pipeline, judges):
    """The largest, of all networks, in units of the largest number of each."""
    generator = torch.Generator().manual_seed(7)
    options = {"dtype": torch.float64, "generator": generator}
    x = torch.randn(2, pipeline.unet.config["in_channels"], 8, 16, **options)
    context, image = torch.randn(2, 5, CONTEXT, **options), torch.randn(1, 3, 16, 32, **options)
    t, tokens = torch.tensor([1, 900]), torch.tensor([[3, 500, 7, 7, 100]])
    z = x[:, :4]
    expected = judges["vae"].encode(image).latent_dist.parameters
    pairs = [
        (pipeline.unet(x, t, context), judges["unet"](x, t, context).sample),
        (torch.cat(pipeline.vae.encode(image), dim=1), expected),
        (pipeline.vae.decode(z), judges["vae"].decode(z).sample),
        (pipeline.text_encoder(tokens), judges["text_encoder"](tokens).last_hidden_state),
    ]
    return max(error(ours, theirs) for ours, theirs in pairs)


# Names


def test_v1_5_has_its_sizes_and_diffusers_names():
    with torch.device("meta"):
        networks = our_networks(V15_UNET, V15_VAE, V15_TEXT)
        judges = {
            "unet": UNet2DConditionModel.from_config(V1_5["unet/config.json"]),
            "vae": AutoencoderKL.from_config(V1_5["vae/config.json"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**V1_5["text_encoder/config.json"])),
        }
    counts = {
        part: (sum(p.numel() for p in net.parameters()), len(net.state_dict()))
        for part, net in networks.items()
    }
    assert counts == {
        "unet": (859_520_964, 686),
        "vae": (83_653_863, 248),
        "text_encoder": (123_060_480, 196),
    }
    for part, network in networks.items():
        theirs = {
            n.removeprefix("text_model."): w.shape for n, w in judges[part].state_dict().items()
        }
        own = network.state_dict()
        assert {n: own[ours].shape for n, ours in name_pairs(part, network, DIFFUSERS)} == theirs


def test_diffusers_converts_the_original_names_to_its_own(judges):
    tensors = single_file(judges)
    assert tensors["model.diffusion_model.output_blocks.2.1.conv.weight"].shape == (64, 64, 3, 3)
    unet = convert_ldm_unet_checkpoint(dict(tensors), dict(judges["unet"].config))
    vae = convert_ldm_vae_checkpoint(dict(tensors), dict(judges["vae"].config))
    vae = {name: w for name, w in vae.items() if "loss" not in name}
    for converted, judge in ((unet, judges["unet"]), (vae, judges["vae"])):
        state = judge.state_dict()
        assert converted.keys() == state.keys()
        assert all(torch.equal(converted[name], w) for name, w in state.items())
    text = {n.removeprefix(PREFIX["text_encoder"]) for n in tensors if "cond_stage_model" in n}
    state = {
        f"text_model.{n.removeprefix('text_model.')}" for n in judges["text_encoder"].state_dict()
    }
    assert text - state == {"text_model.embeddings.position_ids"} and state <= text


# Layouts


@pytest.mark.parametrize("kind", ["single file", "checkpoint", "published", "bin", "present day"])
def test_every_layout_loads_and_computes_what_diffusers_does(kind, layout, judges):
    pipeline = load(layout(kind))
    assert (pipeline.vae.scaling_factor, pipeline.size) == (0.18215, 512)
    schedule = (pipeline.schedule.name, pipeline.prediction, pipeline.spacing)
    assert schedule == ("scaled_linear", "epsilon", "leading")
    alpha_bar = pipeline.schedule.alpha_bar[[0, 1, 250, 500, 999]].tolist()
    published = [0.99914998, 0.99829602, 0.67379230, 0.27633247, 0.00466010]
    assert alpha_bar == pytest.approx(published, abs=1e-6)
    assert not any(p.requires_grad for p in pipeline.unet.parameters())
    assert pipeline.tokenizer("the cat").shape == (1, 16)
    assert difference(pipeline, judges) < 1e-9


def test_a_schedule_of_today_is_read(layout):
    path = layout("present day")
    DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    ).save_pretrained(path / "scheduler")
    pipeline = load(path)
    schedule = (pipeline.schedule.name, pipeline.prediction, pipeline.spacing)
    assert schedule == ("cosine", "v_prediction", "trailing")


def test_half_precision_is_computed_in_float32_on_a_cpu(layout, judges):
    path = layout("fp16")
    for pipeline, dtype in (
        (load(path), torch.float32),
        (load(path, dtype=torch.float64), torch.float64),
        (load(path, "meta"), torch.float16),  # meta stands for a device that can
    ):
        networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        assert {p.dtype for network in networks for p in network.parameters()} == {dtype}
    own, state = load(path).unet.state_dict(), judges["unet"].state_dict()
    for theirs, ours in name_pairs("unet", pipeline.unet, DIFFUSERS):
        assert torch.equal(own[ours], state[theirs].half().float())


def test_a_single_file_may_be_for_inpainting(tmp_path, judges, vocabulary, merges):
    unet = their_unet(SMALL["unet"] | {"in_channels": 9}, CONTEXT).double().requires_grad_(False)
    judges = judges | {"unet": randomise(unet)}
    write_tokenizer(tmp_path, vocabulary, merges)
    pipeline = load(write("single file", tmp_path, judges))
    assert pipeline.for_inpainting and difference(pipeline, judges) < 1e-9
    assert pipeline.unet.config["channels"] == SMALL["unet"]["channels"]
    assert pipeline.text_encoder.config == SMALL["text_encoder"]


MEASURE = """
import sys
from latent_ext.stable_diffusion import load
def memory(kind):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024
before, anonymous = memory("VmRSS"), memory("RssAnon")
pipeline = load(sys.argv[1])
networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
weights = [p for network in networks for p in network.parameters()]
total = sum(p.sum().item() for p in weights)  # each is used once
size = sum(p.numel() * p.element_size() for p in weights)
print(size, memory("VmHWM") - before, memory("RssAnon") - anonymous)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory")
@pytest.mark.parametrize(
    ("dtype", "peak", "own"), [(torch.float32, 1.2, 0.05), (torch.float16, 1.6, 1.05)]
)
def test_loading_takes_no_second_copy(dtype, peak, own, tmp_path, vocabulary, merges):
    """Weights that need no conversion stay in the file, mapped."""
    unet = V15_UNET | {"channels": (160, 320, 640, 640)}
    text = V15_TEXT | {"layers": 2}
    with torch.device("meta"):
        networks = our_networks(unet, V15_VAE, text)
    tensors = {
        PREFIX[part] + name: torch.zeros(network.state_dict()[ours].shape, dtype=dtype)
        for part, network in networks.items()
        for name, ours in name_pairs(part, network, COMPVIS)
    }
    safetensors.torch.save_file(tensors, tmp_path / "large.safetensors")
    write_tokenizer(tmp_path, vocabulary, merges)
    words = [sys.executable, "-c", MEASURE, tmp_path / "large.safetensors"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    size, most, kept = map(int, run.stdout.split())
    assert size > 1e9 and most < peak * size + 1e8 and kept < own * size + 1e8


# Saving


def toy(prediction="v_prediction", spacing="trailing", schedule=None):
    captions = ["an orange cat with green eyes", "a black cat, asleep", "a white cat."]
    tokenizer = Tokenizer.of_words(captions, 12)
    networks = our_networks(
        {"channels": (16, 32), "attention_levels": (False, True), "heads": 4}
        | {"in_channels": 4, "out_channels": 4},
        {"channels": (16, 32, 32), "scaling_factor": 0.7},
        {"vocab_size": tokenizer.size, "width": 24, "layers": 2, "heads": 4, "length": 12},
    )
    for seed, network in enumerate(networks.values()):
        randomise(network, seed).half().float().eval().requires_grad_(False)
    schedule = schedule or NoiseSchedule.cosine()
    return Pipeline(*networks.values(), tokenizer, schedule, 32, prediction, spacing)


@pytest.mark.parametrize(
    "settings",
    [
        ("v_prediction", "trailing", NoiseSchedule.cosine()),
        ("epsilon", "leading", NoiseSchedule.scaled_linear()),
        ("epsilon", "trailing", NoiseSchedule.linear(100)),
    ],
    ids=["toy", "Stable Diffusion", "other"],
)
def test_what_is_saved_loads_again_and_diffusers_draws_the_same(settings, tmp_path):
    pipeline, folder = toy(*settings), tmp_path / "toy"
    for _ in range(2):  # the second time over files that are in use
        save(pipeline, folder)
        again = load(folder)
        for part in PARTS:
            own, back = getattr(pipeline, part), getattr(again, part)
            assert back.config == own.config
            state = back.state_dict()
            assert all(torch.equal(w, state[name]) for name, w in own.state_dict().items())
        for name in ("size", "prediction", "spacing"):
            assert getattr(again, name) == getattr(pipeline, name)
        assert again.vae.scaling_factor == 0.7
        assert torch.equal(again.schedule.alpha_bar, pipeline.schedule.alpha_bar)
        pipeline = again
    text = safetensors.torch.load_file(folder / "text_encoder" / "model.safetensors")
    assert all(n.startswith("text_model.") and w.dtype == torch.float16 for n, w in text.items())

    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert isinstance(theirs.scheduler, DDIMScheduler)
    prompt, negative = "An orange cat, with  unheard eyes. " + "cat " * 20, "a black cat"
    ids = theirs.tokenizer(prompt, padding="max_length", max_length=12, truncation=True).input_ids
    assert pipeline.tokenizer(prompt).tolist() == [ids] and again.tokenizer.unknown("dog") == [
        "dog"
    ]
    assert_same_image(pipeline, theirs, prompt, negative, size=8)


def assert_same_image(pipeline, theirs, prompt, negative, size):
    generator = torch.Generator().manual_seed(3)
    options = {"negative_prompt": negative, "num_inference_steps": 5, "guidance_scale": 3.0}
    latents = torch.randn(1, 4, size, size, generator=generator)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(prompt, latents=latents, output_type="pt", **options).images
    image = text_to_image(
        pipeline,
        [prompt],
        negative=negative,
        steps=5,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
    )
    assert expected.std() > 0.05  # there is something to see
    torch.testing.assert_close(image / 2 + 0.5, expected, atol=1e-4, rtol=0)


def test_the_ready_model_draws_what_diffusers_draws():
    folder = PRETRAINED / "latent-cats"
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    prompt = "an orange tabby cat with green eyes on a blue background"
    assert_same_image(load(folder), theirs, prompt, "a black cat", size=16)


def test_a_single_file_can_be_saved_as_a_folder(layout, judges, tmp_path):
    for judge in judges.values():
        judge.half().double()
    save(load(layout("single file")), tmp_path / "folder")
    theirs = StableDiffusionPipeline.from_pretrained(
        tmp_path / "folder", safety_checker=None, torch_dtype=torch.float64
    )
    again = load(tmp_path / "folder", dtype=torch.float64)
    assert difference(again, {part: getattr(theirs, part) for part in PARTS}) < 1e-9
    assert difference(again, judges) < 1e-9
    same_tokens(again.tokenizer, theirs.tokenizer, varied_texts(50), 16)


def test_a_failed_save_leaves_no_half_files(tmp_path):
    resource = pytest.importorskip("resource")
    pipeline = toy()
    save(pipeline, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    randomise(pipeline.unet, 99)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(UserError, match=r"model\.safetensors: the disk is full"):
            save(pipeline, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# The tokenizer


def varied_texts(n):
    words = WORDS.split() + (
        "I'VE don't we'll THEY'RE 's o'clock naïve nai\u0308ve Ångström A\u030angstro\u0308m Straße "
        "ﬁne İstanbul ΣΊΣΥΦΟΣ 日本語の猫 кошка قطة १२३ ½ Ⅷ x² 2024 3.14 1,000,000 4k 😀 👩‍👩‍👧 🐈‍⬛ ❤️ "
        "!!! ... #cat @you (a:1.2) [b] --ar &amp; <|endoftext|> <b> \\n _"
    ).split(" ")
    spaces = [" ", " ", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", ", ", "", "-"]
    draw = random.Random(0)
    texts = ["", " ", "\n", "a", " ".join(draw.choices(words, k=200)), "word " * 200]
    while len(texts) < n:
        chosen = draw.choices(words, k=draw.randint(1, 25))
        texts.append("".join(word + draw.choice(spaces) for word in chosen))
    return texts


def same_tokens(ours, theirs, texts, length=77):
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    for text, row, ids in zip(
        texts, ours(texts).tolist(), theirs(texts, **options).input_ids, strict=True
    ):
        assert row == ids, text


@pytest.mark.parametrize("kind", ["vocab.json and merges.txt", "merges.txt", "tokenizer.json"])
def test_tokens_are_transformers(kind, tmp_path, vocabulary, merges):
    write_tokenizer(tmp_path, vocabulary, merges, kind)
    theirs = CLIPTokenizer(vocabulary, [tuple(m.split()) for m in merges])
    ours, size = Tokenizer.load(tmp_path, 77), len(vocabulary)
    assert (ours.size, ours.start, ours.end) == (size, size - 2, size - 1)
    same_tokens(ours, theirs, varied_texts(1000))


@pytest.mark.skipif("CLIP_MERGES" not in os.environ, reason="names no bpe_simple_vocab_16e6.txt.gz")
def test_clips_own_tokens_are_transformers(tmp_path):
    text = gzip.decompress(Path(os.environ["CLIP_MERGES"]).read_bytes()).decode()
    lines = text.split("\n")[1 : 49152 - 256 - 2 + 1]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), "utf-8")
    ours = Tokenizer.load(tmp_path, 77)
    assert (ours.size, ours.start, ours.end) == (49408, 49406, 49407)
    ids = [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]  # as published
    tokens = ours("a photograph of an astronaut riding a horse")
    assert tokens.tolist() == [ids + [49407] * 67]
    theirs = CLIPTokenizer(ours.rules.get_vocab(), [tuple(line.split()) for line in lines])
    same_tokens(ours, theirs, varied_texts(1000))


# Bad input


def change(name, **entries):
    """Of a small file."""

    def damage(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | entries))

    return name, damage


def content(name, content):
    return name, lambda folder: (folder / name).write_bytes(content)


def tensors(name, new, suffix="safetensors"):
    """Of a weights file: new(weights) instead."""

    def damage(folder):
        file = folder / name
        weights = safetensors.torch.load_file(file)
        file.unlink()
        file = file.with_suffix(f".{suffix}")
        if suffix == "bin":
            torch.save(new(weights), file)
        else:
            safetensors.torch.save_file(new(weights), file)

    return name.removesuffix("safetensors") + suffix, damage


def missing(name):
    return name, lambda folder: (folder / name).unlink()


UNET, VAE_, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"
WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
NAME = "encoder.conv_in.bias"
EVERYTHING = torch.zeros(1)


def compressed(folder):
    file = folder / WEIGHTS
    torch.save(safetensors.torch.load_file(file), folder / "plain")
    file.unlink()
    with (
        zipfile.ZipFile(folder / "plain") as plain,
        zipfile.ZipFile(file.with_suffix(".bin"), "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))


BAD = [
    (content(UNET, b"{"), "damaged"),
    (content(UNET, b"[]"), "damaged"),
    (content(UNET, b"\xff\xfe{"), "damaged"),
    (content(UNET, b"[" * 100_000), "damaged"),
    (missing(UNET), "no such file"),
    (change(UNET, layers_per_block=10**8), "expected a layers_per_block like 2"),
    (change(UNET, block_out_channels=[16] * 1000), "expected a block_out_channels"),
    (change(UNET, block_out_channels=[16, 10**12]), "expected a block_out_channels"),
    (change(UNET, block_out_channels="wide"), "expected a block_out_channels"),
    (change(UNET, block_out_channels=[16, None]), "expected a block_out_channels"),
    (change(UNET, attention_head_dim=[5, 10]), "expected a attention_head_dim"),
    (change(UNET, attention_head_dim=5), "do not fit its channels"),
    (change(UNET, norm_num_groups=0), "expected a norm_num_groups"),
    (change(UNET, norm_num_groups=5), "do not fit its channels"),
    (change(UNET, down_block_types=3), "expected a down_block_types"),
    (change(UNET, down_block_types=["DownBlock2D"]), "do not fit its channels"),
    (change(UNET, use_linear_projection=True), "use_linear_projection False, got True"),
    (change(UNET, sample_size=10**9), "expected a sample_size"),
    (change(VAE_, scaling_factor=float("nan")), "expected a scaling_factor"),
    (change(VAE_, latent_channels="4"), "expected a latent_channels"),
    (change(TEXT, num_hidden_layers=10**8), "expected a num_hidden_layers"),
    (change(TEXT, num_attention_heads=5), "do not fit its channels"),
    (change(TEXT, hidden_act="gelu"), "hidden_act quick_gelu, got 'gelu'"),
    (content(SCHEDULER, b"{"), "damaged"),
    (change(SCHEDULER, beta_schedule="sigmoid"), "a beta_schedule of"),
    (change(SCHEDULER, beta_schedule="linear", beta_end=0.03), "a beta_schedule of"),
    (change(SCHEDULER, prediction_type="sample"), "prediction_type epsilon or v_prediction"),
    (change(SCHEDULER, trained_betas=[0.1]), "trained_betas None, got"),
    (change(SCHEDULER, num_train_timesteps=10**12), "expected a num_train_timesteps"),
    (content(TOKENIZER, b"{"), "expected"),
    (content(TOKENIZER, b"[]"), "expected"),
    (missing(TOKENIZER), "tokenizer: expected a tokenizer.json or merges.txt"),
    (content(WEIGHTS, b""), "damaged or of another kind"),
    (content(WEIGHTS, b"\xff" * 8 + b"{}"), "damaged or of another kind"),
    (content(WEIGHTS, b"<html>not found</html>"), "damaged or of another kind"),
    (missing(WEIGHTS), "vae: expected weights"),
    (tensors(WEIGHTS, lambda w: w | {NAME: w[NAME] * torch.nan}), "not all of them are finite"),
    (tensors(WEIGHTS, lambda w: w | {NAME: w[NAME] / 0}), "not all of them are finite"),
    (tensors(WEIGHTS, lambda w: w | {NAME: w[NAME].long()}), "encoder.conv_in.bias has not"),
    (tensors(WEIGHTS, lambda w: w | {NAME: w[NAME][1:]}), r"is \(15,\), expected \(16,\)"),
    (tensors(WEIGHTS, lambda w: w | {"extra": w[NAME].clone()}), "extra is not known"),
    (tensors(WEIGHTS, lambda w: {NAME: w[NAME]}), "is missing, expected .*; and .. more"),
    (tensors(WEIGHTS, lambda w: [*w.values()], "bin"), "damaged or of another kind"),
    (tensors(WEIGHTS, lambda w: w | {NAME: torch.zeros(1).expand(16)}, "bin"), "has not all"),
    (tensors(WEIGHTS, lambda w: w | {NAME: w[NAME].to_sparse()}, "bin"), "has not all"),
    (tensors(WEIGHTS, lambda w: w | {NAME: w[NAME].to("meta")}, "bin"), "has not all"),
    ((WEIGHTS.replace("safetensors", "bin"), compressed), "damaged or of another kind"),
]


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    save(toy(), tmp_path_factory.mktemp("model") / "toy")
    return tmp_path_factory.getbasetemp() / "model0" / "toy"


@pytest.mark.parametrize(("damage", "sentence"), BAD)
def test_a_damaged_folder_is_one_sentence_that_names_the_file(
    damage, sentence, toy_folder, tmp_path
):
    (name, damage), folder = damage, tmp_path / "toy"
    shutil.copytree(toy_folder, folder)
    damage(folder)
    with pytest.raises(UserError, match=sentence) as caught:
        load(folder)
    file = folder / name
    assert str(file) in str(caught.value) or (
        not file.exists() and str(file.parent) in str(caught.value)
    )
