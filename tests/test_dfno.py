"""DFNO: the authors' names, and what the notebook's cells do not try: kills, processes, damaged files, every solver."""
import functools
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from extras import need

need("train", "data", "flax", "dev")

import msgpack
from torch import nn
from torch.nn import functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from test_distributed import trained_by_command
from test_genie import MEAN, Gaussian, gamma_at, pull, randomised, seeded, squared_frechet

from diffusion_papers import dfno
from diffusion_papers.workbench.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from diffusion_papers.core.diffusion import DiffusionConfig, build_denoiser
from diffusion_papers.core.data import digits
from diffusion_papers.core.denoisers import Denoiser
from diffusion_papers.core.generation import Generated, noise_for
from diffusion_papers.core.metrics import Moments
from diffusion_papers.core.networks import MLPConfig, ResidualMLP, UNet, unet_config
from diffusion_papers.core.processes import BoundedCosineVP, LinearVP
from diffusion_papers.core.samplers import SAMPLERS, time_grid
from diffusion_papers.core.training import step_seed
from diffusion_papers.evidence import dfno as evidence
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


# ---- every formula against numbers found otherwise: by hand, in closed form on a Gaussian, or written out in NumPy

X_T = torch.linspace(-2, 2, 128, dtype=torch.float64).reshape(2, 1, 8, 8)


def alpha_at(t): return np.exp(-0.05 * t - 4.975 * t**2)  # of the linear process


def times_of(steps, exponent=2.0, end=1e-3):
    "Their roots fall linearly."
    return np.linspace(1, end ** (1 / exponent), steps + 1) ** exponent


def ddim(x_T, times, seen=lambda x0: x0, mean=MEAN):
    "All states of DDIM on the Gaussian, as its authors write it: alpha x0 + sigma eps."
    x, states = x_T, [x_T]
    for now, then in pairwise(times):
        a, b = alpha_at(now), alpha_at(then)
        x0 = seen(mean + pull(gamma_at(now)) * (x / a - mean))
        x = b * x0 + math.sqrt(1 - b**2) * (x - a * x0) / math.sqrt(1 - a**2)
        states.append(x)
    return np.stack(states, axis=1)


@pytest.mark.parametrize("end", [0.0, 1e-3])
@pytest.mark.parametrize("kept", [(0, 2, 3, 6), (1, 5), (6,)])
def test_the_states_that_are_kept_are_those_of_ddim(kept, end):
    "With time 0 as the last, the last state is the estimate of x_0."
    times = times_of(6, 2.0, end)
    found = dfno.trajectory(Gaussian(), X_T, LinearVP(), torch.from_numpy(times), kept)
    np.testing.assert_allclose(found.numpy(), ddim(X_T.numpy(), times)[:, list(kept)], rtol=1e-7, atol=1e-9)


def test_a_trajectory_of_the_bounded_process_ends_in_the_estimate():
    "At its time 0 a little noise is left; the step to it goes all the way."
    point, times = lambda x, sigma: torch.full_like(x, 0.25), torch.tensor([1.0, 0.5, 0.0]).double()
    found = dfno.trajectory(point, X_T.float(), BoundedCosineVP(), times, (0, 1, 2))
    assert torch.equal(found[:, 0], X_T.float()) and found[:, 2].unique().tolist() == [0.25]
    torch.testing.assert_close(found[:, 1], (0.25 + X_T.float()) / math.sqrt(2), rtol=1e-5, atol=1e-5)


def convolved(u, weight):
    "By the fast Fourier transform along time (B, T, C)."
    spectrum = torch.fft.rfft(u, dim=1)
    modes = torch.zeros(len(u), spectrum.shape[1], weight.shape[1], dtype=spectrum.dtype)
    modes[:, :weight.shape[2]] = torch.einsum("bmi,iom->bmo", spectrum[:, :weight.shape[2]], torch.view_as_complex(weight))
    return torch.fft.irfft(modes, n=u.shape[1], dim=1)


@pytest.mark.parametrize("modes", [1, 2, 3])
def test_a_temporal_block_adds_what_a_leaky_rectifier_leaves_of_a_convolution(modes):
    block = dfno.TemporalBlock(6, modes).double().requires_grad_(False)
    nn.init.normal_(block.convolution.weight, generator=seeded())
    u = torch.randn(2, 5, 6, 3, generator=seeded(1), dtype=torch.float64)
    change = torch.stack([convolved(u[..., pixel], block.convolution.weight) for pixel in range(3)], dim=-1)
    torch.testing.assert_close(block(u), u + torch.where(change > 0, change, change / 100))


@pytest.mark.parametrize("setting, steps", [((512, 17, (0, 4, 8, 12, 16)), (0, 224, 384, 480, 512)), ((16, 3, (0, 1, 2)), (0, 12, 16)),
                                            ((9, 4, (0, 1, 2, 3)), (0, 5, 8, 9)), ((18, 4, (1, 3)), (10, 18)), ((1, 2, (0, 1)), (0, 1))])
def test_a_quadratic_grid_lies_on_these_steps(setting, steps): assert dfno.quadratic_steps(*setting) == steps


def test_a_quadratic_grid_between_the_steps_is_refused():
    for steps in (8, 10):
        with pytest.raises(ValueError, match="solver_steps: a quadratic grid of 4 points needs a multiple of 9 steps"):
            dfno.quadratic_steps(steps, 4, (0,))
    with pytest.raises(ValueError, match="stored"): dfno.quadratic_steps(8, 1, (0,))


@pytest.mark.parametrize("setting, times", [((4, 1.0, 0.0), (1, 0.75, 0.5, 0.25, 0)), ((4, 2.0, 0.0), (1, 0.5625, 0.25, 0.0625, 0)),
                                            ((2, 1.0, 0.01), (1, 0.505, 0.01)), ((2, 2.0, 0.01), (1, 0.3025, 0.01)),
                                            ((3, 3.0, 0.0), (1, 8 / 27, 1 / 27, 0))])
def test_the_solver_stops_at_these_times(setting, times):
    found = dfno.solver_times(*setting)
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(times, abs=1e-12)


def test_a_configuration_knows_the_times_of_its_states():
    assert dfno.DIGITS.times.tolist() == pytest.approx(times_of(32)[[8, 16, 24, 32]].tolist())
    assert dfno.CONFIGS["cifar10"].times.tolist() == [0.5625, 0.25, 0.0625, 0.0]
    assert dfno.CONFIGS["imagenet64"].times.tolist() == [0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("weighting, power", [("none", 0), ("sqrt_snr", 1), ("snr", 2)])
def test_states_weigh_by_the_signal_to_noise_ratio_between_its_bounds(weighting, power):
    times = np.array([1.0, 0.5, 0.2, 0.1, 0.01, 0.001])
    found = dfno.state_weights(LinearVP(), torch.from_numpy(times), weighting)
    np.testing.assert_allclose(found, (gamma_at(times) ** -power).clip(1, 1e4), rtol=1e-9)
    assert dfno.state_weights(BoundedCosineVP(), torch.tensor([1.0, 0.0]), weighting).tolist() == ([1, 1e4] if power else [1, 1])


def test_the_papers_weights_are_the_default():
    assert dfno.state_weights(BoundedCosineVP(), torch.tensor([0.25]).double()).item() == pytest.approx(math.tan(3 * math.pi / 8), rel=1e-3)


def test_images_differ_by_these_distances():
    a = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0]).reshape(2, 1, 2, 2)
    b = torch.tensor([0.0, 0.0, 4.0, 2.0, 0.0, 2.0, 0.0, 0.0]).reshape(2, 1, 2, 2)
    assert dfno.DISTANCES["l1"](a, b).tolist() == [2.0, 0.5] and dfno.DISTANCES["l2"](a, b).tolist() == [5.5, 1.0]


def test_the_perceptual_distance_compares_directions_of_features():
    "By hand: (3, 4) and (0, 5) are 0.4 apart, over two places 0.2; a second layer adds 2."
    layers = {0: (torch.tensor([[3.0, 1.0], [4.0, 1.0]]), torch.tensor([[1.0], [0.0]])),
              1: (torch.tensor([[0.0, 7.0], [5.0, 7.0]]), torch.tensor([[0.0], [9.0]]))}
    extractor = lambda images: [torch.stack([layers[int(number)][layer][:, :, None] for number in images]) for layer in range(2)]
    distance = dfno.perceptual(extractor)(torch.tensor([0, 0, 1]), torch.tensor([1, 0, 0]))
    assert distance.tolist() == pytest.approx([2.2, 0.0, 2.2], abs=1e-6)


@pytest.mark.parametrize("loss, wanted", [("l1", [(2 * 3 + 5 * 1) / 2, (2 * 0 + 5 * 4) / 2]), ("l2", [(2 * 9 + 5 * 1) / 2, (2 * 0 + 5 * 16) / 2])])
def test_a_trajectorys_loss_is_the_mean_of_its_weighted_states(loss, wanted):
    target = torch.zeros(2, 2, 1, 2, 2)
    predicted = target + torch.tensor([[3.0, -1.0], [0.0, 4.0]]).reshape(2, 2, 1, 1, 1)
    assert dfno.weighted_loss(predicted, target, torch.tensor([2.0, 5.0]), dfno.DISTANCES[loss]).tolist() == wanted
    for other in (target[:, :1], target[:1]):
        with pytest.raises(ValueError, match="predicted: expected 2 states"): dfno.weighted_loss(other, target, torch.ones(2))
    with pytest.raises(ValueError, match="predicted: expected 3 states"): dfno.weighted_loss(target, target, torch.ones(3))


def test_the_students_loss_is_of_the_states_after_the_noise():
    asked, times = [], torch.tensor([0.5, 0.1])
    def student(x_T, times, **cond):
        asked.append((x_T, times, cond))
        return torch.stack([x_T, 2 * x_T], dim=1)
    states = torch.tensor([[1.0, 3.0, 5.0], [2.0, 2.0, 1.0]]).reshape(2, 3, 1, 1, 1)
    loss = dfno.student_loss(student, {"states": states, "class_label": 5}, None, times, torch.tensor([1.0, 10.0]), dfno.DISTANCES["l2"])
    assert loss.tolist() == [(4 + 90) / 2, (0 + 90) / 2]
    assert torch.equal(asked[0][0], states[:, 0]) and asked[0][1] is times and asked[0][2] == {"class_label": 5}


# ---- the student


def asked_one_by_one(student, x_T, gammas, labels):
    "Each sample and each time alone, apart from the convolutions between the blocks."
    network, answers = student.denoiser.network, []
    for x, label in zip(x_T, labels):
        rows = [network.embed(torch.tensor([math.log(gamma) / 4], dtype=x_T.dtype), label[None]) for gamma in gammas]
        features = [network.input(x.flatten())[None]] * len(gammas)
        for block, temporal in zip(network.blocks, student.temporal):
            features = torch.stack([block(feature, embedding) for feature, embedding in zip(features, rows)], dim=1)
            change = convolved(features, temporal.convolution.weight)
            features = (features + torch.where(change > 0, change, change / 100)).unbind(1)
        answers.append(torch.stack([network.output(feature).reshape(x.shape) for feature in features]))
    return torch.stack(answers)


@pytest.mark.parametrize("modes, times", [(2, (1.0, 0.5, 0.2, 0.01)), (1, (0.3,)), (3, (0.9, 0.4, 0.3, 0.2, 0.1))])
def test_a_student_mixes_the_times_of_each_sample_alone(modes, times):
    network = ResidualMLP(MLPConfig(shape=(1, 2, 3), width=8, blocks=2, classes=3))
    student = randomised(dfno.Student(Denoiser(network, LinearVP(), "v", "log_sigma"), modes))
    x_T, labels = torch.randn(3, 1, 2, 3, generator=seeded(), dtype=torch.float64), torch.tensor([0, 3, 1])
    found = student(x_T, torch.tensor(times), class_label=labels)
    torch.testing.assert_close(found, asked_one_by_one(student, x_T, gamma_at(np.float32(times).astype(float)), labels))


UNET = unet_config("distillation", image_size=8, width=32, multipliers=(1, 2), blocks=2, attention=(4,), classes=3)


def test_every_stage_of_a_u_net_is_followed_by_a_temporal_block():
    "Blocks with their attention on the way down, the first half of the middle, and the way up."
    student, seen = randomised(dfno.Student(Denoiser(UNet(UNET), BoundedCosineVP(), "x0", "angle"), 2), 0.05).float(), []
    network = student.denoiser.network
    ends = [*network.down[0].blocks, *network.down[1].attentions, network.middle[1], *network.up[0].attentions, *network.up[1].blocks]
    assert dfno._stage_ends(network) == ends and len(student.temporal) == len(ends) == 11
    widths = [block.convolution.weight.shape[0] for block in student.temporal]
    assert widths == [32, 32, 64, 64, 64, 64, 64, 64, 32, 32, 32] == dfno._stage_channels(network)
    for module in ends: module.register_forward_hook(lambda module, args, output: seen.append(output))
    for number, block in enumerate(student.temporal):
        block.register_forward_hook(lambda module, args, output, number=number: torch.testing.assert_close(args[0].flatten(0, 1), seen[number]))
    student(torch.randn(2, 3, 8, 8, generator=seeded()), torch.tensor([0.9, 0.5, 0.0]), class_label=torch.tensor([1, 2]))
    assert len(seen) == 11


def test_without_temporal_blocks_a_student_answers_at_every_time_alone():
    student = randomised(dfno.Student(Denoiser(UNet(UNET), BoundedCosineVP(), "x0", "angle"), 0), 0.05).float()
    x_T, times, labels = torch.randn(2, 3, 8, 8, generator=seeded()), torch.tensor([0.9, 0.5, 0.0]), torch.tensor([1, 2])
    found, first = student(x_T, times, class_label=labels), 2 / math.pi * math.atan(math.exp(-10))
    for sample in range(2):
        for number, time in enumerate(times):
            label = torch.full((1,), first + (1 - 2 * first) * time.item())  # the share of a quarter turn
            alone = student.denoiser.network(x_T[sample:sample + 1], label, class_label=labels[sample:sample + 1])[0]
            torch.testing.assert_close(found[sample, number], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("times", [(0.5, 0.5), (0.2, 0.5), (1.1, 0.5), (0.5, -0.1), ()])
def test_a_student_refuses_times_that_do_not_fall_within_its_process(times):
    student = dfno.Student(Denoiser(UNet(UNET), LinearVP(), "x0", "time"), 2)
    with pytest.raises(ValueError, match="times: expected strictly decreasing times in"): student.labels(torch.tensor(times))
    torch.testing.assert_close(student.labels(torch.tensor([1.0, 0.25, 0.0])), torch.tensor([1.0, 0.25, 0.0]).double())


def test_a_student_starts_as_its_teacher():
    teacher, student = (dfno.build(SMALL.override(**{"diffusion.seed": seed})).student for seed in (0, 1))
    before = [block.convolution.weight.clone() for block in student.temporal]
    randomised(teacher.denoiser.network).float()
    assert dfno.start_from(student, teacher.denoiser) is student
    assert all(torch.equal(a, b) for a, b in zip(student.denoiser.network.state_dict().values(), teacher.denoiser.network.state_dict().values()))
    assert all(torch.equal(a, block.convolution.weight) for a, block in zip(before, student.temporal))


TWICE = dfno.CONFIGS["imagenet64"].override(diffusion=replace(dfno.CONFIGS["imagenet64"].diffusion, unet=UNET))


def test_a_student_of_a_teacher_with_two_answers_starts_with_the_first():
    teacher = dfno.build_teacher(TWICE)
    randomised(teacher, 0.05).float()
    assert teacher.network.network.output.out_channels == 6 and (teacher.label, teacher.prediction) == ("angle", "x0") and not teacher.training
    student = dfno.start_from(dfno.build(TWICE).student, teacher)
    x, label, cond = torch.randn(2, 3, 8, 8, generator=seeded()), torch.tensor([0.3, 0.8]), {"class_label": torch.tensor([0, 2])}
    torch.testing.assert_close(student.denoiser.network(x, label, **cond), teacher.network.network(x, label, **cond)[:, :3])


def test_two_answers_are_joined_by_where_each_is_good():
    "At sigma / alpha = 3 / 4: 0.36 of the first answer, and alpha (x_t - 0.6 of the second)."
    class Fixed(nn.Module):
        shape = (1, 2, 2)
        def forward(self, x, label, **cond):
            self.told = label, cond
            return torch.cat([torch.full_like(x, 5.0), torch.full_like(x, 7.0)], dim=1)
    network = Fixed()
    x = torch.linspace(-1, 1, 4, dtype=torch.float64).reshape(1, 1, 2, 2)
    found = Denoiser(dfno.TwoAnswers(network), BoundedCosineVP(), "x0", "angle")(x, torch.tensor([0.75]).double(), class_label=4)
    torch.testing.assert_close(found, 0.36 * 5 + 0.8 * (0.8 * x - 0.6 * 7))
    assert network.told[0].item() == pytest.approx(2 / math.pi * math.atan(0.75)) and network.told[1] == {"class_label": 4}


def test_initial_kernels_depend_on_the_students_own_seed_alone():
    torch.manual_seed(1)
    before, first = torch.random.get_rng_state(), dfno.build(SMALL)
    assert torch.equal(before, torch.random.get_rng_state()) and not first.training
    torch.manual_seed(2)
    for changes, same_network, same_kernels in (({}, True, True), ({"seed": 1}, True, False), ({"diffusion.seed": 1}, False, True)):
        other = dfno.build(SMALL.override(**changes)).student
        assert torch.equal(first.student.denoiser.network.input.weight, other.denoiser.network.input.weight) == same_network
        assert torch.equal(first.student.temporal[0].convolution.weight, other.temporal[0].convolution.weight) == same_kernels


@pytest.mark.parametrize("changes, message", [
    ({"kept": (1, 8)}, "kept"), ({"kept": (0, 4, 2)}, "kept"), ({"kept": (0, 4, 4)}, "kept"), ({"kept": (0, 9)}, "kept"), ({"kept": (0,)}, "kept"),
    ({"modes": 4}, "modes: 4 states have 3 temporal modes, got 4"), ({"kept": (0, 8), "modes": 2}, "modes: 1 states have 1"), ({"end": 0.0}, "end"),
    ({"kept": (0, 2, 4, 8), "modes": 3}, "modes: 3 states have 2"), ({"unlabelled": 1.1}, "unlabelled"),
    ({"solver": "ancestral"}, "solver"), ({"loss": "l3"}, "loss")])
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message): SMALL.override(**changes)
    assert SMALL.override(modes=3).modes == 3 and SMALL.override(kept=(0, 8), modes=1).kept == (0, 8)


# ---- trajectories and training


def test_a_share_of_the_trajectories_is_made_without_a_class():
    config = SMALL.override(unlabelled=0.25)
    labels = dfno._trajectory_conditions(config, range(0, 20_000))["class_label"]
    counts = torch.bincount(labels, minlength=11) / 20_000
    assert counts[10].item() == pytest.approx(0.25, abs=0.01) and (counts[:10] - 0.075).abs().max() < 0.01 and len(counts) == 11
    assert not torch.equal(labels[:500], dfno._trajectory_conditions(config, range(500, 1000))["class_label"])
    assert not torch.equal(labels, dfno._trajectory_conditions(config.override(seed=1), range(0, 20_000))["class_label"])
    assert dfno._trajectory_conditions(config.override(unlabelled=0.0), range(50))["class_label"].max() < 10
    assert dfno._trajectory_conditions(config.override(unlabelled=1.0), range(5)) == {} == dfno._trajectory_conditions(
        config.override(**{"diffusion.mlp.classes": 0, "unlabelled": 0.5}), range(5))


@pytest.mark.parametrize("clip", [False, True])
def test_trajectories_start_from_the_noise_of_their_numbers(tmp_path, clip):
    "Estimates are clipped before the noise is computed from them."
    config = SMALL.override(unlabelled=1.0, trajectories=5, clip=clip, seed=3, exponent=1.0)
    found = dfno.make_trajectories(config, Gaussian(), tmp_path, size=3, device="cpu").__getitems__(range(5))
    noise = torch.cat([torch.randn(count, 1, 8, 8, generator=seeded(step_seed(3, first))) for first, count in ((0, 3), (3, 2))]).double().numpy()
    wanted = ddim(noise, times_of(8, 1.0), (lambda x0: x0.clip(-1, 1)) if clip else lambda x0: x0)[:, ::2]
    assert found.keys() == {"states"}
    np.testing.assert_allclose(found["states"], wanted, atol=5e-5)


def test_trajectories_say_what_they_were_told(tmp_path):
    config = SMALL.override(trajectories=40)
    found = dfno.make_trajectories(config, Gaussian(), tmp_path, size=25, device="cpu").__getitems__(range(40))
    noise = torch.cat([noise_for(piece, (1, 8, 8), config.seed) for piece in (range(25), range(25, 40))]).double().numpy()
    mean = MEAN + 0.1 * found["class_label"].double().reshape(-1, 1, 1, 1).numpy()
    np.testing.assert_allclose(found["states"], ddim(noise, times_of(8), mean=mean)[:, ::2], atol=5e-5)


def test_clipped_estimates_are_told_what_the_others_are():
    asked = lambda x, sigma, **cond: 3 * x + cond["shift"]
    x = torch.tensor([-1.0, 0.1, 1.0])
    assert dfno.clipped(asked)(x, None, shift=0.0).tolist() == pytest.approx([-1.0, 0.3, 1.0]) and dfno.clipped(asked, False) is asked


@pytest.mark.parametrize("weighting, loss", [("sqrt_snr", "l2"), ("snr", "l1"), ("none", "perceptual")])
@pytest.mark.parametrize("pretrained", [True, False])
def test_training_weighs_the_states_by_weights_of_mean_one(monkeypatch, weighting, loss, pretrained):
    asked, config = [], SMALL.override(weighting=weighting, loss=loss, pretrained=pretrained, trajectories=3, seed=7, unlabelled=1.0)
    monkeypatch.setattr(dfno, "fit", lambda *args, **options: asked.append((args, options)) or args[0])
    teacher = build_denoiser(config.diffusion.__class__(**{**vars(config.diffusion), "seed": 1}))
    feature_maps = lambda images: [torch.cat([images, torch.ones_like(images)], dim=1)]
    model = dfno.train(config, teacher=teacher, features=feature_maps, device="cpu", workers=2)
    (student, objective, examples, training), options = asked[0]
    starts_as_teacher = torch.equal(student.denoiser.network.input.weight, teacher.network.input.weight)
    assert model.student is student and starts_as_teacher == pretrained and training.seed == 7 and training.steps == 12 and options["workers"] == 2
    power, gammas = {"sqrt_snr": 1, "snr": 2, "none": 0}[weighting], gamma_at(times_of(8)[[2, 4, 6, 8]])
    weights = (gammas**-power).clip(1, 1e4)
    weights /= weights.mean()
    np.testing.assert_allclose(objective.keywords["times"], times_of(8)[[2, 4, 6, 8]])
    states = torch.randn(2, 5, 1, 8, 8, generator=seeded())
    randomised(student, 0.1).float()
    predicted, target = student(states[:, 0], config.times).double(), states[:, 1:].double()
    unit = lambda images: torch.stack([images, torch.ones_like(images)]) / torch.sqrt(1 + images**2)
    apart = {"l1": (predicted - target).abs(), "l2": (predicted - target) ** 2, "perceptual": ((unit(predicted) - unit(target)) ** 2).sum(0)}[loss]
    wanted = (apart.flatten(2).mean(2) * torch.from_numpy(weights)).mean(1)
    torch.testing.assert_close(objective(student, {"states": states}, None).double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset, training, more", [
    ("cifar10", (400_001, 256, 2e-4, 10_000, "halving", 100_000), (1_000_000, 512, "perceptual", False)),
    ("imagenet64", (120_000, 2048, 2e-4, 10_000, "halving", 200_000), (2_300_000, 16, "l1", True))])
def test_published_students_are_trained_as_the_paper_says(preset, training, more):
    config = dfno.CONFIGS[preset]
    asked = config.training
    assert training == (asked.steps, asked.batch_size, asked.lr, asked.warmup, asked.decay, asked.decay_steps) and asked.ema == 0.9999
    assert more == (config.trajectories, config.solver_steps, config.loss, config.two_answers) and config.modes == 2 and len(config.kept) == 5
    assert (config.clip, config.exponent, config.end, config.unlabelled) == (True, 1.0, 0.0, 0.0)
    assert (config.weighting, config.solver) == ("sqrt_snr", "euler")
    diffusion = config.diffusion
    assert (diffusion.process, diffusion.prediction, diffusion.label) == ("bounded_cosine", "x0", "angle")


# ---- sampling and measuring


class Doubling(nn.Module):
    "A student whose state at time t is (2 - t) x_T, more by a tenth of the class."

    def __init__(self):
        super().__init__()
        self.denoiser, self.one = build_denoiser(SMALL.diffusion), nn.Parameter(torch.ones(()))

    def forward(self, x_T, times, class_label=None):
        told = 0 if class_label is None else 0.1 * class_label.reshape(-1, 1, 1, 1, 1)
        return (2 - times.to(x_T)).reshape(-1, 1, 1, 1) * x_T[:, None] + told


def doubling(**changes): return dfno.Dfno(Doubling(), SMALL.override(**{"unlabelled": 1.0, **changes})).eval()


def test_a_sample_is_the_last_state():
    model, x_T = doubling(), torch.randn(3, 1, 8, 8, generator=seeded(4))
    torch.testing.assert_close(dfno.sample(model, 3, seed=4), (2 - 1e-3) * x_T)
    torch.testing.assert_close(dfno.sample(model, x_T=x_T, class_label=5), (2 - 1e-3) * x_T + 0.5)
    torch.testing.assert_close(dfno.sample(model, x_T=x_T, times=torch.tensor([0.9, 0.3])), 1.7 * x_T)
    whole = dfno.sample(model, x_T=x_T, whole=True)
    torch.testing.assert_close(whole, torch.stack([(2 - t) * x_T for t in times_of(8)[2::2].tolist()], dim=1))
    assert len(dfno.sample(model)) == 16


@pytest.mark.parametrize("clip", [False, True])
def test_a_teachers_samples_are_the_end_of_its_solver_or_of_ddim(clip):
    model, seen = doubling(clip=clip, solver="heun", exponent=1.0), (lambda x0: x0.clip(-1, 1)) if clip else lambda x0: x0
    found = dfno.teacher_samples(model, Gaussian(), X_T, 3)
    np.testing.assert_allclose(found, ddim(X_T.numpy(), times_of(3, 1.0), seen)[:, -1], rtol=1e-6, atol=1e-8)
    gammas = gamma_at(times_of(8, 1.0))
    x, slope = X_T.numpy() * math.sqrt(1 + gammas[0] ** 2), lambda x, gamma: (x - seen(MEAN + pull(gamma) * (x - MEAN))) / gamma
    for now, then in pairwise(gammas):
        first = slope(x, now)
        x = x + (then - now) / 2 * (first + slope(x + (then - now) * first, then))
    np.testing.assert_allclose(dfno.teacher_samples(model, Gaussian(), X_T), x / math.sqrt(1 + gammas[-1] ** 2), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("unlabelled", [1.0, 0.5])
def test_rows_hold_the_distance_to_the_teachers_end_and_to_the_digits(unlabelled):
    rows = dfno.evaluate(doubling(unlabelled=unlabelled), 80, teacher=Gaussian(), calls=(1, 3), seed=6)
    noise = torch.randn(80, 1, 8, 8, generator=seeded(step_seed(6, 0))).double().numpy()
    told = (unlabelled < 1) * (np.arange(80) % 10).reshape(-1, 1, 1, 1)
    ends = {steps: ddim(noise, times_of(steps), mean=MEAN + 0.1 * told)[:, -1] for steps in (1, 3, 8)}
    images = {"student": (2 - 1e-3) * noise + 0.1 * told, "DDIM": ends[1], "DDIM, 3": ends[3], "teacher": ends[8]}
    assert [(row["sampler"], row["calls"]) for row in rows] == [("student", 1), ("DDIM", 1), ("DDIM", 3), ("teacher", 8)]
    for row, drawn in zip(rows, images.values()):
        assert row["error"] == pytest.approx(math.sqrt(((drawn - ends[8]) ** 2).mean()), rel=1e-3)
        assert row["frechet"] == pytest.approx(squared_frechet(drawn.reshape(80, 64).clip(-1, 1), digits()[:]["x0"].flatten(1)), rel=1e-3)
    assert rows[-1]["error"] == 0 and rows[-1]["seconds"] is None and all(row["seconds"] > 0 for row in rows[:-1])


def test_as_many_are_drawn_as_the_configuration_says():
    teacher = Gaussian()
    dfno.evaluate(doubling(evaluated=7), teacher=teacher)
    assert {len(told["sigma"]) for told in teacher.told} == {7} and len(teacher.told) == 8 + 1 + 2 + 4 + 8


def test_a_student_is_measured_with_noise_of_another_seed_than_its_trainings():
    asked = []
    model = doubling()
    model.student.register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    dfno.evaluate(model, 3, teacher=Gaussian(), calls=())
    assert torch.equal(asked[0], torch.randn(3, 1, 8, 8, generator=seeded(step_seed(1000, 0)))) and model.config.seed == 0


def test_only_small_pictures_of_the_users_own_are_asked_for(tmp_path):
    "Larger ones are not compared, and those that ship are there."
    small, large = dfno.CONFIGS["cifar10"], dfno.CONFIGS["imagenet64"]
    assert dfno.unmeasured(large) == dfno.unmeasured(SMALL) == "" and "nobody said where" in dfno.unmeasured(small)
    with pytest.raises((ValueError, FileNotFoundError), match="folder"):
        dfno.unmeasured(small.override(**{"diffusion.data_path": str(tmp_path / "nothing")}))


def test_the_fastest_of_the_repeats_is_reported(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(dfno, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert dfno.evaluate(doubling(), 3, teacher=Gaussian(), calls=(), repeats=3)[0]["seconds"] == 2.0


def test_many_samples_are_clipped_bytes_of_all_classes(tmp_path):
    made = dfno.generate_data(doubling(), tmp_path, count=25, size=10, seed=3, device="cpu").__getitems__(range(25))
    noise = torch.cat([torch.randn(count, 1, 8, 8, generator=seeded(step_seed(3, first))) for first, count in ((0, 10), (10, 10), (20, 5))])
    images = ((2 - 1e-3) * noise + 0.1 * (torch.arange(25) % 10).reshape(-1, 1, 1, 1)).clamp(-1, 1)
    assert made["class_label"].tolist() == [number % 10 for number in range(25)]
    assert (made["images"].int() - ((images / 2 + 0.5) * 255).to(torch.uint8).int()).abs().max() <= 1  # a value may round across a level


# ---- the experiments


def test_what_a_student_computes_is_counted_in_calls():
    "Each matrix product counts twice the product of its sizes; four times, and two modes in three blocks of 160 features."
    network = 2 * (64 * 160 + 64 * 160 + 3 * 3 * 160 * 160 + 160 * 64)
    temporal = 3 * 2 * (4 * 4 * 160 + 2 * 320 * 320 + 4 * 4 * 160)
    assert evidence.arithmetic(dfno.build(dfno.DIGITS)) == pytest.approx(4 + temporal / network, rel=1e-9)
    assert evidence.arithmetic(dfno.build(dfno.DIGITS.override(modes=0))) == pytest.approx(4)


@pytest.mark.parametrize("points", [2, 4, 8])
def test_the_error_along_time_is_that_of_each_state(monkeypatch, points):
    monkeypatch.setattr(evidence, "load_teacher", lambda config, device: Gaussian())
    found = evidence.errors_along_time(doubling(), points, count=6, seed=9)
    noise, places = torch.randn(6, 1, 8, 8, generator=seeded(step_seed(9, 0))).double().numpy(), list(range(8 // points, 9, 8 // points))
    states, times = ddim(noise, times_of(8)), times_of(8)
    assert found == pytest.approx([math.sqrt((((2 - times[place]) * noise - states[:, place]) ** 2).mean()) for place in places], rel=1e-4)


@pytest.mark.parametrize("two, four, holds", [(0.69, 0.99, True), (0.71, 0.99, False), (0.69, 1.01, False)])
def test_a_demonstration_compares_one_call_with_the_best_solver(monkeypatch, two, four, holds):
    rows = [{"sampler": "student", "calls": 1, "error": 0.3, "frechet": 2.0, "seconds": 0.5}]
    rows += [{"sampler": "DDIM", "calls": calls, "error": 1 / calls, "frechet": 2.0, "seconds": 0.25} for calls in (1, 2, 4)]
    rows += [{"sampler": "teacher", "calls": 32, "error": 0.0, "frechet": 1.0, "seconds": None}]
    for name, value in {"load_pretrained": doubling, "load_teacher": lambda config: Gaussian(), "evaluate": lambda model, teacher: rows,
                        "solver_samples": lambda model, teacher, x_T, rival: evidence.teacher_samples(model, teacher, x_T) - 0.3 / ratios[rival["calls"]]}.items():
        monkeypatch.setattr(evidence, name, value)
    ratios = {1: 0.2, 2: two, 4: four, 8: 6.0}
    shown = evidence.demonstrate()
    assert shown.holds == holds and f"{two:.2g} with 2 (dpm_solver_pp), {four:.2g} with 4 (dpm_solver_pp), 6 with 8 (s_pndm)" in shown.verdict
    assert [row["milliseconds"] for row in shown.table] == [500.0, 250.0, 250.0, 250.0]
    assert shown.curves["lines"]["DDIM"] == ((1, 2, 4), (1.0, 0.5, 0.25)) and shown.curves["lines"]["student"] == ((1,), (0.3,))
    assert shown.curves["lines"]["best solver"][1] == pytest.approx([0.3 / ratio for ratio in ratios.values()], rel=1e-3)
    noise = noise_for(range(16), (1, 8, 8), 5).double().numpy()
    np.testing.assert_allclose(shown.images["DDIM, 2 calls"], ddim(noise, times_of(2))[:, -1], atol=1e-4)
    np.testing.assert_allclose(shown.images["teacher, 32 calls"], ddim(noise, times_of(8))[:, -1], atol=1e-4)
    np.testing.assert_allclose(shown.images["student, 1 call"], (2 - 1e-3) * noise, atol=1e-4)


@pytest.mark.parametrize("solver, calls, asked", [("ddim", 2, 2), ("heun", 8, 8), ("s_pndm", 8, 8), ("adams_bashforth", 4, 4), ("dpm_solver_pp", 4, 4)])
def test_a_rival_asks_the_teacher_as_often_as_it_may(solver, calls, asked):
    noise, count = noise_for(range(6), (1, 8, 8), 5), []
    class Counting(Gaussian):
        def forward(self, x, sigma, **cond): count.append(1); return super().forward(x, sigma, **cond)
    found = evidence.solver_samples(doubling(), Counting(), noise, {"sampler": solver, "calls": calls, "exponent": 2.0})
    assert len(count) == asked
    if solver == "ddim": np.testing.assert_allclose(found, ddim(noise.double().numpy(), times_of(2))[:, -1], atol=1e-4)


def test_three_seeds_of_everything_are_stored():
    counts = {study: sum(setting["study"] == study for setting in evidence.EXPERIMENTS) for study in evidence.STUDIES}
    assert counts == {"claim": 3, "ablation": 45, "scenes": 3, "rivals": 6} and {setting["seed"] for setting in evidence.EXPERIMENTS} == {0, 1, 2}


def test_studies_train_and_measure_what_they_say(monkeypatch):
    "Each seed has its own noise, which no student has seen."
    trained, measured = [], []
    monkeypatch.setattr(evidence, "train", lambda config, device: trained.append(config) or config)
    monkeypatch.setattr(evidence, "evaluate", lambda model, *args, **options: measured.append((args, options)))
    monkeypatch.setattr(evidence, "errors_along_time", lambda model, points: points)
    monkeypatch.setattr(evidence, "arithmetic", lambda model: 5)
    assert evidence.study_claim({"seed": 2})["along"] == {points: points for points in (4, 8, 16, 32)}
    assert trained[0] == dfno.DIGITS.override(seed=2) and measured[0] == ((), {"repeats": 3, "seed": 1002})
    for variant in evidence.ABLATIONS: evidence.study_ablation({"seed": 1, "variant": variant})
    configs = dict(zip(evidence.ABLATIONS, trained[1:]))
    assert configs["as in the paper"] == dfno.DIGITS.override(seed=1) and all(options == {"calls": ()} for _, options in measured[1:])
    assert (configs["no temporal blocks"].modes, configs["1 mode"].modes, configs["3 modes"].modes) == (0, 1, 3)
    assert configs["uniform grid"].exponent == 1.0
    assert (configs["end point alone"].kept, configs["end point alone"].modes, configs["2 states"].kept) == ((0, 32), 0, (0, 16, 32))
    assert configs["8 states"].kept == (0, 4, 8, 12, 16, 20, 24, 28, 32)
    assert (configs["no weights"].weighting, configs["weights SNR"].weighting) == ("none", "snr")
    assert (configs["absolute error"].loss, configs["random start"].pretrained, configs["trajectories by Heun"].solver) == ("l1", False, "heun")
    assert configs["1,500 trajectories"].trajectories == 1500 and configs["3 times the training"].training.steps == 3 * dfno.DIGITS.training.steps
