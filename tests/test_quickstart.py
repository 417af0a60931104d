"""docs/quickstart.ipynb runs from its first cell to its last, and what it draws are digits."""

import pathlib
import re

import pytest

FILE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "quickstart.ipynb"


@pytest.mark.notebook
@pytest.mark.filterwarnings("default")  # of Jupyter
def test_the_quickstart_trains_samples_and_scores_digits(tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(FILE.parents[1]))
    monkeypatch.delenv("XLA_FLAGS")  # one device, as a user has
    notebook = nbformat.read(FILE, as_version=4)
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    accuracy, distance = (float(re.search(rf"{name} (\d\.\d+)", text)[1]) for name in ("accuracy", "distance"))
    assert accuracy > 0.9 and distance < 1.0, text
    assert any("image/png" in output.get("data", {}) for output in outputs)
