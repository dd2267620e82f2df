"""The recipe step by step; a run that is killed resumes bit by bit; nothing is lost or mixed up."""

import copy
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Evil, checkpoint, flat, said

import toolbox.device
import toolbox.run
import toolbox.timing
import train
from processes import NoiseSchedule
from toolbox.data import Data, from_uint8, load_data
from toolbox.device import pick_device
from toolbox.files import UserError
from toolbox.models import load_model, model_config
from toolbox.muon import Muon
from toolbox.run import Run, generator_for
from unet import UNet

LOG_SAMPLES = train.log_samples  # the fixture train_here replaces it
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows sends signals differently")

# ---- the recipe ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "steps", "rate"),
    [(0, 1000, 4e-5), (24, 1000, 1e-3), (48, 1000, 1.904e-3), (500, 1000, 1e-3), (999, 1000, 2e-6)],
)
def test_the_learning_rate_warms_up_and_falls_linearly_to_0(step, steps, rate):
    assert train.learning_rate(step, steps) == pytest.approx(rate)


def test_a_step_is_clip_then_muon_for_matrices_and_adamw_for_vectors_then_ema():
    """The same arithmetic a second time, with optimizers built here, number by number."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Conv2d(1, 2, 3))
    network.register_buffer("table", torch.zeros(3))
    ema, twin = copy.deepcopy(network), copy.deepcopy(network)
    optimizers = train.make_optimizers(network)
    muon, adamw = (o.param_groups[0]["params"] for o in optimizers)
    assert {w.ndim for w in muon} == {2, 4} and [w.ndim for w in adamw] == [1, 1]
    matrices = Muon([twin[0].weight, twin[1].weight], 2e-3, 0.95, 0.01)
    vectors = [twin[0].bias, twin[1].bias]
    vectors = torch.optim.AdamW(vectors, 2e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    expected = [w.detach().clone() for w in ema.parameters()]
    for step in range(4):
        scale = (30.0, 0.01, 3.0, 1.0)[step]
        for net in (network, twin):
            loss = scale * sum((w.sin() * (1 + step)).sum() for w in net.parameters())
            if net is twin:
                loss.backward()
        train.gradient_step(
            scale * sum((w.sin() * (1 + step)).sum() for w in network.parameters()),
            network, ema, optimizers, step, 100,
        )  # fmt: skip
        norm = sum(w.grad.square().sum() for w in twin.parameters()).sqrt().item()
        assert norm > 1.1 or norm < 0.9
        for w in twin.parameters():
            w.grad *= min(1, 1 / norm)
        for optimizer in (matrices, vectors):
            optimizer.param_groups[0]["lr"] = 2e-3 * (step + 1) / 50
            optimizer.step()
            optimizer.zero_grad()
        decay = (2 + step) / (11 + step)
        torch._foreach_lerp_(expected, [*twin.parameters()], 1 - decay)
        torch.testing.assert_close([*network.parameters()], [*twin.parameters()])
        torch.testing.assert_close([*ema.parameters()], expected)
        assert all(w.grad is None for w in network.parameters())
        network.table.add_(1)
    assert not ema.table.any()  # a buffer is no weight: its values have no mean
    train.update_ema(ema, network, 10**6)
    torch._foreach_lerp_(expected, [*network.parameters()], 0.0001)
    torch.testing.assert_close([*ema.parameters()], expected)


def test_bfloat16_is_for_products_only_and_float32_for_all():
    x = torch.ones(2, 2)
    for precision in ("float32", "bfloat16"):
        with train.autocast(torch.device("cpu"), precision):
            assert str((x @ x).dtype) == f"torch.{precision}"


def test_the_loss_is_that_of_the_noise_in_x_t_at_t(train_here, monkeypatch):
    """math.md (7). All that is random in step k is drawn again here: from (seed, k), in order."""
    asked = []

    class Asked(UNet):
        def forward(self, x, t, context=None):
            asked.append((x, t, super().forward(x, t, context)))
            return asked[-1][-1]

    monkeypatch.setattr(train, "UNet", lambda *channels: Asked(*channels, **TINY))
    out = train_here("--steps", 2, "--seed", 5)
    images, losses = from_uint8(load_data("photos", 16).images), []
    for step, (x, t, v) in enumerate(asked[-2:]):
        generator = generator_for(5, step)
        indices = torch.randint(len(images), (4,), generator=generator)
        flipped = torch.rand(4, generator=generator) < 0.5
        expected_t = torch.randint(1000, (4,), generator=generator)
        noise = torch.randn(4, 3, 16, 16, generator=generator)
        x0 = images[indices]
        x0[flipped] = x0[flipped].flip(-1)
        a = NoiseSchedule.sigmoid().alpha_bar[t].view(-1, 1, 1, 1)
        assert torch.equal(t, expected_t)
        torch.testing.assert_close(x, a.sqrt() * x0 + (1 - a).sqrt() * noise)
        losses.append(F.mse_loss((1 - a).sqrt() * x + a.sqrt() * v, noise).item())
    assert checkpoint("run")["history"][0][1] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert "steps 0 to 2 of 4 images" in out and "photos: 12 of 3x16x16" in out


@pytest.mark.parametrize(
    ("size", "channels"), [(32, (32, 64, 128, 128)), (64, train.LARGE["channels"])]
)
def test_large_images_get_another_network(train_here, monkeypatch, size, channels):
    monkeypatch.setattr(train, "UNet", UNet)
    monkeypatch.setattr(
        train, "start_run", lambda args, folder, network, *_: made.append(network) or 1 / 0
    )
    made = []
    with pytest.raises(ZeroDivisionError):
        train_here("--size", size)
    assert made[0].config["channels"] == list(channels) and made[0].config["in_channels"] == 3


def test_it_learns(train_here, photos, monkeypatch):
    """Some steps on a single image: the loss falls below that of a network that outputs 0."""
    monkeypatch.setattr(toolbox.run, "SAVE_EVERY", 1000)
    for i in range(1, 12):
        (photos / f"{i}.png").unlink()
    train_here("--steps", 120, "--size", 8, "--batch", 16)
    losses = [loss for _, loss in checkpoint("run")["history"]]
    assert len(losses) == 12 and sum(losses[-3:]) < 0.85 * sum(losses[:3])


# ---- a run ---------------------------------------------------------------------------------------


def tiny_run(folder, steps=1000, batch=8, images=None, hflip=True, precision="float32"):
    torch.manual_seed(0)
    network = UNet(**TINY)
    images = torch.zeros(40, 3, 8, 8, dtype=torch.uint8) if images is None else images
    config = model_config(network, NoiseSchedule.linear(), 8, "test")
    ema, optimizers = copy.deepcopy(network), train.make_optimizers(network)
    data, cpu = Data("test", images, hflip=hflip), torch.device("cpu")
    return Run(folder, network, ema, optimizers, data, config, {}, steps, batch, 0, cpu, precision)


@pytest.mark.parametrize("hflip", [True, False])
def test_time_steps_images_and_noise_are_uniform_and_complete(here, hflip):
    """Each index 0 .. T-1 is trained, each image shown, half of them flipped; no step repeats."""
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 8, 8).clone()
    images[..., 0] = 255  # the left edge: bright; flipped: the right one
    run = tiny_run(here / "run", steps=1500, images=images, hflip=hflip)
    times, shown, flipped, noises = [], Counter(), 0, []
    for x0 in run.batches():
        assert x0.shape == (8, 3, 8, 8)
        times += run.randint(1000).tolist()
        noises += run.randn_like(x0)[:, 0, 0, 0].tolist()
        shown.update(((x0[:, 0, 0, 3] + 1) * 127.5).round().int().tolist())
        flipped += (x0[:, 0, 0, 7] == 1).sum().item()
        run.step += 1
    assert set(times) == set(range(1000)) and abs(sum(times) / 12_000 - 499.5) < 12
    assert set(shown) == set(range(40)) and max(shown.values()) < 2 * min(shown.values())
    assert abs(flipped / 12_000 - 0.5) < 0.02 if hflip else flipped == 0
    assert len(set(noises)) > 11_900 and abs(torch.tensor(noises).std() - 1) < 0.03


def test_generators_of_different_seeds_and_steps_differ():
    """(seed << 32) + step would not do: PyTorch's CPU generator reads 32 bits."""
    numbers = [generator_for(seed, step).initial_seed() for seed in range(20) for step in range(50)]
    assert len(set(numbers)) == 1000 and max(numbers) > 2**31


def test_the_log_has_the_mean_loss_of_each_ten_steps(here):
    run = tiny_run(here / "run", steps=24)
    for _ in run.batches():
        run.log(torch.tensor(float(run.step)))
    assert (here / "run/log.csv").read_text() == (
        "step,loss\n10,4.500000\n20,14.500000\n24,21.500000\n"
    )


@pytest.mark.parametrize(
    ("steps", "previews"),
    [
        (1, [1]),
        (99, [99]),
        (250, [100, 200, 250]),
        (1003, [201, 402, 603, 804, 1003]),
        (3700, [740, 1480, 2220, 2960, 3700]),
    ],
)
def test_a_run_shows_what_it_learned_a_few_times_and_at_its_end(here, steps, previews):
    run = tiny_run(here / "run", steps=steps)
    assert [step for step in range(1, steps + 1) if run.preview_after(step)] == previews


def test_a_checkpoint_is_due_after_some_seconds_and_at_the_end(here, monkeypatch):
    run, saved = tiny_run(here / "run", steps=9), []
    monkeypatch.setattr(toolbox.run, "time", SimpleNamespace(monotonic=lambda: 7.0 * run.step))
    save, run.save = run.save, lambda: (saved.append(run.step), save())
    for _ in run.batches():
        run.log(torch.tensor(1.0))
    assert saved == [5, 9]  # 30 seconds are over after 4.3 steps of 7


def test_previews_disturb_nothing(train_here, monkeypatch, here):
    train_here("--steps", 3, "--out", "blind")
    monkeypatch.setattr(train, "log_samples", LOG_SAMPLES)
    monkeypatch.setattr(toolbox.run, "MIN_PREVIEW_STEPS", 2)
    train_here("--steps", 3, "--out", "seen")
    assert torch.equal(flat("blind"), flat("seen"))
    made = {path.name for path in (here / "seen").iterdir()} - {"lock"}
    images = {"loss.png", "samples-000002.png", "samples-000003.png"}
    assert made == images | {"log.csv", "model.pt", "resume.pt"}
    assert (here / "seen/samples-000003.png").stat().st_size > 20_000  # 36 images


def test_the_seed_decides_everything(train_here):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_here("--steps", 2, "--out", out, "--seed", seed)
    assert torch.equal(flat("a"), flat("b")) and not torch.equal(flat("a"), flat("c"))


# ---- how long it takes, in which precision, on which device --------------------------------------


@pytest.mark.parametrize("slow", ["float32", "bfloat16", "an error in bfloat16"])
def test_both_precisions_are_timed_and_the_faster_is_taken_announced_and_kept(here, capsys, slow):
    run = tiny_run(here / "run", steps=6000, precision=None)

    def step(precision):
        if slow == f"an error in {precision}":
            raise RuntimeError("this device has none")
        time.sleep(0.06 if precision == slow else 0.02)

    toolbox.timing.announce(run, step, lambda precision: time.sleep(0.05), 60)
    faster = "bfloat16" if slow == "float32" else "float32"
    assert run.precision == faster
    minutes, previews = re.search(
        r"about ([\d.]+) minutes, ([\d.]+) of", capsys.readouterr().out
    ).groups()
    assert float(previews) == pytest.approx(5 * 60 * 0.05 / 60, abs=0.06)
    assert float(minutes) - float(previews) == pytest.approx(6000 * 0.02 / 60, rel=0.15)
    run.save()
    assert tiny_run(here / "run", precision=None).precision == faster
    run.precision, slow = "bfloat16", "an error in bfloat16"  # asked for: nothing else to take
    with pytest.raises(RuntimeError, match="this device has none"):
        toolbox.timing.announce(run, step, lambda precision: None, 60)


def test_timing_and_training_steps_are_whole_steps_and_change_nothing(train_here, monkeypatch):
    """The timed steps train copies: the first real step starts from the weights of the seed."""
    calls, step = [], train.gradient_step
    monkeypatch.setattr(train, "gradient_step", lambda *words: calls.append(words) or step(*words))
    train_here("--steps", 1, "--precision", None)
    timed, (real,) = calls[:-1], calls[-1:]
    assert len(timed) >= 3 and all(words[1] is not real[1] for words in timed)
    torch.manual_seed(0)
    start = UNet(3, 3, **TINY).state_dict()
    weights = checkpoint("run")["network"]
    assert 0 < max((w - start[name]).abs().max().item() for name, w in weights.items()) < 1e-4


def test_the_first_device_that_works_is_taken_and_each_process_has_its_own_gpu(monkeypatch):
    works, touched = {"mps", "cpu"}, []
    monkeypatch.setattr(torch.cuda, "set_device", touched.append)
    error_of = lambda device: None if device in works else RuntimeError("no driver")  # noqa: E731
    monkeypatch.setattr(toolbox.device, "error_of", error_of)
    assert pick_device().type == "mps" and pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="--device cuda: this machine has no such device"):
        pick_device("cuda")
    monkeypatch.setattr(toolbox.device, "PROCESSES", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device().type == "cpu"
    works |= {"cuda:1"}
    assert pick_device() == pick_device("cuda") == torch.device("cuda:1") and set(touched) == {
        "cuda:1"
    }


# ---- to stop and to resume -----------------------------------------------------------------------

# Forks a training again and again, and kills it: at a random moment, or in place of a rename.
KILL = """
import random, signal, time
from pathlib import Path
rng, resume, replace = random.Random(0), Path("killed/resume.pt"), os.replace

def training(out, steps, renames=10**9):
    def rename(old, new, done=[]):
        done.append(new)
        os.kill(os.getpid(), signal.SIGKILL) if len(done) > renames else replace(old, new)

    pid = os.fork()
    if pid == 0:
        os.replace, sys.stderr = rename, open(os.devnull, "w")
        sys.argv = "train.py --data photos --size 16 --batch 4 --precision float32".split()
        sys.argv += f"--device cpu --out {out} --steps {steps}".split()
        train.main()
        os._exit(0)
    return pid

for kill in range(KILLS):
    in_a_write = kill % 3 == 0
    pid = training("killed", 100_000, renames=rng.randint(4, 15) if in_a_write else 10**9)
    if not in_a_write:
        before = resume.stat().st_mtime_ns
        while resume.stat().st_mtime_ns == before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
steps = torch.load(resume)["step"] + 3
assert os.waitpid(training("killed", steps), 0)[1] == 0
assert os.waitpid(training("straight", steps), 0)[1] == 0
sys.argv = ["train.py"]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, and kill -9")
@pytest.mark.parametrize("kills", [7, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_resumes_bit_by_bit(photos, start, kills):
    # The learning rate depends on the number of steps only after the warm-up: hold it.
    rate = "train.learning_rate = lambda step, steps: 1e-3\n"
    program = start(extra=rate + KILL.replace("KILLS", str(kills)))
    out, err = program.communicate(timeout=60 + 10 * kills)
    assert program.returncode == 0, err
    one, other = checkpoint("straight"), checkpoint("killed")
    assert one["step"] == other["step"] > kills and one["history"] == other["history"]
    assert torch.equal(flat("straight"), flat("killed"))
    for name in ("model.pt", "log.csv"):
        assert (photos.parent / "killed" / name).read_bytes() == (
            photos.parent / "straight" / name
        ).read_bytes()
    names = {path.name for path in (photos.parent / "killed").iterdir()}
    assert names - {"lock"} == {"log.csv", "model.pt", "resume.pt"}
    assert out.count("took over killed") == kills


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_the_same_command_resumes(
    train_here, monkeypatch, capsys, number
):
    monkeypatch.setattr(toolbox.run, "SAVE_EVERY", 1000)
    train_here("--steps", 12, "--out", "straight")
    step, before = train.gradient_step, signal.getsignal(number)

    def stop_in_step_7(*words):
        step(*words)
        if words[4:] == (6, 12):
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "gradient_step", stop_in_step_7)
        with pytest.raises(SystemExit) as end:
            train_here("--steps", 12)
    assert end.value.code == 130 and "after step 7 of 12" in capsys.readouterr().out
    assert checkpoint("run")["step"] == 7 and signal.getsignal(number) is before
    assert "steps 7 to 12" in train_here("--steps", 12)
    assert torch.equal(flat("run"), flat("straight"))
    assert checkpoint("run")["history"] == checkpoint("straight")["history"]


def test_a_finished_run_says_so_and_more_steps_continue_it(train_here):
    train_here("--steps", 4)
    first = flat("run")
    for steps in (4, 2):
        assert "finished after 4 steps" in train_here("--steps", steps)
    assert torch.equal(first, flat("run"))
    train_here("--steps", 9)
    train_here("--steps", 9, "--out", "straight")  # the same rates: in both the warm-up lasts
    assert torch.equal(flat("run"), flat("straight"))


def test_a_run_can_start_from_the_weights_of_a_model(train_here):
    train_here("--steps", 2, "--schedule", "cosine")
    out = train_here("--steps", 1, "--out", "fine", "--model", "run/model.pt", "--size", None)
    start, schedule, _ = load_model("run/model.pt")
    end = checkpoint("fine")["network"]
    assert 0 < max((end[k] - w).abs().max().item() for k, w in start.state_dict().items()) < 1e-4
    assert "3x16x16" in out and load_model("fine/model.pt")[1].name == schedule.name == "cosine"


# ---- what is refused, and leaves all as it was ---------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--batch", 2, "batch = 4, and now it is 2"),
        ("--seed", 5, "seed = 0, and now it is 5"),
        ("--size", 8, "size = 16, and now it is 8"),
        ("--schedule", "linear", "schedule = .*'sigmoid'.*'linear'"),
        ("--precision", "bfloat16", "precision = float32, and now it is bfloat16"),
        ("--model", "run/model.pt", "model = None, and now it is run/model.pt"),
    ],
)
def test_a_folder_of_other_settings_is_refused_and_untouched(train_here, here, flag, value, named):
    train_here("--steps", 1)
    (here / "run/lock").write_text(f"{os.getppid()} {socket.gethostname()}")  # a living process
    (here / "run/model.pt.1.tmp").write_text("")
    before = contents(here / "run")
    with pytest.raises(UserError, match=rf"run holds a run with {named}.*use another --out"):
        train_here("--steps", 2, flag, value)
    with pytest.raises(UserError, match=f"another training, process {os.getppid()}, is using run"):
        train_here("--steps", 2)
    assert contents(here / "run") == before


def test_other_images_are_other_settings(train_here, here, photos):
    train_here("--steps", 1)
    (photos / "0.png").unlink()
    with pytest.raises(UserError, match="images = 12, and now it is 11"):
        train_here("--steps", 2)


@pytest.mark.parametrize("network", [False, True])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(train_here, monkeypatch, network):
    """In the loss, or in the gradient of one weight only."""
    train_here("--steps", 4)
    good, mse = flat("run"), F.mse_loss
    with monkeypatch.context() as patch:
        bad = (lambda x, y: (0 * (x - x.detach()).sum()).sqrt() + mse(x, y)) if network else None
        patch.setattr(train.F, "mse_loss", bad or (lambda x, y: mse(x, y) * float("nan")))
        with pytest.raises(UserError, match=r"step 5: the loss is .*nan"):
            train_here("--steps", 8)
    assert torch.equal(flat("run"), good)
    train_here("--steps", 8)
    train_here("--steps", 8, "--out", "straight")
    assert torch.equal(flat("run"), flat("straight"))


def entries(**new):
    return lambda path: torch.save(checkpoint("run") | new, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1000]),
        lambda path: path.write_bytes(b""),
        lambda path: torch.save(Evil(), path),
        lambda path: path.write_bytes(path.with_name("model.pt").read_bytes()),
        lambda path: torch.save([1, 2], path),
        entries(settings=3),
        entries(network={}),
        entries(optimizers=[{}, {}]),
        lambda path: entries(optimizers=checkpoint("run")["optimizers"][:1])(path),
        lambda path: entries(optimizers=checkpoint("run")["optimizers"][::-1])(path),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence_and_nothing_is_touched(
    train_here, here, capsys, damage
):
    train_here("--steps", 1)
    damage(here / "run/resume.pt")
    before = contents(here / "run")
    assert "run/resume.pt" in said(lambda: train_here("--steps", 2), capsys)
    assert contents(here / "run") == before and not (here / "executed").exists()


@posix
def test_a_full_disk_keeps_the_last_checkpoint(train_here, here, monkeypatch, capsys):
    """The limit for the size of a file is real: the system refuses to write, in step 4."""
    from resource import RLIMIT_FSIZE, getrlimit, setrlimit

    train_here("--steps", 6, "--out", "straight")
    model, limits = (here / "straight/model.pt").stat().st_size, getrlimit(RLIMIT_FSIZE)
    ema = train.update_ema

    def full_in_step_4(*words):
        ema(*words)
        if words[2] == 4:
            setrlimit(RLIMIT_FSIZE, (model + 5000, limits[1]))  # resume.pt is larger

    with monkeypatch.context() as patch:
        patch.setattr(train, "update_ema", full_in_step_4)
        try:
            sentence = said(lambda: train_here("--steps", 6), capsys)
        finally:
            setrlimit(RLIMIT_FSIZE, limits)
    assert "run/resume.pt: File too large; check its name" in sentence
    assert checkpoint("run")["step"] == 3 and load_model("run/model.pt")
    assert not [*(here / "run").glob("*.tmp")]
    train_here("--steps", 6)
    assert torch.equal(flat("run"), flat("straight"))
