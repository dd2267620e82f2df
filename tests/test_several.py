"""One training by several processes, or in several parts, is the training by one: the same gradients, losses and files.

Each program runs the trainings that its arguments describe, of a tiny network that is not zero anywhere.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, checkpoint, flat

from toolbox.cats import draw
from toolbox.pictures import save, to_image

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
    time.sleep(0.1)  # the others wait
    with open(f"{{run.folder}}/shown", "a") as file:
        print(RANK, run.k, file=file)

def write(path, content, before=toolbox.run.write):
    before(path, content)
    with open(path.with_name("writers"), "a") as file:
        file.write(str(RANK))

torch.set_num_threads(1)
toolbox.run.SAVE_EVERY, toolbox.run.CLIP = 0, 1e3  # clipping would hide a wrong factor
Run.note, train.UNet, train.show, toolbox.run.write = note, awake, show, write
EXTRA
with errors_in_one_sentence(), all_processes():
    for arguments in sys.argv[1:]:
        sys.argv = ["train.py", *f"--data photos --size 16 --batch 8 --precision float32 --device cpu {{arguments}}".split()]
        try:
            train.main()
        except ValueError as error:
            if "broken" not in arguments:
                raise
            print(error)
"""
ONE = [sys.executable]
TWO = [*ONE, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals; and PyTorch for Windows is built without libuv")


def start(folder, launcher, *trainings, extra=""):
    (folder / "program.py").write_text(PROGRAM.replace("EXTRA", extra))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launcher, "program.py", *trainings], cwd=folder, env=environment, **pipes)


def run(folder, launcher, *trainings, extra=""):
    program = start(folder, launcher, *trainings, extra=extra)
    try:
        out, err = program.communicate(timeout=180)
    finally:
        program.terminate()  # a deadlock must not outlive the tests
    return program.returncode, out, err


def losses(folder, rank=0):
    return torch.tensor([float(line) for line in (folder / f"losses-{rank}").read_text().split()])


def gradient(folder):
    """Of a run's only step: Muon's average is a twentieth of it, AdamW's first moment a tenth."""
    muon, adamw = (optimizer["state"].values() for optimizer in checkpoint(folder)["optimizers"])
    return torch.cat([20 * s["average"].flatten() for s in muon] + [10 * s["exp_avg"].flatten() for s in adamw])


MISHAPS = """
mse, average, wrote = train.F.mse_loss, Run.average, toolbox.run.write

def broken_in_step_3(a, b):
    return mse(a, b) * (float("nan") if RANK == 1 and "broken" in sys.argv and os.path.exists("broken/seen") else 1)

def asked_to_stop_in_step_4(run):
    average(run)
    if run.k == 2 and RANK == 1 and run.folder.name == "broken":
        open("broken/seen", "w").close()
    if run.k == 4 and run.folder.name == "stopped":
        toolbox.run.SAVE_EVERY = 100  # so it is saved when it has stopped, and that takes long
        if RANK == 1:
            signal.raise_signal(signal.SIGTERM)

def slow(path, content):
    time.sleep(1 if toolbox.run.SAVE_EVERY else 0)
    wrote(path, content)

train.F.mse_loss, Run.average, toolbox.run.write = broken_in_step_3, asked_to_stop_in_step_4, slow
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of runs NAME-PARTS-STEPS, by one process and by two; and what the two said and ended with."""
    folder = tmp_path_factory.mktemp("several")
    for i, picture in enumerate(draw(12, 20)[0]):
        save(to_image(picture), folder / "photos" / f"{i}.png")
    for launcher, name, parts in ((ONE, "one", (1, 2, 4)), (TWO, "two", (1, 2))):
        trainings = [f"--steps {k} --accumulate {n} --out {name}-{n}-{k}" for n in parts for k in (1, 10)]
        trainings += ["--steps 10 --out broken", "--steps 10 --out stopped"] if name == "two" else []
        result = run(folder, launcher, *trainings, extra=MISHAPS)
    return folder, *result


@pytest.mark.parametrize("name", ["one-2", "one-4", "two-1", "two-2"])
def test_the_number_of_processes_and_parts_changes_nothing(trained, name):
    alone, shared, first = trained[0] / "one-1-10", trained[0] / f"{name}-10", trained[0] / "one-1-1"
    torch.testing.assert_close(gradient(trained[0] / f"{name}-1"), gradient(first), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(losses(shared), losses(alone), atol=1e-4, rtol=0)
    torch.testing.assert_close(flat(checkpoint(shared)), flat(checkpoint(alone)), atol=1e-4, rtol=1e-4)
    assert gradient(first).norm() > 0.1 and len(losses(alone)) == 10 and losses(alone).std() > 0.01  # no empty comparison
    assert checkpoint(shared)["network"].keys() == checkpoint(alone)["network"].keys()


def test_the_first_process_speaks_and_writes_for_all(trained):
    folder, _, out, err = trained
    assert out.count("training  steps") == 6 and "Warn" not in err and "Traceback" not in err.partition("torch/distributed")[0]
    for name in ("one-1-10", "one-4-10", "two-1-10", "two-2-10"):
        assert (folder / name / "shown").read_text() == "0 2\n0 4\n0 6\n0 8\n0 10\n"  # once a step
        assert (folder / name / "writers").read_text() == "0" * 10
        files = sorted(p.name for p in (folder / name).iterdir() if "losses" not in p.name)
        assert files == ["log.csv", "model.pt", "resume.pt", "shown", "writers"]
    assert torch.equal(losses(folder / "two-2-10"), losses(folder / "two-2-10", rank=1))  # the mean of both


def test_a_loss_that_is_not_finite_in_one_process_stops_all(trained):
    folder, _, out, _ = trained
    assert "step 3: the loss is nan" in out and "The checkpoint of step 2 is kept in broken" in out
    assert checkpoint(folder / "broken")["k"] == 2 and flat(checkpoint(folder / "broken")).isfinite().all()


def test_one_that_is_asked_stops_all_and_another_number_of_processes_goes_on(trained):
    folder, status, out, err = trained
    assert status != 0 and out.count("stopped and saved after step 4 of 10") == 1 and "error:" not in err
    assert checkpoint(folder / "stopped")["k"] == 4
    assert run(folder, ONE, "--steps 10 --out stopped --accumulate 2")[0] == 0
    torch.testing.assert_close(losses(folder / "stopped"), losses(folder / "one-1-10"), atol=1e-4, rtol=0)
    end, straight = (flat(checkpoint(folder / name)) for name in ("stopped", "one-1-10"))
    torch.testing.assert_close(end, straight, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_passes_signals_on_and_all_is_saved(photos, number):
    program = start(photos.parent, TWO, "--steps 100000 --out run")
    while not (photos.parent / "run/resume.pt").exists():
        time.sleep(0.05)
    program.send_signal(number)
    out, err = program.communicate(timeout=60)
    assert program.returncode != 0 and out.count("stopped and saved after step") == 1 and "error:" not in err
    assert f"after step {checkpoint('run')['k']} of" in out


FULL = "if RANK == 0: Run.average = lambda run: os.write(os.open('/dev/full', os.O_WRONLY), b'x')"
GONE = "if RANK == 1: train.load_data = lambda *_: open('nowhere')"
KILLED = "if RANK == 1: Run.average = lambda run: os.kill(os.getpid(), 9)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "extra", "sentence"),
    [
        ("--data nowhere", "", "--data nowhere: no such folder"),
        ("--batch 6 --accumulate 2", "", "--batch 6: expected a multiple of 4"),
        ("--steps 5", FULL, "a file: the disk is full"),  # in the first process alone
        ("--steps 5", GONE, "nowhere: there is no such file"),  # in the second one alone
        ("--steps 5", KILLED, "another process of this training has ended"),
    ],
)
def test_an_error_in_any_process_is_said_once(photos, arguments, extra, sentence):
    status, _, err = run(photos.parent, TWO, f"{arguments} --out run", extra=extra)
    assert status != 0 and err.count(f"error: {sentence}") == 1 and "RuntimeError" not in err, err
