"""docs/evening.ipynb runs from top to bottom, and what it stores is such a run."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "evening.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cells):
    return "".join(o.get("text", "") for cell in cells for o in cell.outputs)


def count_images(cells):
    return sum("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs)


def losses(cells):
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed(cells))]


def test_stored_outputs_are_one_run_from_top_to_bottom():
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert losses(cells)[-1] < 0.1
    assert not any(o.output_type == "error" for cell in cells for o in cell.outputs)
    assert NOTEBOOK.stat().st_size < 1.5e6


@pytest.mark.slow
def test_it_runs_anew():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = count_images(code_cells(notebook))
    (steps,) = (c for c in code_cells(notebook) if re.fullmatch(r"STEPS = \d+", c.source))
    steps.source = "STEPS = 70"  # instead of the three minutes
    place = {"metadata": {"path": NOTEBOOK.parent}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    cells = code_cells(notebook)
    assert losses(cells)[-1] < losses(cells)[0]
    assert "largest difference: 0.0\n" in printed(cells)  # its own loop is that of `sample`
    assert count_images(cells) == stored > 0
