"""A model to share, in one file: what it takes to rebuild the network, and its (averaged) weights in 16 bits."""

import difflib
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from processes import NoiseSchedule
from toolbox.files import whole_file
from unet import UNet

FORMAT = 1
READY = Path(__file__).parent.parent / "models"  # NAME.pt in there can be asked for as NAME


def card(network: UNet, schedule: NoiseSchedule, size: int, data: str, classes: Sequence[str] = ()) -> dict:
    """All that is needed to rebuild and to run a network but its weights; numbers, words and lists only."""
    return {
        "format": FORMAT,
        "network": network.config,
        "schedule": {"name": schedule.name, "T": schedule.T},
        "size": size,
        "channels": network.config["in_channels"],
        "data": data,
        "classes": list(classes),
    }


def save_model(path: Path, network: nn.Module, card: dict) -> None:
    """Float16 halves the file; rounding the weights to 11 bits changes the ready model's predicted noise by 0.0004."""
    weights = {name: w.detach().half().cpu().contiguous() for name, w in network.state_dict().items()}
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        torch.save(card | {"weights": weights}, file)


def load_model(name: str | Path, device: torch.device | str = "cpu") -> tuple[UNet, NoiseSchedule, dict]:
    """From a file, or the name of a ready model: the network, its schedule, and the file's other entries."""
    path = find_model(name)
    content = read(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or "network" not in content:
        raise ValueError(f"{path}: expected a model.pt of this project (format {FORMAT}), this is a file of another kind")
    try:
        network = UNet(**content["network"])
        network.load_state_dict(content.pop("weights"))
        schedule = getattr(NoiseSchedule, content["schedule"]["name"])(content["schedule"]["T"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{path}: its weights do not fit the network that it describes; the file is damaged ({error})"
        ) from error
    return network.to(device).eval(), schedule, content


def find_model(name: str | Path) -> Path:
    ready = {path.stem: path for path in sorted(READY.glob("*.pt"))}
    if Path(name).is_file():
        return Path(name)
    if str(name) in ready:
        return ready[str(name)]
    near = difflib.get_close_matches(str(name), ready, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"--model {name}: no such file and no ready model; {hint}ready models: {', '.join(ready) or 'none'}")


def read(path: Path) -> object:
    """torch.load, without executing anything that a file may contain (weights_only)."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path}: expected a file that torch.save wrote whole; this one is damaged or of another kind"
        ) from error
