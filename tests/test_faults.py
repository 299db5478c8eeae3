"""What must survive: training that is killed at any moment, and readers of damaged files."""
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from extras import need

need("train", "data")

from diffusion_papers import genie
from diffusion_papers.core.diffusion import train_denoiser
from diffusion_papers.workbench.checkpoints import CheckpointError, load_checkpoint, load_foreign, load_into, save_checkpoint

CONFIG = ("genie.CONFIGS['cpu'].override(**{'diffusion.mlp.width': 32, 'diffusion.mlp.blocks': 1, 'diffusion.training.steps': 4000, 'head.steps': 2, "
          "'diffusion.training.checkpoint_every': 3, 'diffusion.training.batch_size': 16, 'head.batch_size': 16})")
PROGRAM = f"""
import sys
from diffusion_papers import genie
from diffusion_papers.core.diffusion import train_denoiser
network = train_denoiser({CONFIG}.diffusion, folder=sys.argv[1], resume=True, device="cpu")
"""


def state_of(folder):
    tensors, about = load_checkpoint(folder / "run.safetensors")
    return tensors, about["step"]


def test_killed_ten_times_and_resumed_is_bit_identical(tmp_path):
    start = lambda folder: subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)],
                                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    undisturbed = start(tmp_path / "undisturbed")
    kills, steps = 0, []
    moments = random.Random(0)
    while kills < 10:
        victim = start(tmp_path / "killed")
        run = tmp_path / "killed" / "run.safetensors"
        seen = run.stat().st_mtime_ns if run.exists() else 0
        while victim.poll() is None and not (run.exists() and run.stat().st_mtime_ns != seen):  # until it trains
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.4))
        assert victim.poll() is None, f"finished after {kills} kills only: {victim.stderr.read().decode()}"
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        kills += 1
        steps.append(state_of(tmp_path / "killed")[1])  # readable after every kill
    assert steps == sorted(steps) and steps[-1] < 4000
    assert start(tmp_path / "killed").wait() == 0 and undisturbed.wait() == 0
    (expected, last), (found, _) = state_of(tmp_path / "undisturbed"), state_of(tmp_path / "killed")
    assert last == 4000 and expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_resumed_head_is_bit_identical(tmp_path):
    class Stop(Exception): pass
    def stop(step, loss):
        if step == 7: raise Stop
    config = genie.CONFIGS["cpu"].override(
        **{"diffusion.mlp.width": 32, "diffusion.mlp.blocks": 1, "diffusion.training.steps": 2, "head.steps": 20, "head.checkpoint_every": 5})
    network = train_denoiser(config.diffusion, device="cpu")
    undisturbed = genie.train_head(config, network, device="cpu")
    with pytest.raises(Stop): genie.train_head(config, network, device="cpu", folder=tmp_path, callback=stop)
    resumed = genie.train_head(config, network, device="cpu", folder=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(undisturbed.head.parameters(), resumed.head.parameters()))


@pytest.fixture
def saved(tmp_path):
    genie.save_model(tmp_path / "model.safetensors", genie.build(genie.CONFIGS["cpu"].override(**{"diffusion.mlp.width": 16, "diffusion.mlp.blocks": 1})))
    return tmp_path / "model.safetensors"


def test_every_truncation_is_noticed(saved):
    whole = saved.read_bytes()
    for length in [0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1]:
        saved.write_bytes(whole[:length])
        with pytest.raises(CheckpointError): genie.load_model(saved)


def test_every_flipped_bit_is_noticed(saved):
    whole, choice = saved.read_bytes(), random.Random(0)
    for place in [choice.randrange(len(whole)) for _ in range(60)] + list(range(0, 200, 7)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << choice.randrange(8)
        saved.write_bytes(flipped)
        with pytest.raises(CheckpointError): genie.load_model(saved)
    saved.write_bytes(whole)
    genie.load_model(saved)


def test_a_model_is_never_half_loaded():
    model = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for tensors in ({"weight": torch.ones(2, 3)},
                    {"weight": torch.ones(2, 3), "bias": torch.ones(3)},
                    {"weight": torch.ones(2, 3), "bias": torch.ones(2), "more": torch.ones(1)}):
        with pytest.raises(CheckpointError): load_into(model, tensors)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_foreign_files_are_refused_by_name(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "pickled.pt")
    with pytest.raises(CheckpointError, match="pickled.pt: refused"): load_foreign(tmp_path / "pickled.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "tensors.pt")
    assert torch.equal(load_foreign(tmp_path / "tensors.pt")["w"], torch.ones(2))
    with pytest.raises(CheckpointError, match="load_foreign"): load_checkpoint(tmp_path / "tensors.pt")
    save_checkpoint(tmp_path / "other.safetensors", {"w": torch.ones(2)}, {"kind": "something"})
    with pytest.raises(CheckpointError, match="expected a model of kind genie, got"):
        genie.load_model(tmp_path / "other.safetensors")


def test_a_failed_write_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "good.safetensors"
    save_checkpoint(path, {"w": torch.ones(2)}, {})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): save_checkpoint(path, {"w": torch.zeros(2)}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["good.safetensors"]
    monkeypatch.undo()
    assert torch.equal(load_checkpoint(path)[0]["w"], torch.ones(2))
