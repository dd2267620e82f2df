"""The device to compute on, and the processes that share a training."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from toolbox.files import UserError

RANK = int(os.environ.get("RANK", 0))  # torchrun numbers its processes; the first one writes
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name: str | None = None) -> torch.device:
    """The requested device, else the first that works: a GPU, Apple's GPU, the CPU."""
    cuda = f"cuda:{os.environ['LOCAL_RANK']}" if PROCESSES > 1 else "cuda"  # one GPU per process
    if name is None:
        candidates = (cuda, "cpu") if PROCESSES > 1 else (cuda, "mps", "cpu")
        name = next(name for name in candidates if error_of(name) is None)
    name = cuda if name == "cuda" else name
    if error := error_of(name):
        advice = "this machine has no such device, or PyTorch cannot use it; try --device cpu"
        raise UserError(f"--device {name}: {advice}") from error
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    return torch.device(name)


def error_of(device: str) -> Exception | None:
    """The error, if any, when a number is put on the device and read back."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device raises its own
        return error


def tune(device: torch.device) -> None:
    """Faster training: plain attention on CPUs, and memory that is kept.

    On CPUs the backward pass of flash attention is slow, and its small memory is of no use here.
    glibc would return large blocks that are freed, to be cleared anew many times a step.
    """
    if device.type == "cpu":
        torch.backends.cuda.enable_flash_sdp(False)  # it also switches the CPU's
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc
            libc, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL(None), -1, -3
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # bytes
            # Older versions take at most 32 MB.
            libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25)


@contextmanager
def distributed() -> Iterator[None]:
    """Inside, torchrun's processes can talk to each other. A single process needs nothing."""
    if PROCESSES == 1:
        yield
        return
    dist.init_process_group(timeout=timedelta(days=1))  # a download may take long
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if RANK else sys.stdout):
            yield
    finally:  # but not after an error: the others may still be waiting for something else
        if sys.exc_info()[0] in (None, SystemExit):  # done, or they have agreed to stop
            dist.destroy_process_group()


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process enters first: the others find what it made, such as the data's cache."""
    if RANK > 0:
        all_reduce_mean(0)
    try:
        yield
    finally:
        if RANK == 0:
            all_reduce_mean(0)


def all_reduce_mean(number: float) -> float:
    """The mean over all processes; each waits here for the others."""
    if PROCESSES == 1:
        return number
    total = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / PROCESSES
