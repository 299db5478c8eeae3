"""Random functions, number by number: covariances as sums over waves, densities as those of dense normal laws, closed forms."""
import itertools
import math

import numpy as np
import pytest
import torch

from diffusion_papers.core.training import step_seed
from diffusion_papers.topics import gaussian_fields
from diffusion_papers.topics.gaussian_fields import (KERNELS, CosineField, KernelField, Matern, PeriodicField, ReleasedCosineField,
                                                     SquaredExponential, cosine_amplitudes, empirical_operator, feldman_hajek,
                                                     gaussian_operator, grid_points, half_plane_amplitudes, half_plane_field,
                                                     inner_product, log_shift_density, mixture_operator, nested_sample,
                                                     stable_density, white)
from diffusion_papers.topics.spectral import cosine_transform, resample

seeded = lambda: torch.Generator().manual_seed(0)
close = lambda found, expected, tolerance=1e-10: torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def unit_functions(shape): return torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)


def covariance_of_draws(measure, shape):
    "A draw is a matrix times white noise: its covariance is that matrix squared."
    factor = measure.color(unit_functions(shape)).flatten(1)
    return factor.T @ factor


def covariance_of_operator(measure, shape): return measure.apply(unit_functions(shape)).flatten(1) * math.prod(shape)


def waves_of(shape): return itertools.product(*(range(-((n - 1) // 2), (n - 1) // 2 + 1) for n in shape))


def sum_over_waves(spectrum, shape, length, constant=False):
    "Sum of eigenvalue times cos(k (x - y)) over all waves below Nyquist's."
    places, total = grid_points(shape) * length, torch.zeros(math.prod(shape), math.prod(shape), dtype=torch.float64)
    for number in waves_of(shape):
        wave = 2 * math.pi / length * torch.tensor(number, dtype=torch.float64)
        if constant or wave.any(): total += spectrum(wave.square().sum()) * torch.cos((places[:, None] - places) @ wave)
    return total


def test_a_matern_spectrum_is_its_formula():
    found = Matern(2.5, 3.0, scale=1.7)(torch.tensor([0.0, 7.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([1.7**2 * 9**-2.5, 1.7**2 * 16**-2.5])
    assert white(torch.tensor([0.0, 9.0])).tolist() == [1, 1]


@pytest.mark.parametrize("dim, mean_free, length", [(1, True, 2 * math.pi), (2, True, 3.0), (2, False, 2 * math.pi), (3, True, 2 * math.pi)])
def test_a_unit_spectrum_sums_to_one_over_its_lattice(dim, mean_free, length):
    reach = 8
    spectrum = Matern(2.0, 3.0, dim=dim, scale=0.6).unit(length, reach, mean_free)
    numbers = np.array(list(itertools.product(range(-reach, reach), repeat=dim)))
    squared = (numbers**2).sum(1) * (2 * math.pi / length)**2
    sizes = spectrum.scale**2 * (squared + 9.0)**-2.0
    assert sizes.sum() - (sizes[squared == 0].sum() if mean_free else 0) == pytest.approx(1) and spectrum.dim == dim
    assert (spectrum.alpha, spectrum.tau) == (2.0, 3.0) and Matern(0.1, 3.0, dim=dim, allow_rough=True).unit(reach=4).allow_rough


@pytest.mark.parametrize("alpha, exact", [
    (1, lambda t: math.pi / (t * math.tanh(math.pi * t))),
    (2, lambda t: math.pi / (2 * t**3 * math.tanh(math.pi * t)) + math.pi**2 / (2 * t**2 * math.sinh(math.pi * t)**2))])
def test_the_trace_on_a_line_is_the_known_series(alpha, exact):
    "Sum of (k^2 + tau^2)^-alpha over all whole numbers; a side of 2 pi / 3 has every third of them."
    points = 2**17 + 1
    field = PeriodicField(Matern(alpha, 0.8, dim=1), dim=1, mean_free=False)
    assert field.trace((points,)) == pytest.approx(exact(0.8), rel=2e-5)
    short = PeriodicField(Matern(alpha, 0.8, dim=1), dim=1, length=2 * math.pi / 3)
    assert short.trace((points,)) == pytest.approx(9**-alpha * exact(0.8 / 3) - 0.8**(-2 * alpha), rel=2e-5)


PERIODIC = [((9,), 2 * math.pi), ((8,), 2.0), ((6, 7), 2 * math.pi), ((6, 4), 2.0), ((4, 5, 3), 1.5)]


@pytest.mark.parametrize("shape, length", PERIODIC)
def test_the_covariance_of_a_periodic_field_is_a_sum_over_waves(shape, length):
    spectrum = Matern(2.0, 1.5, dim=len(shape), scale=1.3)
    field, whole = (PeriodicField(spectrum, dim=len(shape), length=length, mean_free=mean_free) for mean_free in (True, False))
    expected = sum_over_waves(spectrum, shape, length)
    close(covariance_of_draws(field, shape), expected); close(covariance_of_operator(field, shape), expected)
    close(covariance_of_draws(whole, shape), sum_over_waves(spectrum, shape, length, constant=True))
    assert field.trace(shape) == pytest.approx(expected[0, 0].item())


def test_nyquists_wave_is_kept_only_on_request_and_a_cutoff_counts_along_every_axis():
    spectrum = Matern(2.0, 1.5)
    table = PeriodicField(spectrum, nyquist=True).eigenvalues((8, 8))
    assert table[4, 4].item() == pytest.approx((32 + 2.25)**-2.0) and table[0, 0] == 0
    seen = PeriodicField(spectrum).eigenvalues((8, 8)) > 0
    assert not seen[4].any() and not seen[:, 4].any() and seen.sum() == 7 * 4 - 1
    few = PeriodicField(spectrum, cutoff=2).eigenvalues((8, 8), half=False)
    assert {((i + 4) % 8 - 4, (j + 4) % 8 - 4) for i, j in torch.nonzero(few).tolist()} == set(
        itertools.product(range(-2, 3), repeat=2)) - {(0, 0)}


@pytest.mark.parametrize("shape, length", [((7,), 1.0), ((5, 6), 2.0), ((3, 4, 5), 1.0)])
def test_the_covariance_of_a_cosine_field_is_a_sum_over_cosines(shape, length):
    spectrum = Matern(2.0, 1.5, dim=len(shape), scale=1.3)
    middles = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in shape]
    for mean_free in (True, False):
        expected = torch.zeros(math.prod(shape), math.prod(shape), dtype=torch.float64)
        for number in itertools.product(*map(range, shape)):
            if mean_free and not any(number): continue
            wave = torch.ones(1, dtype=torch.float64)
            for k, middle in zip(number, middles): wave = torch.outer(wave, torch.cos(math.pi * k * middle) * (2**0.5 if k else 1)).flatten()
            expected += 1.3**2 * ((math.pi / length)**2 * sum(k**2 for k in number) + 1.5**2)**-2 * torch.outer(wave, wave)
        field = CosineField(spectrum, dim=len(shape), length=length, mean_free=mean_free)
        close(covariance_of_draws(field, shape), expected); close(covariance_of_operator(field, shape), expected)
        assert field.trace(shape) == pytest.approx(expected.diagonal().mean().item())


@pytest.mark.parametrize("dim, n", [(1, 64), (2, 48)])
def test_a_squared_exponential_spectrum_is_that_of_its_kernel(dim, n):
    field = PeriodicField(SquaredExponential(0.1, variance=1.7, dim=dim, box=2.0), dim=dim, length=2.0, mean_free=False, nyquist=True)
    table = torch.fft.ifftn(field.eigenvalues((n,) * dim, half=False), norm="forward").real
    away = 2.0 / n * torch.arange(n // 2, dtype=torch.float64)
    close(table.reshape(n, -1)[:n // 2, 0], 1.7 * torch.exp(-away**2 / (2 * 0.1**2)), 1e-6)
    assert field.trace((n,) * dim) == pytest.approx(1.7, rel=1e-6)


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.5, 2.0])
def test_a_power_of_the_covariance_multiplies_a_wave_by_that_power_of_its_eigenvalue(power):
    x = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    wave = torch.cos(2 * x[:, None] - x) + 0 * x
    field = PeriodicField(Matern(2.0, 1.5))
    close(field.apply(wave, power), (5 + 2.25)**(-2.0 * power) * wave)
    close(field.apply(wave + 3, power), (5 + 2.25)**(-2.0 * power) * wave)  # the constant has no variance


MATERN = {"matern 1/2": 0.5, "matern 3/2": 1.5, "matern 5/2": 2.5}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_those_of_bessels_functions(kernel):
    special, r = pytest.importorskip("scipy.special"), np.linspace(0.05, 3, 20)
    scaled = math.sqrt(2 * MATERN.get(kernel, 1)) * r
    expected = np.exp(-r**2 / 2) if kernel not in MATERN else (
        2**(1 - MATERN[kernel]) / math.gamma(MATERN[kernel]) * scaled**MATERN[kernel] * special.kv(MATERN[kernel], scaled))
    assert KERNELS[kernel](torch.from_numpy(r)).numpy() == pytest.approx(expected, rel=1e-10)
    assert KERNELS[kernel](torch.zeros(1)).item() == 1


def test_the_covariance_of_a_kernel_field_is_its_kernel_and_a_little_noise():
    field, shape = KernelField("matern 1/2", 0.3, variance=1.7, jitter=0.01), (3, 4)
    places = [(i / 3, j / 4) for i in range(3) for j in range(4)]
    expected = torch.tensor([[1.7 * math.exp(-math.dist(a, b) / 0.3) + 0.01 * (a == b) for b in places] for a in places], dtype=torch.float64)
    close(field.covariance(shape), expected); close(covariance_of_draws(field, shape), expected)
    close(covariance_of_operator(field, shape), expected)
    assert field.trace(shape) == pytest.approx(1.71)  # of a point
    u = torch.randn(2, *shape, generator=seeded(), dtype=torch.float64)
    close(field.values(field.modes(u), shape), u); close(field.apply(field.apply(u, 0.5), -0.5), u)
    assert grid_points(shape).tolist() == [list(place) for place in places]


def test_a_nested_draw_keeps_the_coarse_waves_and_draws_the_others():
    "Also where the field has Nyquist's wave on the coarse grid, which is not the same function on the fine one."
    for nyquist in (False, True):
        measure = PeriodicField(Matern(2.0, 3.0).unit(), nyquist=nyquist)
        coarse, fine = (nested_sample(measure, 2, n, seed=5) for n in (16, 32))
        fresh = measure.sample(2, (32, 32), torch.Generator().manual_seed(step_seed(5, 32)))
        close(nested_sample(measure, 2, 16, seed=5), measure.sample(2, (16, 16), torch.Generator().manual_seed(step_seed(5, 16))), 0)
        found, known, new = (torch.fft.fft2(u, norm="forward") for u in (fine, coarse, fresh))
        low = torch.tensor([abs((i + 16) % 32 - 16) < 8 for i in range(32)])
        low = low[:, None] & low
        small = torch.tensor([i for i in range(32) if abs((i + 16) % 32 - 16) < 8])
        close(found[:, small][:, :, small], known[:, small % 16][:, :, small % 16], 1e-6)
        close(found[:, ~low], new[:, ~low], 1e-6)


def test_grids_double_from_the_coarsest_one():
    assert gaussian_fields._doublings(64, 16) == [16, 32, 64] and gaussian_fields._doublings(16, 16) == [16]
    assert gaussian_fields._doublings(50, 16) == [16, 25, 50] and gaussian_fields._doublings(8, 16) == [8]


def test_the_inner_product_of_waves_is_theirs_over_the_eigenvalue():
    x = 2 * math.pi * torch.arange(9, dtype=torch.float64) / 9
    one, other = torch.cos(2 * x), torch.sin(x)
    field = PeriodicField(Matern(2.0, 1.5, dim=1), dim=1)
    assert inner_product(field, 3 * one + other, one).item() == pytest.approx(3 / 2 * 6.25**2)
    assert inner_product(field, other, 2 * other).item() == pytest.approx(3.25**2)


def dense_normal(mean, covariance): return torch.distributions.MultivariateNormal(mean.flatten(), covariance)


def test_the_density_of_a_shift_is_a_ratio_of_normal_densities():
    field, shape = KernelField("matern 3/2", 0.4, jitter=1e-3), (3, 4)
    shift, u = torch.randn(shape, generator=seeded()).double(), torch.randn(5, *shape, generator=seeded()).double()
    covariance = field.covariance(shape)
    moved, still = dense_normal(shift, covariance), dense_normal(0 * shift, covariance)
    close(log_shift_density(field, shift, u), moved.log_prob(u.flatten(1)) - still.log_prob(u.flatten(1)), 1e-8)


@pytest.mark.parametrize("shape", [(9,), (4, 5)])
def test_the_estimate_of_gaussian_data_is_bayes_rule_with_dense_matrices(shape):
    dim, sigma = len(shape), torch.tensor([0.5, 2.0], dtype=torch.float64)
    data, noise = (PeriodicField(Matern(alpha, 1.5, dim=dim), dim=dim) for alpha in (3.0, 1.6))
    mean, v = torch.randn(shape, generator=seeded()).double(), torch.randn(2, *shape, generator=seeded()).double()
    of_data, of_noise = (sum_over_waves(measure.spectrum, shape, 2 * math.pi) for measure in (data, noise))
    expected = [mean.flatten() + of_data @ torch.linalg.pinv(of_data + s**2 * of_noise, rtol=1e-12) @ (each - mean).flatten()
                for s, each in zip(sigma, v)]
    close(gaussian_operator(data, noise, mean)(v, sigma).flatten(1), torch.stack(expected), 1e-8)


@pytest.mark.parametrize("weights", [None, [0.1, 0.9]])
def test_the_estimate_of_a_mixture_is_the_gradient_of_its_density(weights):
    "E(u | v) = v + sigma^2 C grad log p(v)."
    data, noise = (KernelField(kernel, 0.4, dim=1, jitter=1e-3).covariance((6,)) for kernel in ("matern 5/2", "matern 1/2"))
    means = torch.stack([torch.linspace(-1, 1, 6), torch.linspace(0.5, -1, 6)]).double()
    v, sigma = torch.randn(4, 6, generator=seeded(), dtype=torch.float64).requires_grad_(), 0.8
    shares = torch.tensor(weights or [0.5, 0.5], dtype=torch.float64)
    parts = torch.distributions.MultivariateNormal(means, data + sigma**2 * noise)
    density = torch.logsumexp(parts.log_prob(v[:, None]) + shares.log(), 1)
    expected = v + sigma**2 * torch.autograd.grad(density.sum(), v)[0] @ noise
    estimate = mixture_operator(means, data, noise, None if weights is None else shares)
    close(estimate(v.detach(), torch.full((4,), sigma)), expected.detach(), 1e-6)


def test_the_estimate_of_a_list_of_functions_weighs_them_by_bayes():
    field, sigma = KernelField("matern 1/2", 0.3, jitter=1e-3), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    functions, v = field.sample(4, (3, 4), seeded(), torch.float64), field.sample(3, (3, 4), torch.Generator().manual_seed(1), torch.float64)
    found, covariance = empirical_operator(functions, field)(v, sigma), field.covariance((3, 4))
    for s, each, estimate in zip(sigma, v, found):
        share = torch.stack([dense_normal(u, s**2 * covariance).log_prob(each.flatten()) for u in functions]).softmax(0)
        close(estimate, torch.einsum("m,mij->ij", share, functions), 1e-8)


def test_partial_sums_of_two_measures_are_written_out():
    one, other, shift = Matern(2.0, 3.0, dim=1), Matern(2.0, 4.0, dim=1), lambda squared: (1 + squared)**-3.0
    found = feldman_hajek(one, other, shift=shift, dim=1, doublings=6)
    assert found.waves == [2, 4, 8, 16, 32, 64]
    for reach, ratio, moved in zip(found.waves, found.covariances, found.means):
        inside = range(-reach + 1, reach)
        assert ratio == pytest.approx(sum(((k * k + 16)**-2 / (k * k + 9)**-2 - 1)**2 for k in inside))
        assert moved == pytest.approx(sum((1 + k * k)**-3 / (k * k + 9)**-2 for k in inside))
    square = feldman_hajek(Matern(2.0, 3.0), Matern(2.0, 4.0), doublings=5).covariances[0]
    assert square == pytest.approx(sum(((i * i + j * j + 16)**-2 / (i * i + j * j + 9)**-2 - 1)**2
                                       for i in (-1, 0, 1) for j in (-1, 0, 1)))


@pytest.mark.parametrize("other, shift, verdict", [
    (Matern(2.0, 4.0), None, "equivalent"), (Matern(2.0, 3.0, scale=1.01), None, "singular"), (Matern(2.1, 3.0), None, "singular"),
    (Matern(2.0, 3.0), lambda squared: (1 + squared)**-4.0, "equivalent"), (Matern(2.0, 3.0), lambda squared: (1 + squared)**-2.0, "singular")])
def test_verdicts_on_known_pairs(other, shift, verdict):
    assert feldman_hajek(Matern(2.0, 3.0), other, shift=shift, doublings=7).verdict == verdict


def test_sums_converge_if_their_increments_shrink():
    sums = lambda ratio: list(itertools.accumulate(ratio**j for j in range(9)))
    assert gaussian_fields._converges(sums(0.5)) and gaussian_fields._converges(sums(2**-0.25)) and gaussian_fields._converges([1.0] * 9)
    assert gaussian_fields._converges(sums(2**-0.01)) is False  # its increments tend to a constant, as those of a logarithm
    assert gaussian_fields._converges(sums(1.0)) is False and gaussian_fields._converges(sums(1.5)) is False
    assert gaussian_fields._converges(sums(2**-0.15)) is None


def test_the_half_plane_of_waves_has_the_law_of_the_whole_one():
    "A draw has half of the waves, each at twice its variance, over the area of the box."
    alpha, tau, shape, lengths = 2.0, 1.5, (6, 4), (2 * math.pi, 3.0)
    table = half_plane_amplitudes(shape, lengths, alpha, tau)
    numbers = [[0, 1, 2, -3, -2, -1], [0, 1, -2, -1]]
    expected = torch.zeros(shape, dtype=torch.float64)
    for (i, first), (j, second) in itertools.product(*map(enumerate, numbers)):
        size = first**2 + (2 * math.pi / 3 * second)**2
        if first + second > 0 or (first + second == 0 and first > 0):
            expected[i, j] = 24 * math.sqrt(2 / (6 * math.pi) * tau**2 * (size + tau**2)**-2)
    close(table, expected)
    factor = half_plane_field(table, torch.eye(48, dtype=torch.float64).reshape(48, *shape, 2)).flatten(1)
    assert (factor.T @ factor).diagonal().tolist() == pytest.approx([(expected**2).sum().item() / 24**2] * 24)


@pytest.mark.parametrize("index", [2.0, 1.5])
def test_a_stable_density_is_the_transform_of_its_law(index):
    x = torch.tensor([0.05, 0.5, 1.0, 3.0], dtype=torch.float64)
    wave = torch.linspace(0, 40, 200_001, dtype=torch.float64)
    expected = torch.trapezoid(torch.cos(x[:, None] * wave) * torch.exp(-wave**index), wave) / math.pi
    torch.testing.assert_close(stable_density(x, index, nodes=20_000), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(stable_density(x[1:], index), expected[1:], rtol=5e-3, atol=0)
    assert stable_density(torch.zeros(1), index) == stable_density(torch.full((1,), 0.01), index)


def test_amplitudes_of_cosines_are_roots_of_a_normal_density():
    place = math.pi * 0.2 * torch.arange(1, 6, dtype=torch.float64)
    density = torch.exp(-place**2 / 4) / (2 * math.sqrt(math.pi))
    expected = torch.sqrt(5 * 2 * math.pi * 0.2 / (1 + 0.2 * math.pi / 5) * density)
    torch.testing.assert_close(cosine_amplitudes(6, 0.2)[1:], expected, rtol=2e-3, atol=0)


def test_the_released_cosine_field_multiplies_amplitudes_along_the_axes():
    shape, field = (4, 5, 3), ReleasedCosineField(0.3, index=1.7, dim=3)
    first, second, third = (cosine_amplitudes(n, 0.3, 1.7) for n in shape)
    plain = torch.randn(2, *shape, generator=seeded(), dtype=torch.float64)
    expected = cosine_transform(plain, 3) * first[:, None, None] * second[:, None] * third
    close(field.color(plain), cosine_transform(expected, 3, inverse=True))


def test_draws_keep_their_long_waves_on_finer_grids():
    "White noise of the same size at each point is spread over more waves."
    field = PeriodicField(Matern(2.0, 3.0).unit())
    for n in (16, 32): close(field.eigenvalues((n, n), half=False)[:4, :4], field.eigenvalues((64, 64), half=False)[:4, :4], 0)
    grown = covariance_of_draws(PeriodicField(Matern(2.0, 1.5), cutoff=2), (10, 10)).reshape(10, 10, 10, 10)[0, 0]
    close(resample(covariance_of_draws(PeriodicField(Matern(2.0, 1.5), cutoff=2), (6, 6)).reshape(6, 6, 6, 6)[0, 0], (10, 10)), grown)
