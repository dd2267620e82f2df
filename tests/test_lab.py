"""docs/lab.py still runs, docs/lab.md shows its lines, and each bug of the page is caught by the test it names."""

import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

from toolbox.cats import draw

TEXT = (ROOT / "docs/lab.md").read_text(encoding="utf8")
LAB = ROOT / "docs/lab.py"
spec = importlib.util.spec_from_file_location("lab", LAB)
lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lab)
EXPERIMENTS = [name.removeprefix("experiment_") for name in dir(lab) if name.startswith("experiment_")]


@pytest.fixture(scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"STEPS": 2, "BATCH": 2, "CALLS": 2, "cats": lambda: draw(8, 16)[0]}.items():
            patch.setattr(lab, name, value)
        yield


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_draws_its_picture(tiny, here, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["lab.py", name])
    before = torch.get_num_threads(), torch.random.get_rng_state()
    lab.main()
    torch.random.set_rng_state(before[1])
    with Image.open(here / f"runs/lab/lab-{name}.png") as picture:
        assert picture.width == 662 and picture.height % 66 == 2


def test_an_experiment_that_is_none(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lab.py", "nine"])
    with pytest.raises(SystemExit, match="with a NAME of: 1 2 3"):
        lab.main()


def test_the_lines_in_the_text_are_those_of_the_file():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) >= 7
    for block in blocks:
        assert block in LAB.read_text(encoding="utf8"), block


def test_pictures_experiments_tests_and_links_exist():
    pictures = [ROOT / "docs" / name for name in re.findall(r"!\[[^\]]+\]\((.*?)\)", TEXT)]
    assert len(pictures) >= 8 and sum(path.stat().st_size for path in pictures) < 700_000
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / link).exists(), link
    asked = {word for line in re.findall(r"python docs/lab\.py ([\w ]+)", TEXT) for word in line.split()}
    assert asked == set(EXPERIMENTS)
    tests = "".join(path.read_text(encoding="utf8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", TEXT):
        assert f"def {name}(" in tests, name


def test_every_flag_in_the_text_is_one_of_its_program():
    for program, words in re.findall(r"python (train|sample|evaluate)\.py ([^`\n#]+)", TEXT):
        for flag in re.findall(r"--[\w-]+", words):
            assert f'"{flag}"' in (ROOT / f"{program}.py").read_text(encoding="utf8"), (program, flag)


@pytest.mark.parametrize("bug", lab.BUGS)
def test_each_bug_is_one_line_of_ours_and_in_the_table(bug):
    file, line, instead, test = lab.BUGS[bug]
    assert (ROOT / file).read_text(encoding="utf8").count(line) == 1
    row = next(row for row in TEXT.splitlines() if row.startswith(f"| {bug} |"))
    assert f"`{instead}`" in row and (f"`{test}`" in row or not test)


@pytest.mark.slow
@pytest.mark.parametrize("bug", [bug for bug in lab.BUGS if lab.BUGS[bug][3]])
def test_each_bug_is_caught_by_the_test_it_names(tmp_path, bug):
    file, line, instead, test = lab.BUGS[bug]
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".*", "runs", "data", "*.png"))
    words = [sys.executable, "-m", "pytest", "-q", "-m", "", "-k", test, "tests"]
    assert subprocess.run(words, cwd=copy, capture_output=True).returncode == 0  # without the bug it passes
    source = (copy / file).read_text(encoding="utf8")
    (copy / file).write_text(source.replace(line, instead), encoding="utf8")
    assert subprocess.run(words, cwd=copy, capture_output=True).returncode == 1
