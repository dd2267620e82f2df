"""Stable Diffusion v1.5 in the networks of this repository: its numbers, its weights, and folders in diffusers' layout.

    pipeline = load("v1-5-pruned-emaonly.safetensors")  # the original file, or its .ckpt, or a folder as diffusers has them
    save(pipeline, "folder")                            # diffusers opens it as it is

The same weights were published under two sets of names: their authors', in one file, and diffusers', in a folder. The rules
below lead from a name of ours to both. They serve to read and to write: either way one goes through our weights, and asks.
"""

import itertools
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from latent_ext.attention import SpatialTransformer
from latent_ext.clip import END, START, UNKNOWN, TextEncoder, Tokenizer
from latent_ext.pipeline import Pipeline
from latent_ext.vae import VAE
from processes import NoiseSchedule
from toolbox.files import whole_file
from toolbox.models import check_published
from unet import UNet

# v1.5: UNet(**UNET, attention_block=SpatialTransformer), VAE(**AUTOENCODER), TextEncoder(**TEXT)
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "widths": [320, 640, 1280, 1280],
    "blocks": 2,
    "attention": [True, True, True, False],
    "heads": 8,
    "groups": 32,
    "context_width": 768,
}
AUTOENCODER = {"channels": 3, "latent_channels": 4, "widths": [128, 256, 512, 512], "blocks": 2, "groups": 32, "scale": 0.18215}
TEXT = {"vocabulary": 49408, "width": 768, "layers": 12, "heads": 12, "length": 77, "hidden": 3072}
WHAT = "weights of Stable Diffusion v1.x"


# The names: what a layer of ours is called by diffusers, and what by the original's authors.

RES = {"time": "time_emb_proj", "skip": "conv_shortcut"}  # diffusers' words where they are not ours
ORIGINAL_RES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


def place(way: str, i: str, kind: str, config: dict) -> tuple[int, int, str]:
    """Entry i of one of our lists is number j of its level; and diffusers' name of it: down 4 res -> 1, 0, down_blocks.1..."""
    level, j = divmod(int(i) - (way == "down"), config["blocks"] + 1)
    block = "mid_block" if way == "mid" else f"{way}_blocks.{level}"
    return level, j, f"{block}." + {"res": f"resnets.{j}", "attn": f"attentions.{j}", "conv": f"{way}samplers.0.conv"}[kind]


def unet_names(layer: str, config: dict) -> tuple[str, str]:
    """down.4.res.conv1 -> down_blocks.1.resnets.0.conv1, input_blocks.4.0.in_layers.2"""
    match layer.split("."):
        case ["time", i]:
            return f"time_embedding.linear_{1 + int(i) // 2}", f"time_embed.{i}"
        case ["norm"]:
            return "conv_norm_out", "out.0"
        case ["conv"]:
            return "conv_out", "out.2"
        case ["down", "0", "conv"]:
            return "conv_in", "input_blocks.0.0"
        case [way, i, "conv", *_]:
            level, _, theirs = place(way, i, "conv", config)
            last = 1 + config["attention"][-1 - level]  # it comes after the residual block and, if there is one, attention
            return theirs, f"input_blocks.{i}.0.op" if way == "down" else f"output_blocks.{i}.{last}.conv"
        case [way, i, kind, *inside]:
            _, j, theirs = place(way, i, kind, config)
            second = int(kind == "attn")
            original = {
                "down": f"input_blocks.{i}.{second}",
                "mid": f"middle_block.{2 * j + second}",
                "up": f"output_blocks.{i}.{second}",
            }[way]
            if kind == "attn":
                return f"{theirs}.{transformer_name(inside)}", f"{original}.{transformer_name(inside)}"
            return f"{theirs}.{RES.get(inside[0], inside[0])}", f"{original}.{ORIGINAL_RES[inside[0]]}"


def transformer_name(inside: list[str]) -> str:
    """attn1.q -> transformer_blocks.0.attn1.to_q, in both."""
    match inside:
        case ["norm" | "proj_in" | "proj_out" as same]:
            return same
        case ["ff", half]:
            return "transformer_blocks.0.ff.net." + {"hidden": "0.proj", "out": "2"}[half]
        case [attention, "out"]:
            return f"transformer_blocks.0.{attention}.to_out.0"
        case [attention, to]:
            return f"transformer_blocks.0.{attention}.to_{to}"
        case [norm]:
            return f"transformer_blocks.0.{norm}"


def vae_names(layer: str, config: dict) -> tuple[str, str]:
    """encoder.down.4.res.skip -> encoder.down_blocks.1.resnets.0.conv_shortcut, encoder.down.1.block.0.nin_shortcut"""
    match layer.split("."):
        case ["quant" | "post_quant"]:
            return f"{layer}_conv", f"{layer}_conv"
        case [half, "norm"]:
            return f"{half}.conv_norm_out", f"{half}.norm_out"
        case [half, "conv"]:
            return f"{half}.conv_out", f"{half}.conv_out"
        case [half, "first"] | [half, "down", "0", "conv"]:
            return f"{half}.conv_in", f"{half}.conv_in"
        case [half, way, i, kind, *inside]:
            level, j, theirs = place(way, i, kind, config)
            if way == "up":  # the original counts the sizes of the way up from the largest
                level = len(config["widths"]) - 1 - level
            theirs = f"{half}.{theirs}"
            if kind == "conv":
                return theirs, f"{half}.{way}.{level}.{way}sample.conv"
            if kind == "attn":
                return f"{theirs}.{VAE_ATTENTION[inside[0]]}", f"{half}.mid.attn_1.{inside[0].replace('out', 'proj_out')}"
            original = f"{half}.mid.block_{j + 1}" if way == "mid" else f"{half}.{way}.{level}.block.{j}"
            return f"{theirs}.{RES.get(inside[0], inside[0])}", f"{original}.{inside[0].replace('skip', 'nin_shortcut')}"


def text_names(layer: str, config: dict) -> tuple[str, str]:
    """layers.3.q -> encoder.layers.3.self_attn.q_proj, in both."""
    match layer.split("."):
        case ["norm"]:
            name = "final_layer_norm"
        case ["layers", i, "norm1" | "norm2" as norm]:
            name = f"encoder.layers.{i}.layer_{norm}"
        case ["layers", i, "hidden" | "back" as half]:
            name = f"encoder.layers.{i}.mlp.{'fc1' if half == 'hidden' else 'fc2'}"
        case ["layers", i, to]:
            name = f"encoder.layers.{i}.self_attn.{to}_proj"
        case [which]:
            name = f"embeddings.{which}_embedding"
    return name, name


def pairs(network: nn.Module, original: bool = False) -> Iterator[tuple[str, str]]:
    """For each of a network's weights: its name elsewhere (in diffusers, or in the original), its name here."""
    names = {UNet: unet_names, VAE: vae_names, TextEncoder: text_names}[type(network)]
    for name in network.state_dict():
        layer, _, kind = name.rpartition(".")  # kind: weight or bias
        yield f"{names(layer, network.config)[original]}.{kind}", name


# Configurations: diffusers' words for our arguments, and what our networks cannot vary.

UNET_WORDS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "block_out_channels": "widths",
    "layers_per_block": "blocks",
    "attention_head_dim": "heads",  # a number of heads it is, whatever its name says
    "norm_num_groups": "groups",
    "cross_attention_dim": "context_width",
}
UNET_FIXED = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "center_input_sample": False,
    "mid_block_scale_factor": 1,
    "use_linear_projection": False,
}
VAE_WORDS = {
    "in_channels": "channels",
    "out_channels": "channels",
    "latent_channels": "latent_channels",
    "block_out_channels": "widths",
    "layers_per_block": "blocks",
    "norm_num_groups": "groups",
    "scaling_factor": "scale",
}
VAE_FIXED = {"act_fn": "silu"}
TEXT_WORDS = {
    "vocab_size": "vocabulary",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "max_position_embeddings": "length",
    "intermediate_size": "hidden",
}
TEXT_FIXED = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SCHEDULES = {  # diffusers' name of each, and the only numbers for which it is ours
    "scaled_linear": (NoiseSchedule.scaled_linear, {"beta_start": 0.00085, "beta_end": 0.012}),
    "linear": (NoiseSchedule.linear, {"beta_start": 0.0001, "beta_end": 0.02}),
    "squaredcos_cap_v2": (NoiseSchedule.cosine, {}),
}


def their_config(config: dict, words: dict, fixed: dict) -> dict:
    return {theirs: config[ours] for theirs, ours in words.items()} | fixed


def our_config(theirs: dict, words: dict, fixed: dict, default: dict, path: Path) -> dict:
    """What their config.json says, in our words; what it does not say is as in v1.5."""
    for key, value in fixed.items():
        if theirs.get(key, value) != value:
            raise ValueError(f"{path}: expected {WHAT}, with {key} {value}, got {theirs[key]}: it may be 2.x's, or another's")
    return {ours: theirs.get(word, default[ours]) for word, ours in words.items()}


# Reading.

PARTS = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model.transformer."}
OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}  # diffusers' VAE, at first
NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")


def load(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Pipeline:
    """From a single file with the original's names (.safetensors, .ckpt), or from a folder in diffusers' layout.

    dtype: what to compute in; None: in what the file has, but on a CPU in float32 rather than in 16 bits.
    """
    path = Path(path)
    pipeline = (load_folder if path.is_dir() else load_file)(path, device, dtype)
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.eval().requires_grad_(False)
    return pipeline


def load_folder(folder: Path, device: torch.device | str, dtype: torch.dtype | None) -> Pipeline:
    if (folder / "text_encoder_2").exists():
        raise ValueError(f"{folder}: expected {WHAT}, this folder has two text encoders, as Stable Diffusion XL has")
    files = {part: folder / part / "config.json" for part in PARTS}
    unet, vae, text = (read_json(file) for file in files.values())
    attention = ["CrossAttn" in kind for kind in unet.get("down_block_types", ())] or UNET["attention"]
    with torch.device("meta"):  # shapes only: neither memory nor time for weights that those of the files replace
        networks = {
            "unet": UNet(
                **our_config(unet, UNET_WORDS, UNET_FIXED, UNET, files["unet"]),
                attention=attention,
                attention_block=SpatialTransformer,
            ),
            "vae": VAE(**our_config(vae, VAE_WORDS, VAE_FIXED, AUTOENCODER, files["vae"])),
            "text_encoder": TextEncoder(**our_config(text, TEXT_WORDS, TEXT_FIXED, TEXT, files["text_encoder"])),
        }
    for part, network in networks.items():
        file = weights_file(folder / part)
        dtype = fill(network, dict(today(read(file))), False, file, device, dtype)
    return Pipeline(
        **networks,
        tokenizer=find_tokenizer(folder / "tokenizer", networks["text_encoder"].config),
        **read_schedule(folder / "scheduler" / "scheduler_config.json"),
        size=unet.get("sample_size", 64) * networks["vae"].factor,
    )


def load_file(path: Path, device: torch.device | str, dtype: torch.dtype | None) -> Pipeline:
    tensors = read(path)
    if any(name.startswith("conditioner.") for name in tensors):
        raise ValueError(f"{path}: expected {WHAT}, these are Stable Diffusion XL's")
    if any(name.startswith("cond_stage_model.model.") for name in tensors):
        raise ValueError(f"{path}: expected {WHAT}, these are Stable Diffusion 2.x's, which has another text encoder")
    if any(name.startswith(("down_blocks.", "encoder.down_blocks.", "text_model.")) for name in tensors):
        raise ValueError(f"{path}: expected {WHAT}, this is one network of a folder in diffusers' layout: name the folder")
    tensors = {part: dict(today(tensors, prefix)) for part, prefix in PARTS.items()}
    try:
        with torch.device("meta"):
            networks = {
                "unet": UNet(**unet_sizes(tensors["unet"]), attention_block=SpatialTransformer),
                "vae": VAE(**vae_sizes(tensors["vae"])),
                "text_encoder": TextEncoder(**text_sizes(tensors["text_encoder"])),
            }
    except KeyError as error:
        raise ValueError(f"{path}: expected {WHAT}, but {error} is missing") from error
    for part, network in networks.items():
        dtype = fill(network, tensors.pop(part), True, path, device, dtype)
    return Pipeline(
        **networks,
        tokenizer=find_tokenizer(path.parent, networks["text_encoder"].config),
        schedule=NoiseSchedule.scaled_linear(),
    )


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory: what is not used is never read. Nothing that the file may say is executed."""
    path.open("rb").close()  # is it there, and may it be read?
    check_published(path)
    checkpoint = type("ModelCheckpoint", (), {})  # stands for Lightning's, which the original .ckpt names
    number = np.float64().__reduce__()[0]  # what makes a number of NumPy's from bytes; NumPy 1 called it:
    harmless = [
        (checkpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
        (number, "numpy.core.multiarray.scalar"),
        number,
        np.dtype,
        type(np.dtype("float64")),
    ]
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        content = content.get("state_dict", content)
        return {name: w for name, w in content.items() if isinstance(w, Tensor)}
    except Exception as error:  # whatever its bytes lead to
        raise ValueError(
            f"{path}: expected a whole .safetensors, .ckpt or .bin file of weights and nothing else; "
            f"this one is damaged or of another kind"
        ) from error


def today(tensors: dict[str, Tensor], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The weights of one network, under one of the names that they had over the years, without entries of no use."""
    for name, w in tensors.items():
        if name.startswith(prefix) and not name.startswith(prefix + "loss.") and not name.endswith("position_ids"):
            name = name[len(prefix) :].removeprefix("text_model.")
            for old, new in OLD.items():
                name = name.replace(old, new)
            yield name, w


def fill(
    network: nn.Module,
    tensors: dict[str, Tensor],
    original: bool,
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> torch.dtype:
    """Give a network all of these weights, and it must be all of its own; returns the dtype they have there."""
    own, weights, wrong = network.state_dict(), {}, []
    if dtype is None:
        dtype = next(iter(tensors.values())).dtype
        dtype = torch.float32 if torch.device(device).type == "cpu" and dtype.itemsize == 2 else dtype
    for theirs, ours in pairs(network, original):
        w = tensors.pop(theirs, None)
        if w is not None and w.ndim == 4 and own[ours].ndim == 2:
            w = w.flatten(1)  # a 1x1 convolution is a linear layer
        if w is None or w.shape != own[ours].shape:
            has = "is missing" if w is None else f"is {tuple(w.shape)}"
            wrong.append(f"{theirs} {has}, expected {tuple(own[ours].shape)}")
        else:
            weights[ours] = w.to(device, dtype)
    wrong += [f"{name} is not known" for name in tensors]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{path}: expected {WHAT}, but {'; '.join(wrong[:3])}{more}")
    network.load_state_dict(weights, assign=True)
    return dtype


def unet_sizes(tensors: dict[str, Tensor]) -> dict:
    levels = 1 + sum(name.endswith(".0.op.weight") for name in tensors)
    group = count("output_blocks.{}.0.in_layers.0.weight", tensors) // levels  # the blocks of a level, and one
    firsts = [f"input_blocks.{group * level + 1}" for level in range(levels)]
    widths = [len(tensors[f"{first}.0.in_layers.2.weight"]) for first in firsts]
    return UNET | {
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(tensors["out.2.weight"]),
        "widths": widths,
        "blocks": group - 1,
        "attention": [f"{first}.1.norm.weight" in tensors for first in firsts],
        "groups": math.gcd(32, *widths),
        "context_width": tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
    }


def vae_sizes(tensors: dict[str, Tensor]) -> dict:
    levels = count("encoder.down.{}.block.0.conv1.weight", tensors)
    widths = [len(tensors[f"encoder.down.{level}.block.0.conv1.weight"]) for level in range(levels)]
    return AUTOENCODER | {
        "channels": tensors["encoder.conv_in.weight"].shape[1],
        "latent_channels": len(tensors["post_quant_conv.weight"]),
        "widths": widths,
        "blocks": count("encoder.down.0.block.{}.conv1.weight", tensors),
        "groups": math.gcd(32, *widths),
    }


def text_sizes(tensors: dict[str, Tensor]) -> dict:
    vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
    return {
        "vocabulary": vocabulary,
        "width": width,
        "layers": count("encoder.layers.{}.mlp.fc1.weight", tensors),
        "heads": max(1, width // 64),
        "length": len(tensors["embeddings.position_embedding.weight"]),
        "hidden": len(tensors["encoder.layers.0.mlp.fc1.weight"]),
    }


def count(name: str, tensors: dict[str, Tensor]) -> int:
    return next(i for i in itertools.count() if name.format(i) not in tensors)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, this file is damaged ({error})") from error


def weights_file(folder: Path) -> Path:
    names = [f"{name}{variant}.{kind}" for variant in ("", ".fp16") for name in NAMES for kind in ("safetensors", "bin")]
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder}: expected weights in one of the files {', '.join(names)}")


def read_schedule(path: Path) -> dict:
    """How the U-Net was trained, from a scheduler_config.json; as v1.5's where it is silent, or not there."""
    theirs = read_json(path) if path.exists() else {}
    name, prediction = theirs.get("beta_schedule", "scaled_linear"), theirs.get("prediction_type", "epsilon")
    make, betas = SCHEDULES.get(name, (None, {}))
    if make is None or any(theirs.get(key, value) != value for key, value in betas.items()):
        known = "; ".join(f"{name} {betas or ''}" for name, (_, betas) in SCHEDULES.items())
        raise ValueError(f"{path}: expected a beta_schedule of these: {known}; got {name} with other numbers, or another one")
    if theirs.get("rescale_betas_zero_snr") or theirs.get("trained_betas"):
        raise ValueError(f"{path}: expected no rescale_betas_zero_snr and no trained_betas, this program knows neither")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"{path}: expected the prediction_type epsilon or v_prediction, got {prediction}")
    spacing = "trailing" if theirs.get("timestep_spacing") == "trailing" else "leading"
    return {"schedule": make(theirs.get("num_train_timesteps", 1000)), "prediction": prediction, "spacing": spacing}


class Missing:
    """Stands where the tokenizer is not, and says so when it is needed."""

    def __init__(self, sentence: str):
        self.sentence = sentence

    def __call__(self, *_: object) -> None:
        raise ValueError(self.sentence)

    def __getattr__(self, name: str) -> None:  # is asked for what is not there
        raise ValueError(self.sentence)


def find_tokenizer(folder: Path, text: dict) -> Tokenizer | Missing:
    if not (folder / "tokenizer.json").exists() and not (folder / "merges.txt").exists():
        return Missing(
            f"{folder}: expected a tokenizer.json or a merges.txt here, to read texts with; CLIP's merges.txt lies "
            "in the folder `tokenizer` of any Stable Diffusion v1.x in diffusers' layout"
        )
    tokenizer = Tokenizer.load(folder, text["length"])
    if tokenizer.size > text["vocabulary"]:
        raise ValueError(
            f"{folder}: expected a tokenizer of at most {text['vocabulary']} tokens, as the text encoder knows; "
            f"this one has {tokenizer.size}"
        )
    return tokenizer


# Writing.


def save(pipeline: Pipeline, folder: str | Path) -> None:
    """A folder in diffusers' layout, in half precision, for `load` and for StableDiffusionPipeline.from_pretrained."""
    folder = Path(folder)
    unet, vae, text, tokenizer = pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
    attention, levels = unet.config["attention"], len(vae.config["widths"])

    write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", unet)
    write_json(
        folder / "unet" / "config.json",
        {"_class_name": "UNet2DConditionModel", "sample_size": pipeline.size // vae.factor}
        | their_config(unet.config, UNET_WORDS, UNET_FIXED)
        | {"down_block_types": [f"{'CrossAttn' * flag}DownBlock2D" for flag in attention]}
        | {"up_block_types": [f"{'CrossAttn' * flag}UpBlock2D" for flag in reversed(attention)]},
    )
    write_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", vae)
    write_json(
        folder / "vae" / "config.json",
        {"_class_name": "AutoencoderKL", "sample_size": pipeline.size}
        | their_config(vae.config | {"scale": vae.scale}, VAE_WORDS, VAE_FIXED)
        | {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels},
    )
    ids = {"bos_token_id": tokenizer.start, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.end}
    write_weights(folder / "text_encoder" / "model.safetensors", text, "text_model.")
    write_json(
        folder / "text_encoder" / "config.json",
        {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "torch_dtype": "float32",
        }  # computes in, if not asked
        | their_config(text.config, TEXT_WORDS, TEXT_FIXED)
        | ids,
    )
    write(folder / "tokenizer" / "tokenizer.json", tokenizer.rules.to_str(pretty=True).encode())
    unknown = UNKNOWN if tokenizer.rules.token_to_id(UNKNOWN) is not None else END
    write_json(
        folder / "tokenizer" / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenizer.length}
        | {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": unknown},
    )
    name = {"cosine": "squaredcos_cap_v2"}.get(pipeline.schedule.name, pipeline.schedule.name)
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "DDIMScheduler", "num_train_timesteps": pipeline.schedule.T, "beta_schedule": name}
        | SCHEDULES[name][1]
        | {"prediction_type": pipeline.prediction, "timestep_spacing": pipeline.spacing, "steps_offset": 1}
        | {"clip_sample": False, "set_alpha_to_one": pipeline.spacing == "trailing"},
    )
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        },
    )


def write_weights(path: Path, network: nn.Module, prefix: str = "") -> None:
    own = network.state_dict()
    weights = {prefix + theirs: own[ours].half().cpu().contiguous() for theirs, ours in pairs(network)}
    write(path, safetensors.torch.save(weights, {"format": "pt"}))


def write_json(path: Path, content: dict) -> None:
    write(path, (json.dumps(content, indent=2) + "\n").encode())


def write(path: Path, content: bytes) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
