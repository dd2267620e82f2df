"""Atomic file writes, and command-line errors in one sentence."""

import errno
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = "the disk is full; make room and repeat the command: what was saved is kept"
NOT_ALLOWED = "this user may not open or change it; use another place, or change its permissions"
MEANING = {  # of the operating system's errors that a user can mend
    errno.ENOENT: "there is no such file or folder; is the name right?",
    errno.EACCES: NOT_ALLOWED,
    errno.EPERM: NOT_ALLOWED,
    errno.EROFS: "nothing can be written there; use another place",
    errno.EEXIST: "expected a folder, this is a file; use another name",
    errno.ENOTDIR: "expected a folder on the way to it, found a file; use another name",
    errno.EISDIR: "expected a file, this is a folder; use another name",
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: FULL,
}
MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA, Linux, Windows


class UserError(Exception):
    """What the user can mend: one sentence with what was expected, what came, and what to do."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a UserError as one line and exit with 2; any other exception keeps its traceback."""
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first one reports
            time.sleep(3)
        text = " ".join(str(error).split())
        print("error:", "".join(c if c.isprintable() else "?" for c in text), file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in MEMORY):
            print("error: out of memory: use a smaller --batch, --n or --size", file=sys.stderr)
            sys.exit(2)
        raise
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Errors of the operating system while `path` is read or written, as a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in MEANING:
            raise
        raise UserError(f"{path}: {MEANING[error.errno]}") from error


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


def check_writable(path: Path) -> None:
    """Can this file be written? Asked before the work rather than after it."""
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
