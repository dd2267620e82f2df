"""What the tests share: photos to train on, a training of a tiny network, programs that end."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import toolbox.run
import train
from toolbox.cats import ATTRIBUTES, draw
from toolbox.data import Data, to_uint8
from toolbox.files import user_errors
from toolbox.images import save_image, to_image
from toolbox.run import generator_for
from unet import UNet

ROOT = Path(__file__).parent.parent
TINY = {"channels": (8, 16), "attention_levels": (False, True), "heads": 2, "groups": 4}
FLAGS = {"--data": "photos", "--size": 16, "--batch": 4, "--out": "run", "--precision": "float32"}
FLAGS |= {"--device": "cpu"}
# Programs of the tests read from this pipe: it is closed once pytest has ended, and so do they.
STDIN, _OPEN_UNTIL_PYTEST_ENDS = os.pipe()
# The tiny training of `train_here` in a process of its own; EXTRA is code of the test.
PROGRAM = f"""
import functools, os, sys, threading, torch, toolbox.run, train
from toolbox.device import RANK, distributed
from toolbox.files import UserError, user_errors
from toolbox.run import Run
from unet import UNet

def training(words):  # what stands later overrules what stands before
    sys.argv = ["train.py", *"{" ".join(f"{flag} {x}" for flag, x in FLAGS.items())}".split()]
    sys.argv += words.split()
    train.main()

threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
torch.set_num_threads(1)
toolbox.run.SAVE_EVERY = 0
train.UNet = functools.partial(UNet, **{TINY})
train.log_samples = lambda run, predict_noise, schedule: None
EXTRA
with user_errors(), distributed():
    for words in sys.argv[1:]:
        training(words)
"""

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder: runs/ and data/ are made in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def photos(here):
    """A folder of 12 small images."""
    for i, image in enumerate(draw(12, 20)[0]):
        save_image(to_image(image), here / "photos" / f"{i}.png")
    return here / "photos"


@pytest.fixture
def train_here(photos, monkeypatch, capsys):
    """train_here("--steps", 3) trains a tiny network in this process; each step is saved."""
    monkeypatch.setattr(train, "UNet", functools.partial(UNet, **TINY))
    monkeypatch.setattr(toolbox.run, "SAVE_EVERY", 0)
    monkeypatch.setattr(train, "log_samples", lambda run, predict_noise, schedule: None)
    return lambda *words: call(train.main, monkeypatch, capsys, FLAGS, *words)


def cats(n, size, start=0, name="cats"):
    """As load_data has them, but only some."""
    images, labels, captions = draw(n, size, start=start)
    labels = torch.stack([*labels.values()], dim=1)
    return Data(name, to_uint8(images), ATTRIBUTES, labels, captions)


def random_unet(std=0.1):
    """A tiny network whose weights are zero nowhere."""
    torch.manual_seed(0)
    network = UNet(**TINY)
    for w in network.parameters():
        torch.nn.init.normal_(w, std=std)
    return network


def redraw(seed, step, data, schedule, batch=4):
    """All that is random in a training step, again: from (seed, step), and in this order.

    What else a training draws comes from `generator` next.
    """
    generator = generator_for(seed, step)
    indices = torch.randint(len(data.images), (batch,), generator=generator)
    flipped = torch.rand(batch, generator=generator) < 0.5
    first = torch.randint(schedule.T, (), generator=generator)
    t = (first + torch.arange(batch) * schedule.T // batch) % schedule.T
    x0 = data.batch(indices, flipped & data.hflip)
    noise = torch.randn(x0.shape, generator=generator)
    a = schedule.alpha_bar[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    return SimpleNamespace(indices=indices, t=t, noise=noise, x_t=x_t, generator=generator)


def call(main, monkeypatch, capsys, flags, *words):
    """main() with these flags and, overruling them, words: flag, value, ...; what it printed.

    A flag with None is left out, one with True has no value.
    """
    flags = flags | dict(zip(words[::2], words[1::2], strict=True))
    pairs = [pair for pair in flags.items() if pair[1] is not None]
    words = [str(word) for pair in pairs for word in pair if word is not True]
    monkeypatch.setattr(sys, "argv", ["program", *words])
    main()
    return capsys.readouterr().out


@pytest.fixture
def start(here):
    """start("--steps 9", ...) starts PROGRAM; whatever still runs after the test is killed."""
    programs = []

    def start(*trainings, extra="", launcher=()):
        (here / "program.py").write_text(PROGRAM.replace("EXTRA", extra))
        words = [sys.executable, *launcher, "program.py", *trainings]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": STDIN, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        programs.append(subprocess.Popen(words, env=environment, text=True, **pipes))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()
        program.communicate()


def command(program, *words):
    """A program as a user types it: command("sample.py", "--n", 2)."""
    words = [sys.executable, str(ROOT / program), *map(str, words)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result


def said(main, capsys):
    """What a program says of bad input: one sentence on stderr, no traceback, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, user_errors():
        main()
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line.strip() and "/s]" not in line]  # no progress bars
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0].replace("\\", "/")  # of Windows


class Evil:
    """Pickled, it writes a file when it is loaded."""

    def __reduce__(self):
        return (exec, ("open('executed', 'w')",))


def checkpoint(folder):
    return torch.load(Path(folder) / "resume.pt", weights_only=True)


def flat(folder):
    """All numbers that a training continues with: weights, EMA, moments of both optimizers."""
    content = checkpoint(folder)
    states = [s for optimizer in content["optimizers"] for s in optimizer["state"].values()]
    assert len(states) == len(content["network"])  # each of the weights is one optimizer's
    tables = [content["network"], content["ema"], *states]
    return torch.cat([w.double().flatten() for table in tables for w in table.values()])


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def pixels(image):
    """(3, height, width), 0 .. 255, of a file or of an opened image."""
    image = image if isinstance(image, Image.Image) else Image.open(image)
    return pil_to_tensor(image.convert("RGB")).float()
