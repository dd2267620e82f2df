"""Does a test notice? Random small mistakes are put into a file, one at a time, and its tests run:

    python tests/mutants.py processes.py 60 tests/test_processes.py [more tests or pytest's options]

prints the mistakes that no test noticed (survivors). All happens in a copy of the repository. Not
part of the suite: each mistake costs the seconds of the tests.
"""

import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SWAPS = [("+", "-"), ("*", "/"), ("**", "*"), ("//", "/"), ("%", "//"), ("|", "&"), ("==", "!=")]
SWAPS += [("<", "<="), (">", ">="), ("and", "or"), ("in", "not in"), ("is", "is not")]
SWAPS += [(b, a) for a, b in SWAPS]
MISTAKES = [(rf" {re.escape(a)} ", f" {b} ") for a, b in SWAPS]  # pattern, what stands there then
MISTAKES += [
    (r"\bnot ", ""),
    (r"\bTrue\b", "False"),
    (r"\bFalse\b", "True"),
    (r"(?<= )-(?=\w)", ""),
    (r"\b(\d+)\b", r"(\1 + 1)"),
    (r"\b(\d+\.\d+)\b", r"(0.9 * \1)"),
    (r"\b(if|while) (.+?)(:$|$| else )", r"\1 not (\2)\3"),
    (r"(\w+), (\w+)", r"\2, \1"),  # arguments, or what is unpacked
    (r", \w+=[^,()]+(?=[,)])", ""),  # a keyword argument
    (r"^( *)\S.*", r"\1pass"),  # a statement, or a decorator
]


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """(what was changed, the whole new source) for each mistake that is Python."""
    lines = source.splitlines()
    for i, line in enumerate(lines):
        for pattern, instead in MISTAKES:
            for found in re.finditer(pattern, line):
                changed = line[: found.start()] + found.expand(instead) + line[found.end() :]
                mutant = "\n".join([*lines[:i], changed, *lines[i + 1 :]])
                with suppress(SyntaxError):
                    if without_texts(mutant) != without_texts(source):
                        yield f"{line.strip()} -> {changed.strip()}", mutant


def without_texts(source: str) -> str:
    """What the code does: its docstrings and messages may say anything."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)


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
