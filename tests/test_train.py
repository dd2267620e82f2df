"""A training that is killed goes on bit by bit; one that breaks says so; nothing is lost, nothing half-written."""

import copy
import errno
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, checkpoint, command, flat

import toolbox.files
import toolbox.run
import train
from processes import NoiseSchedule, add_noise, v_to_noise
from toolbox.data import Data
from toolbox.files import MEANING, errors_in_one_sentence, sentence
from toolbox.models import card, load_model
from toolbox.run import Run, generator_for
from unet import UNet

# The tiny training of conftest.py as a program: one checkpoint a step, no pictures.
PROGRAM = f"""
import functools, sys, torch, toolbox.run, train
from unet import UNet
torch.set_num_threads(1)
toolbox.run.SAVE_EVERY = 0
train.UNet = functools.partial(UNet, **{TINY})
train.show = lambda run, schedule: None
from toolbox.files import errors_in_one_sentence
from toolbox.run import all_processes
with errors_in_one_sentence(), all_processes():
    train.main()
"""


SHOW = train.show


def start_program(out, steps, **options):
    words = [sys.executable, "-c", PROGRAM, "--data", "photos", "--size", "16", "--batch", "4", "--precision", "float32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*words, "--device", "cpu", "--out", out, "--steps", str(steps)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no kill -9")
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_bit_by_bit(photos, kills):
    folder, steps, rng = photos.parent / "killed", 40 * kills, random.Random(0)
    straight, in_the_act = start_program("straight", steps), 0
    for kill in range(kills):
        program = start_program("killed", steps)
        before = last_saved(folder)
        while last_saved(folder) == before:  # it goes on, and saves after each step
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        while kill % 2 and not any(folder.glob("*.tmp")):  # every other time while it saves
            pass
        program.kill()
        assert program.wait() == -signal.SIGKILL, "it ended before it was killed: more steps are needed"
        in_the_act += any(folder.glob("*.tmp"))
    assert in_the_act or kills < 10
    assert start_program("killed", steps).wait() == straight.wait() == 0
    one, other = checkpoint("straight"), checkpoint("killed")
    assert one["k"] == other["k"] == steps and one["history"] == other["history"]
    assert torch.equal(flat(one), flat(other))
    assert (folder / "model.pt").read_bytes() == (photos.parent / "straight/model.pt").read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["log.csv", "model.pt", "resume.pt"]


def last_saved(folder):
    return (folder / "resume.pt").stat().st_mtime_ns if (folder / "resume.pt").exists() else 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C differently")
def test_ctrl_c_saves_and_says_how_to_go_on(photos):
    program = start_program("run", 100_000)
    while not (photos.parent / "run/resume.pt").exists():
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=60)
    done = checkpoint("run")["k"]
    assert program.returncode == 130 and "Traceback" not in err
    assert f"stopped and saved after step {done} of 100000: the same command goes on" in out


def test_a_finished_run_says_so_and_more_steps_go_on_from_where_it_was(train_here):
    train_here("--steps", 4)
    first = checkpoint("run")
    assert "finished after 4 steps" in train_here("--steps", 4) and "finished after 4 steps" in train_here("--steps", 2)
    assert torch.equal(flat(first), flat(checkpoint("run")))
    train_here("--steps", 9)
    second = checkpoint("run")
    muon, adamw = (optimizer["state"].values() for optimizer in second["optimizers"])
    assert second["k"] == 9 and {int(state["step"]) for state in adamw} == {9} and all(s["average"].any() for s in muon)
    changes = [(second["network"][name] - w).abs().max().item() for name, w in first["network"].items()]
    assert 0 < max(changes) < 0.01  # it went on from these weights, not from new ones
    train_here("--steps", 9, "--out", "straight")  # the same rates: in both the warm-up is not over
    assert torch.equal(flat(second), flat(checkpoint("straight")))


def test_the_seed_decides_everything(train_here):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_here("--steps", 3, "--out", out, "--seed", seed)
    assert torch.equal(flat(checkpoint("a")), flat(checkpoint("b")))
    assert not torch.equal(flat(checkpoint("a")), flat(checkpoint("c")))


def test_looking_along_the_way_changes_nothing(train_here, monkeypatch, here):
    train_here("--steps", 5, "--out", "blind")
    monkeypatch.setattr(train, "show", SHOW)
    train_here("--steps", 5, "--out", "looked")
    assert torch.equal(flat(checkpoint("blind")), flat(checkpoint("looked")))
    made = sorted(p.name for p in (here / "looked").iterdir())
    assert made == ["log.csv", "loss.png", "model.pt", "resume.pt", *(f"samples-{k:06}.png" for k in range(1, 6))]


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--batch", 2, "batch = 4"),
        ("--seed", 5, "seed = 0"),
        ("--size", 8, "size = 16"),
        ("--precision", "bfloat16", "precision = float32"),
    ],
)
def test_a_folder_of_other_settings_is_refused(train_here, option, value, named):
    train_here("--steps", 1)
    with pytest.raises(ValueError, match=f"run holds a run with {named}, and now it is {value}: use another --out"):
        train_here("--steps", 2, option, value)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(train_here, monkeypatch):
    train_here("--steps", 4)
    good = flat(checkpoint("run"))
    mse = torch.nn.functional.mse_loss
    monkeypatch.setattr(train.F, "mse_loss", lambda a, b: mse(a, b) * float("nan"))
    with pytest.raises(ValueError, match=r"step 5: the loss is nan.* The checkpoint of step 4 is kept in run"):
        train_here("--steps", 8)
    monkeypatch.setattr(train.F, "mse_loss", mse)
    assert torch.equal(flat(checkpoint("run")), good)
    train_here("--steps", 8)
    train_here("--steps", 8, "--out", "straight")
    assert torch.equal(flat(checkpoint("run")), flat(checkpoint("straight")))


def tiny_run(tmp_path, steps=1000, batch=8, network=None, images=None):
    torch.manual_seed(0)
    network = network or UNet(**TINY)
    data = Data("test", images if images is not None else torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8))
    schedule = NoiseSchedule.linear()
    about = card(network, schedule, 8, "test")
    return Run(tmp_path / "run", network, data, about, {}, steps, batch, 0, torch.device("cpu"), "float32"), schedule


def test_time_steps_pictures_and_noise_are_uniform_and_complete(tmp_path):
    """Each index 0 .. T-1 is trained, each picture is shown, half of them mirrored; no step repeats another one."""
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 8, 8).clone()
    images[..., 0] = 255  # the left edge: bright; after mirroring the right one
    run, schedule = tiny_run(tmp_path, steps=1500, images=images)
    steps, shown, mirrored, noises = [], [], 0, []
    for x0 in run.batches():
        steps.append(run.randint(schedule.T))
        noises.append(run.randn_like(x0)[0, 0, 0, 0].item())
        shown += ((x0[:, 0, 0, 3] + 1) * 127.5).round().int().tolist()
        mirrored += (x0[:, 0, 0, 7] == 1).sum().item()
        run.k += 1
    steps = torch.cat(steps)
    assert steps.min() == 0 and steps.max() == 999
    assert len(steps.unique()) == 1000  # 12,000 draws miss one with a chance of 0.6 %, this seed misses none
    assert abs(steps.double().mean() - 499.5) < 12
    assert set(shown) == set(range(40)) and abs(mirrored / 12_000 - 0.5) < 0.02
    assert len(set(noises)) == 1500 and abs(sum(noises) / 1500) < 0.1


def test_generators_of_different_seeds_and_steps_differ():
    """(seed << 32) + k would not do: PyTorch's CPU generator reads 32 bits."""
    first = {torch.randint(2**62, (1,), generator=generator_for(seed, k)).item() for seed in range(20) for k in range(50)}
    assert len(first) == 1000
    one, other = (torch.rand(1, generator=torch.Generator().manual_seed(s)) for s in (7, (5 << 32) + 7))
    assert torch.equal(one, other)  # the trap itself


def test_a_step_is_muon_for_matrices_and_adamw_for_vectors_and_the_average_follows(tmp_path, monkeypatch):
    """The same arithmetic a second time, by hand: of a row of three, a matrix of one direction, and of a single number."""
    network = torch.nn.Linear(3, 1)
    network.config = {"in_channels": 1}
    start = torch.tensor([[2.0, -1.0, 0.5]])
    with torch.no_grad():
        network.weight.copy_(start)
        network.bias.fill_(2.0)
    monkeypatch.setattr(toolbox.run, "WARM_UP", 3)
    run, _ = tiny_run(tmp_path, steps=5, network=network)
    run.save = lambda: None
    row, momentum, row_average = start.double(), torch.zeros(1, 3).double(), start.double()
    w, average, m, v = 2.0, 2.0, 0.0, 0.0
    # One direction has one singular value, at first 1: five rounds of Newton-Schulz make it this.
    one = 1.0
    for _ in range(5):
        one = 3.4445 * one - 4.775 * one**3 + 2.0315 * one**5
    assert 0.65 < one < 1.25
    for k, _ in enumerate(run.batches(), start=1):
        towards = torch.tensor([[3.0, 4.0 * (-1) ** k, 1.0 * k]])
        run.step((run.network.weight * towards).sum() + run.network.bias.sum() * 10 * k)
        gradient = torch.cat([towards[0], torch.tensor([10.0 * k])]).double()
        gradient /= gradient.norm()  # clipped to a length of 1
        rate = toolbox.run.LEARNING_RATE * min(k / toolbox.run.WARM_UP, (6 - k) / 5)

        momentum = 0.95 * momentum + 0.05 * gradient[:3]
        ahead = 0.05 * gradient[:3] + 0.95 * momentum
        row = row * (1 - rate * 0.01) - rate * 0.2 * math.sqrt(3) * one * ahead / ahead.norm()
        g = gradient[3].item()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        w = w * (1 - rate * 0.01) - rate * (m / (1 - 0.9**k)) / (math.sqrt(v / (1 - 0.99**k)) + 1e-8)
        decay = (1 + k) / (10 + k)
        row_average, average = decay * row_average + (1 - decay) * row, decay * average + (1 - decay) * w
        torch.testing.assert_close(run.network.weight.double(), row, atol=1e-6, rtol=0)
        torch.testing.assert_close(run.averaged.weight.double(), row_average, atol=1e-6, rtol=0)
        assert run.network.bias.item() == pytest.approx(w, abs=1e-6)
        assert run.averaged.bias.item() == pytest.approx(average, abs=1e-6)
    assert k == 5


def test_every_weight_is_one_optimizers_and_both_follow_the_rate(tmp_path):
    run, schedule = tiny_run(tmp_path, steps=200)
    muon, adamw = (optimizer.param_groups[0]["params"] for optimizer in run.optimizers)
    assert {w.ndim for w in muon} == {2, 4} and {w.ndim for w in adamw} == {1}
    assert sorted(map(id, [*muon, *adamw])) == sorted(map(id, run.network.parameters()))
    run.save, rates = lambda: None, []
    for x0 in run.batches():
        run.step(run.network(x0, run.randint(schedule.T)).square().mean())
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in run.optimizers])
        assert all(p.grad is None for p in run.network.parameters())
    for k, (one, other) in enumerate(rates):
        assert one == other == pytest.approx(2e-3 * min((k + 1) / 50, 1 - k / 200))


def test_memory_is_kept_where_the_c_library_can_and_elsewhere_nothing_happens(monkeypatch):
    asked = []

    class Library:
        def __init__(self, name):
            self.mallopt = lambda *values: asked.append(values) or values[1] <= self.most  # 1: done, 0: refused

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(toolbox.run.ctypes, "CDLL", Library)
    for most, expected in ((2**31, [(-1, 2**31 - 1), (-3, 2**30)]), (2**25, [(-1, 2**31 - 1), (-3, 2**30), (-3, 2**25)])):
        Library.most = most
        asked.clear()
        toolbox.run.keep_memory()
        assert asked == expected  # an older one refuses the second
    monkeypatch.setattr(toolbox.run.ctypes, "CDLL", lambda name: object())  # a C library that knows no mallopt
    toolbox.run.keep_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(toolbox.run.ctypes, "CDLL", None)  # any call would now crash
    toolbox.run.keep_memory()


def test_the_average_is_of_weights_only_and_remembers_a_ninth_of_the_run(tmp_path):
    network = UNet(**TINY)
    network.register_buffer("table", torch.zeros(3))
    run, _ = tiny_run(tmp_path, network=network)
    with torch.no_grad():
        for k in range(1, 901):
            for p in run.network.parameters():
                p.fill_(float(k))
            run.network.table.fill_(float(k))
            run.k = k
            run.average()
    assert not run.averaged.table.any()  # no weight, so no mean of its values
    values = torch.cat([p.flatten() for p in run.averaged.parameters()])
    assert values.min() > 780 and values.max() < 820  # 900 less a ninth of it
    assert all(not p.requires_grad for p in run.averaged.parameters())


def test_the_loss_is_that_of_the_noise_in_x_t_at_t(train_here, monkeypatch):
    """math.md (7): what the loop of train.py hands to the network and to the loss, in each step."""
    seen, asked, losses = [], [], []

    class Asked(UNet):
        def forward(self, x, t, context=None):
            predicted = super().forward(x, t, context)
            asked.append((x, t, predicted))
            return predicted

    def noting(x0, t, schedule, noise):
        seen.append((t, *add_noise(x0, t, schedule, noise), x0))
        return seen[-1][1:3]

    mse = torch.nn.functional.mse_loss
    monkeypatch.setattr(train, "UNet", lambda *channels: Asked(*channels, **TINY))
    monkeypatch.setattr(train, "add_noise", noting)
    monkeypatch.setattr(train.F, "mse_loss", lambda a, b: (losses.append((a, b)), mse(a, b))[1])
    train_here("--steps", 3)
    assert len(seen) == len(losses) == 3
    for (t, x_t, noise, x0), (predicted, target), (x, when, answer) in zip(seen, losses, asked[-3:], strict=True):
        assert target is noise and torch.equal(x, x_t) and torch.equal(when, t)
        a = NoiseSchedule.sigmoid().alpha_bar[t].view(-1, 1, 1, 1)
        torch.testing.assert_close(predicted, (1 - a).sqrt() * x_t + a.sqrt() * answer)  # the network answers v
        assert noise.shape == x0.shape and abs(noise.std() - 1) < 0.1 and -1 <= x0.min() < 0 < x0.max() <= 1


def test_it_learns(tmp_path):
    """A few hundred steps on one picture: the loss falls far below that of a network that answers nothing."""
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    run, schedule = tiny_run(tmp_path, steps=300, batch=32, images=images)
    run.save, losses, guesses = lambda: None, [], []
    predict_noise, nothing = v_to_noise(run.network, schedule), v_to_noise(lambda x, t: torch.zeros_like(x), schedule)
    for x0 in run.batches():
        t = run.randint(schedule.T)
        x_t, noise = add_noise(x0, t, schedule, run.randn_like(x0))
        loss = torch.nn.functional.mse_loss(predict_noise(x_t, t), noise)
        run.step(loss)
        losses.append(loss.item())
        guesses.append(torch.nn.functional.mse_loss(nothing(x_t, t), noise).item())
    assert losses[0] == pytest.approx(guesses[0], rel=0.05) and sum(losses[-20:]) < 0.5 * sum(guesses[-20:])


def test_the_faster_precision_is_taken_and_stored(tmp_path, capsys):
    run, _ = tiny_run(tmp_path)
    run.precision = None
    run.time_step = lambda precision, hopeless: {"float32": 2.0, "bfloat16": 1.0}[precision]
    run.announce()
    assert run.precision == "bfloat16" and "float32 2.00 s, bfloat16 1.00 s" in capsys.readouterr().out
    run.k = 1
    run.save()
    again = Run(run.folder, UNet(**TINY), run.data, run.card, {}, 10, 8, 0, torch.device("cpu"))
    assert again.precision == "bfloat16" and again.k == 1


def test_without_a_wish_the_first_device_that_works_is_taken(monkeypatch):
    monkeypatch.setattr(toolbox.run, "works", lambda device: None if device in ("mps", "cpu") else RuntimeError("no driver"))
    assert toolbox.run.pick_device().type == "mps"
    with pytest.raises(ValueError, match="--device cuda: this machine has no such device"):
        toolbox.run.pick_device("cuda")


@pytest.mark.parametrize("wish", [None, "cuda"])
def test_each_process_of_a_machine_touches_its_own_gpu_only(monkeypatch, wish):
    touched = []
    monkeypatch.setattr(toolbox.run, "PROCESSES", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(toolbox.run, "works", lambda device: touched.append(device))
    monkeypatch.setattr(torch.cuda, "set_device", touched.append)
    assert toolbox.run.pick_device(wish) == torch.device("cuda:1") and set(touched) == {"cuda:1"}


def test_timing_changes_no_weight_and_leaves_no_gradient(tmp_path):
    run, _ = tiny_run(tmp_path)
    before = copy.deepcopy(run.network.state_dict())
    run.time_step("float32", float("inf"))
    assert all(torch.equal(w, before[name]) for name, w in run.network.state_dict().items())
    assert all(p.grad is None for p in run.network.parameters())


def test_a_model_is_shared_in_16_bits_with_all_that_rebuilds_it(train_here):
    train_here("--steps", 2)
    network, schedule, about = load_model("run/model.pt")
    assert about["size"] == 16 and about["channels"] == 3 and about["data"] == "photos" and about["format"] == 2
    assert schedule.name == "sigmoid" and schedule.T == 1000
    exact = checkpoint("run")["averaged"]
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(weight, exact[name], rtol=1e-3, atol=1e-4)


def test_a_ready_models_weights_can_be_the_start(train_here):
    train_here("--steps", 2)
    train_here("--steps", 1, "--out", "fine", "--model", "run/model.pt")
    start, end = load_model("run/model.pt")[0], checkpoint("fine")["network"]
    changes = [(end[name] - w).abs().max().item() for name, w in start.state_dict().items()]
    assert 0 < max(changes) < 1e-4  # one step of the warm-up away


def said(main, capsys):
    """What a program says to a user whose input is bad: one sentence, no traceback, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, errors_in_one_sentence():
        main()
    lines = [line for line in capsys.readouterr().err.splitlines() if "/s]" not in line and line.strip()]  # no bars
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "nowhere"], "--data nowhere: no such folder and no data of that name"),
        (["--data", "empty"], "empty: expected pictures"),
        (["--data", "broken"], "none of the 1 files is a readable picture"),
        (["--size", "0"], "--size 0: expected 1 pixel or more"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--batch", "0"], "--batch 0: expected 1 or more"),
        (["--batch", str(10**12)], "the memory is not enough: train with a smaller --batch"),
        (["--accumulate", "0"], "--accumulate 0: expected 1 or more"),
        (["--accumulate", "3"], "--batch 16: expected a multiple of 3, for even shares"),
        (["--seed", "-1"], "--seed -1: expected 0 to 4294967295"),
        (["--seed", str(10**30)], f"--seed {10**30}: expected 0 to 4294967295"),
        (["--device", "tpu9"], "--device tpu9: this machine has no such device"),
        (["--device", "meta"], "--device meta: this machine has no such device"),
        (["--model", "dogs"], "--model dogs: no such file and no ready model"),
        (["--model", "photos"], "--model photos: expected a file, this is a folder; is it photos/model.pt?"),
        (["--model", "photos/0.png"], "0.png: expected a file that torch.save wrote whole"),
        (["--out", "a_file"], "a_file: expected a folder, this is a file; use another name"),
        (["--out", "a_file/run"], "a_file/run: expected a folder on the way to it, found a file; use another name"),
    ],
)
def test_bad_input_gets_one_sentence(photos, monkeypatch, capsys, words, told):
    (photos.parent / "empty").mkdir()
    (photos.parent / "broken").mkdir()
    (photos.parent / "broken/cat.png").write_bytes(b"no picture")
    (photos.parent / "a_file").write_text("kept")
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "photos", "--size", "16", "--device", "cpu", *words])
    assert told in said(train.main, capsys)
    assert not list(photos.parent.glob("runs/*/*")) and (photos.parent / "a_file").read_text() == "kept"


class Evil:
    def __reduce__(self):
        return (exec, ("open('executed', 'w')",))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not a checkpoint"),
        lambda path: torch.save(Evil(), path),
        lambda path: path.write_bytes(path.with_name("model.pt").read_bytes()),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save(checkpoint("run") | {"settings": 3}, path),
        lambda path: torch.save(checkpoint("run") | {"network": {}}, path),
        lambda path: torch.save(checkpoint("run") | {"optimizers": {}}, path),
        lambda path: torch.save(checkpoint("run") | {"optimizers": checkpoint("run")["optimizers"][:1]}, path),
        lambda path: torch.save(checkpoint("run") | {"optimizers": checkpoint("run")["optimizers"][::-1]}, path),
        lambda path: torch.save(checkpoint("run") | {"optimizers": [{}, {}]}, path),
        lambda path: torch.save({name: entry for name, entry in checkpoint("run").items() if name != "k"}, path),
    ],
)
def test_a_damaged_checkpoint_is_told_and_nothing_is_touched(train_here, here, capsys, damage):
    train_here("--steps", 1)
    damage(here / "run/resume.pt")
    before = {path.name: path.read_bytes() for path in (here / "run").iterdir()}
    error = said(lambda: train_here("--steps", 2), capsys)
    assert (
        "run/resume.pt: this file is damaged or of another kind" in error
        and "use another --out, with --model run/model.pt" in error
    )
    assert {path.name: path.read_bytes() for path in (here / "run").iterdir()} == before
    assert not (here / "executed").exists()
    train_here("--steps", 1, "--out", "another", "--model", "run/model.pt")  # the advice helps


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit for the size of files")
@pytest.mark.parametrize("file", ["model.pt", "resume.pt"])
def test_a_full_disk_keeps_the_last_checkpoint_and_the_same_command_goes_on(train_here, here, monkeypatch, capsys, file):
    """The limit for the size of a file is real: the system refuses to write, in step 4, in the middle of this file."""
    from resource import RLIMIT_FSIZE, getrlimit, setrlimit

    train_here("--steps", 6, "--out", "straight")
    model, limits, average = (here / "straight/model.pt").stat().st_size, getrlimit(RLIMIT_FSIZE), Run.average

    def full_in_step_4(run):
        average(run)
        if run.k == 4:
            setrlimit(RLIMIT_FSIZE, (model // 2 if file == "model.pt" else model + 5000, limits[1]))

    with monkeypatch.context() as patch:
        patch.setattr(Run, "average", full_in_step_4)
        try:
            error = said(lambda: train_here("--steps", 6), capsys)
        finally:
            setrlimit(RLIMIT_FSIZE, limits)
    assert f"run/{file}: the disk is full; make room, and the same command goes on" in error
    assert checkpoint("run")["k"] == 3 and load_model("run/model.pt")
    assert sorted(path.name for path in (here / "run").iterdir()) == ["log.csv", "model.pt", "resume.pt"]
    train_here("--steps", 6)
    assert torch.equal(flat(checkpoint("run")), flat(checkpoint("straight")))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_told_before_the_training(train_here, monkeypatch, capsys, number):
    def deny(path, *_):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(toolbox.files, "open", deny, raising=False)  # the tests may run as root, who may write anywhere
    assert f"run/log.csv: {MEANING[number]}" in said(lambda: train_here("--steps", 2), capsys)


def test_memory_that_is_not_enough_is_told_and_a_mistake_in_the_code_keeps_its_traceback():
    assert sentence(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried")).startswith("the memory is not enough")
    assert sentence(MemoryError()).startswith("the memory is not enough")
    assert sentence(RuntimeError("an illegal memory access was encountered")) is None and sentence(TypeError("x")) is None


def test_a_sentence_and_exit_code_2_instead_of_a_traceback(here):
    result = command("train.py", "--data", "nowhere", check=False)
    assert (
        result.returncode == 2
        and result.stderr.startswith("error: --data nowhere: no such folder")
        and result.stderr.count("\n") == 1
    )
