"""What a training needs besides its recipe: random numbers, progress, checkpoints, processes.

Everything random in step k comes from a generator seeded by (seed, k). So nothing random has to be
saved, a killed run resumes bit by bit, and sampling along the way disturbs nothing.

Several processes may share each batch (`torchrun --nproc_per_node=2 train.py`). Each draws the
random numbers of the whole batch and takes its shard, so together they train what one would.
"""

import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from toolbox.data import Data
from toolbox.device import PROCESSES, RANK, all_reduce_mean, tune
from toolbox.files import UserError, check_number, lock_folder, write_file
from toolbox.models import read, same_network, save_model, write

PREVIEWS = 5  # how often a run shows what it has learned,
MIN_PREVIEW_STEPS = 100  # but not more often than this
SAVE_EVERY = 30.0  # seconds: a killed run loses no more
RESUMED = ("precision", "step", "history", "recent")  # of a Run, besides weights and optimizers


def generator_for(seed: int, step: int) -> torch.Generator:
    """The two are mixed, because PyTorch's CPU generator uses only 32 bits of its seed."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {step}").getrandbits(32))


@dataclass
class Run:
    """One training in one folder: `for x0 in run.batches(): ...; run.log(loss)`.

    config: how model.pt describes the network. settings: what else must stay the same to resume.
    steps: the total; a larger one continues a finished run. `model` is the network to call, wrapped
    for several processes; `network` and `ema` hold the weights.
    """

    folder: Path
    network: nn.Module
    ema: nn.Module
    optimizers: list[torch.optim.Optimizer]
    data: Data
    config: dict
    settings: dict
    steps: int
    batch: int
    seed: int
    device: torch.device
    precision: str | None = None

    def __post_init__(self):
        check_number("--steps", self.steps, 1)
        check_number("--batch", self.batch, 1, 2**20)
        if self.batch % PROCESSES:
            sentence = f"expected a multiple of {PROCESSES}, the processes"
            raise UserError(f"--batch {self.batch}: {sentence}")
        self.settings = self.config | self.settings | {"batch": self.batch, "seed": self.seed}
        self.shard = self.batch // PROCESSES
        self.step = self.saved_step = 0
        self.history: list[tuple[int, float]] = []  # (step, mean loss since the entry before)
        self.recent: list[float] = []
        self.stop_requested = False
        tune(self.device)
        self.resume()
        self.model = DistributedDataParallel(self.network) if PROCESSES > 1 else self.network

    def batches(self) -> Iterator[Tensor]:
        """For each remaining step, this process's shard of a batch: (B, C, H, W) in [-1, 1].

        The images are drawn at random, and half of them flipped if the data allows it.
        """
        numbers = (signal.SIGINT, signal.SIGTERM)
        handlers = [(n, signal.signal(n, self.request_stop)) for n in numbers]
        self.saved_at = time.monotonic()
        total, done = self.steps * self.batch, self.step * self.batch
        self.bar = tqdm(total=total, initial=done, unit="img", unit_scale=True, disable=RANK > 0)
        try:
            while self.step < self.steps and not all_reduce_mean(self.stop_requested):
                self.generator = generator_for(self.seed, self.step)
                self.indices = self.randint(len(self.data.images)).cpu()
                flipped = self.local_shard(torch.rand(self.batch, generator=self.generator) < 0.5)
                x0 = self.data.batch(self.indices, flipped.cpu() & self.data.hflip)
                yield x0.to(self.device)
        finally:
            self.bar.close()
            for number, handler in handlers:
                signal.signal(number, handler)
        if self.step > self.saved_step:
            self.save()
        if self.step < self.steps:
            print(f"stopped and saved after step {self.step} of {self.steps}: repeat to resume")
        all_reduce_mean(0)  # torchrun ends all when one has left, so wait until the first has saved
        if self.step < self.steps:
            sys.exit(130)

    def local_shard(self, batch: Tensor) -> Tensor:
        """This process's part of what was drawn for the whole batch."""
        return batch.chunk(PROCESSES)[RANK].to(self.device)

    def randint(self, high: int) -> Tensor:
        """A whole number in 0 .. high - 1 for each image, uniformly: (B,) long."""
        return self.local_shard(torch.randint(high, (self.batch,), generator=self.generator))

    def timesteps(self, T: int) -> Tensor:
        """A time step for each image: each is uniform in 0 .. T-1, together they are evenly spaced.

        So no batch misses a noise level by chance (Kingma et al. 2021, appendix I.1). (B,) long.
        """
        first = torch.randint(T, (), generator=self.generator)
        return self.local_shard((first + torch.arange(self.batch) * T // self.batch) % T)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal noise of x's shape, for each image of the shard."""
        noise = torch.randn(self.batch, *x.shape[1:], generator=self.generator)
        return self.local_shard(noise)

    def log(self, loss: Tensor) -> None:
        """End a step: show progress, and save a checkpoint when one is due."""
        self.step += 1
        self.recent.append(all_reduce_mean(loss.item()))
        self.bar.set_description("training", refresh=False)
        self.bar.update(self.batch)
        if self.step % 10 == 0 or self.step == self.steps:
            self.history.append((self.step, sum(self.recent) / len(self.recent)))
            self.recent = []
            self.bar.set_postfix(loss=f"{self.history[-1][1]:.4f}", step=self.step)
        if time.monotonic() - self.saved_at > SAVE_EVERY:
            self.save()

    def preview_due(self) -> bool:
        """True a few times in a run and at its end, only in the first process."""
        due = RANK == 0 and self.preview_after(self.step)
        if due:
            self.bar.set_description("sampling")
        return due

    def preview_after(self, step: int) -> bool:
        interval = max(-(-self.steps // PREVIEWS), MIN_PREVIEW_STEPS)
        return step % interval == 0 or step == self.steps

    def save(self) -> None:
        if RANK > 0:
            return
        save_model(self.folder / "model.pt", self.ema, self.config)
        lines = ["step,loss\n", *(f"{step},{loss:.6f}\n" for step, loss in self.history)]
        write_file(self.folder / "log.csv", "".join(lines).encode())
        content = {name: getattr(self, name) for name in ("settings", *RESUMED)}
        content |= {"network": self.network.state_dict(), "ema": self.ema.state_dict()}
        content["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        write(self.folder / "resume.pt", content)  # last: once it is there, all is there
        self.saved_at, self.saved_step = time.monotonic(), self.step

    def resume(self) -> None:
        """Continue the training in the folder, if it is this very one."""
        path = self.folder / "resume.pt"
        content = read(path) if path.exists() else None
        if content is not None:
            with same_network(path):
                self.check_settings(content["settings"] | {"precision": content["precision"]})
        if RANK == 0:
            lock_folder(self.folder)
        if content is None:
            return
        with same_network(path):
            self.network.load_state_dict(content["network"])
            self.ema.load_state_dict(content["ema"])
            for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        vars(self).update({name: content[name] for name in RESUMED})
        self.saved_step = self.step

    def check_settings(self, before: dict) -> None:
        now = self.settings | {"precision": self.precision or before["precision"]}
        for name in before | now:
            if before.get(name) != now.get(name):
                both = f"{name} = {before.get(name)}, and now it is {now.get(name)}"
                advice = "use another --out for a new run, or the same settings to resume that one"
                raise UserError(f"{self.folder} holds a run with {both}: {advice}")

    def request_stop(self, *_: object) -> None:
        self.stop_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once
