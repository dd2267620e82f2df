"""A model to share, in one file: what it takes to rebuild the network, and its (averaged) weights in 16 bits."""

import difflib
import errno
import hashlib
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from processes import NoiseSchedule
from toolbox.files import check_number, whole_file
from unet import UNet

FORMAT = 2  # 1 predicted the noise itself, 2 predicts v
OWN = Path("runs/cats/model.pt")  # of `python train.py`
READY = Path(__file__).resolve().parent.parent / "models"  # NAME.pt in there can be asked for as NAME; README.md lists them
SCHEDULES = {name: getattr(NoiseSchedule, name) for name in ("linear", "scaled_linear", "cosine", "sigmoid")}


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
    write(path, card | {"weights": weights})


def load_model(
    name: str | Path, device: torch.device | str = "cpu", make: type[nn.Module] = UNet
) -> tuple[nn.Module, NoiseSchedule, dict]:
    """From a file, or the name of a ready model: the network (of the class `make`), its schedule, the file's other entries."""
    path = find_model(name)
    content = read(path)
    if isinstance(content, dict) and "settings" in content:
        raise ValueError(f"{path}: expected a model.pt, this is what a run goes on from; use the model.pt beside it")
    if not isinstance(content, dict) or str(content.get("format")) != str(FORMAT) or "network" not in content:
        raise ValueError(f"{path}: expected a model.pt of this project (format {FORMAT}), this is a file of another kind")
    by_class = isinstance(content["network"], dict) and "classes" in content["network"]
    if by_class != (make is not UNet):
        program = "python -m latent_ext.generate" if by_class else "python sample.py"
        raise ValueError(f"{path}: this model is {'' if by_class else 'not '}told what to draw; it draws with {program}")
    try:
        network, schedule = rebuild(content, make)
    except Exception as error:  # a file may say anything
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 150)
        raise ValueError(f"{path}: its entries do not fit together, the file is damaged ({reason}); use another one") from error
    return network.to(device).eval(), schedule, content


def rebuild(content: dict, make: type[nn.Module]) -> tuple[nn.Module, NoiseSchedule]:
    """What the file describes, if it works."""
    with torch.device("meta"):  # shapes only: neither memory nor time for weights that those of the file replace
        network = make(**content["network"])
    network.load_state_dict(content.pop("weights"), assign=True)
    network = network.float()
    if not all(w.isfinite().all() for w in network.parameters()):
        raise ValueError("some weights are no finite numbers")
    size, channels, name, T = content["size"], content["channels"], content["schedule"]["name"], content["schedule"]["T"]
    check_number("size", size, 1, 10_000)
    check_number("T", T, 1, 100_000)
    with torch.no_grad():  # one small picture: what could go wrong later goes wrong now
        x = torch.zeros(1, channels, 8, 8)
        if network(x, torch.zeros(1, dtype=torch.long)).shape != x.shape:
            raise ValueError("what the network predicts has another shape than the picture")
    return network, SCHEDULES[name](T)


def default_model() -> str | Path:
    return OWN if OWN.exists() else "cats"


def find_model(name: str | Path) -> Path:
    ready = {path.stem: path for path in sorted(READY.glob("*.pt"))}
    if Path(name).is_file():
        return Path(name)
    if str(name) in ready:
        return ready[str(name)]
    if Path(name).is_dir():
        raise ValueError(f"--model {name}: expected a file, this is a folder; is it {Path(name) / 'model.pt'}?")
    near = difflib.get_close_matches(str(name), ready, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"--model {name}: no such file and no ready model; {hint}ready models: {', '.join(ready) or 'none'}")


def read(path: Path) -> object:
    """torch.load, without executing anything that a file may contain (weights_only)."""
    check_published(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, FileNotFoundError):
        raise
    except Exception as error:  # whatever its bytes lead to
        raise ValueError(
            f"{path}: expected a file that torch.save wrote whole; this one is damaged or of another kind"
        ) from error


def check_published(path: Path) -> None:
    """A ready model is the very file whose checksum is listed, or it is refused."""
    path = path.resolve()
    if READY not in path.parents or not path.is_file():
        return
    listed = dict(re.findall(r"^\| `(.+?)` .* `([0-9a-f]{64})` \|$", (READY / "README.md").read_text("utf-8"), re.MULTILINE))
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    if listed.get(path.relative_to(READY).as_posix(), checksum) != checksum:
        raise ValueError(
            f"{path}: expected the ready model that {READY / 'README.md'} lists, this file has another checksum: "
            "it is damaged, or somebody's own (move that elsewhere); `git checkout` brings the ready one back"
        )


def write(path: Path, content: object) -> None:
    """torch.save, all or nothing."""
    try:
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        if "inline_container" in str(error) or "failed writing" in str(error):  # how PyTorch's zip writer says it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
