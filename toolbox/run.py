"""What a training needs beside its idea: device, precision, randomness, progress, and a folder from which it goes on.

Everything random in step k comes from a generator seeded by (seed, k). So nothing random has to be saved, a run that
was killed goes on bit by bit as if it had not been, and drawing pictures along the way disturbs nothing.

A batch may be shared by several processes (`torchrun --nproc_per_node=2 train.py`), and worked on in several parts
(`--accumulate 2`) where it does not fit into memory. Each draws what is random for the whole batch and takes its share:
so however many they are, they learn from the same pictures and the same noise.
"""

import copy
import ctypes
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from toolbox.data import Data, from_bytes
from toolbox.files import check_number, check_writable, whole_file
from toolbox.models import read, save_model, write
from toolbox.muon import Muon

LEARNING_RATE = 2e-3
WARM_UP = 50  # steps: the optimizers' averages of the gradient are young, so the first steps are small
CLIP = 1.0  # the longest gradient that is believed
PICTURES = 5  # how often a run shows what it has learned
SAVE_EVERY = 30.0  # seconds: as much as a killed run can lose

RANK = int(os.environ.get("RANK", 0))  # torchrun numbers its processes; the first one speaks and writes for all
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def all_processes() -> Iterator[None]:
    """In here the processes that torchrun has started can talk to each other. One process alone needs nothing."""
    if PROCESSES == 1:
        yield
        return
    dist.init_process_group(timeout=timedelta(days=1))  # gloo for CPUs, NCCL for GPUs; drawing or a download may take long
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if RANK else sys.stdout):
            yield
    except SystemExit:  # they have agreed to stop
        dist.destroy_process_group()
        raise
    else:  # but not after an error: the others may still be waiting for something else
        dist.destroy_process_group()


@contextmanager
def first_process_first() -> Iterator[None]:
    """What the first process makes in here, like the cache of the data, the others then find."""
    if RANK > 0:
        mean(0)
    try:
        yield
    finally:
        if RANK == 0:
            mean(0)


def mean(number: float) -> float:
    """Over all processes, so each waits here for the others."""
    if PROCESSES == 1:
        return number
    total = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / PROCESSES


def pick_device(name: str | None = None) -> torch.device:
    """The one asked for, else the first that works: a GPU, Apple's GPU (for one process), the processor."""
    cuda = f"cuda:{os.environ['LOCAL_RANK']}" if PROCESSES > 1 else "cuda"  # each process of this machine has its own GPU
    if name is None:
        name = next(name for name in (cuda, "mps", "cpu") if works(name) is None and (name != "mps" or PROCESSES == 1))
    if name == "cuda":
        name = cuda
    if error := works(name):
        raise ValueError(
            f"--device {name}: this machine has no such device, or PyTorch cannot use it; try --device cpu"
        ) from error
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    return torch.device(name)


def works(device: str) -> Exception | None:
    """Why a number cannot be put there and read again, if so."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device has its own
        return error


def keep_memory() -> None:
    """Linux' C library gives each large block back to the system, which must then clear it anew, hundreds of times a step."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc
            libc, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL(None), -1, -3
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # bytes
            libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # older ones: at most 32 MB


def generator_for(seed: int, k: int) -> torch.Generator:
    """Of step k, or of picture k. The two numbers are mixed: PyTorch's CPU generator looks at 32 bits of its seed only."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {k}").getrandbits(32))


class Run:
    """One training in one folder: `for x0 in run.batches(): ...; run.step(loss)`.

    card: what model.pt says of the network beside its weights. settings: what else must be the same for a run to go on.
    steps: how many in all; asking for more goes on with a finished run. accumulate: in how many parts each process works
    on its share of a batch. It and the number of processes are no settings: a run may go on with others. example: what the
    network takes, (1, ...) each, if it is more than a picture and a time step.
    """

    def __init__(
        self,
        folder: Path,
        network: nn.Module,
        data: Data,
        card: dict,
        settings: dict,
        steps: int,
        batch: int,
        seed: int,
        device: torch.device,
        precision: str | None = None,
        accumulate: int = 1,
        example: Sequence[Tensor] | None = None,
    ):
        for flag, number in (("--steps", steps), ("--batch", batch), ("--accumulate", accumulate)):
            check_number(flag, number, 1)
        if batch % (PROCESSES * accumulate):
            raise ValueError(
                f"--batch {batch}: expected a multiple of {PROCESSES * accumulate}, for even shares "
                f"(processes: {PROCESSES}, parts by --accumulate: {accumulate}); change one of them"
            )
        self.folder, self.data, self.card, self.settings = folder, data, card, settings | {"batch": batch, "seed": seed}
        self.steps, self.batch, self.seed, self.device, self.precision = steps, batch, seed, device, precision
        self.k = self.saved_k = 0  # training steps done; and of the last checkpoint
        self.history: list[tuple[int, float]] = []  # (step, mean loss since the entry before)
        self.recent: list[float] = []
        self.parts, self.share = accumulate, batch // (PROCESSES * accumulate)  # a process's parts, and the pictures in each
        self.example = example or (torch.zeros(1, *data.images.shape[1:]), torch.zeros(1, dtype=torch.long))
        self.last_part, self.loss = True, 0.0  # of the step's parts; and their mean so far
        self.stop_asked = False
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format  # on CPUs it slows GroupNorm
        self.network = network.to(device, memory_format=layout)
        self.averaged = copy.deepcopy(self.network).requires_grad_(False).eval()
        matrices = [w for w in self.network.parameters() if w.ndim > 1]
        vectors = [w for w in self.network.parameters() if w.ndim < 2]
        adamw = torch.optim.AdamW(vectors, lr=LEARNING_RATE, betas=(0.9, 0.99), fused=device.type in ("cpu", "cuda"))
        self.optimizers = [Muon(matrices, lr=LEARNING_RATE), adamw]
        keep_memory()
        self.resume()
        self.parallel = DistributedDataParallel(self.network) if PROCESSES > 1 else self.network

    # ---- the training's own numbers -------------------------------------------------------------------------------

    def batches(self) -> Iterator[Tensor]:
        """A batch (B, C, H, W) in [-1, 1] for each step that is left, or this process's share of it, part by part.

        The pictures are drawn at random, half of them mirrored if allowed.
        """
        previous = {number: signal.signal(number, self.ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.saved_at = time.monotonic()
        images = {"total": self.steps * self.batch, "initial": self.k * self.batch, "unit": "img", "unit_scale": True}
        self.bar = tqdm(**images, smoothing=0.05, disable=RANK > 0)
        try:
            while self.k < self.steps and not mean(self.stop_asked):  # one that is asked stops all, after the same step
                for part in range(self.parts):
                    self.first = (RANK * self.parts + part) * self.share
                    self.last_part = part == self.parts - 1
                    self.parallel.require_backward_grad_sync = self.last_part  # the processes exchange gradients once a step
                    self.generator = generator_for(self.seed, self.k)
                    self.chosen = self.mine(torch.randint(len(self.data.images), (self.batch,), generator=self.generator))
                    mirrored = self.mine(torch.rand(self.batch, generator=self.generator) < 0.5) & self.data.mirror
                    yield self.data.batch(self.chosen, mirrored).to(self.device)
        finally:
            self.bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.k > self.saved_k:
            self.save()
        if self.k < self.steps:
            print(f"stopped and saved after step {self.k} of {self.steps}: the same command goes on from here", flush=True)
        mean(0)  # torchrun ends all when one has left, so nobody leaves before the first one has saved
        if self.k < self.steps:
            sys.exit(130)

    def mine(self, batch: Tensor) -> Tensor:
        """Of what was drawn for the whole batch, this part of this process."""
        return batch[self.first : self.first + self.share]

    def randint(self, high: int) -> Tensor:
        """For each image a whole number, 0 .. high - 1, uniformly: (B,) long."""
        return self.mine(torch.randint(high, (self.batch,), generator=self.generator)).to(self.device)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal noise of x's shape."""
        return self.mine(torch.randn(self.batch, *x.shape[1:], generator=self.generator)).to(self.device)

    # ---- one step of learning -------------------------------------------------------------------------------------

    def step(self, loss: Tensor) -> None:
        """Backward; after the last part clip, learn, average; then progress, and a checkpoint when one is due."""
        (loss / self.parts).backward()  # gradients add up; DistributedDataParallel takes the processes' mean
        self.loss += loss.detach() / self.parts
        if not self.last_part:
            return
        loss, self.loss = mean(self.loss.item()), 0.0
        length = nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        if not torch.isfinite(loss + length):
            self.stop_broken(loss, length.item())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:  # up in WARM_UP steps, then down to 0: the last steps only polish
                group["lr"] = LEARNING_RATE * min((self.k + 1) / WARM_UP, 1 - self.k / self.steps)
            optimizer.step()
            optimizer.zero_grad()
        self.k += 1
        self.average()
        self.note(loss)
        if time.monotonic() - self.saved_at > SAVE_EVERY:
            self.save()

    @torch.no_grad()
    def average(self) -> None:
        """Exponential moving average of the weights: steadier than the last weights, which still tremble with every batch.

        Its memory grows with the run, to about a ninth of it: with a fixed one, a young average still holds the random start.
        """
        decay = min(0.9999, (1 + self.k) / (10 + self.k))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.network.parameters()), 1 - decay)

    def stop_broken(self, loss: float, length: float) -> None:
        kept = (
            f"The checkpoint of step {self.saved_k} is kept in {self.folder}" if self.saved_k else "There is no checkpoint yet"
        )
        raise ValueError(
            f"step {self.k + 1}: the loss is {loss}, its gradient {length} long; learning on would break the network. "
            f"{kept}. Try --precision float32, or look for broken pictures in the data"
        )

    # ---- looking ----------------------------------------------------------------------------------------------------

    def pictures_due(self) -> bool:
        """A few times in a run, and at its end; never in the middle of a step, and only in the first process."""
        wanted = self.k % -(-self.steps // PICTURES) == 0 or self.k == self.steps
        return wanted and self.last_part and RANK == 0

    def pictures(self, n: int) -> Tensor:
        """The first n of the data, (n, C, H, W) in [-1, 1]."""
        return from_bytes(self.data.images[:n]).to(self.device)

    # ---- as fast as the machine allows ------------------------------------------------------------------------------

    def announce(self) -> None:
        """Time a step in float32 and in bfloat16, take the faster one, and say what is going to happen."""
        seconds = {}
        for precision in [self.precision] if self.precision else ["float32", "bfloat16"]:
            seconds[precision] = mean(self.time_step(precision, 3 * min(seconds.values(), default=float("inf"))))
        self.precision = min(seconds, key=seconds.get)
        timed = ", ".join(f"{precision} {s:.2f} s" for precision, s in seconds.items())
        images, minutes = self.data.images, (self.steps - self.k) * seconds[self.precision] / 60
        print(f"data      {self.data.name}: {len(images):,} pictures of {'x'.join(map(str, images.shape[1:]))}")
        print(f"network   {sum(p.numel() for p in self.network.parameters()) / 1e6:.1f} million parameters")
        shared = f" x {PROCESSES} processes" * (PROCESSES > 1) + f", a batch in {self.parts} parts" * (self.parts > 1)
        print(f"device    {self.device}{shared}, {self.precision} (a step takes: {timed})")
        print(f"training  steps {self.k} to {self.steps} with {self.batch} pictures each: about {minutes:.0f} minutes")
        print(f"folder    {self.folder}", flush=True)
        if self.device.type == "cuda" and sys.platform == "linux" and minutes > 5:
            self.network.compile()  # costs a minute or two once, so only a longer run gains; inside DistributedDataParallel

    def time_step(self, precision: str, hopeless: float) -> float:
        """Seconds for the network forward and backward, the best of three: the first ones also look for memory.

        One is enough if it is hopeless: without instructions for it, bfloat16 takes 20 times as long as float32.
        """
        inputs = [one.expand(self.share, *one.shape[1:]).to(self.device) for one in self.example]
        seconds = []
        try:
            for _ in range(3):
                start = time.perf_counter()
                outputs = self.fast(self.network, precision)(*inputs)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                sum(y.square().mean() for y in outputs).backward()
                if self.device.type != "cpu":  # a GPU works on while Python goes on
                    getattr(torch, self.device.type).synchronize()
                seconds.append(time.perf_counter() - start)
                if self.device.type == "cpu" and mean(seconds[-1]) > hopeless:  # all processes agree
                    break
        except (RuntimeError, TypeError):  # this device has no bfloat16
            if precision == "float32" or precision == self.precision:
                raise
            return float("inf")
        finally:
            self.network.zero_grad()
        return min(seconds) * self.parts

    def fast(self, network: nn.Module, precision: str | None = None) -> Callable[..., Tensor]:
        """The same function in the run's precision; the network that learns, together with those of the other processes."""
        network = self.parallel if network is self.network else network
        bfloat16 = (precision or self.precision) == "bfloat16"

        def function(*inputs: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
                return network(*inputs)

        return function

    # ---- the folder ------------------------------------------------------------------------------------------------

    def note(self, loss: float) -> None:
        self.recent.append(loss)
        self.bar.update(self.batch)
        if self.k % 10 == 0 or self.k == self.steps:
            self.history.append((self.k, sum(self.recent) / len(self.recent)))
            self.recent = []
            self.bar.set_postfix(loss=f"{self.history[-1][1]:.4f}", step=self.k)

    def save(self) -> None:
        if RANK > 0:
            return
        content = {
            "settings": self.card | self.settings,
            "precision": self.precision,
            "k": self.k,
            "history": self.history,
            "recent": self.recent,
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        save_model(self.folder / "model.pt", self.averaged, self.card)
        with whole_file(self.folder / "log.csv") as temporary:
            temporary.write_text("step,loss\n" + "".join(f"{k},{loss:.6f}\n" for k, loss in self.history))
        write(self.folder / "resume.pt", content)  # last: when it says "done", all is there
        self.saved_at, self.saved_k = time.monotonic(), self.k

    def resume(self) -> None:
        if RANK == 0:
            check_writable(self.folder / "log.csv")
            for leftover in self.folder.glob("*.tmp"):
                leftover.unlink()
        path = self.folder / "resume.pt"
        if not path.exists():
            return
        damaged = (
            f"{path}: this file is damaged or of another kind, no run can go on from it; "
            f"use another --out, with --model {self.folder / 'model.pt'} to begin from its weights"
        )
        try:
            content = read(path)
            before = content["settings"] | {"precision": content["precision"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(damaged) from error
        now = self.card | self.settings | {"precision": self.precision or content["precision"]}
        for name in before | now:
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{self.folder} holds a run with {name} = {before.get(name)}, and now it is {now.get(name)}: "
                    f"use another --out for a new run, or the same settings to go on with that one"
                )
        try:
            self.network.load_state_dict(content["network"])
            self.averaged.load_state_dict(content["averaged"])
            for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.precision, self.history, self.recent = content["precision"], content["history"], content["recent"]
            self.k = self.saved_k = content["k"]
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(damaged) from error

    def ask_to_stop(self, *_: object) -> None:
        self.stop_asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once
