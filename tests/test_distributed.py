"""Two processes train what one would have trained."""
import subprocess
import sys
from pathlib import Path

import torch

from diffusion_papers.core.checkpoints import load_checkpoint

PROGRAM = """
import functools, sys
import torch
from diffusion_papers import genie
from diffusion_papers.core.data import TensorSet, digits
from diffusion_papers.core.training import fit

config = genie.CONFIGS["cpu"].override(**{"width": 32, "blocks": 2, "base.steps": 30, "base.batch_size": 24, "base.accumulate": int(sys.argv[2])})
data = digits()[:]
denoiser = genie.build(config).denoiser.double()
data = TensorSet(data["x0"].double(), class_label=data["class_label"])
fit(denoiser, functools.partial(genie.base_loss, config=config), data, config.base, folder=sys.argv[1], device="cpu")
"""


def trained(folder, processes, accumulate=1):
    program = folder.parent / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    words = [*launcher, program, folder, str(accumulate)] if processes > 1 else [sys.executable, program, folder, str(accumulate)]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_checkpoint(folder / "run.safetensors")[0]


def test_two_processes_equal_one(tmp_path):
    one, two = trained(tmp_path / "one", 1), trained(tmp_path / "two", 2)
    assert one.keys() == two.keys()
    difference = max((one[name] - two[name]).abs().max().item() for name in one if name.startswith(("model", "average")))
    assert 0 <= difference < 1e-6
    pieces = trained(tmp_path / "pieces", 2, accumulate=3)
    assert max((one[name] - pieces[name]).abs().max().item() for name in one if name.startswith(("model", "average"))) < 1e-6
