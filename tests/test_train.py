"""The recipe step by step; a run that is killed resumes bit by bit; nothing is lost or mixed up."""

import copy
import os
import signal
import socket
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Evil, checkpoint, contents, flat, pixels, redraw, said

import toolbox.device
import toolbox.run
import toolbox.timing
import train
from processes import NoiseSchedule, noise_from_v
from toolbox.data import Data, load_data
from toolbox.device import pick_device
from toolbox.files import UserError
from toolbox.images import grid
from toolbox.models import load_model, model_config
from toolbox.muon import Muon
from toolbox.run import Run, generator_for
from toolbox.seeds import sample_seeds
from toolbox.timing import announce
from unet import UNet

STEP = 2.5 * train.learning_rate(0, 1)  # no weight changes by more in a run's first step
LOG_SAMPLES = train.log_samples  # the fixture train_here replaces it

# ---- the recipe ----------------------------------------------------------------------------------


def test_a_step_is_clip_then_muon_for_matrices_and_adamw_for_vectors_then_ema():
    """The same arithmetic a second time, with optimizers built here, number by number."""
    shares = {0: 0.02, 24: 0.5, 48: 0.952, 500: 0.5, 999: 0.001}  # of the rate, in 1000 steps
    rates = {step: train.learning_rate(step, 1000) / train.LEARNING_RATE for step in shares}
    assert rates == pytest.approx(shares)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Conv2d(1, 2, 3)).double()
    network.register_buffer("table", torch.zeros(3))
    ema, twin = copy.deepcopy(network), copy.deepcopy(network)
    optimizers = train.make_optimizers(network)
    judges = [Muon([twin[0].weight, twin[1].weight], 1.0, 0.95, 0.01)]
    options = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    judges += [torch.optim.AdamW([twin[0].bias, twin[1].bias], 1.0, **options)]
    expected = [w.detach().clone() for w in ema.parameters()]
    for step, scale in enumerate((30.0, 0.01, 3.0, 1.0), start=48):
        losses = [scale * sum(w.sin().sum() for w in net.parameters()) for net in (network, twin)]
        train.gradient_step(losses[0], network, optimizers, step, 100, "float32")
        train.update_ema(ema, network, step)
        losses[1].backward()
        norm = sum(w.grad.square().sum() for w in twin.parameters()).sqrt().item()
        for w in twin.parameters():
            w.grad *= min(1, 1 / (norm + 1e-6))
        for judge in judges:
            judge.param_groups[0]["lr"] = train.learning_rate(step, 100)
            judge.step()
            judge.zero_grad()
        torch._foreach_lerp_(expected, [*twin.parameters()], 1 - (1 + step) / (10 + step))
        same = {"rtol": 0, "atol": 1e-8}
        torch.testing.assert_close([*network.parameters()], [*twin.parameters()], **same)
        torch.testing.assert_close([*ema.parameters()], expected, **same)
        assert all(w.grad is None for w in network.parameters())
        network.table.add_(1)
    assert not ema.table.any()  # a buffer is no weight: its values have no mean
    train.update_ema(ema, network, 10**6)
    torch._foreach_lerp_(expected, [*network.parameters()], 0.0001)
    torch.testing.assert_close([*ema.parameters()], expected, **same)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_muon_multiplies_in_the_precision_of_the_run(monkeypatch, precision):
    seen, orthogonal = [], toolbox.muon.orthogonal

    def watched(matrices):
        seen.append((matrices @ matrices.mT).dtype)
        return orthogonal(matrices)

    monkeypatch.setattr(toolbox.muon, "orthogonal", watched)
    network = torch.nn.Linear(3, 4)
    optimizers = train.make_optimizers(network)
    train.gradient_step(network(torch.ones(1, 3)).sum(), network, optimizers, 0, 10, precision)
    assert seen == [getattr(torch, precision)]


def test_a_step_is_made_in_the_precision_of_the_run_and_then_averaged(train_here, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "gradient_step", lambda *words: calls.append(words[3:]))
    monkeypatch.setattr(train, "update_ema", lambda *words: calls.append(words[2:]))
    train_here("--steps", 2, "--precision", "bfloat16")
    assert calls[-4:] == [(0, 2, "bfloat16"), (0,), (1, 2, "bfloat16"), (1,)]


@pytest.mark.parametrize("hflip", [True, False])
def test_the_loss_is_that_of_the_noise_in_x_t_at_t(train_here, monkeypatch, hflip):
    """math.md (7)"""
    data, asked = replace(load_data("photos", 16), hflip=hflip), []

    class Asked(UNet):
        def forward(self, x, t, context=None):
            asked.append((x, t, super().forward(x, t, context)))
            return asked[-1][-1]

    monkeypatch.setattr(train, "UNet", lambda *channels: Asked(*channels, **TINY))
    monkeypatch.setattr(train, "load_data", lambda *_: data)
    out, losses = train_here("--steps", 2, "--seed", 5, "--out", None), []
    for step, (x, t, v) in enumerate(asked[-2:]):
        drawn = redraw(5, step, data, NoiseSchedule.sigmoid())
        torch.testing.assert_close((x, t), (drawn.x_t, drawn.t))
        a = NoiseSchedule.sigmoid().alpha_bar[t].view(-1, 1, 1, 1)
        losses.append(F.mse_loss((1 - a).sqrt() * x + a.sqrt() * v, drawn.noise).item())
    history = checkpoint("runs/photos")["history"]
    assert history == [(2, pytest.approx(sum(losses) / 2, rel=1e-5))]
    assert "steps 0 to 2 of 4 images" in out and "photos: 12 of 3x16x16" in out


def test_no_two_steps_draw_the_same():
    """(seed << 32) + step would not do: PyTorch's CPU generator reads 32 bits."""
    seeds = {generator_for(seed, step).initial_seed() for seed in range(20) for step in range(50)}
    assert len(seeds) == 1000 and 2**31 < max(seeds) < 2**32


@pytest.mark.parametrize(("size", "seed"), [(63, 0), (64, 0), (64, 1)])
def test_the_network_depends_on_the_size_and_starts_from_the_seed(
    train_here, monkeypatch, size, seed
):
    made = []
    note = lambda _, out, network, *__: made.append(network) or sys.exit()  # noqa: E731
    monkeypatch.setattr(train, "start_run", note)
    monkeypatch.setattr(train, "UNet", UNet)
    with pytest.raises(SystemExit):
        train_here("--size", size, "--seed", seed)
    torch.manual_seed(seed)
    expected = UNet(3, 3, **(train.LARGE if size == 64 else {})).state_dict()
    torch.testing.assert_close(made[0].state_dict(), expected, rtol=0, atol=0)


# ---- a run ---------------------------------------------------------------------------------------


def tiny_run(steps=1000, precision="float32"):
    network, cpu = UNet(**TINY), torch.device("cpu")
    config = model_config(network, NoiseSchedule.linear(), 8, "test")
    parts = network, copy.deepcopy(network), train.make_optimizers(network)
    data = Data("test", torch.zeros(40, 3, 8, 8, dtype=torch.uint8))
    return Run(toolbox.run.Path("run"), *parts, data, config, {}, steps, 8, 0, cpu, precision)


def test_a_run_on_a_cpu_attends_without_the_flash_kernel():
    q = torch.randn(1, 2, 16, 8)
    for tuned in (False, True):
        torch.backends.cuda.enable_flash_sdp(True)
        if tuned:
            tiny_run()
        with torch.profiler.profile() as profile:
            F.scaled_dot_product_attention(q, q, q)
        assert any("flash" in event.key for event in profile.key_averages()) is not tuned


def test_the_log_has_the_mean_loss_of_each_ten_steps_and_is_saved_when_due(here, monkeypatch):
    run, saved = tiny_run(steps=24), []
    monkeypatch.setattr(toolbox.run, "time", SimpleNamespace(monotonic=lambda: 7.0 * run.step))
    save, run.save = run.save, lambda: (saved.append(run.step), save())
    for _ in run.batches():
        run.log(torch.tensor(float(run.step)))
    log = "step,loss\n10,4.500000\n20,14.500000\n24,21.500000\n"
    assert (here / "run/log.csv").read_text() == log
    assert saved == [5, 10, 15, 20, 24]  # after 30 seconds: 4.3 steps of 7; and at the end


def test_previews_are_a_few_and_one_at_the_end_and_disturb_nothing(train_here, monkeypatch, here):
    ends = {1: [1], 99: [99], 250: [100, 200, 250], 1003: [201, 402, 603, 804, 1003]}
    for steps, previews in ends.items():
        run = tiny_run(steps)
        assert [step for step in range(1, steps + 1) if run.preview_after(step)] == previews
    train_here("--steps", 3, "--out", "blind")
    monkeypatch.setattr(train, "log_samples", LOG_SAMPLES)
    monkeypatch.setattr(toolbox.run, "MIN_PREVIEW_STEPS", 2)
    train_here("--steps", 3, "--out", "seen")
    assert torch.equal(flat("blind"), flat("seen"))
    new = contents("seen").keys() - contents("blind").keys()
    assert new == {"loss.png", "samples-000002.png", "samples-000003.png"}
    network, schedule = UNet(3, 3, **TINY), NoiseSchedule.sigmoid()
    network.load_state_dict(checkpoint("seen")["ema"])
    predict_noise, seeds = noise_from_v(network, schedule), range(36)
    x = sample_seeds(predict_noise, (3, 16, 16), seeds, schedule, clip_x0=True)
    assert (pixels(grid(x)) - pixels(here / "seen/samples-000003.png")).abs().max() <= 1


# ---- how long it takes, in which precision, on which device --------------------------------------


@pytest.mark.parametrize("slow", ["float32", "bfloat16", "an error in bfloat16"])
def test_both_precisions_are_timed_and_the_faster_is_taken_announced_and_kept(
    here, capsys, monkeypatch, slow
):
    def work(seconds):
        clock.append(clock[-1] + seconds)

    def step(precision):
        if slow == f"an error in {precision}":
            raise RuntimeError("this device has none")
        work(0.06 if precision == slow else 0.02)

    clock = [0.0]
    monkeypatch.setattr(toolbox.timing, "time", SimpleNamespace(perf_counter=lambda: clock[-1]))
    run, faster = tiny_run(6000, precision=None), "bfloat16" if slow == "float32" else "float32"
    announce(run, step, lambda precision: work(0.06), 60)
    assert run.precision == faster
    assert "about 2.3 minutes, 0.3 of them for previews" in capsys.readouterr().out
    run.save()
    assert tiny_run(precision=None).precision == faster
    run.precision, slow = "bfloat16", "an error in bfloat16"  # asked for: nothing else to take
    with pytest.raises(RuntimeError, match="this device has none"):
        announce(run, step, lambda precision: None, 60)


def test_timing_makes_whole_steps_of_a_copy_in_both_precisions(train_here, monkeypatch):
    steps, step = [], train.gradient_step
    monkeypatch.setattr(train, "gradient_step", lambda *words: steps.append(words) or step(*words))
    train_here("--steps", 1, "--precision", None)
    *timed, real = steps
    assert len(timed) >= 3 and all(words[1] is not real[1] for words in timed)
    assert {words[5] for words in timed} == {"float32", "bfloat16"} >= {real[5]}
    torch.manual_seed(0)
    start, weights = UNet(3, 3, **TINY).state_dict(), checkpoint("run")["network"]
    assert 0 < max((w - start[name]).abs().max().item() for name, w in weights.items()) < STEP
    for precision in ("float32", "bfloat16"):
        with train.autocast(torch.device("cpu"), precision):
            assert str((torch.ones(2, 2) @ torch.ones(2, 2)).dtype) == f"torch.{precision}"


def test_the_first_device_that_works_is_taken_and_each_process_has_its_own_gpu(monkeypatch):
    works, touched = {"mps", "cpu"}, set()
    error_of = {"cuda": RuntimeError("no driver")}.get
    monkeypatch.setattr(torch.cuda, "set_device", touched.add)
    fails = lambda name: error_of(name, name not in works or None)  # noqa: E731
    monkeypatch.setattr(toolbox.device, "error_of", fails)
    assert pick_device().type == "mps" and pick_device("cpu").type == "cpu"
    monkeypatch.setattr(toolbox.device, "PROCESSES", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device().type == "cpu"
    works.add("cuda:1")
    assert pick_device() == pick_device("cuda") == torch.device("cuda:1") and touched == {"cuda:1"}


# ---- to stop and to resume -----------------------------------------------------------------------

# Forks a training again and again, and kills it: at a random moment, or in place of a rename.
KILL = """
import random, signal, time
from pathlib import Path
rng, resume, replace = random.Random(0), Path("killed/resume.pt"), os.replace
train.learning_rate = lambda step, steps: 1e-3  # which else depends on the number of steps

def fork(words, renames=10**9):
    def rename(old, new, done=[]):
        done.append(new)
        os.kill(os.getpid(), signal.SIGKILL) if len(done) > renames else replace(old, new)

    if pid := os.fork():
        return pid
    os.replace, sys.stderr = rename, open(os.devnull, "w")
    training(words)
    os._exit(0)

for kill in range(KILLS):
    pid = fork("--out killed --steps 99999", rng.randint(4, 15) if kill % 3 == 0 else 10**9)
    if kill % 3:
        before, end = resume.stat().st_mtime_ns, time.monotonic() + 60
        while resume.stat().st_mtime_ns == before and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
for out in ("killed", "straight"):
    pid = fork(f"--out {out} --steps {torch.load(resume)['step'] + 3 * (out == 'killed')}")
    assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, and kill -9")
@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_resumes_bit_by_bit(photos, start, kills):
    program = start(extra=KILL.replace("KILLS", str(kills)))
    out, err = program.communicate(timeout=60 + 10 * kills)
    assert program.returncode == 0, err
    assert out.count("took over killed") == kills and checkpoint("killed")["step"] > kills
    assert torch.equal(flat("straight"), flat("killed"))
    straight, killed = contents("straight"), contents("killed")
    assert killed.keys() - {"lock"} == {"log.csv", "model.pt", "resume.pt"}
    assert all(straight[name] == killed[name] for name in ("model.pt", "log.csv"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends signals differently")
def test_after_ctrl_c_it_saves_and_the_same_command_resumes(train_here, monkeypatch, capsys):
    monkeypatch.setattr(toolbox.run, "SAVE_EVERY", 1000)
    train_here("--steps", 12, "--out", "straight")
    step, before = train.gradient_step, signal.getsignal(signal.SIGINT)

    def stop_in_step_7(*words):
        step(*words)
        if words[3:5] == (6, 12):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train, "gradient_step", stop_in_step_7)
        train_here("--steps", 12)
    assert end.value.code == 130 and "after step 7 of 12" in capsys.readouterr().out
    assert checkpoint("run")["step"] == 7 and signal.getsignal(signal.SIGINT) is before
    assert "steps 7 to 12" in train_here("--steps", 12)
    assert torch.equal(flat("run"), flat("straight"))


def test_a_run_can_start_from_the_weights_of_a_model(train_here):
    train_here("--steps", 2, "--schedule", "cosine")
    out = train_here("--steps", 1, "--out", "fine", "--model", "run/model.pt", "--size", None)
    start, schedule, _ = load_model("run/model.pt")
    end = checkpoint("fine")["network"]
    assert 0 < max((end[k] - w).abs().max().item() for k, w in start.state_dict().items()) < STEP
    assert "3x16x16" in out and load_model("fine/model.pt")[1].name == schedule.name == "cosine"


# ---- what is refused, and leaves all as it was ---------------------------------------------------


def test_a_folder_of_other_settings_or_of_another_training_is_refused_and_untouched(
    train_here, here, photos
):
    train_here("--steps", 1)
    (here / "run/lock").write_text(f"{os.getppid()} {socket.gethostname()}")  # a living process
    (here / "run/model.pt.1.tmp").write_text("")
    before = contents("run")
    for flag, value, told in [
        ("--batch", 2, "batch = 4, and now it is 2"),
        ("--seed", 5, "seed = 0, and now it is 5"),
        ("--size", 8, "size = 16, and now it is 8"),
        ("--schedule", "linear", "schedule = .*'sigmoid'.*'linear'"),
        ("--precision", "bfloat16", "precision = float32, and now it is bfloat16"),
        ("--model", "run/model.pt", "model = None, and now it is run.model.pt"),
        ("--steps", 3, f"another training, process {os.getppid()}, is using run"),
    ]:
        with pytest.raises(UserError, match=rf"{told}.*use another --out"):
            train_here("--steps", 2, flag, value)
    (photos / "0.png").unlink()
    with pytest.raises(UserError, match=r"data_checksum = .*, and now it is"):
        train_here("--steps", 2)
    assert contents("run") == before


def test_a_finished_run_says_so_and_a_loss_that_is_not_finite_keeps_it(train_here, monkeypatch):
    train_here("--steps", 4)
    good, mse = contents("run"), F.mse_loss
    assert all("finished after 4 steps" in train_here("--steps", steps) for steps in (4, 2))
    in_the_loss = lambda x, y: mse(x, y) * torch.nan  # noqa: E731
    in_the_gradient = lambda x, y: mse(x, y) + (0 * x.sum()).sqrt()  # noqa: E731
    for bad in (in_the_loss, in_the_gradient):
        with monkeypatch.context() as patch:
            patch.setattr(train.F, "mse_loss", bad)
            with pytest.raises(UserError, match=r"step 5: the loss is .*nan"):
                train_here("--steps", 8)
        assert contents("run") == good


def test_a_damaged_checkpoint_is_one_sentence_and_nothing_is_touched(train_here, here, capsys):
    train_here("--steps", 1)
    path, whole = here / "run/resume.pt", checkpoint("run")
    both, model = whole["optimizers"], (here / "run/model.pt").read_bytes()
    damages = [path.read_bytes()[:-1000], b"", model, Evil(), [1, 2], torch.zeros(3)]
    damages += [whole | change for change in ({"settings": 3}, {"network": {}})]
    damages += [whole | {"optimizers": bad} for bad in ([{}, {}], both[:1], both[::-1])]
    for damage in damages:
        path.write_bytes(damage) if isinstance(damage, bytes) else torch.save(damage, path)
        before = contents("run")
        assert "run/resume.pt" in said(lambda: train_here("--steps", 2), capsys)
        assert contents("run") == before and not (here / "executed").exists()
