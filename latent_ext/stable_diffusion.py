"""Stable Diffusion v1.x, and this repository's own latent models, from files and to files.

    pipeline = load("v1-5-pruned-emaonly.safetensors")  # or its .ckpt, or a folder of diffusers
    save(pipeline, "folder")  # for StableDiffusionPipeline.from_pretrained

The published weights themselves were never at hand. Names, shapes and numerics are tested with
random weights, in files laid out like the published ones, against diffusers, transformers, and
diffusers' own conversion of CompVis' names.
"""

import functools
import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from latent_ext.attention import SpatialTransformer
from latent_ext.clip import END, UNKNOWN, TextEncoder, Tokenizer
from latent_ext.pipeline import Pipeline
from latent_ext.vae import VAE
from latent_ext.weight_names import COMPVIS, DIFFUSERS, name_pairs
from processes import NoiseSchedule
from toolbox.files import UserError, atomic_write, system_errors
from toolbox.models import verify_checksum
from unet import UNet

EXPECTED = "expected a Stable Diffusion v1.x (2.x and XL are others)"
V1_5 = json.loads(Path(__file__).with_name("v1_5.json").read_text("utf-8"))  # its small files
PARTS = {  # of a pipeline, and how the names of their weights begin in a single file
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
CONFIG_KEYS = {  # of diffusers' files: our words for them
    "unet/config.json": {
        "sample_size": "size",  # of the latents
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "block_out_channels": "channels",
        "layers_per_block": "num_res_blocks",
        "down_block_types": "attention_levels",
        "attention_head_dim": "heads",  # a number of heads, whatever the name says
        "norm_num_groups": "groups",
    },
    "vae/config.json": {
        "in_channels": "in_channels",
        "latent_channels": "latent_channels",
        "block_out_channels": "channels",
        "layers_per_block": "num_res_blocks",
        "norm_num_groups": "groups",
        "scaling_factor": "scaling_factor",
    },
    "text_encoder/config.json": {
        "vocab_size": "vocab_size",
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "length",
        "intermediate_size": "hidden",
    },
    "scheduler/scheduler_config.json": {
        "num_train_timesteps": "T",
        "prediction_type": "prediction",
        "timestep_spacing": "spacing",
    },
}
REQUIRED = V1_5.pop("required")  # entries that our networks and schedules cannot vary
SCHEDULES = {  # ours, and how a scheduler_config.json describes them
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
LEGACY_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Pipeline:
    """From a single file with CompVis' names (.safetensors, .ckpt), or a folder of diffusers.

    dtype: what to compute in. None: the U-Net's, but on a CPU float32 rather than 16 bits.
    """
    path = Path(path)
    if path.is_dir():
        layout, tokenizer = DIFFUSERS, path / "tokenizer"
        configs = {part: read_config(path, part) for part in PARTS}
        training = read_scheduler(path)
        files = {part: weights_file(path / part) for part in PARTS}
        tensors = {part: modern_names(read_tensors(file)) for part, file in files.items()}
    else:
        layout, tokenizer = COMPVIS, path.parent
        files = dict.fromkeys(PARTS, path)
        content = read_tensors(path)
        tensors = {part: modern_names(content, prefix) for part, prefix in PARTS.items()}
        configs = {part: read_sizes(tensors[part], path, part) for part in PARTS}
        training = {"schedule": NoiseSchedule.scaled_linear()}

    size, text = configs["unet"].pop("size"), configs["text_encoder"]
    with torch.device("meta"):  # shapes only: the weights are those of the files
        attention = functools.partial(SpatialTransformer, context_width=text["width"])
        networks = {
            "unet": UNet(**configs["unet"], attention_block=attention),
            "vae": VAE(**configs["vae"]),
            "text_encoder": TextEncoder(**text),
        }
    for part, network in networks.items():
        load_weights(part, network, tensors[part], layout, files[part])
    if dtype is None:
        dtype = networks["unet"].conv_in.weight.dtype
        if torch.device(device).type == "cpu":
            dtype = torch.promote_types(dtype, torch.float32)
    for network in networks.values():
        network.to(device, dtype).eval().requires_grad_(False)
    return Pipeline(
        **networks,
        **training,
        tokenizer=find_tokenizer(tokenizer, text),
        size=size * networks["vae"].downsampling,
    )


# Reading weights.


def weights_file(folder: Path) -> Path:
    """Of several files the one with the shortest name: not the .fp16, not the .non_ema."""
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    if not files:
        raise UserError(f"{folder}: expected weights, a .safetensors or .bin file")
    return min(files, key=lambda file: len(file.name))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Mapped into memory: what is not used is never read. Nothing in the file is executed."""
    with system_errors(path):
        path.open("rb").close()
    verify_checksum(path)
    checkpoint = type("ModelCheckpoint", (), {})  # in place of Lightning's, which a .ckpt names
    scalar = np.float64().__reduce__()[0]  # makes a number of NumPy from bytes
    harmless = [
        (checkpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
        (scalar, "numpy.core.multiarray.scalar"),  # as NumPy 1 called it
        scalar,
        np.dtype,
        type(np.dtype("float64")),
    ]
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        is_zip = zipfile.is_zipfile(path)
        if is_zip and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError("compressed, which torch.save never does: it may unpack to any size")
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        content = content.get("state_dict", content)
        return {name: w for name, w in content.items() if isinstance(w, Tensor)}
    except Exception as error:  # whatever the bytes lead to
        raise UserError(
            f"{path}: expected a whole .safetensors, .ckpt or .bin file of weights; this one is "
            "damaged or of another kind"
        ) from error


def modern_names(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The weights of one network, under the names that they have today."""
    modern = {}
    for name, w in tensors.items():
        if name.startswith(prefix) and not name.endswith("position_ids"):
            name = name.removeprefix(prefix).removeprefix("text_model.")
            for old, new in LEGACY_NAMES.items():  # of the VAE's attention
                name = name.replace(f".{old}.", f".{new}.")
            modern[name] = w
    return {name: w for name, w in modern.items() if not name.startswith("loss.")}


def load_weights(
    part: str, network: nn.Module, tensors: dict[str, Tensor], layout: int, path: Path
) -> None:
    """Give a network these tensors: all that it needs, and nothing else."""
    own, weights, wrong = network.state_dict(), {}, []
    for theirs, ours in name_pairs(part, network, layout):
        w, shape = tensors.pop(theirs, None), own[ours].shape
        if w is not None and w.shape == (*shape, 1, 1):
            w = w[:, :, 0, 0]  # a 1x1 convolution is a linear layer
        weights[ours] = w
        if w is None or w.shape != shape:
            got = "is missing" if w is None else f"is {tuple(w.shape)}"
            wrong.append(f"{theirs} {got}, expected {tuple(shape)}")
        elif not is_whole(w):
            wrong.append(f"{theirs} has not all of its numbers, or not all of them are finite")
    wrong += [f"{name} is not known" for name in tensors]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path}: {EXPECTED}, but {'; '.join(wrong[:3])}{more}")
    network.load_state_dict(weights, assign=True)


def is_whole(w: Tensor) -> bool:
    """Finite floating-point numbers, each of them in the file? A stride of 0 claims any size."""
    plain = w.layout == torch.strided and w.dtype in FLOATS and not w.is_meta
    there = plain and w.nbytes <= w.untyped_storage().nbytes()
    return there and bool(torch.stack(w.aminmax()).isfinite().all())


# Reading configurations.


def read_entries(folder: Path, name: str) -> dict:
    """Of one of the small files. What it does not say is as in v1.5."""
    path = folder / name
    with system_errors(path):
        content = path.read_bytes()
    try:
        entries = V1_5[name] | json.loads(content)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: expected a JSON object; the file is damaged") from error
    for key, usual in V1_5[name].items():
        value = entries[key]
        if key in REQUIRED and value != usual:
            raise UserError(f"{path}: {EXPECTED}, with {key} {usual}, got {value!r:.60}")
        if key in CONFIG_KEYS[name] and not is_plausible(value, usual):
            raise UserError(f"{path}: expected a {key} like {usual}, got {value!r:.60}")
    return entries


def is_plausible(value: object, usual: object) -> bool:
    """Of the same kind, and not larger by far? Asked before anything is built."""
    if isinstance(usual, list):
        few = isinstance(value, list) and 1 <= len(value) <= 10
        return few and all(is_plausible(one, usual[0]) for one in value)
    if isinstance(usual, str):
        return isinstance(value, str)
    return type(value) in (int, type(usual)) and 0 < value <= 50 * usual


def read_config(folder: Path, part: str) -> dict:
    name = f"{part}/config.json"
    return our_config(read_entries(folder, name), name, folder / name)


def read_sizes(tensors: dict[str, Tensor], path: Path, part: str) -> dict:
    """In place of a config.json: v1.5's structure, with the sizes of these tensors."""

    def size(layer: str, dim: int = 0) -> int:
        w = tensors.get(f"{layer}.weight")
        if w is None or w.ndim <= dim or w.numel() == 0:
            raise UserError(f"{path}: {EXPECTED}, but {layer}.weight is missing")
        return w.shape[dim]

    if part == "unet":
        blocks = [f"input_blocks.{i}.0.out_layers.3" for i in (1, 4, 7, 10)]
        sizes = {
            "in_channels": size("input_blocks.0.0", dim=1),  # 9: for inpainting
            "block_out_channels": [size(block) for block in blocks],
        }
    elif part == "vae":
        blocks = [f"encoder.down.{level}.block.0.conv1" for level in range(4)]
        sizes = {"block_out_channels": [size(block) for block in blocks]}
    else:
        width = size("embeddings.token_embedding", dim=1)
        layers = [i for i in range(100) if f"encoder.layers.{i}.mlp.fc1.weight" in tensors]
        sizes = {
            "vocab_size": size("embeddings.token_embedding"),
            "hidden_size": width,
            "num_hidden_layers": len(layers),
            "num_attention_heads": max(1, width // 64),
            "max_position_embeddings": size("embeddings.position_embedding"),
            "intermediate_size": size("encoder.layers.0.mlp.fc1"),
        }
    name = f"{part}/config.json"
    return our_config(V1_5[name] | sizes, name, path)


def our_config(entries: dict, name: str, path: Path) -> dict:
    """The arguments of our network."""
    config = {ours: entries[key] for key, ours in CONFIG_KEYS[name].items()}
    channels = config.get("channels") or [config["width"]]
    attention = [
        kind == "CrossAttnDownBlock2D" for kind in config.get("attention_levels", channels)
    ]
    if "attention_levels" in config:
        config["attention_levels"] = attention
    attended = [*itertools.compress(channels, attention), channels[-1]]
    groups, heads = config.get("groups", 1), config.get("heads", 1)
    uneven = any(c % groups for c in channels) or any(c % heads for c in attended)
    if uneven or len(channels) != len(attention):
        raise UserError(f"{path}: its levels, groups and heads do not fit its channels, {channels}")
    return config


def read_scheduler(folder: Path) -> dict:
    """How the U-Net was trained. As v1.5 where the file is silent, or not there."""
    name = "scheduler/scheduler_config.json"
    entries = read_entries(folder, name) if (folder / name).exists() else V1_5[name]
    names = [name for name, ours in SCHEDULES.items() if entries | ours == entries]
    prediction, spacing = entries["prediction_type"], entries["timestep_spacing"]
    if not names or prediction not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{folder / name}: expected the prediction_type epsilon or v_prediction, and a "
            f"beta_schedule of {[*SCHEDULES.values()]}"
        )
    return {
        "schedule": getattr(NoiseSchedule, names[0])(entries["num_train_timesteps"]),
        "prediction": prediction,
        "spacing": "trailing" if spacing == "trailing" else "leading",
    }


def find_tokenizer(folder: Path, text: dict) -> Tokenizer:
    if not any((folder / name).exists() for name in ("tokenizer.json", "merges.txt")):
        raise UserError(
            f"{folder}: expected a tokenizer.json or merges.txt, to read prompts with; CLIP's "
            "merges.txt is in the folder `tokenizer` of any Stable Diffusion v1.x of diffusers"
        )
    tokenizer = Tokenizer.load(folder, text["length"])
    largest = max(tokenizer.rules.get_vocab().values())
    if largest >= text["vocab_size"]:
        raise UserError(f"{folder}: token {largest} is not one of the text encoder's")
    return tokenizer


# Writing.


def save(pipeline: Pipeline, folder: str | Path) -> None:
    """A folder in diffusers' layout, in half precision, for `load` and for diffusers."""
    folder, tokenizer = Path(folder), pipeline.tokenizer
    unet, vae, text = pipeline.unet, pipeline.vae, pipeline.text_encoder
    cross = ["CrossAttn" if here else "" for here in unet.config["attention_levels"]]
    levels = len(vae.config["channels"])
    ours = {  # the values of CONFIG_KEYS
        "unet/config.json": unet.config
        | {
            "size": pipeline.size // vae.downsampling,
            "attention_levels": [f"{kind}DownBlock2D" for kind in cross],
        },
        "vae/config.json": vae.config | {"scaling_factor": vae.scaling_factor},
        "text_encoder/config.json": text.config,
        "scheduler/scheduler_config.json": {
            "T": pipeline.schedule.T,
            "prediction": pipeline.prediction,
            "spacing": pipeline.spacing,
        },
    }
    theirs = {  # what only diffusers and transformers read
        "unet/config.json": {
            "cross_attention_dim": text.config["width"],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(cross)],
        },
        "vae/config.json": {
            "out_channels": vae.config["in_channels"],
            "sample_size": pipeline.size,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        },
        "text_encoder/config.json": {
            "bos_token_id": tokenizer.start,
            "eos_token_id": tokenizer.end,
            "pad_token_id": tokenizer.end,
        },
        "tokenizer/tokenizer_config.json": {
            "model_max_length": tokenizer.length,
            "unk_token": UNKNOWN if tokenizer.rules.token_to_id(UNKNOWN) is not None else END,
        },
        "scheduler/scheduler_config.json": SCHEDULES[pipeline.schedule.name]
        | {"set_alpha_to_one": pipeline.spacing == "trailing"},
    }
    for name, usual in V1_5.items():
        translated = {key: ours[name][word] for key, word in CONFIG_KEYS.get(name, {}).items()}
        content = usual | translated | theirs.get(name, {})
        write(folder / name, (json.dumps(content, indent=2) + "\n").encode())
    write(folder / "tokenizer" / "tokenizer.json", tokenizer.rules.to_str(pretty=True).encode())
    for part, network in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        stem, prefix = (
            ("model", "text_model.") if network is text else ("diffusion_pytorch_model", "")
        )
        weights = network.state_dict()
        tensors = {
            prefix + name: weights[own].half().cpu().contiguous()
            for name, own in name_pairs(part, network, DIFFUSERS)
        }
        content = safetensors.torch.save(tensors, {"format": "pt"})
        write(folder / part / f"{stem}.safetensors", content)


def write(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
