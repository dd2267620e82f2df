"""Files are written whole or not at all, folders belong to one training, errors are sentences."""

import math
import os
import socket
import subprocess
import sys

import pytest
from conftest import said

from toolbox.files import (
    UserError,
    atomic_write,
    check_number,
    check_writable,
    lock_folder,
    remove_leftovers,
    user_errors,
)


@pytest.fixture(scope="module")
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


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
    with pytest.raises(UserError, match=r"file/x: .*; check its name"), atomic_write(path / "x"):
        pass


def test_whether_a_file_can_be_written_is_asked_without_changing_anything(here):
    (here / "file").write_text("kept")
    check_writable(here / "file")
    check_writable(here / "folder/new")
    assert (here / "file").read_text() == "kept" and not [*(here / "folder").iterdir()]
    for bad in ("folder", "file/below"):
        with pytest.raises(UserError, match=bad):
            check_writable(here / bad)


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


def test_numbers_are_checked_with_their_limits(capsys):
    check_number("--n", 1, 1)
    check_number("--n", 5, 1, 5)
    for number, low, high, limits in [
        (0, 1, math.inf, "1 or more"),
        (6, 1, 5, "1 to 5"),
        (math.nan, 0, 1, "0 to 1"),
        (math.inf, 0, math.inf, "0 or more"),
    ]:
        sentence = said(lambda n=number, a=low, b=high: check_number("--n", n, a, b), capsys)
        assert sentence == f"error: --n {number}: expected {limits}"


def test_a_folder_is_one_living_process_and_a_dead_ones_lock_is_taken_over(here, dead, capsys):
    lock, host = here / "run/lock", socket.gethostname()
    lock_folder(here / "run")
    mine = lock.read_text()
    lock_folder(here / "run")
    assert mine == f"{os.getpid()} {host}" and not capsys.readouterr().out
    for left in (f"{dead} {host}", f"{os.getppid()} elsewhere", ""):
        lock.write_text(left)
        lock_folder(here / "run")
        assert lock.read_text() == mine and capsys.readouterr().out.count("\n") == 1
    lock.write_text(f"{os.getppid()} {host}")
    with pytest.raises(UserError, match=f"another training, process {os.getppid()}, is using"):
        lock_folder(here / "run")
    assert lock.read_text() == f"{os.getppid()} {host}"
    (here / "file").write_text("kept")
    with pytest.raises(UserError, match=r"file.*: .*check its name"):
        lock_folder(here / "file")


def test_leftovers_of_dead_processes_are_removed(here, dead):
    names = [f"model.pt.{dead}.tmp", "a.odd.tmp", f"model.pt.{os.getppid()}.tmp", "model.pt"]
    for name in names:
        (here / name).write_text("")
    remove_leftovers(here)
    assert sorted(path.name for path in here.iterdir()) == sorted(names[2:])
