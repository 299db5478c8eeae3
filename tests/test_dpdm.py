"""DPDM: what a promise to people needs beyond the notebook's cells: kills, secrets, files, processes, the authors' names."""
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from extras import need

need("train", "data")

from safetensors import safe_open
from torch import nn

from test_distributed import launched

from diffusion_papers import dpdm
from diffusion_papers.__main__ import main
from diffusion_papers.evidence.dpdm import audit
from diffusion_papers.workbench.checkpoints import CheckpointError, load_checkpoint
from diffusion_papers.core.data import digits
from diffusion_papers.core.networks import authors_keys
from diffusion_papers.topics.privacy import (Ledger, Mechanism, PrivacyBudgetExceeded, check_private, clipped_sum,
                                           gradients_by_layer, per_example_gradients, public_generator)

SHORT = dpdm.DIGITS.override(**{"training.steps": 12, "training.checkpoint_every": 3, "draws": 2, "perceptron.width": 16})
PUBLIC = replace(SHORT, public=True)
MANIFESTS = Path(__file__).parent / "manifests"


class Stop(Exception): pass


def stop_at(number):
    def callback(step, spent):
        if step == number: raise Stop
    return callback


@pytest.mark.parametrize("preset, manifest, count", [
    ("mnist", "mnist_28", 1_753_345), ("cifar10", "cifar10_32", 1_754_499), ("celeba32", "celeba_32", 1_804_451),
    ("imagenet32", "imagenet_32", 1_836_483), ("celeba64", "celeba_64", 1_999_907)])
def test_published_networks_have_the_authors_tensors(preset, manifest, count):
    with torch.device("meta"): network = dpdm.build(dpdm.CONFIGS[preset]).network
    expected = json.loads((MANIFESTS / f"dpdm-{manifest}.json").read_text())
    state, pairs = network.state_dict(), authors_keys(network, "ddpmpp")
    assert [f"module.model.{theirs}" for _, theirs in pairs] == list(expected)
    assert {f"module.model.{theirs}": list(state[ours].shape) for ours, theirs in pairs} == expected
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("preset, people, epsilon, noise", [("mnist", 60_000, 10, 2.48779), ("mnist_1", 60_000, 1, 18.28125),
                                                            ("mnist_02", 60_000, 0.2, 85.0), ("cifar10", 50_000, 10, 2.48047)])
def test_published_budgets_ask_for_the_published_noise(preset, people, epsilon, noise):
    plan = dpdm.CONFIGS[preset].mechanism(people)
    assert abs(plan.noise_multiplier / noise - 1) < 1e-4 and epsilon - 0.01 <= plan.epsilon() <= epsilon


def test_a_public_run_is_resumed_to_the_same_bits(tmp_path):
    with pytest.raises(Stop): dpdm.train(PUBLIC, tmp_path / "run", device="cpu", callback=stop_at(8))
    resumed = dpdm.train(PUBLIC, tmp_path / "run", resume=True, device="cpu")
    whole = dpdm.train(PUBLIC, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values()))
    assert "no privacy" in resumed.guarantee["statement"] and resumed.guarantee["steps"] == 12


def test_a_private_run_never_spends_more_than_it_says(tmp_path):
    steps = []
    def count(step, spent):
        steps.append(step)
        if len(steps) in (5, 9): raise Stop
    for resume in (False, True):
        with pytest.raises(Stop): dpdm.train(SHORT, tmp_path / "run", resume=resume, device="cpu", callback=count)
    model = dpdm.train(SHORT, tmp_path / "run", resume=True, device="cpu", callback=count)
    assert len(steps) == 12  # steps really taken are those planned: lost ones are paid for and not given back
    assert model.guarantee["steps"] == 12 and model.guarantee["epsilon"] <= 10
    assert "no privacy" not in model.guarantee["statement"]
    ledger = Ledger.open(tmp_path / "run" / "ledger.json", SHORT.mechanism(1438))
    with pytest.raises(PrivacyBudgetExceeded): ledger.record()


def test_a_callback_is_told_the_price_so_far_and_nothing_of_the_pictures(tmp_path):
    told = {}
    def listen(step, spent, last=7):
        told[step] = spent
        assert spent == Ledger.read(tmp_path / "run").spent()  # what is told is paid
        if step == last: raise Stop
    with pytest.raises(Stop): dpdm.train(SHORT, tmp_path / "run", device="cpu", callback=listen)
    model = dpdm.train(SHORT, tmp_path / "run", resume=True, device="cpu", callback=lambda step, spent: listen(step, spent, None))
    assert list(told) == list(range(1, 12)) and told[11] == model.guarantee["epsilon"]  # a step was lost, and stays paid
    public = {}
    dpdm.train(PUBLIC, device="cpu", callback=public.__setitem__)
    assert list(public) == list(range(1, 13)) and public[12] == model.guarantee["epsilon"]


def test_a_ledger_of_another_mechanism_or_a_lost_one_is_refused(tmp_path):
    with pytest.raises(Stop): dpdm.train(SHORT, tmp_path / "run", device="cpu", callback=stop_at(4))
    with pytest.raises(ValueError, match="holds a run already"): dpdm.train(SHORT, tmp_path / "run", device="cpu")
    for changed in (replace(SHORT, noise_multiplier=9.0), replace(SHORT, delta=1e-5), SHORT.override(**{"training.batch_size": 200})):
        with pytest.raises(ValueError, match="was"): dpdm.train(changed, tmp_path / "run", resume=True, device="cpu")
    (tmp_path / "run" / "ledger.json").unlink()
    with pytest.raises(ValueError, match="ledger"): dpdm.train(SHORT, tmp_path / "run", resume=True, device="cpu")


def test_what_a_run_keeps_is_for_its_owner_alone(tmp_path):
    dpdm.train(SHORT, tmp_path / "run", device="cpu")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.name for path in files if path.suffix != ".lock"} == {"ledger.json", "run.safetensors", "run.previous.safetensors", "config.json"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in files), [oct(path.stat().st_mode) for path in files]


def test_a_released_file_holds_weights_and_the_guarantee_alone(tmp_path):
    model = dpdm.train(SHORT, tmp_path / "run", device="cpu")
    dpdm.save_model(tmp_path / "model.safetensors", model)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict()) and set(file.metadata()) == {"about", "digest", "format"} - (
            {"format"} - set(file.metadata()))
    about = load_checkpoint(tmp_path / "model.safetensors")[1]
    assert set(about) == {"kind", "config", "guarantee"} and set(about["guarantee"]) == {"mechanism", "steps", "epsilon", "epsilon if secret", "statement"}
    assert dpdm.load_model(tmp_path / "model.safetensors").guarantee == model.guarantee


def test_noise_of_a_private_run_cannot_be_drawn_again(tmp_path):
    one, two = (dpdm.train(SHORT, tmp_path / name, device="cpu") for name in ("one", "two"))  # the same seeds in all files
    parts = [(a - b).abs().max().item() for a, b in zip(one.state_dict().values(), two.state_dict().values())]
    assert min(parts) > 0
    public = [dpdm.train(PUBLIC, device="cpu") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(public[0].state_dict().values(), public[1].state_dict().values()))


@pytest.mark.parametrize("draws", [1, 32])
def test_one_picture_moves_a_sum_by_the_clipping_norm_at_most(draws):
    model = dpdm.build(replace(PUBLIC, draws=draws)).double()
    generator = public_generator(0)
    for parameter in model.parameters(): nn.init.normal_(parameter, std=0.2, generator=generator)
    picture = digits("train")[:8]
    batch = dpdm.with_draws(picture | {"x0": picture["x0"].double()}, replace(PUBLIC, draws=draws), generator)
    batch["x0"][3] *= 1e4
    total = lambda sums: torch.cat([value.flatten() for value in sums.values()])
    everybody = total(clipped_sum(model, dpdm.multiplied_loss, batch, 0.3)[0])
    for index in range(8):
        others = {name: torch.cat([value[:index], value[index + 1:]]) for name, value in batch.items()}
        assert (everybody - total(clipped_sum(model, dpdm.multiplied_loss, others, 0.3)[0])).norm() <= 0.3 * (1 + 1e-6)


def test_an_empty_batch_is_a_step_of_noise():
    model, plan = nn.Linear(1000, 1000, bias=False), Mechanism(1000, 0.1, 3.0, 1e-4, 10)
    dpdm.private_gradients(model, lambda model, batch: model(batch["x0"]).mean(1), {"x0": torch.zeros(0, 1000)}, 0.5, plan,
                           public_generator(0))
    gradient = model.weight.grad
    assert abs(gradient.std().item() / 0.015 - 1) < 0.02 and abs(gradient.mean().item()) < 1e-4


def test_without_noise_and_clipping_it_is_plain_training():
    config = replace(PUBLIC, epsilon=0.0).override(**{"training.steps": 5, "training.batch_size": 5000, "training.ema": 0.0})
    ours = dpdm.train(config, device="cpu")
    model, data = dpdm.build(config), digits("train")
    optimizer = torch.optim.Adam(model.parameters(), lr=config.training.lr)
    for step in range(5):
        generator = public_generator(dpdm.step_seed(config.training.seed, 3, step, 0))
        torch.rand(len(data), generator=generator, dtype=torch.float64)  # who takes part: with q = 1 everybody
        batch = dpdm.with_draws(data[:], config, generator)
        optimizer.zero_grad()
        dpdm.multiplied_loss(model, batch).mean().backward()
        optimizer.step()
    assert max((a - b).abs().max().item() for a, b in zip(ours.state_dict().values(), model.state_dict().values())) < 1e-5


@pytest.mark.parametrize("preset", ["mnist", "celeba32", "celeba64", "cifar10", "imagenet32"])
def test_gradients_of_the_papers_networks_are_those_of_a_loop(preset):
    wide = dpdm.CONFIGS[preset].unet
    share = 2 if preset == "celeba64" else 1
    config = replace(dpdm.CONFIGS[preset], public=True, draws=2, unet=replace(
        wide, width=8, image_size=wide.image_size // share, attention=tuple(place // share for place in wide.attention)))
    model, generator = dpdm.build(config).double(), public_generator(0)
    for parameter in model.parameters(): nn.init.normal_(parameter, std=0.1, generator=generator)
    batch = {"x0": torch.rand(3, *config.shape, generator=generator, dtype=torch.float64) * 2 - 1, "class_label": torch.tensor([1, 4, 9])}
    batch = dpdm.with_draws(batch, config, generator)
    mapped = per_example_gradients(model, dpdm.multiplied_loss, batch, chunk=2)
    layered = gradients_by_layer(model, dpdm.multiplied_loss, batch)
    assert all(torch.allclose(layered[name], mapped[name], rtol=1e-6, atol=1e-12) for name in mapped)
    for index in range(3):
        loss = dpdm.multiplied_loss(model, {name: value[index:index + 1] for name, value in batch.items()})[0]
        loop = torch.autograd.grad(loss, list(model.parameters()))
        assert max((mapped[name][index] - g).abs().max().item() for (name, _), g in zip(model.named_parameters(), loop)) < 1e-6


def test_a_network_that_mixes_people_is_refused():
    for bad in (nn.BatchNorm2d(8), nn.Dropout(0.1)):
        with pytest.raises(ValueError, match="keep examples apart"): check_private(nn.Sequential(nn.Conv2d(1, 8, 3), bad))


def test_samples_need_no_data(monkeypatch):
    model = dpdm.build(PUBLIC)
    for name in ("load_data", "test_data", "digits", "glyphs"):
        monkeypatch.setattr(dpdm, name, lambda *_, **__: pytest.fail("the data were asked for"))
    assert dpdm.sample(model, 6, solver="churn", s_churn=5.0, steps=4).shape == (6, 1, 8, 8)


@pytest.mark.parametrize("solver", dpdm.SOLVERS)
def test_guidance_and_seeds(solver):
    model = dpdm.build(PUBLIC)
    for parameter in model.parameters(): nn.init.normal_(parameter, std=0.3, generator=public_generator(0))
    a, b, other, guided = (dpdm.sample(model, 5, solver=solver, steps=5, s_churn=5.0, **kind)
                           for kind in ({}, {}, {"seed": 1}, {"guidance": 2.0}))
    assert torch.equal(a, b) and not torch.equal(a, other) and not torch.equal(a, guided)


def test_private_runs_are_not_measured_unasked(tmp_path):
    model = dpdm.build(SHORT)
    assert dpdm.evaluate(model) == []
    assert dpdm.evaluate(dpdm.build(PUBLIC), 200, epochs=1)[0]["frechet"] > 0
    assert dpdm.evaluate(model, 200, epochs=1, data=digits("test"))[0]["frechet"] > 0


def test_the_audit_can_tell_right_from_wrong():
    assert audit("none", 100) <= 1 < audit("no noise", 100)


def test_a_checkpoint_of_another_paper_is_refused():
    with pytest.raises(CheckpointError, match="kind dpdm"): dpdm.load_pretrained("genie_digits")


TWO = """
import sys, torch
from diffusion_papers import dpdm
from diffusion_papers.__main__ import main
from diffusion_papers.topics.privacy import Mechanism, public_generator
from diffusion_papers.core.training import processes
ours = processes("cpu")
model = dpdm.build(dpdm.DIGITS.override(public=True)).double()
for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=0.1, generator=public_generator(0))
images = dpdm.digits("train")[:20]
batch = dpdm.with_draws(images | {"x0": images["x0"].double()}, dpdm.DIGITS, public_generator(1))
mine = {name: value[ours.process_index::ours.num_processes] for name, value in batch.items()}
plan = Mechanism(20, 0.5, float(sys.argv[2]), 1e-4, 1, randomness="public")
dpdm.private_gradients(model, dpdm.multiplied_loss, mine, 0.3, plan, public_generator(5), summed=dpdm.SUMS["perceptron"], ours=ours)
if ours.is_main_process: torch.save([p.grad for p in model.parameters()], sys.argv[1] + "/gradients.pt")
"""


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_two_processes_add_their_sums_and_noise_once(tmp_path, noise):
    for processes in (1, 2): launched(TWO, tmp_path / str(processes), processes, noise)
    one, two = (torch.load(tmp_path / str(processes) / "gradients.pt") for processes in (1, 2))
    assert max((a - b).abs().max().item() for a, b in zip(one, two)) < 1e-10


def test_two_processes_train_privately(tmp_path):
    program = """
import sys
from diffusion_papers import dpdm
from diffusion_papers.__main__ import main
import time
config = dpdm.DIGITS.override(**{"training.steps": 4, "draws": 2, "perceptron.width": 16})
opened = dpdm.open_run
def late(*words): time.sleep(ours.process_index); return opened(*words)
dpdm.open_run = late  # the second process reads the ledger when the first could have paid already
model = dpdm.train(config, sys.argv[1] + "/run", device="cpu")
assert model.guarantee["steps"] == 4
"""
    launched(program, tmp_path / "two", 2)
    ledger = json.loads((tmp_path / "two" / "run" / "ledger.json").read_text())
    assert ledger["taken"] == 4 and math.isclose(ledger["mechanism"]["q"], 0.5)


def test_the_command_line_knows_private_from_public(tmp_path, capsys):
    small = ["--device", "cpu", "--set", "training.steps=2", "draws=1", "perceptron.width=16", "evaluated=200"]
    assert main(["train", "dpdm", "--folder", str(tmp_path / "private"), *small]) == 0
    about = json.loads((tmp_path / "private" / "model.json").read_text())
    assert about["metrics"] == []
    guarantee = dpdm.load_model(tmp_path / "private" / "model.safetensors").guarantee
    assert "no privacy" not in guarantee["statement"]
    assert main(["evaluate", "dpdm", "--model", str(tmp_path / "private" / "model.safetensors")]) == 1
    assert "private" in capsys.readouterr().err
    assert main(["train", "dpdm", "--i-know-data-are-public", "--folder", str(tmp_path / "public"), *small]) == 0
    assert json.loads((tmp_path / "public" / "model.json").read_text())["metrics"][0]["frechet"] > 0
    free = ["train", "dpdm", "--i-know-data-are-public", "--folder", str(tmp_path / "free"), *small, "epsilon=0"]
    assert main(free) == 0
    assert main(["train", "dpdm", "--folder", str(tmp_path / "sly"), *small, "public=true"]) == 1
    assert "--i-know-data-are-public" in capsys.readouterr().err and not (tmp_path / "sly").exists()


def test_a_declared_number_of_people_hides_the_true_one():
    plans = [replace(SHORT, examples=1500, noise_multiplier=8.0).mechanism(people) for people in (1437, 1438, 1439)]
    assert plans[0] == plans[1] == plans[2] and plans[0].examples == 1500


def test_odd_pictures_are_found_before_the_ledger_opens(tmp_path):
    from diffusion_papers.core.data import TensorSet
    odd = digits("train")[:]
    odd["x0"][1000] = math.nan
    with pytest.raises(ValueError, match="x0"):
        dpdm.train(SHORT, tmp_path / "run", device="cpu", data=TensorSet(odd["x0"], class_label=odd["class_label"]))
    assert not (tmp_path / "run").exists()


def test_scenes_are_measured_by_the_judge():
    model = dpdm.build(replace(dpdm.CONFIGS["scenes"], public=True))
    row, = dpdm.evaluate(model, 100, steps=2, kinds=())
    assert row["frechet"] > 100 and 0 <= row["judged"] < 0.6  # it was not trained
