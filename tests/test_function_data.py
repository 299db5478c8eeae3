"""Data that are functions, and the measures of drawn ones: numbers written out, place by place and wave by wave."""
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from extras import need

need("train", "data")

from diffusion_papers.core.data import digits
from diffusion_papers.core.training import step_seed
from diffusion_papers.topics.function_data import (FORCE, amplitude_spectrum, circular_moments, digit_distances, function_measures,
                                                   gaussian_processes, moment_errors, random_sines, read_functions,
                                                   signed_distances, spectrum_error, squared_norm, vorticity, vorticity_fields,
                                                   wrapped_bumps)
from diffusion_papers.workbench.checkpoints import data_folder, load_checkpoint

seeded = lambda seed=0: torch.Generator().manual_seed(seed)


def waves(amplitudes, n=32):
    "A sum of cosines along the second axis, amplitude by wave number."
    place = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    return sum(size * torch.cos(k * place + k) for k, size in amplitudes.items()).expand(n, n)


def test_the_force_has_ten_periods_at_most_and_a_variance_of_almost_one():
    table = FORCE.eigenvalues((64, 64), half=False)
    numbers = [(i + 32) % 64 - 32 for i in range(64)]
    kept = {(numbers[i], numbers[j]) for i, j in torch.nonzero(table).tolist()}
    assert kept == set(itertools.product(range(-10, 11), repeat=2)) - {(0, 0)} and FORCE.trace((64, 64)) == pytest.approx(0.9957, abs=1e-4)
    assert (table[0, 1] / table[3, 4]).item() == pytest.approx((34 / 10)**3)


def test_a_flow_begins_at_rest_and_follows_its_force():
    "After a moment the vorticity is the force times the time; batches draw on their own."
    time = 1e-3
    found = vorticity_fields(3, 32, seed=4, strength=2.0, time=time, dt=time, batch=2, dtype=torch.float64)
    forces = [FORCE.sample(size, (32, 32), seeded(step_seed(4, 1, first)), torch.float64) for first, size in ((0, 2), (2, 1))]
    torch.testing.assert_close(found, 2 * time * torch.cat(forces), atol=2e-3 * time, rtol=0)


def test_viscosity_takes_from_a_flow_what_it_should():
    slow, fast = (vorticity_fields(1, 32, time=0.5, dt=0.01, viscosity=nu, strength=1e-4, dtype=torch.float64) for nu in (0.1, 0.4))
    for w, nu in ((slow, 0.1), (fast, 0.4)):
        spectrum = torch.fft.fft2(w[0]) / torch.fft.fft2(1e-4 * FORCE.sample(1, (32, 32), seeded(step_seed(0, 1, 0)), torch.float64)[0])
        for i, j in ((1, 2), (3, 0)):  # (1 - exp(-nu k^2 t)) / (nu k^2)
            rate = nu * (i**2 + j**2)
            assert spectrum[i, j].real.item() == pytest.approx((1 - math.exp(-rate * 0.5)) / rate, rel=1e-3)


@pytest.mark.parametrize("split, count, whole, points", [("train", 768, 32, 16), ("test", 128, 128, 32)])
def test_shipped_fields_are_thinned_from_the_first_point_on(split, count, whole, points):
    stored = load_checkpoint(data_folder() / "samples" / f"vorticity_{split}.safetensors")[0]["w"].float()
    assert stored.shape == (count, whole, whole) and torch.equal(vorticity(split, whole), stored)
    found, every = vorticity(split, points), whole // points
    assert all(torch.equal(found[:, i, j], stored[:, every * i, every * j]) for i, j in ((0, 0), (1, 3), (points - 1, 2)))


def test_two_lines_have_a_smooth_process_about_them():
    drawn = gaussian_processes(40_000, 8, seeded()).tensors
    x0, label, place = drawn["x0"], drawn["class_label"], torch.arange(8) / 8
    assert label.float().mean().item() == pytest.approx(0.5, abs=0.01)
    for part, line in ((0, 10 * place - 5), (1, 5 - 10 * place)):
        about = x0[label == part] - line
        assert about.mean(0).abs().max() < 0.02
        covariance = about.T @ about / len(about)
        expected = 0.4 * torch.exp(-(place[:, None] - place)**2 / (2 * 0.1**2))
        torch.testing.assert_close(covariance, expected, atol=0.015, rtol=0)


def test_random_sines_have_a_height_and_a_place():
    a, b = torch.rand(2, 4, 1, generator=seeded())[..., 0].tolist()
    found = random_sines(4, 6, seeded())
    for row in range(4):
        for i in range(6): assert found[row, i].item() == pytest.approx(a[row] * math.sin(-math.pi + i * math.pi / 3 - (4 * b[row] - 2)), abs=1e-6)


def test_a_signed_distance_is_that_to_the_nearest_pixel_of_the_other_kind():
    shape = torch.zeros(1, 7, 7, dtype=torch.bool)
    shape[0, 1:5, 2:6], shape[0, 0, 0] = True, True
    places, found = list(itertools.product(range(7), repeat=2)), signed_distances(shape)[0]
    for i, j in places:
        away = min(math.dist((i, j), other) for other in places if shape[0][other] != shape[0, i, j])
        assert found[i, j].item() == pytest.approx((-1 if shape[0, i, j] else 1) * away / 7)


def test_digits_are_cut_out_after_they_are_made_larger():
    images = F.interpolate(digits("test").tensors["x0"], (16, 16), mode="bicubic")
    found = digit_distances("test", 16)
    assert found.shape == (len(images), 16, 16) and torch.equal(found < 0, images[:, 0] > 0)


def test_fringes_are_the_phase_of_a_bump():
    found = wrapped_bumps(5, 6, seeded())
    drawn, generator = [], seeded()
    for low, high in ((0.3, 0.7), (0.3, 0.7), (0.1, 0.25), (1.0, 3.0)):
        drawn.append((low + (high - low) * torch.rand(5, 1, 1, generator=generator)).flatten().tolist())
    for row, (x, y, width, height) in enumerate(zip(*drawn)):
        for i, j in itertools.product(range(6), repeat=2):
            squared = ((i + 0.5) / 6 - x)**2 + ((j + 0.5) / 6 - y)**2
            phase = 2 * math.pi * height * math.exp(-squared / (2 * width**2))
            assert found[row, :, i, j].tolist() == pytest.approx([math.cos(phase), math.sin(phase)], abs=1e-5)


def test_circular_moments_are_those_of_mean_directions():
    angle = 0.4 + torch.randn(3, 5, 6, generator=seeded(), dtype=torch.float64).exp()
    spread, skewness = circular_moments(torch.stack([angle.cos(), angle.sin()], 1))
    for row, flat in enumerate(angle.flatten(1).numpy()):
        one, two = np.exp(1j * flat).mean(), np.exp(2j * flat).mean()
        assert spread[row].item() == pytest.approx(1 - abs(one))
        assert skewness[row].item() == pytest.approx(abs(two) * math.sin(np.angle(two) - 2 * np.angle(one)) / (1 - abs(one))**1.5)
    stats = pytest.importorskip("scipy.stats")
    assert spread.numpy() == pytest.approx([stats.circvar(row) for row in angle.flatten(1).numpy()])
    with pytest.warns(UserWarning, match="all angles are the same"):
        assert circular_moments(torch.tensor([0.6, 0.8]).reshape(1, 2, 1, 1).expand(1, 2, 3, 3))[1].item() == 0


def test_files_are_read_to_the_number(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 4, 5)) + 1j * np.random.default_rng(1).normal(size=(3, 4, 5))
    np.save(tmp_path / "real.npy", values.real); np.save(tmp_path / "one.npy", values.real[0]); np.save(tmp_path / "phase.npy", values)
    torch.testing.assert_close(read_functions(tmp_path / "real.npy"), torch.from_numpy(values.real[:, None]).float())
    assert read_functions(tmp_path / "one.npy").shape == (1, 1, 4, 5)
    angle = torch.from_numpy(np.angle(values)).float()
    torch.testing.assert_close(read_functions(tmp_path / "phase.npy", kind="phase"), torch.stack([angle.cos(), angle.sin()], 1))


def test_the_three_norms_are_a_mean_an_integral_and_a_sum():
    u = torch.arange(24.0).reshape(2, 3, 2, 2)
    sums = [sum(value**2 for value in range(12)), sum(value**2 for value in range(12, 24))]
    assert squared_norm(u, "sum").tolist() == sums and squared_norm(u).tolist() == pytest.approx([s / 12 for s in sums])
    assert squared_norm(u, "integral").tolist() == pytest.approx([s / 12 * 4 * math.pi**2 for s in sums])
    assert squared_norm(u, "integral", box=3.0).tolist() == pytest.approx([s / 4 for s in sums])


def test_the_error_of_a_spectrum_is_in_powers_of_ten_and_between_two_lengths():
    flat = dict.fromkeys(range(0, 13), 1.0)
    real = torch.stack([waves(flat), -waves(flat)])
    louder = waves(flat | {2: 10**0.5, 3: 10**-1.0, 0: 7.0, 6: 9.0})[None]  # energies of 10 and of 1/100
    assert spectrum_error(louder, real, 1, 5) == pytest.approx((1 + 2) / 5)
    assert spectrum_error(real, louder, 2, 4) == pytest.approx(3 / 3) and spectrum_error(real, real) == pytest.approx(0, abs=1e-12)
    assert spectrum_error(waves(flat | {10: 10.0})[None], real) == pytest.approx(2 / 10)
    assert spectrum_error(waves(flat | {11: 10.0, 0: 3.0})[None], real) == pytest.approx(0, abs=1e-12)
    mixed = torch.stack([waves(flat | {1: 0.0}), waves(flat | {1: 3.0})])  # the mean is taken over energies: 9/2
    assert spectrum_error(mixed, real, 1, 1) == pytest.approx(math.log10(4.5))


def test_each_measure_of_drawn_functions_is_its_own_number():
    real, made = waves(dict.fromkeys(range(1, 13), 1.0))[None], waves(dict.fromkeys(range(1, 13), 1.0) | {9: 10.0, 12: 2.0})[None]
    found = function_measures(made, real, band=10)
    assert found["spectrum"] == pytest.approx(2 / 10) and found["spectrum_8"] == pytest.approx(0, abs=1e-12)
    assert found["above"] == pytest.approx((1 + 4) / (10 + 100 + 4)) and found["std"] == pytest.approx(math.sqrt(114 / 2), rel=1e-3)
    lag = 2 * math.pi * torch.arange(32, dtype=torch.float64) / 32
    alike = [sum(size**2 / 2 * torch.cos(k * lag) for k, size in amplitudes.items())
             for amplitudes in (dict.fromkeys(range(1, 13), 1.0) | {9: 10.0, 12: 2.0}, dict.fromkeys(range(1, 13), 1.0))]
    assert found["autocovariance"] == pytest.approx(((alike[0] - alike[1]).norm() / alike[1].norm()).item())
    assert function_measures(made, real, band=8)["spectrum"] == pytest.approx(0, abs=1e-12)
    sorts = [w.flatten().sort().values for w in (made, real)]
    assert found["histogram"] == pytest.approx((sorts[0] - sorts[1]).abs().mean().item())


def test_moments_are_compared_in_the_norm_of_the_real_ones():
    made, real = (torch.randn(6, 2, 3, generator=seeded(seed), dtype=torch.float64) + seed for seed in (1, 2))
    a, b = (w.flatten(1).numpy() for w in (made, real))
    found = moment_errors(made, real)
    assert found["mean"] == pytest.approx(np.linalg.norm(a.mean(0) - b.mean(0)) / math.sqrt((b**2).sum() / 6))
    one, other = (np.einsum("ni,nj->ij", w - w.mean(0), w - w.mean(0)) / 5 for w in (a, b))
    assert found["covariance"] == pytest.approx(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_the_published_spectrum_adds_amplitudes_along_diagonals_of_a_quadrant():
    u = torch.randn(2, 6, 6, generator=seeded(), dtype=torch.float64)
    numbers, expected = np.fft.fft2(u.numpy()), np.zeros((2, 3), dtype=complex)
    for i, j in itertools.product(range(3), repeat=2):
        if i + j < 3: expected[:, i + j] += numbers[:, i, j]
    assert amplitude_spectrum(u).numpy() == pytest.approx(np.abs(expected))


def test_of_very_many_values_a_histogram_takes_every_kth():
    u = torch.arange(400 * 32 * 32.0).reshape(400, 32, 32) % 4
    assert function_measures(u[:1], 0 * u[:1])["histogram"] == pytest.approx(1.5)
    assert function_measures(u, 0 * u)["histogram"] == 0 and function_measures(u + 2, 0 * u)["histogram"] == pytest.approx(2)
