"""Does a test notice? Random small mistakes are put into a file, one at a time, and its tests run:

    python tests/mutants.py processes.py 60 tests/test_processes.py [more tests or pytest's options]

prints the mistakes that no test noticed (survivors). All happens in a copy of the repository. Not
part of the suite: each mistake costs the seconds of the tests. Linux and macOS only.
"""

import ast
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel  # noqa: F401  (imported only once)

ROOT = Path(__file__).resolve().parent.parent
SWAPS = [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE)]
SWAPS += [(ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.And, ast.Or), (ast.In, ast.NotIn)]
SWAPS = dict(SWAPS + [(b, a) for a, b in SWAPS])
SWAPS |= {ast.Pow: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd}
SIMPLE = (ast.Expr, ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.For, ast.If)


def variants(field: str, node: ast.AST) -> list[ast.AST | None]:
    """What could stand in the place of a node by mistake; None: nothing."""
    if type(node) in SWAPS:
        return [SWAPS[type(node)]()]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        value = node.value
        new = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 0.9
        return [ast.Constant(new * value if new == 0.9 else new)]
    found = []
    if isinstance(node, ast.Call) and len(node.args) > 1:
        one, other, *rest = node.args
        found.append(ast.Call(node.func, [other, one, *rest], node.keywords))
    if isinstance(node, ast.UnaryOp):
        found.append(node.operand)
    if field == "test":
        found.append(ast.UnaryOp(ast.Not(), node))
    if field in ("decorator_list", "keywords") and getattr(node, "arg", "") != "help":
        found.append(None)
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if isinstance(node, SIMPLE) and not docstring:
        found.append(ast.Pass())
    return found


def mutants(source: str) -> list[tuple[str, str]]:
    """(what was changed, the whole new source) for each change that there is."""
    tree, found = ast.parse(source), []
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns"):
                continue
            for i, node in enumerate(value if isinstance(value, list) else [value]):
                for new in variants(field, node) if isinstance(node, ast.AST) else ():
                    outer = node if hasattr(node, "lineno") else parent
                    before = ast.unparse(outer)
                    if isinstance(value, list):
                        value[i : i + 1] = [] if new is None else [new]
                    else:
                        setattr(parent, field, new)
                    changed = ast.unparse(ast.fix_missing_locations(tree))
                    after = ast.unparse(parent if outer is parent else new) if new else "(nothing)"
                    if after != before:
                        found.append((f"{outer.lineno}: {before[:70]} -> {after[:70]}", changed))
                    if isinstance(value, list):
                        value[i : i + (new is not None)] = [node]
                    else:
                        setattr(parent, field, node)
    return found


def passes(copy: Path, arguments: list[str], seconds: float) -> bool:
    """Do all tests pass? In a fork of this process, which has the large libraries already."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(copy)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        sys.path[0] = str(copy)
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))
    end, ended, status = time.monotonic() + seconds, 0, -1
    try:
        while not ended and time.monotonic() < end:
            time.sleep(0.05)
            ended, status = os.waitpid(pid, os.WNOHANG)
        return ended != 0 and status == 0
    finally:
        if not ended:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def main(name: str, count: str, *arguments: str) -> None:
    os.nice(10)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # the file changes faster than its date
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "data")
        )
        start = time.monotonic()
        if not passes(copy, [*arguments], 3600):
            sys.exit("the tests do not pass as they are")
        seconds = 30 + 3 * (time.monotonic() - start)
        everything = mutants((copy / name).read_text())
        chosen = random.Random(0).sample(everything, min(int(count), len(everything)))
        survivors = 0
        for i, (change, source) in enumerate(chosen, start=1):
            (copy / name).write_text(source)
            if passes(copy, [*arguments], seconds):
                survivors += 1
                print(f"{name}:{change}", flush=True)
            print(f"{i} of {len(chosen)}, {survivors} survived", end="\r", file=sys.stderr)
        print(f"{name}: {len(chosen) - survivors} of {len(chosen)} killed, of {len(everything)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
