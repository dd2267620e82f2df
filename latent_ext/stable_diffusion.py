"""Stable Diffusion v1.x, and this repository's own latent models, from files and to files.

    pipeline = load("v1-5-pruned-emaonly.safetensors")  # or its .ckpt, or a folder of diffusers
    save(pipeline, "folder")  # for StableDiffusionPipeline.from_pretrained

The published weights themselves were never at hand. Names, shapes and numerics are tested with
random weights, in files laid out like the published ones, against diffusers, transformers, and
diffusers' own conversion of CompVis' names.
"""

import inspect
import itertools
import json
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from latent_ext.attention import SpatialTransformer
from latent_ext.clip import END, UNKNOWN, TextEncoder, Tokenizer
from latent_ext.pipeline import Pipeline
from latent_ext.vae import VAE
from latent_ext.weight_names import COMPVIS, CONFIG_KEYS, DIFFUSERS, name_pairs
from processes import NoiseSchedule
from toolbox.files import UserError, atomic_write, system_errors
from toolbox.models import verify_checksum
from unet import UNet

EXPECTED = "expected a Stable Diffusion v1.x (2.x and XL are others)"
V1_5 = json.loads(Path(__file__).with_name("v1_5.json").read_text("utf-8"))  # its JSON files
PREFIX = {  # of the names in a single file
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
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
    text_encoder = load_network("text_encoder", TextEncoder, path)
    attention = partial(SpatialTransformer, context_width=text_encoder.config["width"])
    unet = load_network("unet", partial(UNet, attention_block=attention), path)
    vae = load_network("vae", VAE, path)
    if unet.config["out_channels"] != vae.config["latent_channels"]:
        raise UserError(f"{path}: its U-Net and its VAE differ in the channels of their latents")
    if dtype is None:
        dtype = unet.conv_in.weight.dtype
        if torch.device(device).type == "cpu":
            dtype = torch.promote_types(dtype, torch.float32)
    for network in (unet, vae, text_encoder):
        network.to(device, dtype).eval().requires_grad_(False)
    tokenizer = load_tokenizer(path, text_encoder.config)
    settings = read_settings(path, vae.downsampling)
    return Pipeline(unet, vae, text_encoder, tokenizer, **settings)


def load_network(part: str, make: Callable[..., nn.Module], path: Path) -> nn.Module:
    """One of the three, out of the folder or of the single file."""
    name = f"{part}/config.json"
    if path.is_dir():
        layout, file, source = DIFFUSERS, weights_file(path / part), path / name
        tensors, entries = modern_names(read_tensors(file)), read_entries(source, name)
    else:
        layout, file, source = COMPVIS, path, path
        tensors = modern_names(read_tensors(file), PREFIX[part])
        entries = check_entries(name, read_sizes(part, tensors, path), path)
    config = our_config(make, entries, source)
    with torch.device("meta"):  # shapes only: the weights are those of the file
        network = make(**config)
    load_weights(part, network, tensors, layout, file)
    return network


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
    named = (checkpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    scalar = np.float64().__reduce__()[0]  # makes a number of NumPy from bytes
    old_scalar = (scalar, "numpy.core.multiarray.scalar")  # as NumPy 1 called it
    harmless = [named, scalar, old_scalar, np.dtype, type(np.dtype("float64"))]
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
            wrong.append(f"{theirs} has missing or non-finite numbers")
    wrong += [f"{name} is not known" for name in tensors]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{path}: {EXPECTED}, but {'; '.join(wrong[:3])}{more}. If you changed the networks, "
            "undo that or train anew"
        )
    network.load_state_dict(weights, assign=True)


def is_whole(w: Tensor) -> bool:
    """Finite floating-point numbers, each of them in the file? A stride of 0 claims any size."""
    plain = w.layout == torch.strided and w.dtype in FLOATS and not w.is_meta
    there = plain and w.nbytes <= w.untyped_storage().nbytes()
    return there and bool(torch.stack(w.aminmax()).isfinite().all())


# Reading configurations.


def read_entries(file: Path, name: str) -> dict:
    """Of one of the JSON files of a folder."""
    with system_errors(file):
        content = file.read_bytes()
    try:
        return check_entries(name, {} | json.loads(content), file)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: expected a JSON object; this one is damaged") from error


def check_entries(name: str, given: dict, path: Path) -> dict:
    """These entries of a JSON file, and v1.5's where they are silent, before anything is built."""
    entries = {key: given.get(key, usual) for key, usual in V1_5[name].items()}
    for key, usual in V1_5[name].items():
        value = entries[key]
        if key in REQUIRED and value != usual:
            raise UserError(f"{path}: {EXPECTED}, with {key} {usual}, got {value!r:.60}")
        if key in CONFIG_KEYS and not is_plausible(value, usual):
            raise UserError(f"{path}: expected {key} to be like {usual}, got {value!r:.60}")
    return entries


def is_plausible(value: object, usual: object) -> bool:
    """Of the same type as in v1.5, and not larger by far?"""
    if isinstance(usual, list):
        few = isinstance(value, list) and 1 <= len(value) <= 8
        return few and all(is_plausible(one, usual[0]) for one in value)
    if isinstance(usual, str):
        return isinstance(value, str)
    most = (20 if isinstance(usual, int) else 1000) * usual
    return type(value) in (int, type(usual)) and 0 < value <= most


def read_sizes(part: str, tensors: dict[str, Tensor], path: Path) -> dict:
    """In place of a config.json: the entries in which these tensors may differ from v1.5's."""

    def size(layer: str, dim: int = 0) -> int:
        w = tensors.get(f"{layer}.weight")
        if w is None or w.ndim <= dim or w.numel() == 0:
            raise UserError(
                f"{path}: {EXPECTED}, but {layer}.weight is missing; of a model in diffusers' "
                "layout, name the folder"
            )
        return w.shape[dim]

    if part == "unet":
        blocks = [f"input_blocks.{i}.0.out_layers.3" for i in (1, 4, 7, 10)]
        inputs = size("input_blocks.0.0", dim=1)  # 9: for inpainting
        return {"in_channels": inputs, "block_out_channels": [size(block) for block in blocks]}
    if part == "vae":
        blocks = [f"encoder.down.{level}.block.0.conv1" for level in range(4)]
        return {"block_out_channels": [size(block) for block in blocks]}
    width = size("embeddings.token_embedding", dim=1)
    layers = [i for i in range(100) if f"encoder.layers.{i}.mlp.fc1.weight" in tensors]
    return {
        "vocab_size": size("embeddings.token_embedding"),
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": size("embeddings.position_embedding"),
        "intermediate_size": size("encoder.layers.0.mlp.fc1"),
    }


def our_config(make: Callable[..., nn.Module], entries: dict, path: Path) -> dict:
    """The arguments of `make`, checked: groups and heads show in the shape of no weight."""
    ours = {CONFIG_KEYS.get(key): value for key, value in entries.items()}
    config = {key: ours[key] for key in inspect.signature(make).parameters if key in ours}
    channels = config.get("channels") or [config["width"]]
    attended = channels
    if "attention_levels" in config:
        levels = [kind == "CrossAttnDownBlock2D" for kind in config["attention_levels"]]
        config["attention_levels"] = levels
        attended = [*itertools.compress(channels, levels), channels[-1]]
    uneven = any(c % config.get("groups", 1) for c in channels)
    uneven |= any(c % config.get("heads", 1) for c in attended)
    if uneven or len(config.get("attention_levels", channels)) != len(channels):
        raise UserError(f"{path}: its levels, groups and heads do not fit its channels, {channels}")
    return config


def read_settings(path: Path, downsampling: int) -> dict:
    """How the U-Net was trained. As v1.5 where a file is silent, or not there."""
    scheduler, unet = "scheduler/scheduler_config.json", "unet/config.json"
    file = path / scheduler
    entries = read_entries(file, scheduler) if file.exists() else V1_5[scheduler]
    size = (read_entries(path / unet, unet) if path.is_dir() else V1_5[unet])["sample_size"]
    names = [name for name, ours in SCHEDULES.items() if entries | ours == entries]
    prediction, spacing = entries["prediction_type"], entries["timestep_spacing"]
    if not names or prediction not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{file}: expected the prediction_type epsilon or v_prediction, and a "
            f"beta_schedule of {[*SCHEDULES.values()]}"
        )
    return {
        "schedule": getattr(NoiseSchedule, names[0])(entries["num_train_timesteps"]),
        "prediction": prediction,
        "spacing": "trailing" if spacing == "trailing" else "leading",
        "size": size * downsampling,
    }


def load_tokenizer(path: Path, text: dict) -> Tokenizer:
    folder = path / "tokenizer" if path.is_dir() else path.parent
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
    changes = {  # of v1.5's JSON files, in our words where CONFIG_KEYS has them
        "unet/config.json": {
            **unet.config,
            "size": pipeline.size // vae.downsampling,
            "attention_levels": [f"{kind}DownBlock2D" for kind in cross],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(cross)],
            "cross_attention_dim": text.config["width"],
        },
        "vae/config.json": {
            **vae.config,
            "size": pipeline.size,
            "scaling_factor": vae.scaling_factor,
            "out_channels": vae.config["in_channels"],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        },
        "text_encoder/config.json": {
            **text.config,
            "bos_token_id": tokenizer.start,
            "eos_token_id": tokenizer.end,
            "pad_token_id": tokenizer.end,
        },
        "tokenizer/tokenizer_config.json": {
            "model_max_length": tokenizer.length,
            "unk_token": UNKNOWN if tokenizer.rules.token_to_id(UNKNOWN) is not None else END,
        },
        "scheduler/scheduler_config.json": {
            **SCHEDULES[pipeline.schedule.name],
            "T": pipeline.schedule.T,
            "prediction": pipeline.prediction,
            "spacing": pipeline.spacing,
            "set_alpha_to_one": pipeline.spacing == "trailing",
        },
    }
    for name, usual in V1_5.items():
        new = usual | changes.get(name, {})
        content = {key: new.get(CONFIG_KEYS.get(key), new[key]) for key in usual}
        write(folder / name, (json.dumps(content, indent=2) + "\n").encode())
    write(folder / "tokenizer" / "tokenizer.json", tokenizer.rules.to_str(pretty=True).encode())

    for part, network in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        file, prefix, weights = "diffusion_pytorch_model", "", network.state_dict()
        if network is text:
            file, prefix = "model", "text_model."  # without the prefix transformers 4 fails
        tensors = {
            prefix + theirs: weights[ours].half().cpu().contiguous()
            for theirs, ours in name_pairs(part, network, DIFFUSERS)
        }
        content = safetensors.torch.save(tensors, {"format": "pt"})
        write(folder / part / f"{file}.safetensors", content)


def write(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
