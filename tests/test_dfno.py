"""DFNO: the authors' names, and what the notebook's cells do not try: kills, processes, damaged files, every solver."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from extras import need

need("train", "data", "flax", "dev")

import msgpack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test_distributed import trained_by_command

from diffusion_papers import dfno
from diffusion_papers.workbench.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from diffusion_papers.core.diffusion import DiffusionConfig, build_denoiser
from diffusion_papers.core.generation import Generated, noise_for
from diffusion_papers.core.networks import MLPConfig, unet_config
from diffusion_papers.core.samplers import SAMPLERS, time_grid
from diffusion_papers.topics.flax_weights import flax_tensors, teacher_places, write_msgpack

SMALL = dfno.DfnoConfig(DiffusionConfig(mlp=MLPConfig(width=16, blocks=1, classes=10)), teacher="", trajectories=40, unlabelled=0.5,
                        solver_steps=8, kept=(0, 2, 4, 6, 8)).override(**{"training.steps": 12, "training.batch_size": 8,
                                                                         "training.checkpoint_every": 3})
FLAX = dfno.CONFIGS["cifar10"].override(diffusion=replace(dfno.CONFIGS["cifar10"].diffusion, unet=unet_config(
    "distillation", image_size=8, width=32, multipliers=(1,), blocks=1, attention=())))
MANY = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))

MANIFESTS = Path(__file__).parent / "manifests"


@pytest.mark.parametrize("preset, count", [("cifar10", 65_771_267), ("imagenet64", 329_225_091)])
def test_published_students_have_the_authors_tensors(preset, count):
    with torch.device("meta"): student = dfno.build(dfno.CONFIGS[preset]).student
    read = lambda name: json.loads((MANIFESTS / f"{name}.json").read_text())
    manifest, state, pairs = read(f"dfno-{preset}"), student.state_dict(), dfno.student_authors_keys(student)
    assert [theirs for _, theirs in pairs] == list(manifest)
    assert {theirs: list(state[ours].shape) for ours, theirs in pairs} == manifest
    assert sum(parameter.numel() for parameter in student.parameters()) == count
    # The released teacher's names, by the number that a module has in the student.
    number = {ours.removeprefix("denoiser.network."): theirs.split(".")[1] for ours, theirs in pairs}
    expected = {name: place for place, name in read(f"dfno-{preset}-module-index-to-teacher-name").items() if "time_conv" not in name}
    found = {theirs: next(place for name, place in number.items() if name.startswith(f"{ours}."))
             for ours, theirs in teacher_places(student.denoiser.network)}
    assert found == expected


def test_two_processes_share_trajectories_and_train_one_student(tmp_path):
    words = ["-m", "diffusion_papers", "train", "dfno", "--device", "cpu", "--folder", "FOLDER", "--set", "trajectories=70", "unlabelled=0.5",
             "solver_steps=8", "kept=(0,2,4,6,8)", "training.steps=3", "training.batch_size=16", "evaluated=20"]
    one, two = (trained_by_command(words, tmp_path / str(processes), processes) for processes in (1, 2))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    made = [Generated(tmp_path / str(processes) / "trajectories").__getitems__(range(70)) for processes in (1, 2)]
    assert all(torch.equal(made[0][name], made[1][name]) for name in ("states", "class_label"))


def test_an_interrupted_student_is_resumed_to_the_same_bits(tmp_path):
    class Stop(Exception): pass
    def stop(step, loss):
        if step == 7: raise Stop
    with pytest.raises(Stop): dfno.train(SMALL, tmp_path / "run", device="cpu", callback=stop)
    resumed, undisturbed = dfno.train(SMALL, tmp_path / "run", resume=True, device="cpu"), dfno.train(SMALL, device="cpu")
    for (name, a), b in zip(resumed.state_dict().items(), undisturbed.state_dict().values()): assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="modes was 2 and is 1"): dfno.train(SMALL.override(modes=1), tmp_path / "run", resume=True, device="cpu")


@pytest.mark.parametrize("solver", dfno.SOLVERS)
def test_every_solver_makes_trajectories(solver):
    denoiser, x_T, times = build_denoiser(SMALL.diffusion), noise_for(range(3), (1, 8, 8)), time_grid(8, 2.0)
    process = denoiser.process
    states = dfno.trajectory(denoiser, x_T, process, times, (0, 2, 5, 8), solver)
    sigmas = process.noise_to_signal(times)
    end = SAMPLERS[solver](denoiser, x_T / process.alpha_at(sigmas[0]).float(), sigmas) * process.alpha_at(sigmas[-1]).float()
    assert torch.equal(states[:, 0], x_T) and torch.allclose(states[:, -1], end, atol=1e-5)
    assert all((states[:, i] - states[:, i + 1]).abs().max() > 1e-3 for i in range(3))


def test_samples_depend_on_the_seed_alone():
    model = dfno.load_pretrained()
    x_T = noise_for(range(20), model.shape, 3)
    whole = dfno.sample(model, x_T=x_T)
    assert torch.allclose(whole, torch.cat([dfno.sample(model, x_T=part) for part in x_T.split(7)]), atol=1e-5)
    assert torch.equal(dfno.sample(model, 4, seed=5), dfno.sample(model, 4, seed=5))


def test_kernels_of_another_number_of_modes_are_refused(tmp_path):
    model, path = dfno.build(SMALL), tmp_path / "model.safetensors"
    dfno.save_model(path, model)
    tensors, about = load_checkpoint(path)
    save_checkpoint(path, tensors, {**about, "config": about["config"] | {"modes": 3}})
    with pytest.raises(CheckpointError, match="model.safetensors: wrong shapes: student.temporal"): dfno.load_model(path)


def test_a_teacher_of_another_form_is_refused():
    with pytest.raises(ValueError, match="teacher: genie_digits has network"): dfno.load_teacher(SMALL.override(teacher="genie_digits"))


@MANY
@given(data=st.data())
def test_spoiled_files_of_released_teachers_are_refused(tmp_path, data):
    path, tree = tmp_path / "teacher.msgpack", flax_tensors(build_denoiser(FLAX.diffusion).network)
    write_msgpack(path, {"ema_params": tree})
    if not (tmp_path / "right").exists():
        dfno.load_authors_checkpoint(path, FLAX)
        (tmp_path / "right").touch()
    name = data.draw(st.sampled_from(sorted(tree)), label="name")
    how = data.draw(st.sampled_from(["cut", "missing", "shape", "not finite", "number", "no average", "pickle"]), label="how")
    if how == "missing": del tree[name]
    elif how == "shape": tree[name] = torch.zeros(3, 3, 3, 3, 3)
    elif how == "not finite": tree[name] = torch.full_like(tree[name], float("nan"))
    elif how == "number": tree[name] = 7
    write_msgpack(path, {"ema_params": tree})
    content = path.read_bytes()
    if how == "cut": path.write_bytes(content[:data.draw(st.integers(0, len(content) - 1))])
    elif how == "no average": path.write_bytes(msgpack.packb({"params": {}}))
    elif how == "pickle": path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(CheckpointError, match="teacher.msgpack"): dfno.load_authors_checkpoint(path, FLAX)
