"""DDO and what it stands on: names, kills, files, the solver's promises, the same function on many grids."""
import argparse
import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from extras import need

need("train", "data", "dev")

from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_papers import ddo
from diffusion_papers.__main__ import main
from diffusion_papers.workbench.checkpoints import CheckpointError
from diffusion_papers.evidence import ddo as evidence
from diffusion_papers.topics.fluids import FourthOrder, energy, enstrophy, solve, speed
from diffusion_papers.topics.function_data import digit_distances, read_functions, vorticity_fields
from diffusion_papers.topics.gaussian_fields import Matern, PeriodicField, gaussian_operator, nested_sample
from diffusion_papers.topics.neural_operators import spectral_convolution_2d
from diffusion_papers.topics.operator_networks import (FnoUNetConfig, Gano, GanoConfig, UShapedConfig,
                                                     operator_keys, unused_tensors)
from diffusion_papers.topics.spectral import energy_spectrum, resample

MANIFESTS = Path(__file__).parent / "manifests"
SHORT = ddo.VORTICITY.override(**{"training.steps": 12, "training.checkpoint_every": 4, "network.width": 4, "network.blocks": 1})
SMALL_UNET = FnoUNetConfig(width=8, modes=8, multipliers=(1, 2), blocks=1, groups=4)
SMALL_U = UShapedConfig(width=8, size=24, pad=8, rank=0.3)


def manifest(name): return json.loads((MANIFESTS / f"ddo-{name}.json").read_text())


def test_the_published_unet_has_the_authors_tensors():
    with torch.device("meta"): network = ddo.build(ddo.CONFIGS["mnist_sdf"]).network
    expected, state = manifest("mnistsdf-fnounet2d"), network.state_dict()
    of_the_process = {name: shape for name, shape in expected.items() if name.startswith("forward_diffusion.")}
    found = {f"_model.model.{theirs}": list(state[ours].shape) for ours, theirs in operator_keys(network)}
    assert found | of_the_process == expected and list(found | of_the_process) == list(expected)
    assert set(of_the_process) == {"forward_diffusion.T", "forward_diffusion.gp.T"}
    assert sum(p.numel() for p in network.parameters()) == 257_716_993


def test_the_published_volcano_network_has_the_authors_tensors():
    with torch.device("meta"): network = ddo.build(ddo.CONFIGS["volcano"]).network
    expected, state = manifest("volcano-uno"), network.state_dict()
    unused = unused_tensors(network.config)
    found = {theirs: list(state[ours].shape) for ours, theirs in operator_keys(network)}
    assert found | {name: list(shape) for name, shape in unused.items()} == expected and not found.keys() & unused
    assert [name for name in expected if name in found] == list(found)
    assert sum(math.prod(shape) for shape in expected.values()) == 142_205_986


@pytest.mark.parametrize("name, critic", [("gano-gen", False), ("gano-disc", True)])
def test_the_published_gan_has_the_authors_tensors(name, critic):
    with torch.device("meta"): network = Gano(GanoConfig(critic=critic))
    state = network.state_dict()
    complex_shape = lambda ours: list(state[ours].shape)[:-1] if ours.startswith("spectral.") else list(state[ours].shape)
    assert {theirs: complex_shape(ours) for ours, theirs in operator_keys(network)} == manifest(name)
    assert [theirs for _, theirs in operator_keys(network)] == list(manifest(name))


def test_a_killed_run_is_resumed_to_the_same_bits(tmp_path):
    def kill(step, loss):
        if step == 6: raise InterruptedError
    with pytest.raises(InterruptedError): ddo.train(SHORT, tmp_path / "run", device="cpu", callback=kill)
    resumed = ddo.train(SHORT, tmp_path / "run", resume=True, device="cpu")
    whole = ddo.train(SHORT, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values()))


@pytest.mark.parametrize("config", [
    replace(ddo.CONFIGS["mnist_sdf"], points=32, unet=SMALL_UNET), replace(ddo.CONFIGS["volcano"], data="bumps", points=24,
                                                                             length=0.08, ushaped=SMALL_U, levels=10)])
def test_the_released_processes_train_and_sample(config, tmp_path):
    model = ddo.train(replace(config, training=replace(config.training, steps=2, batch_size=4)), device="cpu")
    ddo.save_model(tmp_path / "model.safetensors", model)
    read = ddo.load_model(tmp_path / "model.safetensors")
    drawn = [ddo.sample_functions(each, 2, 48, calls=6, seed=1) for each in (model, read)]
    assert torch.equal(*drawn) and drawn[0].shape == (2, config.channels, 48, 48) and torch.isfinite(drawn[0]).all()


@pytest.mark.parametrize("config", [
    SHORT, replace(ddo.CONFIGS["mnist_sdf"], points=32, unet=SMALL_UNET),
    replace(ddo.CONFIGS["volcano"], points=24, length=0.08, ushaped=SMALL_U)])
def test_what_is_computed_stays_on_the_device_of_its_input(config, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: contextlib.nullcontext())  # unknown to "meta"
    with torch.device("meta"):  # which refuses to mix with the CPU
        model = ddo.build(config)
        v, level = torch.zeros(2, config.channels, config.points, config.points), torch.full((2,), 0.5)
    assert model(v, level).device.type == "meta" and ddo.colored(config, v).device.type == "meta"
    process, time = ddo.BlurredVP(), level.double()
    assert ddo.blurred_step(process, v[:, 0].double(), v[:, 0].double(), time, time)[0].device.type == "meta"


def test_samples_are_the_seeds_and_nested_ones_agree_on_grids():
    model = ddo.load_pretrained()
    one, same, other = (ddo.sample_functions(model, 2, 32, calls=8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    noise = [ddo._nested_noise(model.config, 3)(torch.zeros(2, 1, n, n)) for n in (32, 64)]
    assert torch.allclose(resample(noise[1], (31, 31)), resample(noise[0], (31, 31)), atol=1e-5)


SMOOTH, ROUGH = PeriodicField(Matern(3.0, 3.0).unit()), PeriodicField(Matern(1.5, 3.0).unit())


def fields(generator): return lambda x: ROUGH.sample(len(x), tuple(x.shape[1:]), generator, x.dtype)


@pytest.mark.parametrize("solver", ["crank_nicolson_langevin", "released_langevin", "blurred_sample"])
def test_the_samplers_of_the_released_programs_are_guarded_like_all_others(solver):
    walk, x = getattr(ddo, solver), torch.zeros(2, 8, 8)
    nothing, noise = (lambda x, sigma: torch.zeros_like(x)), fields(torch.Generator().manual_seed(0))
    levels, seen = torch.tensor([1.0, 0.5, 0.1]), []
    end = walk(nothing, x, levels, noise=noise, callback=lambda step, x, x0: seen.append((step, x.shape, x0.shape, x0.dtype)))
    assert end.dtype == x.dtype and torch.isfinite(end).all()
    steps = 2 if solver == "blurred_sample" else 3
    assert seen == [(step, x.shape, x.shape, x.dtype) for step in range(steps)]
    with pytest.raises(ValueError, match="strictly fall"): walk(nothing, x, torch.tensor([1.0, 1.0]), noise=noise)
    with pytest.raises(ValueError, match="cannot encode"): walk(nothing, x, levels.flip(0), noise=noise)
    with pytest.raises(TypeError, match=f"noise: {solver} draws noise"): walk(nothing, x, levels)
    with pytest.raises(ValueError, match="x: "): walk(nothing, x * math.nan, levels, noise=noise)
    with pytest.raises(FloatingPointError, match=f"{solver}: call 1"): walk(lambda x, sigma: x * math.nan, x, levels, noise=noise)


def test_the_samplers_of_the_released_programs_have_the_bits_that_they_had():
    "Against the loops as they are written in the paper, without guards."
    denoise, sigmas = gaussian_operator(SMOOTH, ROUGH), torch.tensor([2.0, 0.7, 0.2], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        start = ROUGH.sample(3, (16, 16), torch.Generator().manual_seed(0), dtype)
        noise, x = fields(torch.Generator().manual_seed(1)), start
        for sigma in sigmas.tolist():
            for _ in range(3):
                x0 = denoise(x, torch.full((3,), sigma, dtype=dtype))
                x = ((1 - 0.5 / 4) * x + 0.5 / 2 * x0 + math.sqrt(0.5) * sigma * noise(x)) / (1 + 0.5 / 4)
        assert torch.equal(x, ddo.crank_nicolson_langevin(denoise, start, sigmas, noise=fields(torch.Generator().manual_seed(1))))
        score = lambda x, sigma: (denoise(x, sigma.sqrt()) - x) / sigma.to(x)[:, None, None]
        noise, x = fields(torch.Generator().manual_seed(1)), start
        for level, sigma in enumerate(sigmas.tolist()):
            alpha = 1e-3 * (sigma / 0.2)**2
            for inner in range(3):
                drift = score(x, torch.full((3,), sigma, dtype=dtype))
                x = x + alpha / 2 * drift + (0.0 if (level, inner) == (2, 2) else math.sqrt(alpha) * noise(x))
        found = ddo.released_langevin(score, start, sigmas, noise=fields(torch.Generator().manual_seed(1)), epsilon=1e-3)
        assert torch.allclose(x, found, rtol=1e-5 if dtype == torch.float32 else 0, atol=1e-6 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("points", [16, 32, 64, 128])
def test_nested_draws_have_the_right_law(points):
    measure = PeriodicField(Matern(2.0, 3.0).unit())
    found = energy_spectrum(nested_sample(measure, 1500, points, seed=5)).mean(0)[1:8]
    free = energy_spectrum(measure.sample(1500, (points, points), torch.Generator().manual_seed(0))).mean(0)[1:8]
    assert ((found / free - 1).abs() < 0.12).all()


def test_white_noise_needs_shorter_steps_on_finer_grids():
    smooth, rough = PeriodicField(Matern(3.0, 3.0).unit()), PeriodicField(Matern(1.5, 3.0).unit())
    limits = {n: [ddo.step_limit(smooth.eigenvalues((n, n)), rough.eigenvalues((n, n)), 1.0, way) for way in (True, False)]
              for n in (32, 128)}
    assert limits[128][0] >= 4 and limits[32][1] > 20 * limits[128][1]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), nu=st.sampled_from([1e-4, 1e-3, 1e-2]), alpha=st.floats(2.5, 5.0))
def test_without_force_energy_and_enstrophy_never_grow(seed, nu, alpha):
    start = PeriodicField(Matern(alpha, 3.0).unit()).sample(1, (32, 32), torch.Generator().manual_seed(seed), torch.float64)
    flow, seen = FourthOrder((32, 32), nu), []
    solve(flow, start, time=0.5, dt=0.45 * flow.cell / max(speed(flow.velocity(flow.prepared(start, "w"))), 0.4),
          callback=lambda step, time, spectrum: seen.append(flow.values(spectrum)))
    for measure in (lambda w: energy(flow, w), enstrophy):
        values = torch.stack([measure(w)[0] for w in seen])
        assert (values.diff() <= 1e-9 * values[0]).all()


def test_an_unstable_step_says_when():
    with pytest.raises(FloatingPointError, match=r"step \d+ at time"): vorticity_fields(2, 64, dt=0.2)


@pytest.mark.parametrize("kind", ["real", "phase"])
def test_functions_are_read_from_arrays(tmp_path, kind):
    import h5py
    values = np.random.default_rng(0).normal(size=(3, 8, 6)).astype(np.float32)
    if kind == "phase": values = (values + 1j * values[::-1]).astype(np.complex64)
    np.save(tmp_path / "a.npy", values); np.savez(tmp_path / "a.npz", u=values)
    with h5py.File(tmp_path / "a.h5", "w") as file: file["u"] = values
    read = [read_functions(tmp_path / f"a.{suffix}", kind=kind) for suffix in ("npy", "npz", "h5")]
    assert all(torch.equal(each, read[0]) for each in read) and read[0].shape == (3, 1 + (kind == "phase"), 8, 6)
    with open(tmp_path / "objects.npy", "wb") as file:  # the header of an array of objects
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    with pytest.raises(ValueError, match="damaged, or no file of arrays"): read_functions(tmp_path / "objects.npy")


def test_only_vorticity_is_compared_unasked():
    config = replace(ddo.CONFIGS["mnist_sdf"], points=32, unet=SMALL_UNET)
    model = ddo.build(config)
    assert ddo.evaluate(model, 2, points=(32,)) == []
    assert len(ddo.evaluate(model, 2, points=(32,), calls=3, data=digit_distances("test", 32)[:4])) == 1


def test_a_released_volcano_file_is_read_with_its_average(tmp_path):
    config = replace(ddo.CONFIGS["volcano"], ushaped=SMALL_U)
    model = ddo.build(config)
    weights = {theirs: model.network.state_dict()[ours] for ours, theirs in operator_keys(model.network)}
    weights |= {name: torch.zeros(shape) for name, shape in unused_tensors(SMALL_U).items()}
    average = {name: value + 1 for name, value in weights.items()}
    torch.save({"weights": weights, "metrics": {}, "ema_helper": average, "last_epoch": 3}, tmp_path / "model.pt")
    read = ddo.load_authors_checkpoint(tmp_path / "model.pt", config)
    assert all(torch.equal(read.network.state_dict()[ours], average[theirs]) for ours, theirs in operator_keys(model.network))


def test_a_released_file_with_its_settings_is_read_and_one_that_runs_code_is_not(tmp_path):
    config = replace(ddo.CONFIGS["mnist_sdf"], unet=SMALL_UNET)
    model = ddo.build(config)
    state = {f"_model.model.{theirs}": model.network.state_dict()[ours] for ours, theirs in operator_keys(model.network)}
    torch.save({"args": argparse.Namespace(lr=1e-4), "gen_sde_state_dict": state}, tmp_path / "fine.pt")
    ddo.load_authors_checkpoint(tmp_path / "fine.pt", config)
    torch.save({"args": Path("."), "gen_sde_state_dict": state}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="refused"): ddo.load_authors_checkpoint(tmp_path / "odd.pt", config)


def test_the_bench_compares_the_same(): # the convolution only where the library is installed
    mine, plain = (side() for side in evidence._bench_flow("cpu", 4))
    assert torch.allclose(mine, plain, atol=1e-4 * plain.abs().max())
    pytest.importorskip("neuralop")
    u, weight, library = evidence._bench_convolution("cpu", 2, 4, 32)
    with torch.no_grad(): assert torch.allclose(spectral_convolution_2d(u, weight), library(u), atol=1e-5)


def test_the_command_line_trains_and_samples(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    options = ["--set", "training.steps=2", "network.width=4", "network.blocks=1", "evaluated=4"]
    main(["train", "ddo", *options, "--device", "cpu", "--folder", str(tmp_path / "run"), "--output", str(path)])
    main(["sample", "ddo", "--model", str(path), "--set", "count=4", "points=48", "calls=4", "--output", str(tmp_path / "w.png")])
    assert path.is_file() and (tmp_path / "w.png").is_file()
