"""Execute notebooks in place and store what a reader should see: `python tools/notebooks.py [NOTEBOOK ...]`, all of them by default.

A display that is both a live widget and a still picture keeps its picture only: a widget needs the kernel that made it.
"""
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from diffusion_papers.workbench.files import whole_file

ROOT = Path(__file__).resolve().parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"
# progress bars are for people who wait, and a terminal's width is theirs; nbs/conftest.py sets the same
QUIET = {"TQDM_DISABLE": "1", "COLUMNS": "80", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}


def still(outputs):
    "The outputs without live widgets; an output that is nothing else disappears."
    for output in outputs:
        data = output.get("data", {})
        if WIDGET in data:
            del data[WIDGET]
            if set(data) <= {"text/plain"}: continue
        yield output


def joined(outputs):
    "Consecutive pieces of one stream as one output, as nbval joins them before it compares."
    result = []
    for output in outputs:
        if (result and output["output_type"] == "stream" and result[-1]["output_type"] == "stream"
                and result[-1]["name"] == output["name"]):
            result[-1]["text"] += output["text"]
        else: result.append(output)
    return result


def execute(path):
    "Run one notebook in its folder and write its outputs back."
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, store_widget_state=False,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code": cell.outputs = joined(still(cell.outputs))
    with whole_file(path) as unfinished: nbformat.write(notebook, unfinished)


if __name__ == "__main__":
    os.environ |= QUIET
    for path in ([Path(name).resolve() for name in sys.argv[1:]]
                 or sorted(ROOT.glob("nbs/**/[0-9]*.ipynb")) + [ROOT / "nbs" / "index.ipynb"]):
        print(f"running {path.relative_to(ROOT)}", flush=True)
        execute(path)
