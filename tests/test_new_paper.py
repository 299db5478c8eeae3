"""A new paper, from `make paper SLUG=toy` on: every command and every check works on it while it is in the making."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from extras import need

need("train", "data", "plots", "dev")

import nbformat

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("nbs", "diffusion_papers", "data", "tools", "tests", "settings.ini", "pyproject.toml", "setup.py", "README.md", "CHANGELOG.md", "CONTRIBUTING.md",
          "_quarto.yml", "Makefile")
OWN = '''#| export
import torch
from diffusion_papers.workbench.registry import Hook


def shout(
    text: Path,      # a text file
    words: str,      # what is appended to it
    *,
    count: int=1,    # how often
    model=None,      # unused: a text needs none
    device: str="cpu",  # unused
    output: Path | str="shout.txt",  # where the result goes
    say=print,       # called with what is worth telling
):
    "A text, and what is to be shouted after it."
    Path(output).write_text(Path(text).read_text() + count * words)
    say(f"{output}: shouted {count} times")


def write_csv(
    samples: torch.Tensor,  # (B, ...)
    unfinished: Path,       # becomes a CSV file
):
    "Samples as numbers, one a line."
    unfinished.write_text("\\\\n".join(",".join(f"{value:.3f}" for value in sample.flatten().tolist()) for sample in samples))


HOOKS = {"shout": Hook(shout, (".txt",))}
WRITERS = {".csv": write_csv}
'''.replace("\\\\n", "\\n")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "A copy of the repository with a toy paper in it, its notebooks executed."
    folder = tmp_path_factory.mktemp("clone")
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in COPIED: (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name, **({"ignore": ignored} if (ROOT / name).is_dir() else {}))
    assert "make notebooks" in run(folder, "tools/paper.py", "toy").stdout
    [paper], [evidence] = ((folder / "nbs" / shelf).glob("*_toy.ipynb") for shelf in ("papers", "evidence"))
    notebook = nbformat.read(paper, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(OWN))
    nbformat.write(notebook, paper)
    for command in ("nbdev_export", "nbdev_clean"): subprocess.run([Path(sys.executable).parent / command], cwd=folder, check=True, capture_output=True)
    assert run(folder, "tools/notebooks.py", paper, evidence).returncode == 0
    subprocess.run([Path(sys.executable).parent / "nbdev_clean"], cwd=folder, check=True, capture_output=True)
    return folder, paper, evidence


def run(folder, *words):
    "A Python program in the copy."
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def test_commands_work_on_a_paper_in_the_making(clone):
    folder, *_ = clone
    call = lambda *words: run(folder, "-m", "diffusion_papers", *words)
    listed = call("list").stdout
    assert "toy: A module of diffusion_papers" in listed and "in the making: lacks tests/golden/toy.py" in listed and "unfinished" not in listed
    model = folder / "runs" / "toy" / "model.safetensors"
    call("train", "toy", "--set", "training.steps=20", "--folder", model.parent)
    assert model.is_file() and "frechet" in model.with_suffix(".json").read_text()
    assert "samples.csv: 3 samples" in call("sample", "toy", "--model", model, "--set", "count=3").stdout
    assert len((folder / "samples.csv").read_text().splitlines()) == 3
    assert "frechet" in call("evaluate", "toy", "--model", model, "--set", "count=50").stdout
    assert "holds" in call("demo", "toy").stdout
    assert "shouted 2 times" in call("shout", "toy", "README.md", "--words", "!", "--set", "count=2", "--output", "loud.txt").stdout
    assert (folder / "loud.txt").read_text() == (folder / "README.md").read_text() + "!!"
    assert "what is appended to it" in call("shout", "toy", "--help").stdout


def test_checks_work_on_a_paper_in_the_making(clone):
    folder, paper, evidence = clone
    quick = "not generated_files and not import_with_torch"
    told = run(folder, "-m", "pytest", "tests/test_repository.py", "-k", f"(toy or shelf or imports or links) and {quick}", "-rs", "-q", "-p", "no:cacheprovider").stdout
    assert "toy is in the making" in told and "data/results/toy.json" in told
    run(folder, "-m", "pytest", "--nbval", paper, evidence, "-q", "-p", "no:cacheprovider")


@pytest.mark.parametrize("words, told", [(["genie"], "genie is there already"), (["Toy"], "lower-case"), (["other", "6"], "free one from 1 to 99, got 6"), ([], "SLUG=name")])
def test_a_name_or_a_number_that_cannot_be_had_is_refused(words, told):
    before = sorted((ROOT / "nbs").rglob("*.ipynb"))
    done = subprocess.run([sys.executable, "tools/paper.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and told in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted((ROOT / "nbs").rglob("*.ipynb")) == before
