"""Which device to compute on."""

import ctypes
import os
import sys
from contextlib import suppress

import torch

from toolbox.files import UserError

RANK = int(os.environ.get("RANK", 0))  # torchrun numbers its processes; the first one writes
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name: str | None = None) -> torch.device:
    """The device asked for, else the first that works: a GPU, Apple's GPU, the CPU."""
    cuda = f"cuda:{os.environ['LOCAL_RANK']}" if PROCESSES > 1 else "cuda"  # one GPU per process
    if name is None:
        candidates = (cuda, "cpu") if PROCESSES > 1 else (cuda, "mps", "cpu")
        name = next(name for name in candidates if error_of(name) is None)
    name = cuda if name == "cuda" else name
    if error := error_of(name):
        raise UserError(
            f"--device {name}: this machine has no such device, or PyTorch cannot use it; "
            "try --device cpu"
        ) from error
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    return torch.device(name)


def error_of(device: str) -> Exception | None:
    """What goes wrong when a number is put there and read again, if anything does."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device has its own
        return error


def tune_malloc() -> None:
    """Keep freed memory: glibc would return large blocks, to be cleared anew many times a step."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc
            libc, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL(None), -1, -3
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # bytes
            # Older versions take at most 32 MB.
            libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25)
