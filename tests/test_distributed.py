"""Two processes train, draw and measure what one would have."""
import subprocess
import sys
import warnings

import torch

from extras import need

need("train", "data")

from diffusion_papers.workbench.checkpoints import load_checkpoint
from diffusion_papers.core.generation import Generated

PROGRAM = """
import functools, sys
import torch
from diffusion_papers import genie
from diffusion_papers.core.data import TensorSet, digits
from diffusion_papers.core.diffusion import diffusion_loss
from diffusion_papers.core.training import fit

config = genie.CONFIGS["cpu"].override(**{"diffusion.mlp.width": 32, "diffusion.mlp.blocks": 2, "diffusion.training.steps": 30, "diffusion.training.batch_size": 24, "diffusion.training.accumulate": int(sys.argv[2])})
data = digits()[:]
denoiser = genie.build(config).denoiser.double()
data = TensorSet(data["x0"].double(), class_label=data["class_label"])
fit(denoiser, functools.partial(diffusion_loss, config=config.diffusion), data, config.diffusion.training, folder=sys.argv[1], device="cpu")
"""


GENERATE = """
import os, sys, torch
from diffusion_papers import genie
from diffusion_papers.core.generation import generate, noise_for
from diffusion_papers.core.protocols import model_fid
from diffusion_papers.core.training import start_accelerator

model = genie.load_pretrained()
draw = lambda piece: {"x0": genie.sample(model, x_T=noise_for(piece, model.shape), calls=3)}
generate(draw, 70, sys.argv[1] + "/samples", size=16, about={"calls": 3}, device="cpu")
os.chdir(sys.argv[1])  # where statistics are kept
made = genie.generate_data(model, "many", count=300, size=40, calls=3, device="cpu")
distance = model_fid(made, model, sys.argv[2], size=3, device="cpu")["fid"]
if start_accelerator("cpu").is_main_process: torch.save(torch.tensor(distance, dtype=torch.float64), "distance.pt")
"""


class Lines(torch.nn.Module):
    def forward(self, images): return images[:, 0].double().mean(2) / 255


def launcher(processes):
    "Starts several processes of this machine (`accelerate launch --cpu` starts one, whatever number it is told)."
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


MARK = """
import pathlib, sys
from diffusion_papers.core.training import processes
ours = processes("cpu")
pathlib.Path(sys.argv[1], f"process {ours.process_index} of {ours.num_processes}").touch()
"""


def launched(program_text, folder, processes, *more):
    "Run a program in so many processes, and see that there were so many."
    folder.mkdir(exist_ok=True)
    program = folder.parent / "program.py"
    program.write_text(MARK + program_text)
    words = [*(launcher(processes) if processes > 1 else [sys.executable]), program, folder, *more]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in folder.glob("process *")} == {f"process {rank} of {processes}" for rank in range(processes)}


def trained(folder, processes, accumulate=1):
    launched(PROGRAM, folder, processes, accumulate)
    return load_checkpoint(folder / "run.safetensors")[0]


def test_two_processes_equal_one(tmp_path):
    one, two = trained(tmp_path / "one", 1), trained(tmp_path / "two", 2)
    assert one.keys() == two.keys()
    difference = max((one[name] - two[name]).abs().max().item() for name in one if name.startswith(("model", "average")))
    assert 0 <= difference < 1e-6
    pieces = trained(tmp_path / "pieces", 2, accumulate=3)
    assert max((one[name] - pieces[name]).abs().max().item() for name in one if name.startswith(("model", "average"))) < 1e-6


def test_two_processes_draw_and_measure_what_one_does(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Lines()).save(tmp_path / "lines.pt")
    for processes in (1, 2): launched(GENERATE, tmp_path / str(processes), processes, tmp_path / "lines.pt")
    one, two = (Generated(tmp_path / str(processes) / "samples").__getitems__(range(70))["x0"] for processes in (1, 2))
    assert torch.equal(one, two)
    one, two = (torch.load(tmp_path / str(processes) / "distance.pt").item() for processes in (1, 2))
    assert one == two > 0  # blocks are the same, and are added in the same order


def test_the_command_line_trains_with_two_processes(tmp_path):
    words = ["-m", "diffusion_papers", "train", "genie", "--device", "cpu", "--folder", "FOLDER", "--set", "diffusion.training.steps=3", "head.steps=2",
             "diffusion.mlp.width=16", "diffusion.mlp.blocks=1", "diffusion.training.batch_size=16", "head.batch_size=16", "evaluated=20"]
    one, two = (trained_by_command(words, tmp_path / str(processes), processes) for processes in (1, 2))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5  # in float32


def trained_by_command(words, folder, processes):
    "The model that a command of this package writes into a folder."
    launch = launcher(processes) if processes > 1 else [sys.executable]
    named = ["--module", *words[1:]] if processes > 1 else words
    done = subprocess.run([str(folder) if word == "FOLDER" else word for word in [*launch, *named]], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_checkpoint(folder / "model.safetensors")[0]
