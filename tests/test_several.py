"""One training by several processes, or in several parts, is the training by one: the same gradients, losses and files.

Each program runs the trainings that its arguments describe, of a tiny network that is not zero anywhere.
"""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, checkpoint, flat

PROGRAM = f"""
import os, shlex, signal, sys, time, torch, toolbox.run, train
from toolbox.files import errors_in_one_sentence
from toolbox.run import RANK, Run, all_processes
from unet import UNet

def awake(*channels):
    network = UNet(*channels, **{TINY})
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return network

def note(run, loss, before=Run.note):
    before(run, loss)
    with open(f"{{run.folder}}/losses-{{RANK}}", "a") as file:
        print(loss, file=file)

def show(run, schedule):
    time.sleep(0.3)  # the others wait
    with open(f"{{run.folder}}/shown", "a") as file:
        print(RANK, run.k, file=file)

torch.set_num_threads(1)
toolbox.run.SAVE_EVERY, toolbox.run.CLIP = 0, 1e3  # clipping would hide a wrong factor
Run.note, train.UNet, train.show = note, awake, show
EXTRA
with errors_in_one_sentence(), all_processes():
    for arguments in sys.argv[1:]:
        sys.argv = ["train.py", *f"--data photos --size 16 --batch 8 --precision float32 --device cpu {{arguments}}".split()]
        train.main()
"""
ONE = [sys.executable]
TWO = [*ONE, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals; and PyTorch for Windows is built without libuv")


def start(launcher, *trainings, extra=""):
    with open("program.py", "w") as file:
        file.write(PROGRAM.replace("EXTRA", extra))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [*launcher, "program.py", *trainings]
    return subprocess.Popen(
        words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def run(launcher, *trainings, extra="", check=True):
    program = start(launcher, *trainings, extra=extra)
    out, err = program.communicate(timeout=120)
    assert not check or program.returncode == 0, err
    return program.returncode, out, err


def losses(folder, rank=0):
    with open(f"{folder}/losses-{rank}") as file:
        return torch.tensor([float(line) for line in file])


def gradient(folder):
    """Of a run's only step: AdamW's first moment is a tenth of it."""
    return torch.cat([10 * state["exp_avg"].flatten() for state in checkpoint(folder)["optimizer"]["state"].values()])


def test_the_number_of_processes_and_parts_changes_nothing(photos):
    for launcher, name, parts in ((ONE, "one", (1, 2, 4)), (TWO, "two", (1, 2))):
        trainings = [f"--steps {k} --accumulate {n} --out {name}-{n}-{k}" for n in parts for k in (1, 10)]
        _, out, err = run(launcher, *trainings)
        assert out.count("folder ") == len(trainings) and "Warn" not in err and "rror" not in err
    for other in ("one-2", "one-4", "two-1", "two-2"):
        torch.testing.assert_close(gradient(f"{other}-1"), gradient("one-1-1"), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(losses(f"{other}-10"), losses("one-1-10"), atol=1e-4, rtol=0)
        torch.testing.assert_close(flat(checkpoint(f"{other}-10")), flat(checkpoint("one-1-10")), atol=1e-4, rtol=1e-4)
        assert checkpoint(f"{other}-10")["network"].keys() == checkpoint("one-1-10")["network"].keys()
        with open(f"{other}-10/shown") as file:
            assert file.read() == "0 2\n0 4\n0 6\n0 8\n0 10\n"  # once a step, by the first process
        files = sorted(p.name for p in (photos.parent / f"{other}-10").iterdir() if "losses" not in p.name)
        assert files == ["log.csv", "model.pt", "resume.pt", "shown"]
    assert gradient("one-1-1").norm() > 0.1 and len(losses("one-1-10")) == 10 and losses("one-1-10").std() > 0.01
    assert torch.equal(losses("two-2-10"), losses("two-2-10", rank=1))


def test_one_that_is_asked_stops_all_and_another_number_of_processes_goes_on(photos):
    ask = "if RANK == 1: Run.average = lambda run, before=Run.average: (before(run), run.k == 4 and signal.raise_signal(15))"
    status, out, _ = run(TWO, "--steps 10 --out run", extra=ask, check=False)
    assert status != 0 and out.count("stopped and saved after step 4 of 10") == 1 and checkpoint("run")["k"] == 4
    run(ONE, "--steps 10 --out run --accumulate 2", "--steps 10 --out straight")
    torch.testing.assert_close(losses("run"), losses("straight"), atol=1e-4, rtol=0)
    torch.testing.assert_close(flat(checkpoint("run")), flat(checkpoint("straight")), atol=1e-4, rtol=1e-4)


BROKEN = """
mse = train.F.mse_loss
if RANK == 1: train.F.mse_loss = lambda a, b: mse(a, b) * (1 if os.path.exists("run/model.pt") is False else float("nan"))
"""


def test_a_loss_that_is_not_finite_in_one_process_stops_all_with_one_sentence(photos):
    status, _, err = run(TWO, "--steps 10 --out run", extra=BROKEN, check=False)
    assert status != 0 and len(re.findall("^error: ", err, flags=re.MULTILINE)) == 1
    assert "the loss is nan" in err and "is kept in run" in err and "RuntimeError" not in err
    assert flat(checkpoint("run")).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_passes_signals_on_and_all_is_saved(photos, number):
    program = start(TWO, "--steps 100000 --out run")
    while not (photos.parent / "run/resume.pt").exists():
        time.sleep(0.05)
    program.send_signal(number)
    out, err = program.communicate(timeout=60)
    assert program.returncode != 0 and out.count("stopped and saved after step") == 1 and "error:" not in err
    assert f"after step {checkpoint('run')['k']} of" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "extra", "sentence"),
    [
        ("--data nowhere", "", "--data nowhere: expected"),
        ("--batch 6 --accumulate 2", "", "--batch 6: expected a multiple of 4"),
        ("--steps 5", "if RANK == 0: Run.save = lambda run: open('/dev/full', 'w').write('x')", "/dev/full: the disk is full"),
        ("--steps 5", "if RANK == 1: train.load_data = lambda *_: open('nowhere')", "nowhere: there is no such file"),
        ("--steps 5", "if RANK == 1: Run.average = lambda run: os.kill(os.getpid(), 9)", "another process of this training"),
    ],
)
def test_an_error_is_said_once(photos, arguments, extra, sentence):
    status, _, err = run(TWO, f"{arguments} --out run", extra=extra, check=False)
    assert status != 0 and re.findall("^error: ", err, flags=re.MULTILINE) == ["error: "], err
    assert f"error: {sentence}" in err and "RuntimeError" not in err
