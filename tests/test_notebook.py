"""docs/first_steps.ipynb: it names what the package has, and it runs."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

import dinovmf_plugin as dv

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first_steps.ipynb"


def test_notebook__names_what_there_is():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells), "committed without outputs"
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    used = set(re.findall(r"\bdv\.(\w+)", "\n".join(sources)))
    assert {"pretrain", "embed", "knn_accuracy"} <= used <= set(dv.__all__)
    for source in sources:
        ast.parse(source)


@pytest.mark.slow
def test_notebook__runs(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("skimage")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    shown = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    (accuracy,) = [text for text in shown if re.fullmatch(r"\([\d.]+, [\d.]+\)", text)]
    trained, pixels = ast.literal_eval(accuracy)
    assert trained > pixels
