"""One training by two processes is the training by one: the same gradients, losses and files."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import checkpoint, flat, random_unet

import train
from processes import NoiseSchedule
from toolbox.models import model_config, save_model
from toolbox.run import Run

TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="PyTorch has no libuv there")

# Both processes note their losses and what they write. Mishaps happen in the second one only.
EXTRA = """
import signal

def log(run, loss, before=Run.log):
    run.losses = [*getattr(run, "losses", []), loss.item()]
    torch.save(run.losses, f"losses-{run.folder}-{RANK}")
    if RANK == 1 and run.folder.name == "stopped" and run.step == 3:
        signal.raise_signal(signal.SIGTERM)
    before(run, loss)

def write(path, content, before=toolbox.run.write):
    before(path, content)
    with open(f"writers-{path.parent}", "a") as file:
        file.write(str(RANK))

def loss(x, y, before=train.F.mse_loss):
    return before(x, y) * (float("nan") if RANK == 1 and "nan" in sys.argv else 1)

def attempt(before=train.main):
    try:
        before()
    except (UserError, SystemExit) as error:
        print(RANK, "ended:", error, file=sys.stderr)

train.MAX_GRAD_NORM = 1e3  # clipping would hide a wrong factor
train.F.mse_loss, Run.log, toolbox.run.write, train.main = loss, log, write, attempt
"""


def gradients(folder):
    """Of a run's only step: Muon's average is a twentieth of it, AdamW's first moment a tenth."""
    muon, adamw = (optimizer["state"].values() for optimizer in checkpoint(folder)["optimizers"])
    parts = [20 * state["average"] for state in muon] + [10 * state["exp_avg"] for state in adamw]
    return torch.cat([part.flatten() for part in parts])


def test_two_processes_train_what_one_trains_and_stop_together(train_here, start, monkeypatch):
    network = random_unet(0.2)
    config = model_config(network, NoiseSchedule.sigmoid(), 16, "nothing")
    save_model(Path("awake.pt"), network, config)
    words = "--batch 8 --model awake.pt --out"
    trainings = [f"--steps 1 {words} first", f"{words} ten", f"{words} stopped", f"{words} nan"]
    trainings += [f"{words} odd --batch 7", "--data nowhere"]
    trainings = [f"--steps 10 {training}" for training in trainings]
    program = start(*trainings, extra=EXTRA, launcher=TWO)

    monkeypatch.setattr(train, "MAX_GRAD_NORM", 1e3)
    losses, log = [], Run.log
    monkeypatch.setattr(Run, "log", lambda run, loss: losses.append(loss.item()) or log(run, loss))
    for steps in (1, 10):
        words = "--steps", steps, "--batch", 8, "--model", "awake.pt"
        train_here(*words, "--out", f"alone-{steps}")
    out, err = program.communicate(timeout=180)
    assert program.returncode == 0, err

    torch.testing.assert_close(gradients("first"), gradients("alone-1"), atol=1e-6, rtol=1e-6)
    assert gradients("first").norm() > 0.1
    shards = torch.tensor([torch.load(f"losses-ten-{rank}") for rank in (0, 1)])
    torch.testing.assert_close(shards.mean(0), torch.tensor(losses[1:]), atol=1e-4, rtol=0)
    assert (shards[0] - shards[1]).abs().min() > 1e-5  # each has other images
    torch.testing.assert_close(flat("ten"), flat("alone-10"), atol=1e-4, rtol=1e-4)
    assert checkpoint("ten")["history"][0][1] == pytest.approx(shards.mean().item(), rel=1e-5)
    assert set(Path("writers-ten").read_text()) == {"0"}  # the first process

    assert err.count("step 1: the loss is nan, the gradient norm nan") == 1
    assert err.count("the gradient norm nan") == 2 and not Path("nan/resume.pt").exists()
    assert checkpoint("stopped")["step"] == 4 and out.count("after step 4 of 10") == 1
    assert err.count("expected a multiple of 2, the processes") == 2
    assert err.count("nowhere': expected a folder of images") == 2
    assert out.count("steps 0 to 10") == 3
    train_here(*words, "--out", "stopped")  # one process resumes it
    torch.testing.assert_close(flat("stopped"), flat("alone-10"), atol=1e-4, rtol=1e-4)
