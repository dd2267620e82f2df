"""A model to share in one file: the numbers that rebuild the network, and its EMA weights."""

import difflib
import hashlib
import inspect
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from processes import NoiseSchedule, noise_from_v, noise_from_velocity
from toolbox.files import UserError, system_errors, write_file
from unet import UNet

FORMAT = 3
OWN_MODEL = Path("runs/cats/model.pt")  # of `python train.py`
PRETRAINED = Path(__file__).resolve().parent.parent / "models"  # models/NAME.pt is called NAME
SCHEDULES = {
    name: getattr(NoiseSchedule, name)
    for name, kind in vars(NoiseSchedule).items()
    if isinstance(kind, classmethod) and not name.startswith("from_")
}
PREDICTIONS = {  # what a network outputs -> how predict_noise follows from it
    "noise": lambda network, schedule: network,
    "v": noise_from_v,
    "velocity": noise_from_velocity,
}
FORMAT_2 = {"widths": "channels", "blocks": "num_res_blocks", "attention": "attention_levels"}


def model_config(
    network: UNet, schedule: NoiseSchedule, size: int, data: str, prediction: str = "v", **more
) -> dict:
    """Describe the network in numbers, words and lists, to rebuild and run it. `more` is added."""
    make = SCHEDULES.get(schedule.name)
    if make is None or not torch.equal(make(schedule.T).alpha_bar, schedule.alpha_bar):
        expected = f"NoiseSchedule.{schedule.name}(T), a classmethod, must make it"
        raise ValueError(f"a model file cannot describe the schedule {schedule.name!r}: {expected}")
    return {
        "format": FORMAT,
        "network": network.config,
        "prediction": prediction,
        "schedule": {"name": schedule.name, "T": schedule.T},
        "size": size,
        "channels": network.config["in_channels"],
        "data": data,
    } | more


def save_model(path: Path, network: nn.Module, config: dict) -> None:
    """Save in float16, which halves the file and changes a predicted noise by 0.0004."""
    state = network.state_dict()
    weights = {name: w.detach().half().cpu().contiguous() for name, w in state.items()}
    write(path, config | {"weights": weights})


def load_model(
    name: str | Path, device: torch.device | str = "cpu", make: type[nn.Module] = UNet
) -> tuple[nn.Module, NoiseSchedule, dict]:
    """A network of class `make`, its schedule and configuration, by file or pretrained name."""
    path = find_model(name)
    if path.is_dir():
        raise UserError(f"{path}: use python -m latent_ext.generate for this one")
    content = read(path)
    if content.get("format") not in (2, FORMAT):
        raise UserError(f"{path}: expected a model.pt of this repository (format {FORMAT})")
    config, weights = content["network"], content.pop("weights")
    if content["format"] == 2:
        content["prediction"] = "v"
        config = {FORMAT_2.get(k, k): value for k, value in config.items() if value is not None}
    if ("classes" in config) != (make is not UNet):
        program = "sample.py" if make is not UNet else "-m latent_ext.generate"
        advice = f"use python {program} for this one"
        raise UserError(f"{path}: expected another kind of model; {advice}")
    if not all(w.isfinite().all() for w in weights.values()):
        raise UserError(f"{path}: this file is damaged (it has NaN in it); use another one")
    with same_network(path):
        inspect.signature(make).bind(**config)
        make_schedule = SCHEDULES[content["schedule"]["name"]]
    with torch.device("meta"):  # shapes only: the weights come from the file
        network = make(**config)
    with same_network(path):
        if content["format"] == 2:  # other names, the same order
            weights = dict(zip(network.state_dict(), weights.values(), strict=True))
        network.load_state_dict(weights, assign=True)
    schedule = make_schedule(content["schedule"]["T"])
    return network.float().to(device).eval(), schedule, content


@contextmanager
def same_network(path: Path) -> Iterator[None]:
    """If unet.py has changed since, say so; nothing else can go wrong in here."""
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        sentence = f"made by another network than unet.py now describes ({reason:.200})"
        raise UserError(f"{path}: {sentence}; train anew, or undo the change") from error


def predict_noise_of(network: nn.Module, schedule: NoiseSchedule, config: dict) -> Callable:
    """predict_noise(x_t, t, *context) of a loaded network, whatever it outputs."""
    return PREDICTIONS[config["prediction"]](network, schedule)


def default_model() -> str | Path:
    return OWN_MODEL if OWN_MODEL.exists() else "cats"


def find_model(name: str | Path) -> Path:
    """The file or pipeline folder of this path, or of this name in PRETRAINED."""
    path = Path(name)
    for found in (path, PRETRAINED / f"{name}.pt", PRETRAINED / name):
        if found.is_file() or (found / "unet").is_dir():
            return found
    files = [*PRETRAINED.glob("*.pt"), *(folder.parent for folder in PRETRAINED.glob("*/unet"))]
    names, inside = sorted(file.stem for file in files), path / "model.pt"
    near = [inside] if inside.is_file() else difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    hint += f"pretrained models: {', '.join(names)}"
    raise UserError(f"--model {name}: no such model file; {hint}")


def read(path: Path) -> dict:
    """torch.load without executing anything that a file may contain (weights_only)."""
    verify_checksum(path)
    with system_errors(path):
        content = io.BytesIO(path.read_bytes())
    try:
        return dict(torch.load(content, map_location="cpu", weights_only=True))
    except Exception as error:  # damaged bytes can raise anything
        sentence = "expected a file of torch.save with named entries; this one is damaged"
        raise UserError(f"{path}: {sentence}") from error


def write(path: Path, content: dict) -> None:
    """torch.save, all or nothing."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


def verify_checksum(path: Path) -> None:
    """Refuse a pretrained model that is not the very file that models/SHA256SUMS lists."""
    path = path.resolve()
    if PRETRAINED not in path.parents:
        return
    for line in (PRETRAINED / "SHA256SUMS").read_text("utf-8").splitlines():
        checksum, name = line.split(maxsplit=1)
        if path == PRETRAINED / name and checksum != hashlib.sha256(path.read_bytes()).hexdigest():
            advice = "`git checkout` brings that one back; put a model of your own elsewhere"
            sentence = "this is not the pretrained model that models/SHA256SUMS lists"
            raise UserError(f"{path}: {sentence}; {advice}")
