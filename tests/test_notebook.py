"""docs/evening.ipynb runs from top to bottom, and what it stores is such a run."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "evening.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(cells):
    """What they print, the losses in it, and how many images they show."""
    results = [output for cell in cells for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in results)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    return printed, losses, sum("image/png" in output.get("data", {}) for output in results)


def test_stored_outputs_are_one_run_from_top_to_bottom():
    cells = code_cells(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    _, losses, _ = outputs(cells)
    assert losses[-1] < 0.1
    assert not any(o.output_type == "error" for cell in cells for o in cell.outputs)
    assert NOTEBOOK.stat().st_size < 1.5e6


@pytest.mark.slow
def test_it_runs_anew():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    _, _, stored = outputs(code_cells(notebook))
    (steps,) = (c for c in code_cells(notebook) if re.fullmatch(r"STEPS = \d+", c.source))
    steps.source = "STEPS = 70"  # instead of the three minutes
    place = {"metadata": {"path": NOTEBOOK.parent}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    printed, losses, images = outputs(code_cells(notebook))
    assert losses[-1] < losses[0] and images == stored > 0
    assert "largest difference: 0.0\n" in printed  # its own loop is that of `sample`
