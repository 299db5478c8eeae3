"""Which optional packages a test file needs: where one is missing, it is skipped, aloud; and how to run without any."""
import importlib.util

import pytest

EXTRAS = {"train": ("accelerate", "safetensors", "tqdm"), "data": ("sklearn", "skimage", "PIL", "scipy", "h5py"),
          "plots": ("matplotlib", "plotly", "ipywidgets"), "flax": ("msgpack",),
          "dev": ("hypothesis", "jsonschema", "yaml", "nbdev", "nbformat", "radon", "jupytext"),
          "oracles": ("torchdeq", "OneEuroFilter")}  # other people's programs, to compare with: in the extra dev


def need(*extras):
    "To be called at the top of a test file, before it imports what may be missing."
    missing = [module for extra in extras for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]
    if missing: pytest.skip(f"needs {', '.join(missing)}: pip install 'diffusion_papers[{','.join(extras)}]'", allow_module_level=True)


def whole_papers():
    "The papers of which everything is required, as parameters of a test; one in the making is skipped, and the reason says what it lacks."
    from diffusion_papers.workbench.registry import in_the_making, lacking, paper, papers
    def why(slug): return f"{slug} is in the making and not installed yet: it lacks {', '.join(lacking(slug)) or 'nothing'}"
    return [pytest.param(slug, marks=pytest.mark.skip(reason=why(slug))) if in_the_making(paper(slug)) else slug for slug in sorted(papers())]


# a sitecustomize.py, or the head of a program: whatever is installed beside PyTorch, NumPy and pytest is not found
BARE = """
import sys, sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
allowed = {"torch", "numpy", "diffusion_papers", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock", "functorch", "torchgen", "setuptools",
           "pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments", "tomli", "exceptiongroup"}
hidden = {path.name.split(".")[0] for path in Path(sysconfig.get_path("purelib")).iterdir()} - allowed
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""
