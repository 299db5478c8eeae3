"""Runs that are resumed: parameters without a gradient, tied weights, what may change, damaged checkpoints, folders in use."""
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from extras import need

need("train", "data")

from diffusion_papers import ddo, dfno, dpdm, ediffi, genie, i2sb, ldeq, odise
from diffusion_papers.__main__ import main
from diffusion_papers.workbench.checkpoints import CheckpointError, load_checkpoint, load_into, save_checkpoint
from diffusion_papers.core.data import TensorSet
from diffusion_papers.workbench.files import locked
from diffusion_papers.core.generation import generate
from diffusion_papers.core.training import TrainingConfig, claim_folder, fit

DATA = TensorSet(torch.linspace(-1, 1, 48 * 4).reshape(48, 4))
SHORT = TrainingConfig(steps=12, batch_size=8, checkpoint_every=3, ema=0.9)
TINY = genie.CONFIGS["cpu"].override(**{
    "diffusion.mlp.width": 8, "diffusion.mlp.blocks": 1, "diffusion.training.steps": 4, "diffusion.training.batch_size": 8,
    "diffusion.training.decay": "constant", "head.steps": 4, "head.batch_size": 8, "head.checkpoint_every": 1})


class Stop(Exception): pass


def stop_at(number):
    def callback(step, value):
        if step == number: raise Stop
    return callback


class Branches(nn.Module):
    "A layer that is always used, one that is used late, one that is frozen late, one that is used never, and one frozen for ever."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in ("always", "late", "early", "never", "frozen"): setattr(self, name, nn.Linear(4, 4))
        self.frozen.requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        x = self.frozen(self.always(x))
        if self.calls > 7: x = self.late(x)
        return self.early(x) if self.calls <= 5 else x


class Tied(nn.Module):
    "Two layers that share one matrix, and a buffer with two names."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("scale", torch.ones(4)); self.register_buffer("same_scale", self.scale)

    def forward(self, x): return self.decoder(torch.tanh(self.encoder(x))) * self.scale


def squared(model, batch, draws): return (model(batch["x0"] + draws.normal(batch["x0"])) - batch["x0"]).square().mean(1)


def equal(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def train(model, folder=None, config=SHORT, **options): return fit(model, squared, DATA, config, folder=folder, device="cpu", **options)


@pytest.mark.parametrize("kind", [Branches, Tied])
@pytest.mark.parametrize("stop", [4, 7, 10, 11])
def test_a_run_is_resumed_exactly_with_branches_and_ties(kind, stop, tmp_path):
    undisturbed = train(kind(), tmp_path / "whole")
    with pytest.raises(Stop): train(kind(), tmp_path / "run", callback=stop_at(stop))
    assert equal(undisturbed, train(kind(), tmp_path / "run", resume=True))
    (one, _), (two, _) = (load_checkpoint(tmp_path / name / "run.safetensors") for name in ("whole", "run"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)  # moments, too


def test_moments_of_other_parameters_are_refused(tmp_path):
    with pytest.raises(Stop): train(Branches(), tmp_path, callback=stop_at(10))
    other = Branches()
    other.always.requires_grad_(False); other.frozen.requires_grad_(True)  # as many parameters, of the same shapes
    with pytest.raises(CheckpointError, match="moved other parameters.*always"): train(other, tmp_path, resume=True)
    tensors, about = load_checkpoint(tmp_path / "run.safetensors")
    save_checkpoint(tmp_path / "run.safetensors", {n: v for n, v in tensors.items() if not n.startswith("optimizer.0.")}, about)
    with pytest.raises(CheckpointError, match="moments are not those"): train(Branches(), tmp_path, resume=True)


def test_a_model_without_anything_to_train_is_refused_before_the_work(tmp_path):
    average = train(Tied())
    with pytest.raises(ValueError, match="model: expected a parameter to train"): train(average, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tied_weights_are_saved_and_loaded_as_ties(tmp_path):
    model = train(Tied())
    save_checkpoint(tmp_path / "tied.safetensors", model.state_dict(), {})
    tensors, _ = load_checkpoint(tmp_path / "tied.safetensors")
    loaded = load_into(Tied(), tensors)
    assert equal(model, loaded) and loaded.decoder.weight is loaded.encoder.weight
    with pytest.raises(CheckpointError, match="differ.*shares: .*decoder.weight and encoder.weight"):
        load_into(Tied(), tensors | {"decoder.weight": torch.zeros(4, 4)})


def test_each_training_of_a_process_has_its_own_precision():
    seen = []
    class Net(nn.Linear):
        def forward(self, x): seen.append(super().forward(x).dtype); return super().forward(x)
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16), ("no", torch.float32)):
        seen.clear()
        train(Net(4, 4), config=SHORT.override(precision=precision))
        assert set(seen) == {dtype}


def test_a_damaged_checkpoint_leaves_the_one_before_and_a_way_on(tmp_path):
    undisturbed = train(Branches())
    with pytest.raises(Stop): train(Branches(), tmp_path, callback=stop_at(10))
    last, former = tmp_path / "run.safetensors", tmp_path / "run.previous.safetensors"
    assert [load_checkpoint(path)[1]["step"] for path in (former, last)] == [6, 9]
    last.write_bytes(last.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"run.safetensors: damaged.*run.previous.safetensors, is whole \(step 6\): remove .*run.safetensors, then resume"):
        train(Branches(), tmp_path, resume=True)
    last.unlink()
    with pytest.raises(ValueError, match="holds a run already"): train(Branches(), tmp_path)
    with pytest.warns(UserWarning, match="goes on from the checkpoint before it"): assert equal(undisturbed, train(Branches(), tmp_path, resume=True))
    for path in (last, former): path.write_bytes(b"spoiled")
    with pytest.raises(CheckpointError, match="no whole one before it: remove .*then start again"): train(Branches(), tmp_path, resume=True)


def test_a_private_run_goes_on_from_the_checkpoint_before_and_pays_again(tmp_path):
    config = dpdm.DIGITS.override(**{"training.steps": 12, "training.checkpoint_every": 3, "draws": 1, "perceptron.width": 8})
    with pytest.raises(Stop): dpdm.train(config, tmp_path, device="cpu", callback=stop_at(8))
    (tmp_path / "run.safetensors").write_bytes(b"spoiled")
    with pytest.raises(CheckpointError, match=r"step 3\): remove"): dpdm.train(config, tmp_path, resume=True, device="cpu")
    (tmp_path / "run.safetensors").unlink()
    steps = []
    with pytest.warns(UserWarning, match="before it"):
        model = dpdm.train(config, tmp_path, resume=True, device="cpu", callback=lambda step, spent: steps.append(step))
    assert steps == [4, 5, 6, 7] and model.guarantee["steps"] == 12  # eight were paid for, four were left
    assert load_checkpoint(tmp_path / "run.safetensors")[1]["step"] == 7


# what may change

FREE = {genie: {"evaluated": 7, "diffusion.training.checkpoint_every": 7, "head.checkpoint_every": 7},
        dfno: {"evaluated": 7, "training.checkpoint_every": 7, "diffusion.training.steps": 7, "diffusion.data_path": "elsewhere"},
        i2sb: {"evaluated": 7, "training.checkpoint_every": 7}, dpdm: {"evaluated": 700, "training.checkpoint_every": 7},
        ddo: {"evaluated": 7, "training.checkpoint_every": 7}, ldeq: {"evaluated": 7, "training.checkpoint_every": 7},
        ediffi: {"evaluated": 7, "training.checkpoint_every": 7, "data_path": "elsewhere", "states_path": "elsewhere", "encoders.text_path": "elsewhere", "encoders.device": "cuda"},
        odise: {"evaluated": 7, "training.checkpoint_every": 7, "data_path": "elsewhere", "frozen_path": "elsewhere", "alpha": 0.5, "longest": 99}}


@pytest.mark.parametrize("module", FREE, ids=lambda module: module.__name__.split(".")[-1])
def test_a_folder_accepts_what_is_free_and_writes_it_down(module, tmp_path):
    config = module.CONFIGS["cpu"]
    for stage in config.STAGES or [""]:
        (tmp_path / stage).mkdir(exist_ok=True)
        (tmp_path / stage / "run.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    changed = config.override(**FREE[module])
    with claim_folder(tmp_path, changed, resume=True): pass
    assert type(config).from_dict(json.loads((tmp_path / "config.json").read_text())) == changed
    seed = "training.seed" if module in (dpdm, ddo) else "seed"
    with pytest.raises(ValueError, match=f"{seed} was 0 and is 5"):
        with claim_folder(tmp_path, changed.override(**{seed: 5}), resume=True): pass


@pytest.mark.parametrize("decay, decay_steps, free", [("constant", 0, True), ("linear", 0, False), ("linear", 50, True), ("cosine", 0, False), ("halving", 5, True)])
def test_folder_and_checkpoint_agree_on_more_steps(decay, decay_steps, free, tmp_path):
    short = SHORT.override(decay=decay, decay_steps=decay_steps)
    with claim_folder(tmp_path, short): train(Branches(), tmp_path, short)
    longer = short.override(steps=15)
    if not free:
        with pytest.raises(ValueError, match="steps was 12 and is 15"), claim_folder(tmp_path, longer, resume=True): pass
        with pytest.raises(CheckpointError, match="steps was 12 and is 15"): train(Branches(), tmp_path, longer, resume=True)
        return
    with claim_folder(tmp_path, longer, resume=True): resumed = train(Branches(), tmp_path, longer, resume=True)
    assert equal(resumed, train(Branches(), None, longer))
    with pytest.raises(CheckpointError, match="taken 15 steps already"): train(Branches(), tmp_path, short, resume=True)


def test_a_stage_that_has_not_begun_is_free_and_one_that_was_built_upon_is_not(tmp_path):
    def stop(step, value):
        if step == 3: raise Stop
    with pytest.raises(Stop): genie.train(TINY, tmp_path, device="cpu", callback=stop)
    assert not (tmp_path / "head" / "run.safetensors").exists()
    later = TINY.override(**{"head.steps": 2, "head.lr": 1e-3, "head_blocks": 1, "diffusion.training.steps": 5, "evaluated": 9})
    model = genie.train(later, tmp_path, resume=True, device="cpu")
    assert equal(model, genie.train(later, device="cpu"))
    assert genie.GenieConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == later
    for changes in ({"diffusion.training.steps": 6}, {"head.lr": 1e-2}, {"head_blocks": 2}):  # the head was distilled from this network
        with pytest.raises(ValueError, match=next(iter(changes))): genie.train(later.override(**changes), tmp_path, resume=True, device="cpu")


def test_a_damaged_configuration_is_named(tmp_path):
    (tmp_path / "run.safetensors").touch()
    for content in ("{", "[]", '{"colour": 1}', '{"steps": "many"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="config.json is damaged, or no TrainingConfig"):
            with claim_folder(tmp_path, SHORT, resume=True): pass


# one folder, one run

SECOND = """
import sys
from diffusion_papers.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("slug", ["genie", "dfno", "i2sb", "dpdm", "ddo", "ldeq", "ediffi", "odise"])
def test_a_folder_serves_one_training(slug, tmp_path, capsys):
    words = ["train", slug, "--device", "cpu", "--folder", str(tmp_path / "run")] + (["--i-know-data-are-public"] if slug == "dpdm" else [])
    lock = "ledger.json.lock" if slug == "dpdm" else "config.lock"  # what a run takes first
    with locked(tmp_path / "run" / lock, "folder"):  # as another process would hold it
        before = sorted(path.name for path in (tmp_path / "run").iterdir())
        assert main(words) == 1 and main([*words, "--resume"]) == 1
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 2 and all("is in use by process" in line and "one run at a time" in line for line in told)


def test_the_second_of_two_trainings_is_refused_and_the_first_is_not_disturbed(tmp_path):
    def second(step, value):
        if step != 2: return
        done = subprocess.run([sys.executable, "-c", SECOND, "train", "genie", "--device", "cpu", "--folder", str(tmp_path), "--set", "seed=3"],
                              capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "is in use by process" in done.stderr, done.stderr
    model = genie.train(TINY, tmp_path, device="cpu", callback=second)
    assert equal(model, genie.train(TINY, device="cpu"))
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(TINY.to_dict()))


def test_fit_and_generate_have_a_folder_of_their_own_and_leave_it(tmp_path):
    def again(step, value):
        with pytest.raises(RuntimeError, match="in use"): train(Tied(), tmp_path)
    train(Tied(), tmp_path, callback=again)
    with pytest.raises(CheckpointError): train(Branches(), tmp_path, resume=True)
    train(Tied(), tmp_path, resume=True)  # whatever ended the last one, the folder is free
    def draw(piece):
        with pytest.raises(RuntimeError, match="in use"): generate(draw, 8, tmp_path / "samples", size=4, device="cpu")
        return {"x0": torch.zeros(len(piece), 2)}
    assert len(generate(draw, 8, tmp_path / "samples", size=4, about={"seed": 1, "where": "here"}, device="cpu")) == 8
    assert len(generate(draw, 8, tmp_path / "samples", size=4, about={"seed": 1, "where": "there"}, free={"where"}, device="cpu")) == 8
    with pytest.raises(ValueError, match="holds other samples: about.seed was 1 and is 2"):
        generate(draw, 8, tmp_path / "samples", size=4, about={"seed": 2, "where": "here"}, device="cpu")


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path):
    for name in ("run.safetensors.7.tmp", "run.previous.safetensors.7.tmp", "notes.tmp"): (tmp_path / name).touch()
    train(Tied(), tmp_path)
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["notes.tmp"]
    (tmp_path / "samples").mkdir(); (tmp_path / "samples" / "000000000.safetensors.7.tmp").touch()
    generate(lambda piece: {"x0": torch.zeros(len(piece), 2)}, 4, tmp_path / "samples", device="cpu")
    assert not list((tmp_path / "samples").glob("*.tmp"))


# genie's head

def test_a_head_or_a_denoiser_of_another_form_is_refused_before_the_work(tmp_path):
    model, other = genie.build(TINY), genie.build(TINY.override(**{"head_blocks": 1, "diffusion.mlp.width": 16}))
    with pytest.raises(CheckpointError, match="head: "): genie.train_head(TINY, model.denoiser, other.head, folder=tmp_path / "run")
    with pytest.raises(CheckpointError, match="denoiser: wrong shapes"): genie.train_head(TINY, other.denoiser, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
