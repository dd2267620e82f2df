"""Atomic file writes, and command-line errors in one sentence."""

import atexit
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA, Linux, Windows


class UserError(Exception):
    """An error that the user can fix: one sentence on what was expected, what came, what to do."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a UserError as one line and exit with 2; any other exception keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        for name in ("write", "flush"):
            setattr(stream, name, partial(unbroken, getattr(stream, name)))
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":  # only the first of torchrun's processes reports
            time.sleep(3)
        text = " ".join(str(error).split())
        print("error:", printable(text), file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in MEMORY):
            print("error: out of memory: use a smaller --batch, --n or --size", file=sys.stderr)
            sys.exit(2)
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def unbroken(method: Callable, *args: object) -> object:
    """Continue in silence when the reader of the output has left (`| head`)."""
    try:
        return method(*args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), method.__self__.fileno())


def printable(text: str) -> str:
    """Control characters in the name of a file could do anything to a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's errors in reading or writing `path` into a UserError."""
    try:
        yield
    except OSError as error:
        advice = "check its name, its permissions, and the space on the disk"
        raise UserError(f"{path}: {error.strerror or error}; {advice}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; it becomes `path` at the end, or vanishes on failure."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with system_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)  # a rename is all or nothing
        finally:
            temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def check_writable(path: Path, suffix: str = "") -> None:
    """Raise an error before the work, not after it, if this file cannot be written."""
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"{path}: expected a name that ends in {suffix}")
    with system_errors(path):
        new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "ab").close()
        if new:
            path.unlink()


def check_number(flag: str, number: float, low: float, high: float = math.inf) -> None:
    if not low <= number <= high or math.isinf(number):
        limits = f"{low} or more" if high == math.inf else f"{low} to {high}"
        raise UserError(f"{flag} {number}: expected {limits}")


def lock_folder(folder: Path) -> None:
    """Let no other process write there until this one ends; take over a dead process's lock.

    Remove temporary files that dead processes left.
    """
    path, mine = folder / "lock", f"{os.getpid()} {socket.gethostname()}"
    with system_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.read_text("utf-8") if path.exists() else mine
        if lock != mine:
            pid, _, host = lock.partition(" ")
            if host == socket.gethostname() and process_alive(pid):
                advice = f"use another --out, or wait for it (if it is no training, delete {path})"
                raise UserError(f"another training, process {pid}, is using {folder}: {advice}")
            print(f"took over {folder}: process {pid} no longer runs here", flush=True)
        path.write_text(mine, "utf-8")
    atexit.register(path.unlink, missing_ok=True)
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files (see atomic_write) of killed processes."""
    for path in folder.glob("*.tmp"):
        if not process_alive(path.name.split(".")[-2]):
            path.unlink(missing_ok=True)


def process_alive(pid: str) -> bool:
    try:
        if os.name != "nt":  # Windows cannot ask without killing: assume yes
            os.kill(int(pid), 0)  # signal 0 only asks
    except (OSError, ValueError, OverflowError) as error:
        return isinstance(error, PermissionError)  # another user's
    return True
