"""Exact denoisers against integrals, and exact paths against their equation."""
import math

import pytest
import torch

from diffusion_papers.core.analytic import gaussian_denoiser, gaussian_flow, mixture_denoiser, ring, sample_mixture

double = lambda values: torch.tensor(values, dtype=torch.float64)
GRID = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
density = lambda x, mean, std: torch.exp(-((x - mean) / std) ** 2 / 2) / (std * math.sqrt(2 * math.pi))


def posterior_mean(prior, x, sigma):
    "E[x_0 | x_0 + sigma eps = x], by quadrature."
    weights = prior(GRID) * density(x, GRID, sigma)
    return ((weights * GRID).sum() / weights.sum()).item()


@pytest.mark.parametrize("x", [-2.0, 0.1, 1.7])
@pytest.mark.parametrize("sigma", [0.2, 1.0, 4.0])
def test_denoisers_are_posterior_means(x, sigma):
    at, level = torch.tensor([[x]], dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64)
    wanted = posterior_mean(lambda x0: density(x0, 0.4, 0.7), x, sigma)
    assert gaussian_denoiser(0.4, 0.7)(at, level).item() == pytest.approx(wanted, abs=1e-8)
    prior = lambda x0: 0.2 * density(x0, -1.5, 0.3) + 0.5 * density(x0, 0.5, 0.3) + 0.3 * density(x0, 2.0, 0.3)
    mixture = mixture_denoiser(torch.tensor([[-1.5], [0.5], [2.0]]), 0.3, torch.tensor([0.2, 0.5, 0.3]))
    assert mixture(at, level).item() == pytest.approx(posterior_mean(prior, x, sigma), abs=1e-6)


def test_distances_of_a_mixture_are_those_of_all_coordinates():
    "Along a line between two means of the plane a mixture is one of a line."
    means, x = double([[0.0, 0.0], [3.0, 4.0]]), double([[1.8, 2.4]])
    on_line = mixture_denoiser(double([[0.0], [5.0]]), 0.5)(double([[3.0]]), double([1.2]))
    assert mixture_denoiser(means, 0.5)(x, double([1.2])) == pytest.approx(on_line * double([[0.6, 0.8]]))


def test_the_flow_of_a_gaussian_solves_its_equation_and_starts_at_its_start():
    "dx/dsigma = (x - D(x, sigma)) / sigma."
    x, first, mean = double([[2.0, -1.0]]), double(3.0), double([0.4, 0.1])
    assert gaussian_flow(x, first, first, mean, 0.7) == pytest.approx(x)
    at = torch.tensor(0.6, dtype=torch.float64)
    there, slope = torch.func.jvp(lambda sigma: gaussian_flow(x, first, sigma, mean, 0.7), (at,), (torch.ones_like(at),))
    assert slope == pytest.approx((there - gaussian_denoiser(mean, 0.7)(there, at[None])) / at)


def test_samples_of_a_mixture_have_its_shares_means_and_spread():
    means = torch.tensor([[-5.0, 0.0], [5.0, 2.0]], dtype=torch.float64)
    samples = sample_mixture(20_000, means, 0.4, torch.Generator().manual_seed(0), torch.tensor([0.25, 0.75]))
    right = samples[samples[:, 0] > 0]
    assert samples.shape == (20_000, 2) and len(right) / 20_000 == pytest.approx(0.75, abs=0.01)
    assert right.mean(0) == pytest.approx(means[1], abs=0.015) and right.std(0) == pytest.approx(torch.full((2,), 0.4, dtype=torch.float64), abs=0.01)


def test_a_ring_goes_round_from_the_positive_axis():
    assert ring(4, 2.0) == pytest.approx(torch.tensor([[2, 0], [0, 2], [-2, 0], [0, -2]], dtype=torch.float64), abs=1e-12)
    assert ring().shape == (8, 2) and ring().norm(dim=1) == pytest.approx(torch.ones(8, dtype=torch.float64))
