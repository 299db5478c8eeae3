"""What notebooks print does not depend on the last bits: no minus before a zero, no digits of rounding errors, no number in full."""
import importlib
import json
import re
import shutil
import warnings
from pathlib import Path

from extras import need

need("train", "plots", "dev")

import pytest
import torch

from diffusion_papers.workbench.printing import bounded, percent, rounded

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in path.parts)

MINUS_ZERO = re.compile(r"(?<![\w.])-0(?:\.0*)?(?![\d.e])")
SMALL = re.compile(r"(?<![\w.])(?:\d+(?:\.\d*)?e-(?:0[6-9]|[1-9]\d+)|0(?:\.0*)?e[+-]?0+)(?!\d)")
RAW = re.compile(r"(?<![\w.])\d+\.\d{9,}(?:e[+-]\d+)?")
BOUND = re.compile(r"(?:below|within|less than|tolerance|to|<) $")

# small, and far above the rounding errors of float64; or the same in every bit
TRUE_VALUES = {
    "configs": {"0.30000000000000004"},  # 0.1 + 0.2
    "dfno": {"0.20000000298023224"},     # 0.2 in float32
    "privacy": {"9.4e-06", "1e-30"},     # a tail of the normal distribution; what is left of a gradient of 1e30
    "spectral": {"1.4e-07"},             # of an interpolation that gains digits with every point
    "fluids": {"2e-06"},                 # Heun's gain of energy, an error of third order
    "dpdm": {"1e-07"},                   # the delta of a guarantee
    "command_line": {"1e-06"},              # the default of an option
    "ddo": {"2.8e-06"},                  # the longest stable step on 128 points
}


def text(outputs):
    "What a cell shows in words; of a picture nothing."
    for output in outputs:
        for kind, value in {"text/plain": output.get("text", ""), **output.get("data", {})}.items():
            if kind.startswith("text/"): yield "".join(value)


def suspicious(shown, source="", known=()):
    "Minus zeros, digits of rounding errors and all digits of a number; what the author typed is exact, and so is a bound."
    found = [match for pattern in (MINUS_ZERO, RAW, SMALL) for match in pattern.finditer(shown)]
    typed = {match[0] for pattern in (MINUS_ZERO, RAW, SMALL) for match in pattern.finditer(source)}
    return [match[0] for match in found if match[0] not in typed | set(known) and not BOUND.search(shown[:match.start()])]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_compared_output_shows_a_minus_zero_or_the_digits_of_a_rounding_error(notebook):
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        if cell["cell_type"] != "code" or {"nbval-ignore-output", "nbval-skip"} & set(cell["metadata"].get("tags", [])): continue
        shown = "\n".join(text(cell["outputs"]))
        assert suspicious(shown, "".join(cell["source"]), TRUE_VALUES.get(re.sub(r"^\d\d_", "", notebook.stem), ())) == [], f"cell {number}: {shown}"


@pytest.mark.parametrize("shown, found", [
    ("share: -0%", ["-0"]), ("[-0.0, 1.0]", ["-0.0"]), ("±-0.00", ["-0.00"]), ("minus -0e+00", ["0e+00"]),
    ("error 9e-07", ["9e-07"]), ("error 1.2e-16 of", ["1.2e-16"]), ("penalty 0e+00", ["0e+00"]),
    ("error below 1e-06", []), ("x < 1e-09", []), ("2e-04, 3.1e-05", []), ("-0.27 and 10-0", []), ("-0.05%", []), ("1e+06", []),
    ("mean 127.66666666666667", ["127.66666666666667"]), ("127.67", []), ("1,234.12345678", [])])
def test_what_counts_as_suspicious(shown, found):
    assert suspicious(shown) == found and suspicious(shown, source=shown) == [] and suspicious(shown, source="-0.04 + 1") == found


def test_printed_numbers_have_no_minus_before_a_zero_and_rounding_errors_are_bounds():
    assert [percent(share) for share in (-1e-9, 0.256, -0.256, -0.0)] == ["0%", "26%", "-26%", "0%"]
    assert [rounded(value, 1) for value in (-0.04, -0.06, 0.04)] == ["0.0", "-0.1", "0.0"]
    assert {bounded(value, 1e-6) for value in (2e-8, -9e-8, 3e-7, 0.0)} == {"below 1e-06"}
    assert (percent(1.0), percent(-1.0), rounded(float("nan")), percent(0.105, 1)) == ("100%", "-100%", "nan", "10.5%")
    learned = torch.zeros((), requires_grad=True) - 1e-9  # no warning that it has a gradient: that would be one more output
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (rounded(learned), percent(learned), bounded(learned, 1e-6)) == ("0.00", "0%", "below 1e-06")
    for wrong in (1e-6, -2e-6, float("nan")):
        with pytest.raises(ValueError, match="value: expected below 1e-06"): bounded(wrong, 1e-6)


@pytest.mark.parametrize("stored, different", [("default 1 80", False), ("default 2 80", True)])
def test_another_processors_arithmetic_reaches_the_notebook_and_what_differs_is_found(stored, different, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.setenv("COLUMNS", "200")  # the width of somebody's terminal, which decides where a help text breaks
    kernels = importlib.import_module("kernels")
    shutil.copy(ROOT / "nbs" / "conftest.py", tmp_path)
    cell = {"cell_type": "code", "execution_count": None, "metadata": {},
            "source": 'import os\nprint(os.environ["ATEN_CPU_CAPABILITY"], os.environ["OMP_NUM_THREADS"], os.environ["COLUMNS"])',
            "outputs": [{"name": "stdout", "output_type": "stream", "text": stored + "\n"}]}
    notebook = tmp_path / "prints.ipynb"
    notebook.write_text(json.dumps({"cells": [cell], "metadata": {"kernelspec": {"name": "python3", "display_name": "python3"}},
                                    "nbformat": 4, "nbformat_minor": 4}))
    variables = kernels.PROCESSORS["no vector units"] | {"OMP_NUM_THREADS": "1"}
    assert kernels.differs(variables, [str(notebook)]) == different
