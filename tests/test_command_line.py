"""The command line as a user meets it: in a process of its own."""
import json
import subprocess
import sys

import pytest

from extras import need

need("train", "data", "plots")

from diffusion_papers.workbench.registry import papers

SMALL = ["diffusion.training.steps=3", "head.steps=3", "diffusion.training.checkpoint_every=2", "diffusion.mlp.width=16", "diffusion.mlp.blocks=1"]


def command(*words):
    return subprocess.run([sys.executable, "-m", "diffusion_papers", *map(str, words)], capture_output=True, text=True)


def test_list_names_every_paper():
    done = command("list")
    assert done.returncode == 0 and all(name in done.stdout for name in papers())


def test_help_explains_every_field():
    done = command("train", "genie", "--help")
    assert done.returncode == 0 and "diffusion.training.lr" in done.stdout and "learning rate of Adam" in done.stdout
    assert "striding" in command("sample", "genie", "--help").stdout


def test_train_resume_evaluate_and_sample(tmp_path):
    run = ["train", "genie", "--folder", tmp_path / "run", "--device", "cpu", "--set", *SMALL]
    assert command(*run).returncode == 0
    about = json.loads((tmp_path / "run" / "model.json").read_text())
    assert (about["config"]["diffusion"]["training"]["steps"] == 3 and about["metrics"]
            and about["command"].startswith("python -m diffusion_papers train genie"))
    again = command(*run)
    assert again.returncode == 1 and "resume" in again.stderr
    other = command(*run[:-len(SMALL)], *SMALL, "diffusion.training.steps=5", "--resume")
    assert other.returncode == 1 and "diffusion.training.steps was 3 and is 5" in other.stderr
    assert command(*run, "--resume").returncode == 0
    model = tmp_path / "run" / "model.safetensors"
    done = command("evaluate", "genie", "--model", model, "--set", "count=20", "calls=(5,)",
                   "--output", tmp_path / "rows.json")
    assert (done.returncode == 0 and "frechet" in done.stdout
            and len(json.loads((tmp_path / "rows.json").read_text())) == 7)
    assert command("sample", "genie", "--model", model, "--set", "count=4",
                   "--output", tmp_path / "a" / "samples.png").returncode == 0
    assert (tmp_path / "a" / "samples.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words, told", [
    (["train", "genie", "--set", "widht=3"], "expected one of"),
    (["train", "genie", "--preset", "huge"], "--preset: genie has cpu"),
    (["sample", "genie", "--model", "nowhere.safetensors"], "there is no such checkpoint"),
    (["sample", "genie", "--set", "solver=rk4"], "solver: expected one of"),
    (["sample", "genie", "--set", "calls"], "expected name=value"), (["sample", "genie", "--set", "calls=ten"], "calls takes a value like 10"), (["sample", "gan"], "invalid choice")])
def test_mistakes_are_told_in_one_line(words, told, tmp_path):
    if words[0] == "train": words += ["--folder", str(tmp_path)]
    done = command(*words)
    assert done.returncode in (1, 2) and told in done.stderr and "Traceback" not in done.stderr


def test_demo_writes_one_self_contained_page(tmp_path):
    done = command("demo", "--output", tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "http://" not in page and "https://" not in page and page.count("data:image/png") >= 4 and "Holds" in page
