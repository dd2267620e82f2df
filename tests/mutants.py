"""Does a test notice? Random small mistakes are put into a file, one at a time, and its tests run:

    python tests/mutants.py processes.py 60 tests/test_processes.py [more tests or pytest's options]

prints the mistakes that no test noticed (survivors). All happens in a copy of the repository. Not
part of the suite: each mistake costs the seconds of the tests.
"""

import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SWAPS = [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE)]
SWAPS += [(ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.And, ast.Or), (ast.In, ast.NotIn)]
SWAPS = dict(SWAPS + [(b, a) for a, b in SWAPS])
SWAPS |= {ast.Pow: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd}
SIMPLE = (ast.Expr, ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.If)


def changes(tree: ast.AST) -> Iterator[tuple[ast.AST, str, object]]:
    """(node, one of its fields, what could stand there by mistake)"""
    for node in ast.walk(tree):
        if type(getattr(node, "op", None)) in SWAPS:
            yield node, "op", SWAPS[type(node.op)]()
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield node, "ops", [SWAPS[type(node.ops[0])](), *node.ops[1:]]
        if hasattr(node, "test"):
            yield node, "test", ast.UnaryOp(ast.Not(), node.test)
        if isinstance(node, ast.UnaryOp):
            yield node, "op", ast.UAdd()
        if isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, "value", not node.value
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield node, "value", node.value + 1 if isinstance(node.value, int) else 0.9 * node.value
        if isinstance(node, ast.Call) and len(node.args) > 1:
            yield node, "args", [node.args[1], node.args[0], *node.args[2:]]
        for field in ("keywords", "decorator_list", "body", "orelse"):
            values = getattr(node, field, [])
            for i, value in enumerate(values if isinstance(values, list) else []):
                if isinstance(value, SIMPLE):
                    yield node, field, [*values[:i], ast.Pass(), *values[i + 1 :]]
                elif getattr(value, "arg", "") != "help" and field in (
                    "keywords",
                    "decorator_list",
                ):
                    yield node, field, values[:i] + values[i + 1 :]


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """(what was changed, the whole new source) for each change that there is."""
    tree = ast.parse(source)
    before = ast.unparse(tree)
    for node, field, new in list(changes(tree)):
        old = getattr(node, field)
        setattr(node, field, new)
        after = ast.unparse(ast.fix_missing_locations(tree))
        setattr(node, field, old)
        lines = zip(before.splitlines(), after.splitlines(), strict=False)
        different = [f"{a.strip()} -> {b.strip()}" for a, b in lines if a != b]
        if different and '"""' not in different[0]:
            yield different[0], after


def passes(copy: Path, arguments: list[str], seconds: float) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        result = subprocess.run(command, cwd=copy, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return result.returncode == 0


def main(name: str, count: str, *arguments: str) -> None:
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # the file changes faster than its date
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignore = shutil.ignore_patterns(".*", "__pycache__", "node_modules", "runs", "data")
        shutil.copytree(ROOT, copy, ignore=ignore)
        start = time.monotonic()
        if not passes(copy, [*arguments], 3600):
            sys.exit("the tests do not pass as they are")
        seconds = 30 + 3 * (time.monotonic() - start)
        everything = [*mutants((copy / name).read_text("utf-8"))]
        chosen = random.Random(0).sample(everything, min(int(count), len(everything)))
        survivors = 0
        for i, (change, source) in enumerate(chosen, start=1):
            (copy / name).write_text(source, "utf-8")
            if passes(copy, [*arguments], seconds):
                survivors += 1
                print(f"{name}: {change}", flush=True)
            print(f"{i} of {len(chosen)}, {survivors} survived", end="\r", file=sys.stderr)
        print(f"{name}: {len(chosen) - survivors} of {len(chosen)} killed, of {len(everything)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
