"""Stable Diffusion's weights under all of their names, against diffusers' and transformers' own networks with the same ones.

No real weights are needed: the structure is v1.5's with small widths, and the files are built key by key as the published
ones are laid out. The judges are diffusers' modules and its own conversion of the original file.
"""

import collections
import gzip
import json
import os
import pickle
import random
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from tokenizers import Tokenizer as Rules
from tokenizers import models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latent_ext import stable_diffusion
from latent_ext.attention import SpatialTransformer
from latent_ext.clip import TextEncoder, Tokenizer
from latent_ext.guidance import guided
from latent_ext.pipeline import Pipeline
from latent_ext.stable_diffusion import AUTOENCODER, TEXT, UNET, load, pairs, save
from latent_ext.vae import VAE
from processes import NoiseSchedule, sample
from unet import UNet

ROOT = Path(__file__).parent.parent
SMALL = {"unet": [32, 64, 64, 64], "vae": [32, 32, 64, 64], "text": 128, "layers": 2, "length": 16, "context": 128}
FULL = {"unet": [320, 640, 1280, 1280], "vae": [128, 256, 512, 512], "text": 768, "layers": 12, "length": 77, "context": 768}

WORDS = "a photo of the orange cat in the garden, the cats' green eyes and an astronaut riding a horse; it's painting the thing"


def published_configs(sizes, vocabulary, in_channels=4):
    """The config.json files of the published folder, with these sizes."""
    unet = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": sizes["unet"],
        "center_input_sample": False,
        "cross_attention_dim": sizes["context"],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": in_channels,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    vae = {  # without a scaling_factor, as the first ones
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": sizes["vae"],
        "down_block_types": ["DownEncoderBlock2D"] * len(sizes["vae"]),
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * len(sizes["vae"]),
    }
    text_encoder = {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": sizes["text"],
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * sizes["text"],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": sizes["length"],
        "model_type": "clip_text_model",
        "num_attention_heads": sizes["text"] // 64,
        "num_hidden_layers": sizes["layers"],
        "pad_token_id": 1,
        "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0",
        "vocab_size": vocabulary,
    }
    return {"unet": unet, "vae": vae, "text_encoder": text_encoder}


PNDM = {  # the published scheduler_config.json
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def judges_of(configs):
    return {
        "unet": UNet2DConditionModel.from_config(configs["unet"]),
        "vae": AutoencoderKL.from_config(configs["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
    }


def randomise(network, seed):
    """Random numbers everywhere: with norms at their initial 1 and 0, a swapped pair of them would not show."""
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        numbers = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.data = 0.5 + 0.2 * numbers if p.ndim == 1 else numbers / p[0].numel() ** 0.5


def clip_name(name):
    """Published files have this prefix; transformers 5 has dropped it."""
    return "text_model." + name.removeprefix("text_model.")


def original_name(part, name):
    """diffusers' name -> the original's, a second derivation: rules for v1.5's two residual blocks a level, by pattern."""
    if part == "text_encoder":
        return clip_name(name)

    def first(i, j):  # the 12 blocks of the way down, counted through
        return 3 * int(i) + int(j) + 1

    if part == "unet":
        for old, new in {
            r"^conv_in": "input_blocks.0.0",
            r"^conv_norm_out": "out.0",
            r"^conv_out": "out.2",
            r"^time_embedding.linear_1": "time_embed.0",
            r"^time_embedding.linear_2": "time_embed.2",
            r"^mid_block.resnets.0": "middle_block.0",
            r"^mid_block.attentions.0": "middle_block.1",
            r"^mid_block.resnets.1": "middle_block.2",
            r"^up_blocks.0.upsamplers.0": "output_blocks.2.1",
            r"^up_blocks.1.upsamplers.0": "output_blocks.5.2",
            r"^up_blocks.2.upsamplers.0": "output_blocks.8.2",
        }.items():
            name = re.sub(old, new, name)
        name = re.sub(r"^down_blocks.(\d).downsamplers.0.conv", lambda m: f"input_blocks.{first(m[1], 2)}.0.op", name)
        name = re.sub(r"^down_blocks.(\d).resnets.(\d)", lambda m: f"input_blocks.{first(m[1], m[2])}.0", name)
        name = re.sub(r"^down_blocks.(\d).attentions.(\d)", lambda m: f"input_blocks.{first(m[1], m[2])}.1", name)
        name = re.sub(r"^up_blocks.(\d).resnets.(\d)", lambda m: f"output_blocks.{first(m[1], m[2]) - 1}.0", name)
        name = re.sub(r"^up_blocks.(\d).attentions.(\d)", lambda m: f"output_blocks.{first(m[1], m[2]) - 1}.1", name)
        if "transformer" not in name:
            for old, new in {
                "norm1": "in_layers.0",
                "conv1": "in_layers.2",
                "time_emb_proj": "emb_layers.1",
                "norm2": "out_layers.0",
                "conv2": "out_layers.3",
                "conv_shortcut": "skip_connection",
            }.items():
                name = name.replace(f".{old}.", f".{new}.")
        return name
    for old, new in {
        r"down_blocks.(\d).resnets": r"down.\1.block",
        r"down_blocks.(\d).downsamplers.0": r"down.\1.downsample",
        r"mid_block.resnets.0": "mid.block_1",
        r"mid_block.resnets.1": "mid.block_2",
        r"mid_block.attentions.0": "mid.attn_1",
        r"conv_norm_out": "norm_out",
        r"conv_shortcut": "nin_shortcut",
        r"group_norm": "norm",
        r"to_(q|k|v)\b": r"\1",
        r"to_out.0": "proj_out",
    }.items():
        name = re.sub(old, new, name)
    name = re.sub(r"up_blocks.(\d).resnets", lambda m: f"up.{3 - int(m[1])}.block", name)
    return re.sub(r"up_blocks.(\d).upsamplers.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)


PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model.transformer."}


def original_state(states):
    """All weights as in the original file, with what else lies in it."""
    everything = {}
    for part, state in states.items():
        for name, w in state.items():
            attention = part == "vae" and "attentions" in name and w.ndim == 2
            everything[PREFIX[part] + original_name(part, name)] = w[:, :, None, None] if attention else w
    everything |= {name: torch.ones(1000) for name in ("betas", "alphas_cumprod", "sqrt_one_minus_alphas_cumprod")}
    everything["model_ema.decay"] = torch.tensor(0.9999)
    everything["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(32, 4, 3, 3)
    everything["first_stage_model.loss.logvar"] = torch.zeros(())
    everything["first_stage_model.loss.discriminator.main.0.weight"] = torch.zeros(8, 3, 4, 4)
    length = len(states["text_encoder"]["embeddings.position_embedding.weight"])
    everything["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(length)[None]
    return everything


@pytest.fixture(scope="module")
def merges():
    """A small vocabulary with CLIP's rules, learned from one sentence."""
    rules = Rules(models.BPE(end_of_word_suffix="</w>"))
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    rules.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=150, end_of_word_suffix="</w>", show_progress=False))
    return [line if isinstance(line, str) else " ".join(line) for line in json.loads(rules.to_str())["model"]["merges"]]


@pytest.fixture(scope="module")
def vocabulary(merges):
    """Written down once more: CLIP's list of bytes, and then its order."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    symbols = [chr(b) for b in visible] + [chr(256 + i) for i in range(len(hidden))]
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(m.split()) for m in merges]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


@pytest.fixture(scope="module")
def configs(vocabulary):
    return published_configs(SMALL, len(vocabulary))


@pytest.fixture(scope="module")
def judges(configs):
    judges = judges_of(configs)
    for seed, judge in enumerate(judges.values()):
        judge.double().eval().requires_grad_(False)
        randomise(judge, seed)
    return judges


@pytest.fixture(scope="module")
def states(judges):
    states = {part: judge.state_dict() for part, judge in judges.items()}
    states["text_encoder"] = {clip_name(name)[len("text_model.") :]: w for name, w in states["text_encoder"].items()}
    return states


def write_tokenizer(folder, vocabulary, merges, kind="vocab.json and merges.txt"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    if kind == "vocab.json and merges.txt":
        (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    if kind == "tokenizer.json":
        CLIPTokenizer(vocabulary, [tuple(m.split()) for m in merges]).save_pretrained(folder)
        (folder / "merges.txt").unlink()


def write_folder(folder, configs, states, style="published"):
    """The published folder: old names in the VAE, a prefix and an integer buffer in the text encoder."""
    for part, config in configs.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        state = dict(states[part])
        if style != "today":
            if part == "vae":
                for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
                    state = {name.replace(f".{new}.", f".{old}."): w for name, w in state.items()}
            if part == "text_encoder":
                state = {clip_name(name): w for name, w in state.items()}
                state["text_model.embeddings.position_ids"] = torch.arange(config["max_position_embeddings"])[None]
        if style == "fp16":
            state = {name: w.half() if w.is_floating_point() else w for name, w in state.items()}
        variant = ".fp16" if style == "fp16" else ""
        if style == "bin":
            torch.save(
                state, folder / part / ("pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin")
            )
        else:
            stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            safetensors.torch.save_file(state, folder / part / f"{stem}{variant}.safetensors")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(PNDM))
    return folder


class OldNumber:
    """A number as NumPy 1 pickled it."""

    def __reduce__(self):
        return sys.modules["numpy.core.multiarray"].scalar, (np.dtype("float64"), np.float64(0.5).tobytes())


def write_checkpoint(path, tensors):
    """The original .ckpt: a training's, with the class of a library that is not installed, and numbers of NumPy's."""
    libraries = {}
    for module, name in {
        "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
        "numpy.core.multiarray": "scalar",
    }.items():
        libraries[module] = types.ModuleType(module)
        setattr(libraries[module], name, type(name, (), {"__module__": module}))
    for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        libraries[parent] = types.ModuleType(parent)
    callback = libraries["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint
    content = {
        "epoch": 8,
        "global_step": 840000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": collections.OrderedDict(tensors),
        "callbacks": {callback: {"monitor": None, "best_model_score": OldNumber(), "lr": np.float64(0.5), "dirpath": "/logs"}},
    }
    with mock.patch.dict(sys.modules, libraries):
        torch.save(content, path)
    pickled = zipfile.ZipFile(path).read(f"{path.stem}/data.pkl")
    assert b"cnumpy.core.multiarray\nscalar" in pickled and b"model_checkpoint\nModelCheckpoint" in pickled
    return path


def write(kind, folder, configs, states):
    if kind == "single file":
        safetensors.torch.save_file({n: w.contiguous() for n, w in original_state(states).items()}, folder / "v1-5.safetensors")
        return folder / "v1-5.safetensors"
    if kind == "checkpoint":
        return write_checkpoint(folder / "v1-5.ckpt", original_state(states))
    return write_folder(folder / "folder", configs, states, kind)


def outputs(pipeline):
    """What the three networks make of fixed inputs, in float64."""
    generator = torch.Generator().manual_seed(7)
    dtype = next(pipeline.unet.parameters()).dtype
    x = torch.randn(2, pipeline.unet.config["in_channels"], 8, 16, dtype=torch.float64, generator=generator).to(dtype)
    context = torch.randn(2, 5, SMALL["context"], dtype=torch.float64, generator=generator).to(dtype)
    picture = torch.randn(1, 3, 16, 32, dtype=torch.float64, generator=generator).to(dtype)
    tokens = torch.tensor([[3, 500, 7, 7, 100]])
    with torch.no_grad():
        return {
            "unet": pipeline.unet(x, torch.tensor([1, 900]), context),
            "encoder": torch.cat(pipeline.vae.encode(picture), 1),
            "decoder": pipeline.vae.decode(x[:, :4]),
            "text": pipeline.text_encoder(tokens),
        }, (x, context, picture, tokens)


def expected(judges, inputs):
    x, context, picture, tokens = inputs
    with torch.no_grad():
        return {
            "unet": judges["unet"](x, torch.tensor([1, 900]), context).sample,
            "encoder": judges["vae"].encode(picture).latent_dist.parameters,
            "decoder": judges["vae"].decode(x[:, :4]).sample,
            "text": judges["text_encoder"](tokens).last_hidden_state,
        }


def difference(pipeline, judges):
    ours, inputs = outputs(pipeline)
    theirs = expected(judges, inputs)
    return {part: ((ours[part] - theirs[part]).abs().max() / theirs[part].abs().max()).item() for part in theirs}


# Names


def test_the_originals_names_are_those_that_diffusers_converts(configs, states):
    """The fixtures' second derivation of the names, judged: diffusers finds each weight where it belongs."""
    original = original_state(states)
    unet = convert_ldm_unet_checkpoint(dict(original), configs["unet"])
    vae = convert_ldm_vae_checkpoint(dict(original), configs["vae"])
    vae = {name: w for name, w in vae.items() if "loss" not in name}
    assert unet.keys() == states["unet"].keys() and vae.keys() == states["vae"].keys()
    assert all(torch.equal(unet[name], w) for name, w in states["unet"].items())
    assert all(torch.equal(vae[name], w) for name, w in states["vae"].items())
    assert original["model.diffusion_model.output_blocks.2.1.conv.weight"].shape == (64, 64, 3, 3)  # as in the real file
    assert original["first_stage_model.decoder.up.0.block.2.conv2.weight"].shape == (32, 32, 3, 3)


def v1_5(**unet):
    with torch.device("meta"):
        return {
            "unet": UNet(**UNET | unet, attention_block=SpatialTransformer),
            "vae": VAE(**AUTOENCODER),
            "text_encoder": TextEncoder(**TEXT),
        }


def test_v1_5_has_its_sizes_and_every_name_in_both_layouts():
    networks = v1_5()
    counts = {part: (sum(p.numel() for p in net.parameters()), len(net.state_dict())) for part, net in networks.items()}
    assert counts == {"unet": (859_520_964, 686), "vae": (83_653_863, 248), "text_encoder": (123_060_480, 196)}
    assert sum(p.numel() for p in v1_5(in_channels=9)["unet"].parameters()) == 859_535_364
    with torch.device("meta"):
        judges = judges_of(published_configs(FULL, 49408))
    for part, network in networks.items():
        own = network.state_dict()
        theirs = {name.removeprefix("text_model."): w.shape for name, w in judges[part].state_dict().items()}
        assert {name: own[ours].shape for name, ours in pairs(network)} == theirs
        original = {original_name(part, name).removeprefix("text_model.") for name in theirs}
        assert {name for name, _ in pairs(network, original=True)} == original


# Layouts


@pytest.mark.parametrize("kind", ["single file", "checkpoint", "published", "bin"])
def test_every_layout_loads_whole_and_computes_what_diffusers_does(kind, tmp_path, configs, states, judges):
    pipeline = load(write(kind, tmp_path, configs, states))
    assert (pipeline.vae.scale, pipeline.size) == (0.18215, 512)
    assert (pipeline.schedule.name, pipeline.prediction, pipeline.spacing) == ("scaled_linear", "epsilon", "leading")
    assert not pipeline.unet.training and not any(p.requires_grad for p in pipeline.unet.parameters())
    for part, error in difference(pipeline, judges).items():
        assert error < 1e-9, (part, error)


def test_what_todays_libraries_save_loads(tmp_path, judges):
    for part, judge in judges.items():
        judge.save_pretrained(tmp_path / part)
    DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    ).save_pretrained(tmp_path / "scheduler")
    pipeline = load(tmp_path)
    assert (pipeline.schedule.name, pipeline.prediction, pipeline.spacing) == ("cosine", "v_prediction", "trailing")
    assert max(difference(pipeline, judges).values()) < 1e-9


def test_half_precision_is_computed_in_float32_on_a_cpu(tmp_path, configs, states):
    folder = write("fp16", tmp_path, configs, states)
    for pipeline, dtype in ((load(folder), torch.float32), (load(folder, dtype=torch.float64), torch.float64)):
        assert {p.dtype for net in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in net.parameters()} == {dtype}
    assert {p.dtype for p in load(folder, "meta").unet.parameters()} == {torch.float16}  # stands for a device that can
    own = pipeline.unet.state_dict()
    for theirs, ours in pairs(pipeline.unet):
        assert torch.equal(own[ours], states["unet"][theirs].half().double())


def test_smaller_and_inpainting_structures_are_read_off_a_single_file(tmp_path, configs, states, judges):
    unet = UNet2DConditionModel.from_config(configs["unet"] | {"in_channels": 9}).double()
    randomise(unet, 5)
    path = write("single file", tmp_path, configs, states | {"unet": unet.state_dict()})
    pipeline = load(path)
    assert pipeline.unet.config == {
        "in_channels": 9,
        "out_channels": 4,
        "widths": [32, 64, 64, 64],
        "blocks": 2,
        "attention": [True, True, True, False],
        "heads": 8,
        "groups": 32,
        "context_width": 128,
    }
    assert pipeline.text_encoder.config | {"vocabulary": 0} == {
        "vocabulary": 0,
        "width": 128,
        "layers": 2,
        "heads": 2,
        "length": 16,
        "hidden": 512,
    }
    x, context = torch.randn(1, 9, 8, 8, dtype=torch.float64), torch.randn(1, 5, 128, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = pipeline.unet(x, torch.tensor([7]), context), unet(x, 7, context).sample
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_other_numbers_of_levels_and_blocks_are_read_off_too(tmp_path):
    """Widths that 32 groups do not divide, one block a level, attention elsewhere; nothing of v1.5 but the heads."""
    networks = {
        "unet": UNet(4, 4, (16, 24), 1, (False, True), 8, 8, 64, SpatialTransformer),
        "vae": VAE(1, 2, (8, 24, 24), 3, 8),
        "text_encoder": TextEncoder(70, 64, 1, 1, 9, hidden=100),
    }
    tensors = {PREFIX[part] + name: net.state_dict()[own] for part, net in networks.items() for name, own in pairs(net, True)}
    safetensors.torch.save_file(tensors, tmp_path / "other.safetensors")
    pipeline = load(tmp_path / "other.safetensors")
    for part, network in networks.items():
        again = getattr(pipeline, part)
        assert again.config == network.config
        assert all(torch.equal(w, again.state_dict()[name]) for name, w in network.state_dict().items())


MEASURE = """
import sys, torch
from latent_ext.stable_diffusion import load
def memory(kind):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind)) * 1024
before, anonymous = memory("VmRSS"), memory("RssAnon")
pipeline = load(sys.argv[1])
weights = [p for net in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in net.parameters()]
total = sum(p.sum().item() for p in weights)  # each is used once
size = sum(p.numel() * p.element_size() for p in weights)
print(size, memory("VmHWM") - before, memory("RssAnon") - anonymous)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory in use")
@pytest.mark.parametrize(("dtype", "peak", "own"), [(torch.float32, 1.2, 0.05), (torch.float16, 1.6, 1.05)])
def test_loading_takes_no_second_copy_of_the_weights(dtype, peak, own, tmp_path):
    """Weights that need no conversion stay in the file, mapped; of those that do, the file's pages are the system's to drop."""
    sizes = FULL | {"unet": [160, 320, 640, 640], "layers": 2}
    with torch.device("meta"):
        judges = judges_of(published_configs(sizes, 49408))
    states = {
        part: {name: torch.zeros(w.shape, dtype=dtype) for name, w in judge.state_dict().items()}
        for part, judge in judges.items()
    }
    states["text_encoder"] = {clip_name(name)[len("text_model.") :]: w for name, w in states["text_encoder"].items()}
    path = write("single file", tmp_path, None, states)
    run = subprocess.run([sys.executable, "-c", MEASURE, path], cwd=ROOT, capture_output=True, text=True, check=True)
    size, most, kept = map(int, run.stdout.split())
    assert size > 1e9 and most < peak * size + 1e8 and kept < own * size + 1e8, (size, most, kept)


def swap(rules, *keys):
    return dict(rules) | dict(zip(keys, (rules[key] for key in reversed(keys)), strict=True))


@pytest.mark.parametrize(
    ("rules", "keys", "kind"),
    [
        ("ORIGINAL_RES", ("norm1", "norm2"), "single file"),
        ("ORIGINAL_RES", ("conv1", "conv2"), "single file"),
        ("VAE_ATTENTION", ("q", "k"), "published"),
        ("VAE_ATTENTION", ("v", "out"), "today"),
        ("RES", ("time", "skip"), "today"),
    ],
)
def test_a_wrong_name_is_noticed(rules, keys, kind, tmp_path, monkeypatch, configs, states, judges):
    """Two names exchanged, with every shape right, make another network: the comparison sees it, or loading refuses."""
    monkeypatch.setattr(stable_diffusion, rules, swap(getattr(stable_diffusion, rules), *keys))
    path = write(kind, tmp_path, configs, states)
    try:
        pipeline = load(path)
    except ValueError:
        return
    assert max(difference(pipeline, judges).values()) > 1e-6


@pytest.mark.parametrize(("one", "other"), [("norm1", "norm2"), ("q", "k"), ("k", "v"), ("v", "out")])
def test_exchanged_names_of_the_text_encoder_are_noticed(one, other, tmp_path, monkeypatch, configs, states, judges):
    right, others = stable_diffusion.text_names, {one: other, other: one}
    monkeypatch.setattr(
        stable_diffusion, "text_names", lambda layer, _: right(".".join(others.get(word, word) for word in layer.split(".")), _)
    )
    assert difference(load(write("single file", tmp_path, configs, states)), judges)["text"] > 1e-6


def test_exchanged_layer_norms_are_noticed(tmp_path, monkeypatch, configs, states, judges):
    right = stable_diffusion.transformer_name
    others = {"norm1": "norm2", "norm2": "norm1", "attn1": "attn1"}
    monkeypatch.setattr(
        stable_diffusion, "transformer_name", lambda inside: right([others.get(inside[0], inside[0]), *inside[1:]])
    )
    assert difference(load(write("single file", tmp_path, configs, states)), judges)["unet"] > 1e-6


# Faults


def test_missing_wrong_and_unknown_weights_are_named(tmp_path, configs, states):
    path = write("single file", tmp_path, configs, states)
    whole = safetensors.torch.load_file(path)
    faults = {
        "in_layers.2.bias is missing, expected (64,)": ("input_blocks.4.0.in_layers.2.bias", None),
        "skip_connection.weight is (64, 3, 1, 1), expected (64, 32, 1, 1)": (
            "input_blocks.4.0.skip_connection.weight",
            torch.zeros(64, 3, 1, 1),
        ),
        "label_emb.0.0.weight is not known": ("label_emb.0.0.weight", torch.zeros(2)),
        "'input_blocks.4.0.in_layers.2.weight' is missing": ("input_blocks.4.0.in_layers.2.weight", None),
    }
    for sentence, (name, w) in faults.items():
        tensors = dict(whole)
        tensors.pop("model.diffusion_model." + name, None)
        if w is not None:
            tensors["model.diffusion_model." + name] = w
        safetensors.torch.save_file(tensors, tmp_path / "fault.safetensors")
        with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
            load(tmp_path / "fault.safetensors")
        assert "fault.safetensors: expected weights of Stable Diffusion v1.x" in str(caught.value)
    few = {name: w for name, w in whole.items() if "attn_1" not in name and "loss" not in name}
    safetensors.torch.save_file(few, tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match="and 17 more"):  # of 2 x 5 layers with 2 weights each, 3 are named
        load(tmp_path / "few.safetensors")


def test_damaged_files_get_one_sentence(tmp_path, configs, states):
    for kind in ("single file", "checkpoint"):
        path = write(kind, tmp_path, configs, states)
        content = path.read_bytes()
        for damaged in (b"", content[:100], content[: len(content) // 2], content[:-1000], b"<html>" + content[6:]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="damaged or of another kind"):
                load(path)
    folder = write("published", tmp_path, configs, states)
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        load(folder)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.safetensors")


def test_other_models_are_named(tmp_path, configs, states):
    one = torch.zeros(1)
    for name, sentence in {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": "Stable Diffusion XL's",
        "cond_stage_model.model.transformer.resblocks.0.ln_1.weight": "Stable Diffusion 2.x's",
        "down_blocks.0.resnets.0.conv1.weight": "name the folder",
        "encoder.down_blocks.0.resnets.0.conv1.weight": "name the folder",
        "lora_unet_down_blocks_0_attentions_0_proj_in.alpha": "'out.2.weight' is missing|is missing",
    }.items():
        safetensors.torch.save_file(
            {"model.diffusion_model.input_blocks.0.0.bias": one, name: one.clone()}, tmp_path / "other.safetensors"
        )
        with pytest.raises(ValueError, match=sentence):
            load(tmp_path / "other.safetensors")
    folder = write("published", tmp_path, configs, states)
    two = configs["unet"] | {"use_linear_projection": True, "attention_head_dim": [5, 10, 20, 20]}
    (folder / "unet" / "config.json").write_text(json.dumps(two))
    with pytest.raises(ValueError, match="with use_linear_projection False, got True"):
        load(folder)
    (folder / "text_encoder_2").mkdir()
    with pytest.raises(ValueError, match="as Stable Diffusion XL has"):
        load(folder)


class Evil:
    """What unpickling calls, without asking."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["callbacks", "state_dict", "plain pickle"])
def test_a_malicious_pickle_executes_nothing(place, tmp_path):
    trap, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    if place == "plain pickle":
        path.write_bytes(pickle.dumps({"state_dict": Evil(trap)}))
    else:
        torch.save({"state_dict": {"betas": torch.ones(3)}, place: Evil(trap)}, path)
    with pytest.raises(ValueError, match="damaged or of another kind"):
        load(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Evil(trap)))
    assert trap.exists()  # it would have done something


# Tokenizer


def varied_texts(n):
    draw = random.Random(0)
    words = [
        *WORDS.split(),
        "I'VE",
        "don't",
        "we'll",
        "THEY'RE",
        "'s",
        "o'clock",
        "naïve",
        "nai\u0308ve",
        "Ångström",
        "A\u030angstro\u0308m",
    ]
    words += [
        "Straße",
        "ﬁne",
        "İstanbul",
        "ΣΊΣΥΦΟΣ",
        "日本語の猫",
        "кошка",
        "قطة",
        "१२३",
        "½",
        "Ⅷ",
        "x²",
        "2024",
        "3.14",
        "1,000,000",
        "4k",
    ]
    words += [
        "😀",
        "👩‍👩‍👧",
        "🐈‍⬛",
        "❤️",
        "!!!",
        "...",
        "#cat",
        "@you",
        "(a:1.2)",
        "[b]",
        "--ar",
        "&amp;",
        "<|endoftext|>",
        "<b>",
        "\\n",
        "_",
    ]
    spaces = [" ", " ", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", ", ", "", "-"]
    texts = ["", " ", "\n", "a", " ".join(draw.choices(words, k=200)), "word " * 200]
    while len(texts) < n:
        texts.append("".join(word + draw.choice(spaces) for word in draw.choices(words, k=draw.randint(1, 25))))
    return texts


def same_tokens(ours, theirs, texts):
    expected = theirs(texts, padding="max_length", max_length=77, truncation=True).input_ids
    for text, row, right in zip(texts, ours(texts).tolist(), expected, strict=True):
        assert row == right, text


@pytest.mark.parametrize("kind", ["vocab.json and merges.txt", "merges.txt", "tokenizer.json"])
def test_tokens_are_transformers(kind, tmp_path, vocabulary, merges):
    write_tokenizer(tmp_path, vocabulary, merges, kind)
    theirs = CLIPTokenizer(vocabulary, [tuple(m.split()) for m in merges])
    ours = Tokenizer.load(tmp_path, 77)
    assert ours.size == len(vocabulary) and (ours.start, ours.end) == (len(vocabulary) - 2, len(vocabulary) - 1)
    same_tokens(ours, theirs, varied_texts(1000))


@pytest.mark.skipif("CLIP_MERGES" not in os.environ, reason="CLIP_MERGES names no bpe_simple_vocab_16e6.txt.gz")
def test_clips_own_tokens_are_transformers(tmp_path):
    text = gzip.decompress(Path(os.environ["CLIP_MERGES"]).read_bytes()).decode()
    lines = text.split("\n")[1 : 49152 - 256 - 2 + 1]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", "utf-8")
    ours = Tokenizer.load(tmp_path, 77)
    assert (ours.size, ours.start, ours.end) == (49408, 49406, 49407)
    astronaut = [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]  # as published
    assert ours("a photograph of an astronaut riding a horse")[0].tolist() == astronaut + [49407] * 67
    assert ours("a photo of a cat")[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    theirs = CLIPTokenizer(ours.rules.get_vocab(), [tuple(line.split()) for line in lines])
    same_tokens(ours, theirs, varied_texts(1000))


def test_the_folders_tokenizer_is_found_and_a_missing_one_is_named_when_it_is_needed(
    tmp_path, configs, states, vocabulary, merges
):
    for kind, place in (("published", "folder/tokenizer"), ("single file", ".")):
        path = write(kind, tmp_path, configs, states)
        pipeline = load(path)
        with pytest.raises(ValueError, match=r"expected a tokenizer\.json or a merges\.txt here"):
            pipeline.states(["a cat"])
        write_tokenizer(tmp_path / place, vocabulary, merges)
        tokens = load(path).tokenizer("the cat")
        assert tokens.shape == (1, 16) and tokens[0, 0] == len(vocabulary) - 2
    write_tokenizer(tmp_path, vocabulary, [*merges, "q q"], "merges.txt")
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(ValueError, match="this one has"):
        load(path)


# The scheduler


def test_the_schedule_is_read_or_refused(tmp_path):
    path = tmp_path / "scheduler_config.json"
    v1_5 = stable_diffusion.read_schedule(path)  # there is none
    path.write_text(json.dumps(PNDM))
    published = stable_diffusion.read_schedule(path)
    for read in (v1_5, published):
        assert (read["schedule"].name, read["prediction"], read["spacing"]) == ("scaled_linear", "epsilon", "leading")
        values = read["schedule"].alpha_bar[[0, 1, 250, 500, 999]].tolist()
        assert values == pytest.approx(
            [0.99914998, 0.99829602, 0.67379230, 0.27633247, 0.00466010], abs=1e-6
        )  # theirs is a product in float32
    for change in ({"beta_schedule": "sigmoid"}, {"beta_end": 0.02}, {"prediction_type": "sample"}, {"trained_betas": [0.1]}):
        path.write_text(json.dumps(PNDM | change))
        with pytest.raises(ValueError, match=r"scheduler_config\.json: expected"):
            stable_diffusion.read_schedule(path)


# Saving


def toy(prediction, spacing, schedule):
    captions = ["an orange cat with green eyes", "a black cat, asleep", "a white cat with blue eyes."]
    tokenizer = Tokenizer.of_words(captions, 12)
    torch.manual_seed(0)
    pipeline = Pipeline(
        UNet(4, 4, (16, 32), 1, (False, True), 4, 1, 24, SpatialTransformer),
        VAE(3, 4, (16, 32, 32), 1, 1, scale=0.7),
        TextEncoder(tokenizer.size, 24, 2, 4, 12),
        tokenizer,
        schedule,
        32,
        prediction,
        spacing,
    )
    for seed, network in enumerate((pipeline.unet, pipeline.vae, pipeline.text_encoder)):
        randomise(network, seed)
        network.half().float().eval().requires_grad_(False)
    return pipeline


def draw(pipeline, prompt, negative, latents, scale, steps):
    """Stable Diffusion in the lines of the README: its time steps are written down here once more."""
    T = pipeline.schedule.T
    stride = T // steps
    walk = [(t, max(t - stride, 0)) for t in range(1 + (steps - 1) * stride, 0, -stride)]
    context, nothing = pipeline.states([prompt]), pipeline.states([negative])
    predict_noise = guided(pipeline.predict_noise, context, nothing, scale)
    timesteps = walk if pipeline.spacing == "leading" else None
    z = sample(predict_noise, latents, pipeline.schedule, steps, eta=0, timesteps=timesteps)
    with torch.no_grad():
        return (pipeline.vae.decode(z / pipeline.vae.scale) / 2 + 0.5).clamp(0, 1)


SETTINGS = [
    ("v_prediction", "trailing", NoiseSchedule.cosine()),
    ("epsilon", "leading", NoiseSchedule.scaled_linear()),
    ("epsilon", "trailing", NoiseSchedule.linear(100)),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["toy", "Stable Diffusion", "other"])
def test_diffusers_opens_what_is_saved_and_draws_the_same_picture(settings, tmp_path):
    pipeline = toy(*settings)
    save(pipeline, tmp_path / "toy")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "toy", safety_checker=None)
    assert isinstance(theirs.scheduler, DDIMScheduler)
    prompt, negative = "An orange cat, with  unheard eyes. " + "cat " * 20, "a black cat"
    ids = theirs.tokenizer([prompt, ""], padding="max_length", max_length=12, truncation=True).input_ids
    assert pipeline.tokenizer([prompt, ""]).tolist() == ids and theirs.tokenizer.model_max_length == 12
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs.set_progress_bar_config(disable=True)
    picture = theirs(
        prompt,
        negative_prompt=negative,
        latents=latents.clone(),
        num_inference_steps=5,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    ours = draw(pipeline, prompt, negative, latents, 3.0, 5)
    assert picture.std() > 0.05  # there is something to see
    torch.testing.assert_close(ours, picture, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=["toy", "Stable Diffusion", "other"])
def test_what_is_saved_loads_again(settings, tmp_path):
    pipeline = toy(*settings)
    save(pipeline, tmp_path / "toy")
    text = safetensors.torch.load_file(tmp_path / "toy" / "text_encoder" / "model.safetensors")
    assert all(
        name.startswith("text_model.") and w.dtype == torch.float16 for name, w in text.items()
    )  # as transformers 4 reads
    again = load(tmp_path / "toy")
    for part in ("unet", "vae", "text_encoder"):
        own, back = getattr(pipeline, part), getattr(again, part)
        assert back.config == own.config
        assert own.state_dict().keys() == back.state_dict().keys()
        assert all(torch.equal(w, back.state_dict()[name]) for name, w in own.state_dict().items())
    for word in ("size", "prediction", "spacing"):
        assert getattr(again, word) == getattr(pipeline, word)
    assert again.vae.scale == 0.7 and torch.equal(again.schedule.alpha_bar, pipeline.schedule.alpha_bar)
    texts = ["an orange cat", "a dog, asleep " * 5]
    assert torch.equal(again.tokenizer(texts), pipeline.tokenizer(texts)) and again.tokenizer.unknown("a dog") == ["dog"]
    save(again, tmp_path / "toy")  # over the files that are in use
    assert torch.equal(load(tmp_path / "toy").unet.conv.weight, pipeline.unet.conv.weight)


def test_a_single_file_can_be_saved_as_a_folder(tmp_path, configs, states, judges, vocabulary, merges):
    half = {part: {name: w.half().double() for name, w in state.items()} for part, state in states.items()}
    write_tokenizer(tmp_path, vocabulary, merges)
    save(load(write("single file", tmp_path, configs, half)), tmp_path / "folder")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", safety_checker=None, torch_dtype=torch.float64)
    again = load(tmp_path / "folder", dtype=torch.float64)
    parts = {"unet": theirs.unet, "vae": theirs.vae, "text_encoder": theirs.text_encoder}
    assert max(difference(again, parts).values()) < 1e-9
    for part, state in parts.items():
        state = {name.removeprefix("text_model."): w for name, w in state.state_dict().items()}
        assert all(torch.equal(state[name], w) for name, w in half[part].items())
    texts = varied_texts(50)
    ids = theirs.tokenizer(texts, padding="max_length", max_length=16, truncation=True).input_ids
    assert again.tokenizer(texts).tolist() == ids


def test_a_failed_save_leaves_no_half_files(tmp_path, monkeypatch):
    pipeline = toy(*SETTINGS[0])
    save(pipeline, tmp_path / "toy")
    before = {path: path.read_bytes() for path in (tmp_path / "toy").rglob("*") if path.is_file()}
    randomise(pipeline.unet, 99)

    def full(self, content):
        self.open("wb").write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save(pipeline, tmp_path / "toy")
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in (tmp_path / "toy").rglob("*") if path.is_file()} == before
