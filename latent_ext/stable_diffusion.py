"""Read and write Stable Diffusion v1.x, and this repository's own latent models.

    pipeline = load("v1-5-pruned-emaonly.safetensors")  # or its .ckpt, or diffusers' folder
    save(pipeline, "folder")  # for StableDiffusionPipeline.from_pretrained

We never had the published weights. Tests compare names, shapes and numbers with diffusers and
transformers, using random weights in files laid out like the published ones.
"""

import inspect
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
from toolbox.files import UserError, system_errors, write_file
from toolbox.models import verify_checksum
from unet import UNet

EXPECTED = "expected a Stable Diffusion v1.x model (2.x and XL differ)"
V1_5 = json.loads(Path(__file__).with_name("v1_5.json").read_text("utf-8"))  # v1.5's JSON
REQUIRED = V1_5.pop("required")  # entries that our networks and schedules cannot vary
SCHEDULER = "scheduler/scheduler_config.json"
SCHEDULES = {  # ours, and how a scheduler_config.json describes them
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PREFIX = {  # of the names in a single file
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
LEGACY_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Pipeline:
    """Read a single file with CompVis' names (.safetensors, .ckpt), or a folder of diffusers.

    dtype: what to compute in. None: that of the U-Net's weights, but float32 instead of 16 bits.
    """
    path = Path(path)
    text_encoder = load_network("text_encoder", TextEncoder, path)
    attention = partial(SpatialTransformer, context_width=text_encoder.config["width"])
    unet = load_network("unet", partial(UNet, attention_block=attention), path)
    vae = load_network("vae", VAE, path)
    if unet.config["out_channels"] != vae.config["latent_channels"]:
        raise UserError(f"{path}: its U-Net and its VAE differ in the number of latent channels")
    dtype = dtype or torch.promote_types(unet.conv_in.weight.dtype, torch.float32)
    for network in (unet, vae, text_encoder):
        network.to(device, dtype).eval().requires_grad_(False)
    tokenizer = load_tokenizer(path, text_encoder.config)
    settings = read_settings(path, vae.downsampling)
    return Pipeline(unet, vae, text_encoder, tokenizer, **settings)


def load_network(part: str, make: Callable[..., nn.Module], path: Path) -> nn.Module:
    """One of the three networks, from the folder or from the single file."""
    name = f"{part}/config.json"
    if path.is_dir():
        layout, file, source = DIFFUSERS, weights_file(path / part), path / name
        tensors, entries = modern_names(read_tensors(file)), read_entries(source, name)
    else:
        layout, file, source = COMPVIS, path, path
        tensors = modern_names(read_tensors(file), PREFIX[part])
        entries = check_entries(name, read_sizes(part, tensors), path)
    ours = {CONFIG_KEYS.get(key): value for key, value in entries.items()}
    kinds = ours.get("attention_levels", [])
    ours["attention_levels"] = [kind == "CrossAttnDownBlock2D" for kind in kinds]
    config = {key: ours[key] for key in inspect.signature(make).parameters if key in ours}
    try:
        with torch.device("meta"):  # shapes only: the weights come from the file
            network = make(**config)
    except ValueError as error:  # such as groups or heads that do not divide the channels
        raise UserError(f"{source}: {error}") from error
    load_weights(part, network, tensors, layout, file)
    return network


# Reading weights.


def weights_file(folder: Path) -> Path:
    """The file with the shortest name, so neither .fp16 nor .non_ema."""
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    if not files:
        raise UserError(f"{folder}: expected weights, a .safetensors or .bin file")
    return min(files, key=lambda file: len(file.name))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map the file into memory: unused tensors are never read. Nothing in the file is executed."""
    with system_errors(path):
        path.open("rb").close()
    verify_checksum(path)
    checkpoint = type("ModelCheckpoint", (), {})  # stands for Lightning's, which a .ckpt names
    named = (checkpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    scalar = np.float64().__reduce__()[0]  # makes a NumPy number from bytes
    old_scalar = (scalar, "numpy.core.multiarray.scalar")  # as NumPy 1 called it
    harmless = [named, scalar, old_scalar, np.dtype, type(np.dtype("float64"))]
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        is_zip = zipfile.is_zipfile(path)
        if is_zip and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError("compressed, which torch.save never does, and mmap misreads")
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        content = content.get("state_dict", content)
        return {name: w for name, w in content.items() if isinstance(w, Tensor)}
    except Exception as error:  # damaged bytes can raise anything
        raise UserError(
            f"{path}: expected a whole .safetensors, .ckpt or .bin file of weights; this one is "
            "damaged or of another kind"
        ) from error


def modern_names(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The weights of one network, under the names that diffusers and transformers use today."""
    modern = {}
    for name, w in tensors.items():
        new = name.removeprefix(prefix).removeprefix("text_model.")
        for legacy, today in LEGACY_NAMES.items():  # in the VAE's attention
            new = new.replace(f".{legacy}.", f".{today}.")
        unused = new.startswith("loss.") or new.endswith("position_ids")
        if name.startswith(prefix) and not unused:
            modern[new] = w
    return modern


def load_weights(
    part: str, network: nn.Module, tensors: dict[str, Tensor], layout: int, path: Path
) -> None:
    """Load these tensors into a network; it must need all of them and no others."""
    own, weights, wrong = network.state_dict(), {}, []
    for theirs, ours in name_pairs(part, network, layout):
        w, shape = tensors.pop(theirs, None), own[ours].shape
        if w is None:
            wrong.append(f"{theirs} is missing")
            continue
        if w.shape == (*shape, 1, 1):
            w = w[:, :, 0, 0]  # a 1x1 convolution is a linear layer
        weights[ours] = w
        if w.shape != shape or not is_whole(w):
            wrong.append(f"{theirs} {tuple(w.shape)} is not {tuple(shape)} finite numbers")
    wrong += [f"{name} is not known" for name in tensors]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{path}: {EXPECTED}, but {'; '.join(wrong[:3])}{more}. If you changed the networks, "
            "undo that or train anew"
        )
    network.load_state_dict(weights, assign=True)


def is_whole(w: Tensor) -> bool:
    """Are all numbers finite floats, and all in the file? (A stride of 0 claims any size.)"""
    plain = w.layout == torch.strided and w.dtype in FLOATS and not w.is_meta
    there = plain and w.nbytes <= w.untyped_storage().nbytes()
    return there and bool(torch.stack(w.aminmax()).isfinite().all())


# Reading configurations.


def read_entries(file: Path, name: str) -> dict:
    """Read a JSON file of a folder, and check its entries."""
    with system_errors(file):
        content = file.read_bytes()
    try:
        return check_entries(name, {} | json.loads(content), file)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: expected a JSON object; this one is damaged") from error


def check_entries(name: str, given: dict, path: Path) -> dict:
    """Check the entries of a JSON file before anything is built; v1.5's replace missing ones."""
    entries = {key: given.get(key, usual) for key, usual in V1_5[name].items()}
    for key, usual in V1_5[name].items():
        plausible = key not in CONFIG_KEYS or is_plausible(entries[key], usual)
        if not plausible or (key in REQUIRED and entries[key] != usual):
            raise UserError(f"{path}: {EXPECTED}, with {key} {usual}, got {entries[key]!r:.60}")
    return entries


def is_plausible(value: object, usual: object) -> bool:
    """Is the value of the same type as v1.5's, and not far larger?"""
    if isinstance(usual, list):
        few = isinstance(value, list) and 1 <= len(value) <= 8
        return few and all(is_plausible(one, usual[0]) for one in value)
    if isinstance(usual, str):
        return isinstance(value, str)
    most = (20 if isinstance(usual, int) else 1000) * usual
    return type(value) in (int, type(usual)) and 0 < value <= most


def read_sizes(part: str, tensors: dict[str, Tensor]) -> dict:
    """Without a config.json, read from the tensors' shapes what may differ from v1.5."""

    def size(layer: str, dim: int = 0) -> int:
        return tensors[f"{layer}.weight"].shape[dim]

    try:
        if part == "unet":
            blocks = [f"input_blocks.{i}.0.out_layers.3" for i in (1, 4, 7, 10)]
            inputs = size("input_blocks.0.0", dim=1)  # 9 for inpainting
            return {"in_channels": inputs, "block_out_channels": [size(block) for block in blocks]}
        if part == "vae":
            blocks = [f"encoder.down.{level}.block.0.conv1" for level in range(4)]
            return {"block_out_channels": [size(block) for block in blocks]}
        width = size("embeddings.token_embedding", dim=1)
        return {
            "vocab_size": size("embeddings.token_embedding"),
            "hidden_size": width,
            "num_hidden_layers": sum(name.endswith(".mlp.fc1.weight") for name in tensors),
            "num_attention_heads": max(1, width // 64),
            "max_position_embeddings": size("embeddings.position_embedding"),
            "intermediate_size": size("encoder.layers.0.mlp.fc1"),
        }
    except (KeyError, IndexError):
        return {}  # then load_weights says what is missing


def read_settings(path: Path, downsampling: int) -> dict:
    """How the U-Net was trained. v1.5's settings replace missing files and entries."""
    file, unet = path / SCHEDULER, "unet/config.json"
    entries = read_entries(file, SCHEDULER) if file.exists() else V1_5[SCHEDULER]
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
    tokenizer = Tokenizer.load(folder, text["length"])
    largest = max(tokenizer.rules.get_vocab().values())
    if largest >= text["vocab_size"]:
        raise UserError(f"{folder}: token {largest} is not one of the text encoder's")
    return tokenizer


# Writing.


def save(pipeline: Pipeline, folder: str | Path) -> None:
    """Write a folder in diffusers' layout, in half precision, for `load` and for diffusers."""
    folder, tokenizer = Path(folder), pipeline.tokenizer
    unet, vae, text = pipeline.unet, pipeline.vae, pipeline.text_encoder
    cross = ["CrossAttn" if here else "" for here in unet.config["attention_levels"]]
    levels = len(vae.config["channels"])
    changes = {  # to v1.5's JSON files, under our names if CONFIG_KEYS has them
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
        SCHEDULER: {
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
        write_file(folder / name, (json.dumps(content, indent=2) + "\n").encode())
    write_file(
        folder / "tokenizer" / "tokenizer.json", tokenizer.rules.to_str(pretty=True).encode()
    )

    for part, network in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        file, prefix, weights = "diffusion_pytorch_model", "", network.state_dict()
        if network is text:
            file, prefix = "model", "text_model."  # which transformers 4 needs
        tensors = {
            prefix + theirs: weights[ours].half().cpu().contiguous()
            for theirs, ours in name_pairs(part, network, DIFFUSERS)
        }
        content = safetensors.torch.save(tensors, {"format": "pt"})
        write_file(folder / part / f"{file}.safetensors", content)
