"""Files are written whole or not at all, folders belong to one training, errors are sentences."""

import math
import os
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from toolbox.files import (
    UserError,
    atomic_write,
    check_number,
    check_writable,
    lock_folder,
    remove_leftovers,
    user_errors,
)


def test_a_file_is_written_whole_or_stays_as_it_was(here):
    path = here / "new/folder/file"
    with atomic_write(path) as temporary:
        assert temporary.parent == path.parent and str(os.getpid()) in temporary.name
        temporary.write_text("first")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("second, hal")
        raise ZeroDivisionError
    assert path.read_text() == "first" and [*path.parent.iterdir()] == [path]
    check_writable(path)
    check_writable(here / "other/new")
    assert path.read_text() == "first" and not [*(here / "other").iterdir()]
    for write in (lambda: atomic_write(path / "x").__enter__(), lambda: check_writable(path / "x")):
        with pytest.raises(UserError, match=r"file.x: .*; check its name"):
            write()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\nlines, an \x1b[31mescape"), 2, "error: two lines, an ?[31mescape\n"),
        (MemoryError(), 2, "error: out of memory: use a smaller --batch, --n or --size\n"),
        (RuntimeError("CUDA out of memory. Tried to"), 2, "error: out of memory: use a smaller"),
        (RuntimeError("[enforce fail] can't allocate memory"), 2, "error: out of memory"),
        (KeyboardInterrupt(), 130, ""),
        (ValueError("a mistake of the reader's"), None, ""),
        (RuntimeError("an illegal memory access"), None, ""),
        (OSError("disk"), None, ""),
        (NameError("x"), None, ""),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_all_else_keeps_its_traceback(
    error, code, line, capsys
):
    with pytest.raises(type(error) if code is None else SystemExit) as raised, user_errors():
        raise error
    err = capsys.readouterr().err
    assert raised.value is error if code is None else raised.value.code == code
    assert err.startswith(line) and err.count("\n") == (code == 2)


def test_numbers_are_checked_with_their_limits():
    check_number("--n", 1, 1)
    check_number("--n", 5, 1, 5)
    for number, *limits in ((0, 1), (6, 1, 5), (math.nan, 0, 1), (math.inf, 0)):
        told = f"{limits[0]} to {limits[1]}" if limits[1:] else f"{limits[0]} or more"
        with pytest.raises(UserError, match=f"--n {number}: expected {told}"):
            check_number("--n", number, *limits)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot only ask: every process lives")
def test_a_folder_belongs_to_a_living_process_and_leftovers_of_dead_ones_are_removed(here, capsys):
    lock, host = here / "run/lock", socket.gethostname()
    lock_folder(here / "run")
    mine, dead = lock.read_text(), subprocess.Popen([sys.executable, "-c", ""])
    lock_folder(here / "run")
    dead.wait()
    assert mine == f"{os.getpid()} {host}" and not capsys.readouterr().out
    for left in (f"{dead.pid} {host}", f"{os.getppid()} elsewhere", ""):
        lock.write_text(left)
        lock_folder(here / "run")
        assert lock.read_text() == mine and capsys.readouterr().out.count("\n") == 1
    lock.write_text(f"{os.getppid()} {host}")
    with pytest.raises(UserError, match=f"another training, process {os.getppid()}, is using"):
        lock_folder(here / "run")
    assert lock.read_text() == f"{os.getppid()} {host}"
    names = [f"a.pt.{os.getppid()}.tmp", "lock", "model.pt", f"a.pt.{dead.pid}.tmp", "b.odd.tmp"]
    for name in names:
        (here / "run" / name).write_text("")
    remove_leftovers(here / "run")
    assert sorted(path.name for path in (here / "run").iterdir()) == names[:3]
    with pytest.raises(UserError, match=r"lock: .*check its name"):
        lock_folder(lock)


def test_a_reader_that_leaves_ends_nothing(here):
    """As in `python train.py 2>&1 | head -1`."""
    program = """
import sys
from toolbox.files import user_errors
with user_errors():
    for i in range(3):
        print("line", i, flush=True)
        print("bar", i, file=sys.stderr, flush=True)
    open("done", "w").close()
"""
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", program]
    result = subprocess.run(words, stdout=write, stderr=write, env=environment, timeout=60)
    os.close(write)
    assert result.returncode == 0 and (here / "done").exists()
