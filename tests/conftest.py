"""What the tests share: a folder of small pictures, and a training of a tiny network in a process of its own or in this one."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import toolbox.run
import train
from toolbox.cats import draw
from toolbox.pictures import save, to_image
from unet import UNet

ROOT = Path(__file__).parent.parent
TINY = {"widths": (8, 16), "blocks": 1, "attention": (False, True), "heads": 2, "groups": 4}

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder: runs/ and data/ are made in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def photos(here):
    """A folder of 12 small pictures."""
    for i, picture in enumerate(draw(12, 20)[0]):
        save(to_image(picture), here / "photos" / f"{i}.png")
    return here / "photos"


@pytest.fixture
def train_here(photos, monkeypatch, capsys):
    """train_here("--steps", 3) trains a tiny network on the photos, in this process, with a checkpoint after each step."""
    monkeypatch.setattr(train, "UNet", functools.partial(UNet, **TINY))
    monkeypatch.setattr(toolbox.run, "SAVE_EVERY", 0)
    monkeypatch.setattr(train, "show", lambda run, schedule: None)

    def run(*arguments):
        defaults = {"--data": "photos", "--size": 16, "--batch": 4, "--out": "run", "--precision": "float32", "--device": "cpu"}
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        monkeypatch.setattr(sys, "argv", ["train.py", *(str(word) for pair in (defaults | given).items() for word in pair)])
        train.main()
        return capsys.readouterr().out

    return run


def command(*words, check=True):
    """A program of this repository, as a user types it: command("train.py", ...), command("-m", "latent_ext.train", ...)."""
    program = [] if words[0] == "-m" else [str(ROOT / words[0])]
    words = [sys.executable, *program, *map(str, words[len(program) :])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # the tests' own folder is another one
    result = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)
    assert not check or result.returncode == 0, result.stderr
    return result


def checkpoint(folder):
    return torch.load(Path(folder) / "resume.pt", weights_only=True)


def flat(checkpoint):
    """All the numbers that go on: weights, averaged weights, both optimizers' states."""
    states = [state for optimizer in checkpoint["optimizers"] for state in optimizer["state"].values()]
    moments = [v for state in states for v in state.values()]
    assert len(states) == len(checkpoint["network"])  # each of the weights is one optimizer's
    return torch.cat(
        [w.double().flatten() for w in [*checkpoint["network"].values(), *checkpoint["averaged"].values(), *moments]]
    )
