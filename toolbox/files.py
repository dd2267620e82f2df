"""Files that are whole or not there, and errors in one sentence."""

import errno
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = "the disk is full; make room, and the same command goes on from what was saved"
MEANING = {  # what the operating system says -> what it means here, and what to do
    errno.ENOENT: "there is no such file or folder; is the name right?",
    errno.EACCES: "this user may not open or change it; use another place, or change its permissions",
    errno.EPERM: "this user may not open or change it; use another place, or change its permissions",
    errno.EROFS: "nothing can be written there; use another place",
    errno.EEXIST: "expected a folder, this is a file; use another name",
    errno.ENOTDIR: "expected a folder on the way to it, found a file; use another name",
    errno.EISDIR: "expected a file, this is a folder; use another name",
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: FULL,
}
MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # as PyTorch says it of GPUs, on Linux, on Windows
PATIENCE = 3.0  # seconds


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to. It becomes `path` when all went well, and is removed when something failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)  # a rename is all or nothing
    except OSError as error:
        if error.errno in MEANING and str(error.filename) in ("None", str(temporary)):
            error.filename = str(path)  # the one that the user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Before the work, not after it: can this file be written?"""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    open(path, "ab").close()
    if new:
        path.unlink()


def check_number(flag: str, number: float, low: float, high: float = math.inf) -> None:
    if not low <= number <= high:
        raise ValueError(f"{flag} {number}: expected {low} " + ("or more" if high == math.inf else f"to {high}"))


@contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """What the user can mend ends the program without a traceback."""
    try:
        yield
    except Exception as error:
        if os.environ.get("RANK", "0") != "0":  # one of torchrun's other processes: most likely the first has the same
            time.sleep(PATIENCE)  # error and says it, and torchrun ends this one meanwhile
        if (text := sentence(error)) is None:
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]  # for those who change the code
        print(f"error: {' '.join(text.split())} ({Path(place.filename).name}:{place.lineno})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def sentence(error: Exception) -> str | None:
    """For a wrong word or number (ValueError), files (OSError), too little memory; None for a mistake in the code."""
    if isinstance(error, OSError) and error.errno in MEANING:
        return f"{error.filename or 'a file'}: {MEANING[error.errno]}"
    if isinstance(error, ValueError | OSError):
        return str(error)
    if isinstance(error, MemoryError) or any(words in str(error) for words in MEMORY):
        return "the memory is not enough: train with a smaller --batch (or a higher --accumulate), or draw smaller pictures"
    if "by peer" in str(error):  # a connection closed or reset
        return "another process of this training has ended, and so this one does; the last checkpoint is kept"
    return None
