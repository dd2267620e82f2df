"""What README.md says of the code is true of the code."""

import hashlib
import re

import pytest
from conftest import ROOT, command

README = (ROOT / "README.md").read_text(encoding="utf8")
SECOND = (ROOT / "latent_ext" / "README.md").read_text(encoding="utf8")


def core_lines(path):
    """Lines that are code: no blanks, comments or docstrings."""
    text = re.sub(r'^\s*"""(.|\n)*?"""$', "", path.read_text(encoding="utf8"), flags=re.MULTILINE)
    return len([line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")])


@pytest.mark.parametrize(
    ("start", "file"), [("    for x0 in run.batches():", "train.py"), ("    for t, t_prev in strides(", "processes.py")]
)
def test_the_algorithms_in_the_readme_are_the_code(start, file):
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if b.startswith(start))
    assert block in (ROOT / file).read_text(encoding="utf8")


@pytest.mark.parametrize("page", ["README.md", "latent_ext/README.md", "models/README.md"])
def test_every_file_that_is_linked_is_there(page):
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf8")):
        assert ((ROOT / page).parent / link).exists(), link


PROGRAMS = "train.py", "sample.py", "evaluate.py", "-m latent_ext.train", "-m latent_ext.generate", "-m latent_ext.evaluate"


def test_the_file_map_counts_right():
    for file, lines in re.findall(r"^\| \[(\w+\.py)\].*\| (\d+) \|$", README, flags=re.MULTILINE):
        assert core_lines(ROOT / file) == int(lines), file
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_in_the_readmes_is_one_of_the_program(program, here):
    options = command(*program.split(), "--help").stdout
    lines = [line for line in (README + SECOND).splitlines() if f"python {program}" in line]
    used = {flag for line in lines for flag in re.findall(r"--[\w-]+", line)}
    assert used - {"--help"} <= set(re.findall(r"--[\w-]+", options)) and used


def test_the_checksums_of_the_ready_models_are_right():
    """models/README.md names every file that lies there, and no file lies there that it does not name."""
    folder = ROOT / "models"
    rows = re.findall(r"^\| `([\w./-]+)` .*\| `([0-9a-f]{64})` \|$", (folder / "README.md").read_text(), flags=re.MULTILINE)
    weights = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".pt", ".safetensors")}
    assert {name for name, _ in rows} == weights
    for name, checksum in rows:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == checksum, name
    assert sum((folder / name).stat().st_size for name, _ in rows) < 60e6


def test_the_core_imports_its_five_packages_and_no_more():
    allowed = {"torch", "torchvision", "matplotlib", "tqdm", "einops", "PIL"}  # Pillow comes with torchvision
    standard = {
        "argparse",
        "collections",
        "contextlib",
        "copy",
        "ctypes",
        "dataclasses",
        "datetime",
        "difflib",
        "errno",
        "functools",
        "glob",
        "hashlib",
        "io",
        "math",
        "os",
        "pathlib",
    }
    standard |= {"pickle", "random", "re", "signal", "sys", "textwrap", "time", "traceback", "zlib"}
    ours = {"processes", "unet", "toolbox"}
    for path in [*ROOT.glob("*.py"), *(ROOT / "toolbox").glob("*.py")]:
        found = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf8"), flags=re.MULTILINE))
        found -= {"torchmetrics"} if path.name == "metrics.py" else set()  # only for --inception, which says so
        assert found <= allowed | standard | ours, (path.name, found - allowed - standard - ours)
    for path, rooms in {"processes.py": set(), "unet.py": set()}.items():
        assert not set(re.findall(r"^from (\w+)", (ROOT / path).read_text(encoding="utf8"), flags=re.MULTILINE)) & ours - rooms
