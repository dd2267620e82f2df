"""The laboratory's experiments run, its bugs are caught by their tests, and the homework works."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

from docs import homework, lab
from processes import NoiseSchedule
from toolbox.cats import draw
from toolbox.files import UserError

LAB = (ROOT / "docs/lab.md").read_text("utf-8")
MEASURED = ("loss", "steps", "texture")  # for results.md


def run(module, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
    module.main()


@pytest.fixture
def tiny(here, monkeypatch):
    """Experiments in seconds. Their trainings are cached: without the tiny ones afterwards."""
    few = draw(8, 16)[0]
    values = {"TRAINING_STEPS": 2, "BATCH": 2, "CALLS": 2, "cats": lambda: few}
    for name, value in values.items():
        monkeypatch.setattr(lab, name, value)
    with torch.random.fork_rng():
        yield here
    lab.train.cache_clear()


@pytest.mark.parametrize("name", [name for name in lab.EXPERIMENTS if name not in MEASURED])
def test_each_experiment_draws_its_labelled_image(tiny, monkeypatch, name):
    run(lab, monkeypatch, name)
    with Image.open(tiny / f"runs/lab/lab-{name}.png") as image, image.convert("L") as grey:
        assert grey.width == lab.LABELS + 10 * 98 + 2 and grey.height % 98 == 2
        for top in range(0, grey.height - 2, 98):  # black text on white, left of each row
            darkest, brightest = grey.crop((0, top, lab.LABELS, top + 98)).getextrema()
            assert darkest < 60 and brightest == 255


@pytest.mark.slow
def test_what_is_measured_of_the_pretrained_model(here, monkeypatch, capsys):
    monkeypatch.setattr(lab, "CALLS_TRIED", (1, 2))
    monkeypatch.setattr(lab, "SAMPLES", 8)
    run(lab, monkeypatch, "steps")
    assert Image.open(here / "runs/lab/lab-steps.png").width == 1000
    assert len(re.findall(r"^\| [12] \| [01] \|", capsys.readouterr().out, re.MULTILINE)) == 8


def test_strides_lose_as_much_texture_as_their_factors_say(monkeypatch, capsys):
    """Each DDIM stride multiplies x by a number; of 40, the product is the spread that is left."""
    run(lab, monkeypatch, "texture")
    lines = capsys.readouterr().out.splitlines()
    _, _, *spread = (cell.strip() for cell in lines[0].strip("|").split("|"))
    c = torch.tensor([float(x) for x in spread[1:]], dtype=torch.float64)
    alpha_bar = [*NoiseSchedule.sigmoid().alpha_bar.tolist(), 1.0]
    left = torch.ones_like(c)
    for t in range(999, 0, -25):
        a, b = alpha_bar[t], alpha_bar[t - 25]
        left *= ((a * b) ** 0.5 * c**2 + ((1 - a) * (1 - b)) ** 0.5) / (a * c**2 + 1 - a)
    rows = {line[2:13]: re.findall(r"(\d+) %", line) for line in lines[2:]}
    measured = {name: torch.tensor([int(x) for x in row]) for name, row in rows.items()}
    torch.testing.assert_close(measured["40 | 0 | 1 "].double(), 100 * left / c, atol=1.5, rtol=0)
    assert (measured["40 | 1 | 2 "] > measured["40 | 1 | 1 "] + 10).all()


@pytest.mark.parametrize("number", range(1, len(lab.BUGS) + 1))
def test_each_bug_is_one_line_of_ours_and_in_the_table(number):
    bug, (file, line, instead, tests) = [*lab.BUGS.items()][number - 1]
    assert (ROOT / file).read_text("utf-8").count(line) == 1
    (row,) = re.findall(rf"^\| {number} \| (.*) \|$", LAB, flags=re.MULTILINE)
    cells = row.split(" | ")
    assert [*cells[:3], cells[-1]] == [bug, file, f"`{instead}`", tests]


def pytest_in(folder, *words):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=600).returncode


@pytest.mark.slow
@pytest.mark.parametrize("tests", sorted({bug[3] for bug in lab.BUGS.values()}))
def test_each_bug_is_caught_by_the_tests_it_names(tmp_path, monkeypatch, tests):
    ignore = shutil.ignore_patterns(*homework.LEFT_OUT)
    right = shutil.copytree(ROOT, tmp_path / "right", ignore=ignore)
    assert pytest_in(right, f"tests/{tests}") == 0
    for number, bug in enumerate(lab.BUGS, start=1):
        if lab.BUGS[bug][3] == tests:
            run(homework, monkeypatch, tmp_path / bug, "--hunt", number)
            assert pytest_in(tmp_path / bug, f"tests/{tests}") == 1, bug


# ---- homework ------------------------------------------------------------------------------------


def test_each_blank_is_a_body_that_is_gone_and_its_docstring_is_not(tmp_path, monkeypatch):
    pupil = tmp_path / "copy"
    run(homework, monkeypatch, pupil)
    for task in homework.TASKS:
        file, name = task.split(":")
        before, after = ((root / file).read_text("utf-8") for root in (ROOT, pupil))
        blanks = after.count(f'raise NotImplementedError("homework: {name}")')
        assert blanks == (2 if name == "sample" else 1)
        compile(after, file, "exec")
        assert len(after) < len(before) and after.count('"""') == before.count('"""')


@pytest.mark.slow
def test_each_blank_fails_its_test_and_the_report_says_what_is_done(tmp_path, monkeypatch, capsys):
    pupil = tmp_path / "copy"
    run(homework, monkeypatch, pupil)
    run(homework, monkeypatch, pupil)  # it is there: a report
    assert capsys.readouterr().out.count("to do") == len(homework.TASKS)
    for file in homework.files():
        shutil.copy(ROOT / file, pupil / file)
    run(homework, monkeypatch, pupil)
    assert capsys.readouterr().out.count("done ") == len(homework.TASKS)


def test_the_copy_stays_outside_of_the_repository(monkeypatch):
    with pytest.raises(UserError, match="outside"):
        run(homework, monkeypatch, ROOT / "docs" / "copy")
