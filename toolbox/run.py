"""What a training needs beside its idea: device, precision, randomness, progress, and a folder from which it goes on.

Everything random in step k comes from a generator seeded by (seed, k). So nothing random has to be saved, a run that
was killed goes on bit by bit as if it had not been, and drawing pictures along the way disturbs nothing.
"""

import copy
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from toolbox.data import Data, from_bytes
from toolbox.files import whole_file
from toolbox.models import read, save_model

LEARNING_RATE = 1e-3
WARM_UP = 50  # steps: AdamW's averages of the gradient are young, so the first steps are small
CLIP = 1.0  # the longest gradient that is believed
PICTURES = 5  # how often a run shows what it has learned
SAVE_EVERY = 30.0  # seconds: as much as a killed run can lose


def pick_device(name: str | None = None) -> torch.device:
    """The one asked for, else the first that works: a GPU, Apple's GPU, the processor."""
    if name is None:
        return next(torch.device(name) for name in ("cuda", "mps", "cpu") if works(name) is None)
    if error := works(name):
        raise ValueError(
            f"--device {name}: this machine has no such device, or PyTorch cannot use it; try --device cpu"
        ) from error
    return torch.device(name)


def works(device: str) -> Exception | None:
    """Why a tensor cannot be made there, if so."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return error


def generator_for(seed: int, k: int) -> torch.Generator:
    """Of step k, or of picture k. The two numbers are mixed: PyTorch's CPU generator looks at 32 bits of its seed only."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {k}").getrandbits(32))


class Run:
    """One training in one folder: `for x0 in run.batches(): ...; run.step(loss)`.

    card: what model.pt says of the network beside its weights. settings: what else must be the same for a run to go on.
    steps: how many in all; asking for more goes on with a finished run.
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
    ):
        for name, number in (("--steps", steps), ("--batch", batch)):
            if number < 1:
                raise ValueError(f"{name} {number}: expected 1 or more")
        self.folder, self.data, self.card, self.settings = folder, data, card, settings | {"batch": batch, "seed": seed}
        self.steps, self.batch, self.seed, self.device, self.precision = steps, batch, seed, device, precision
        self.k = self.saved_k = 0  # training steps done; and of the last checkpoint
        self.history: list[tuple[int, float]] = []  # (step, mean loss since the entry before)
        self.recent: list[float] = []
        self.stop_asked = False
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format  # on CPUs it slows GroupNorm
        self.network = network.to(device, memory_format=layout)
        self.averaged = copy.deepcopy(self.network).requires_grad_(False).eval()
        fused = device.type in ("cpu", "cuda")  # one pass over the weights instead of ten
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), fused=fused)
        self.resume()

    # ---- the training's own numbers -------------------------------------------------------------------------------

    def batches(self) -> Iterator[Tensor]:
        """A batch (B, C, H, W) in [-1, 1] for each step that is left: pictures drawn at random, half of them mirrored if allowed."""
        previous = signal.signal(signal.SIGINT, self.ask_to_stop)
        self.saved_at = time.monotonic()
        self.bar = tqdm(total=self.steps * self.batch, initial=self.k * self.batch, unit="img", unit_scale=True, smoothing=0.05)
        try:
            while self.k < self.steps and not self.stop_asked:
                self.generator = generator_for(self.seed, self.k)
                chosen = torch.randint(len(self.data.images), (self.batch,), generator=self.generator)
                mirrored = (torch.rand(self.batch, generator=self.generator) < 0.5) & self.data.mirror
                x0 = from_bytes(self.data.images[chosen])
                yield torch.where(mirrored[:, None, None, None], x0.flip(-1), x0).to(self.device)
        finally:
            self.bar.close()
            signal.signal(signal.SIGINT, previous)
        if self.k > self.saved_k:
            self.save()
        if self.k < self.steps:
            print(f"stopped and saved after step {self.k} of {self.steps}: the same command goes on from here")
            sys.exit(130)

    def randint(self, high: int) -> Tensor:
        """For each image a whole number, 0 .. high - 1, uniformly: (B,) long."""
        return torch.randint(high, (self.batch,), generator=self.generator).to(self.device)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal noise of x's shape."""
        return torch.randn(x.shape, generator=self.generator).to(self.device)

    # ---- one step of learning -------------------------------------------------------------------------------------

    def step(self, loss: Tensor) -> None:
        """Backward, clip, AdamW, average; then progress, and a checkpoint when one is due."""
        for group in self.optimizer.param_groups:  # up in WARM_UP steps, then down to 0 at the end: the last steps only polish
            group["lr"] = LEARNING_RATE * min((self.k + 1) / WARM_UP, 1 - self.k / self.steps)
        self.optimizer.zero_grad()
        loss.backward()
        length = nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        if not torch.isfinite(loss + length):
            self.stop_broken(loss.item(), length.item())
        self.optimizer.step()
        self.k += 1
        self.average()
        self.note(loss.item())
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
        """A few times in a run, and at its end."""
        return self.k % -(-self.steps // PICTURES) == 0 or self.k == self.steps

    def pictures(self, n: int) -> Tensor:
        """The first n of the data, (n, C, H, W) in [-1, 1]."""
        return from_bytes(self.data.images[:n]).to(self.device)

    # ---- as fast as the machine allows ------------------------------------------------------------------------------

    def announce(self) -> None:
        """Time a step in float32 and in bfloat16, take the faster one, and say what is going to happen."""
        seconds = {p: self.time_step(p) for p in ([self.precision] if self.precision else ["float32", "bfloat16"])}
        self.precision = min(seconds, key=seconds.get)
        timed = ", ".join(f"{precision} {s:.2f} s" for precision, s in seconds.items())
        images, minutes = self.data.images, (self.steps - self.k) * seconds[self.precision] / 60
        print(f"data      {self.data.name}: {len(images):,} pictures of {'x'.join(map(str, images.shape[1:]))}")
        print(f"network   {sum(p.numel() for p in self.network.parameters()) / 1e6:.1f} million parameters")
        print(f"device    {self.device}, {self.precision} (a step takes: {timed})")
        print(f"training  steps {self.k} to {self.steps} with {self.batch} pictures each: about {minutes:.0f} minutes")
        print(f"folder    {self.folder}", flush=True)
        if self.device.type == "cuda" and sys.platform == "linux" and minutes > 5:
            self.network.compile()  # costs a minute or two once, so only a longer run gains

    def time_step(self, precision: str) -> float:
        """Seconds for the network forward and backward, the best of three: the first ones also look for memory."""
        x = torch.zeros(self.batch, *self.data.images.shape[1:], device=self.device)
        t = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        seconds = []
        try:
            for _ in range(3):
                start = time.perf_counter()
                self.fast(self.network, precision)(x, t).square().mean().backward()
                if self.device.type != "cpu":  # a GPU works on while Python goes on
                    getattr(torch, self.device.type).synchronize()
                seconds.append(time.perf_counter() - start)
        except (RuntimeError, TypeError):  # this device has no bfloat16
            if precision == "float32" or precision == self.precision:
                raise
            return float("inf")
        finally:
            self.network.zero_grad()
        return min(seconds)

    def fast(self, network: nn.Module, precision: str | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """The same function in the run's precision."""
        bfloat16 = (precision or self.precision) == "bfloat16"

        def predict_noise(x_t: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
                return network(x_t, t)

        return predict_noise

    # ---- the folder ------------------------------------------------------------------------------------------------

    def note(self, loss: float) -> None:
        self.recent.append(loss)
        self.bar.update(self.batch)
        if self.k % 10 == 0 or self.k == self.steps:
            self.history.append((self.k, sum(self.recent) / len(self.recent)))
            self.recent = []
            self.bar.set_postfix(loss=f"{self.history[-1][1]:.4f}", step=self.k)

    def save(self) -> None:
        content = {
            "settings": self.card | self.settings,
            "precision": self.precision,
            "k": self.k,
            "history": self.history,
            "recent": self.recent,
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_model(self.folder / "model.pt", self.averaged, self.card)
        with whole_file(self.folder / "log.csv") as temporary:
            temporary.write_text("step,loss\n" + "".join(f"{k},{loss:.6f}\n" for k, loss in self.history))
        with whole_file(self.folder / "resume.pt") as temporary:  # last: when it says "done", all is there
            torch.save(content, temporary)
        self.saved_at, self.saved_k = time.monotonic(), self.k

    def resume(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        path = self.folder / "resume.pt"
        if not path.exists():
            return
        content = read(path)
        if not isinstance(content, dict) or "settings" not in content:
            raise ValueError(
                f"{path}: expected a checkpoint of this project, this is a file of another kind; use another --out"
            )
        before = content["settings"] | {"precision": content["precision"]}
        now = self.card | self.settings | {"precision": self.precision or content["precision"]}
        for name in before | now:
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{self.folder} holds a run with {name} = {before.get(name)}, and now it is {now.get(name)}: "
                    f"use another --out for a new run, or the same settings to go on with that one"
                )
        self.network.load_state_dict(content["network"])
        self.averaged.load_state_dict(content["averaged"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.precision, self.history, self.recent = content["precision"], content["history"], content["recent"]
        self.k = self.saved_k = content["k"]

    def ask_to_stop(self, *_: object) -> None:
        self.stop_asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once
