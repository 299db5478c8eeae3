"""Every stored reference case against the public API. A paper's cases lie in tests/golden/SLUG/, its answers in tests/golden/SLUG.py."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent / "golden"
CASES = [(path.parent.name, path.stem) for path in sorted(FOLDER.glob("*/*.npz"))]
INPUTS = {"schedule": {"t"}, "gaussian_samplers": {"x_T", "mu", "s"}, "gmm": {"means", "probs", "std", "t", "x_t", "x_T"}}


def answers_of(slug):
    spec = importlib.util.spec_from_file_location(f"golden_{slug}", FOLDER / f"{slug}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("slug, case", CASES, ids="/".join)
def test_golden_case(slug, case):
    module, arrays = answers_of(slug), dict(np.load(FOLDER / slug / f"{case}.npz"))
    # What compute sees of the outputs are their names alone: an output that was passed through would come back as zeros.
    blinded = {name: values if name in INPUTS[case] else np.zeros_like(values) for name, values in arrays.items()}
    computed = module.compute(case, blinded)
    outputs = arrays.keys() - INPUTS[case]
    assert computed.keys() == outputs
    for name in sorted(outputs): np.testing.assert_allclose(computed[name], arrays[name], err_msg=name, **module.TOLERANCES[case])
