"""Waves on grids, number by number: against NumPy, SciPy, and sums written out."""
import itertools
import math

import numpy as np
import pytest
import torch

from diffusion_papers.topics.spectral import autocovariance, cosine_transform, energy_spectrum, resample, wave_numbers

seeded = lambda: torch.Generator().manual_seed(0)
SHAPES = [(8,), (7,), (6, 8), (5, 8), (6, 7), (4, 5, 6)]


def plane_wave(shape, number, phase=0.3):
    "cos(k x + phase) on a torus."
    places = torch.meshgrid(*(2 * math.pi * torch.arange(n, dtype=torch.float64) / n for n in shape), indexing="ij")
    return torch.cos(sum(k * place for k, place in zip(number, places)) + phase)


@pytest.mark.parametrize("shape", SHAPES)
def test_wave_numbers_are_those_of_numpy(shape):
    for half in (True, False):
        found, last = wave_numbers(shape, half=half), len(shape) - 1
        for axis, (n, number) in enumerate(zip(shape, found)):
            one = half and axis == last
            expected = (np.fft.rfftfreq if one else np.fft.fftfreq)(n, 1 / n)
            assert number.flatten().tolist() == expected.round().tolist() and number.dtype == torch.float64
            assert list(number.shape) == [len(expected) if i == axis else 1 for i in range(len(shape))]


def test_only_the_wave_of_an_even_grids_edge_can_be_left_out():
    assert wave_numbers((8,), half=False, nyquist=False)[0].tolist() == [0, 1, 2, 3, 0, -3, -2, -1]
    assert wave_numbers((8,), nyquist=False)[0].tolist() == [0, 1, 2, 3, 0]
    assert wave_numbers((7,), half=False, nyquist=False)[0].tolist() == [0, 1, 2, 3, -3, -2, -1]


@pytest.mark.parametrize("dim, shape", [(1, (2, 7)), (2, (2, 6, 9)), (3, (2, 4, 5, 6))])
def test_the_cosine_transform_is_scipys(dim, shape):
    fft = pytest.importorskip("scipy.fft")
    u = torch.randn(shape, generator=seeded(), dtype=torch.float64)
    axes = tuple(range(-dim, 0))
    torch.testing.assert_close(cosine_transform(u, dim), torch.from_numpy(fft.dctn(u.numpy(), axes=axes, norm="ortho")))
    torch.testing.assert_close(cosine_transform(u, dim, inverse=True), torch.from_numpy(fft.idctn(u.numpy(), axes=axes, norm="ortho")))


def test_a_cosine_has_one_coefficient():
    place = (torch.arange(9, dtype=torch.float64) + 0.5) / 9
    found = cosine_transform(torch.stack([torch.ones(9, dtype=torch.float64), torch.cos(4 * math.pi * place)]), 1)
    expected = torch.zeros(2, 9, dtype=torch.float64)
    expected[0, 0], expected[1, 4] = 3.0, math.sqrt(4.5)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("before, after", [((16, 16), (12, 24)), ((15, 16), (21, 11)), ((12, 15), (16, 16)), ((16, 16), (16, 9))])
def test_a_wave_keeps_its_place_and_height_on_another_grid(before, after):
    for number in ((0, 0), (-3, 2), (4, -4), (0, 3), (5, 1)):
        torch.testing.assert_close(resample(plane_wave(before, number), after), plane_wave(after, number), atol=1e-12, rtol=0)


def test_what_the_smaller_grid_does_not_carry_is_lost():
    "Half of its points is too many periods, whichever of the two grids is the smaller."
    for number, lost in ((3, False), (4, True), (5, True)):
        kept = 0.0 if lost else 1.0
        torch.testing.assert_close(resample(plane_wave((16,), (number,)), (8,)), kept * plane_wave((8,), (number,)), atol=1e-12, rtol=0)
    assert resample(plane_wave((8,), (4,)), (16,)).abs().max() < 1e-12
    torch.testing.assert_close(resample(plane_wave((16,), (4,)), (9,)), plane_wave((9,), (4,)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_energy_of_a_shell_is_a_sum_over_all_its_waves(shape):
    u = torch.randn(3, *shape, generator=seeded(), dtype=torch.float64)
    whole, expected = np.abs(np.fft.fftn(u.numpy(), axes=range(1, u.ndim)) / math.prod(shape))**2, {}
    numbers = [np.fft.fftfreq(n, 1 / n).round() for n in shape]
    for place in itertools.product(*map(range, shape)):
        length = round(math.sqrt(sum(number[i]**2 for number, i in zip(numbers, place))))
        expected[length] = expected.get(length, 0) + whole[(slice(None), *place)]
    found = energy_spectrum(u, len(shape))
    assert found.shape == (3, max(expected) + 1)
    for length in range(found.shape[1]): assert found[:, length].numpy() == pytest.approx(expected.get(length, np.zeros(3)), abs=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_autocovariance_is_a_mean_over_places(shape):
    u, axes = torch.randn(2, *shape, generator=seeded()).double(), tuple(range(1, len(shape) + 1))
    found = autocovariance(u, len(shape))
    for shift in itertools.islice(itertools.product(*map(range, shape)), 0, None, 3):
        moved = (u * u.roll([-r for r in shift], axes)).mean(axes)
        torch.testing.assert_close(found[(slice(None), *shift)], moved, atol=1e-12, rtol=0)
