"""Convolutions in Fourier space against the fast Fourier transform; layers against the same arithmetic, written out."""
import math

import pytest
import torch
from torch import nn

from diffusion_papers.topics import neural_operators as no

seeded = lambda seed=0: torch.Generator().manual_seed(seed)
normal = lambda *shape, seed=0: torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("points, modes", [(8, 5), (8, 3), (7, 4), (7, 1), (1, 1), (2, 2)])
def test_matrices_are_the_real_fourier_transform_and_back(points, modes):
    forward, back = no.fourier_matrices(points, modes, torch.zeros((), dtype=torch.float64))
    u = normal(points, 3)
    spectrum = torch.fft.rfft(u, dim=0)
    torch.testing.assert_close((forward @ u).unflatten(0, (modes, 2)), torch.view_as_real(spectrum[:modes]).transpose(1, 2))
    given = torch.view_as_complex(normal(modes, 3, 2, seed=1))
    whole = torch.cat([given, torch.zeros(points // 2 + 1 - modes, 3)])
    torch.testing.assert_close(back @ torch.view_as_real(given).transpose(1, 2).flatten(0, 1), torch.fft.irfft(whole, n=points, dim=0))


def test_points_have_so_many_modes():
    for points, modes in ((8, 6), (7, 5), (1, 2)):
        with pytest.raises(ValueError, match=f"modes: {points} points have {modes - 1} Fourier modes, {modes} were asked for"):
            no.fourier_matrices(points, modes, torch.zeros(()))


@pytest.mark.parametrize("points, modes", [(8, 5), (8, 2), (5, 3), (4, 3)])
@pytest.mark.parametrize("rest", [(), (3, 2)])
def test_a_temporal_convolution_multiplies_each_mode_by_a_matrix(points, modes, rest):
    "By (C_in, C_out), complex."
    u, weight = normal(2, points, 3, *rest), normal(3, 4, modes, 2, seed=1)
    spectrum, mixed = torch.fft.rfft(u, dim=1), torch.zeros(2, points // 2 + 1, 4, *rest, dtype=torch.complex128)
    for mode in range(modes):
        for i in range(3):
            for o in range(4): mixed[:, mode, o] += spectrum[:, mode, i] * torch.complex(*weight[i, o, mode])
    torch.testing.assert_close(no.spectral_convolution(u, weight), torch.fft.irfft(mixed, n=points, dim=1))


def test_a_temporal_convolution_is_one_in_time():
    "With the kernel's own values: the circular sum, point by point."
    u, kernel = normal(1, 6, 1), normal(6)
    weight = torch.view_as_real(torch.fft.rfft(kernel))[None, None]
    wanted = [sum(kernel[lag] * u[0, (place - lag) % 6, 0] for lag in range(6)) for place in range(6)]
    torch.testing.assert_close(no.spectral_convolution(u, weight)[0, :, 0], torch.stack(wanted))


def test_a_temporal_layer_starts_with_uniform_weights_near_zero():
    torch.manual_seed(0)
    weight = no.SpectralConv1d(30, 50, 3).weight
    assert weight.shape == (30, 50, 3, 2) and weight.min() >= 0 and weight.max() <= 1 / 1500
    assert weight.mean().item() == pytest.approx(0.5 / 1500, rel=0.02) and weight.max() > 0.99 / 1500
    u = normal(2, 7, 30)
    layer = no.SpectralConv1d(30, 50, 3).double()
    assert torch.equal(layer(u), no.spectral_convolution(u, layer.weight))


def test_shapes_that_do_not_fit_are_named():
    for shape in ((2, 8), (2, 8, 4)):
        with pytest.raises(ValueError, match=r"u: expected shape \(B, T, 3, \.\.\.\)"):
            no.spectral_convolution(torch.zeros(shape), torch.zeros(3, 2, 2, 2))
    with pytest.raises(ValueError, match=r"u: expected shape \(B, 3, n_1, n_2\)"):
        no.spectral_convolution_2d(torch.zeros(2, 2, 8, 8), torch.zeros(2, 3, 3, 2, 2))


@pytest.mark.parametrize("points", [7, 8])
def test_the_spectrum_shares_out_the_squared_values(points):
    "Waves of known height: a constant c has c^2, a wave of height a a^2 / 2, that of alternating signs a^2."
    place, heights = torch.arange(points, dtype=torch.float64), {0: 3.0, 1: 2.0, points // 2: 5.0}
    waves = {number: height * torch.cos(2 * math.pi * number * place / points) for number, height in heights.items()}
    shares = torch.zeros(points // 2 + 1, dtype=torch.float64)
    for number, height in heights.items(): shares[number] = height**2 / (1 if number in (0, points / 2) else 2)
    found = no.temporal_spectrum(sum(waves.values())[None, :, None])
    torch.testing.assert_close(found, shares / shares.sum())
    states = normal(5, points, 2, 3)
    whole = torch.fft.fft(states, dim=1).abs().square().sum((0, 2, 3))
    both = [whole[number] + (whole[-number] if number not in (0, points / 2) else 0) for number in range(points // 2 + 1)]
    torch.testing.assert_close(no.temporal_spectrum(states), torch.stack(both) / whole.sum())


@pytest.mark.parametrize("modes", [1, 2, 3])
def test_the_lowest_modes_are_a_projection(modes):
    states = normal(2, 7, 2, 3)
    spectrum = torch.fft.rfft(states, dim=1)
    spectrum[:, modes:] = 0
    torch.testing.assert_close(no.lowest_modes(states, modes), torch.fft.irfft(spectrum, n=7, dim=1))


# ---- in the plane


def row_numbers(rows): return [*range(rows - rows // 2), *range(-(rows // 2), 0)]


@pytest.mark.parametrize("rows, numbers", [(1, [0]), (2, [0, -1]), (3, [0, 1, -1]), (4, [0, 1, -2, -1]), (5, [0, 1, 2, -2, -1])])
def test_waves_come_in_this_order(rows, numbers): assert no._rows(rows).tolist() == numbers


@pytest.mark.parametrize("size", [(8, 6), (7, 9), (5, 8)])
@pytest.mark.parametrize("rows, columns", [(5, 3), (4, 4), (1, 1), (3, 2)])
def test_waves_are_coefficients_of_the_fourier_transform(size, rows, columns):
    "Divided by the number of points, (columns, rows)."
    u = normal(2, 3, *size)
    wanted = torch.fft.fft2(u, norm="forward")[:, :, row_numbers(rows)][..., :columns].transpose(2, 3)
    torch.testing.assert_close(no.waves_2d(u, rows, columns), wanted)


@pytest.mark.parametrize("size", [(8, 6), (7, 9), (6, 12)])
@pytest.mark.parametrize("rows, columns", [(5, 3), (4, 4), (1, 2)])
def test_waves_become_values_on_any_grid(size, rows, columns):
    waves = torch.view_as_complex(normal(2, 3, columns, rows, 2))
    spectrum = torch.zeros(2, 3, size[0], size[1] // 2 + 1, dtype=torch.complex128)
    for place, number in enumerate(row_numbers(rows)): spectrum[:, :, number, :columns] = waves[..., place]
    torch.testing.assert_close(no.values_2d(waves, size), torch.fft.irfft2(spectrum, s=size, norm="forward"))


@pytest.mark.parametrize("old, size", [(8, (8, 6)), (8, (12, 6)), (8, (6, 6)), (7, (14, 9))])
def test_misplaced_waves_lie_where_the_other_grid_has_them(old, size):
    "A negative number counts from the other grid's end; what lies beyond this one is lost."
    waves, rows = torch.view_as_complex(normal(2, 3, 3, 5, 2)), row_numbers(5)
    spectrum = torch.zeros(2, 3, size[0], size[1] // 2 + 1, dtype=torch.complex128)
    for place, number in enumerate(rows):
        if number % old < size[0]: spectrum[:, :, number % old, :3] = waves[..., place]
    torch.testing.assert_close(no.values_2d(waves, size, old), torch.fft.irfft2(spectrum, s=size, norm="forward"))


def test_a_grid_with_too_few_waves_is_named():
    for size, rows in (((4, 8), 5), ((3, 8), 4), ((2, 8), 3)):
        with pytest.raises(ValueError, match=f"modes: a grid of {size[0]} points along the first axis has no {rows} waves"):
            no.waves_2d(torch.zeros(1, 1, *size), rows, 2)
        with pytest.raises(ValueError, match=f"has no {rows} waves"): no.values_2d(torch.zeros(1, 1, 2, rows, dtype=torch.complex64), size)
    assert no.waves_2d(torch.zeros(1, 1, 4, 8), 4, 5).shape == (1, 1, 5, 4)
    with pytest.raises(ValueError, match="modes: 8 points have 5"): no.waves_2d(torch.zeros(1, 1, 8, 8), 3, 6)


@pytest.mark.parametrize("size, misplaced", [(None, False), ((12, 10), False), ((12, 10), True), (None, True)])
def test_a_convolution_in_the_plane_multiplies_each_wave_by_a_matrix(size, misplaced):
    "By (C_out, C_in), complex; the result lies on the grid that is asked for."
    u, weight = normal(2, 3, 8, 6), normal(4, 3, 5, 3, 2, seed=1)
    spectrum, new = torch.fft.fft2(u, norm="forward"), size or (8, 6)
    mixed = torch.zeros(2, 4, new[0], new[1] // 2 + 1, dtype=torch.complex128)
    for place, row in enumerate(row_numbers(5)):
        where = row % 8 if misplaced else row
        for column in range(3): mixed[:, :, where, column] = spectrum[:, :, row, column] @ torch.view_as_complex(weight[:, :, place, column]).T
    found = no.spectral_convolution_2d(u, weight, size, misplaced=True) if misplaced else no.spectral_convolution_2d(u, weight, size)
    torch.testing.assert_close(found, torch.fft.irfft2(mixed, s=new, norm="forward"))


def test_autocast_leaves_a_convolution_in_the_plane_alone():
    u, weight = normal(2, 3, 8, 8), normal(4, 3, 5, 3, 2, seed=1)
    with torch.autocast("cpu", torch.bfloat16): found = no.spectral_convolution_2d(u.float(), weight.float())
    torch.testing.assert_close(found, no.spectral_convolution_2d(u, weight).float(), rtol=1e-5, atol=1e-5)


def test_a_layer_in_the_plane_keeps_the_size_of_a_function():
    "All waves kept: weights with parts of variance 1 / (2 C_in) each. A seventh lies in the first column, whose waves are real: half of it is lost."
    torch.manual_seed(0)
    layer = no.SpectralConv2d(20, 30, 3)
    assert layer.weight.shape == (30, 20, 7, 4, 2) and layer.weight.std().item() == pytest.approx(math.sqrt(1 / 40), rel=0.01)
    u = torch.randn(50, 20, 7, 7, generator=seeded())  # 7 points have the waves 0 to 3 alone
    assert layer(u).square().mean().item() == pytest.approx(13 / 14, rel=0.02)


def randomised(module):
    for number, parameter in enumerate(module.parameters()): nn.init.normal_(parameter, std=0.3, generator=seeded(number))
    return module.double().requires_grad_(False)


def pointwise(layer, u): return torch.einsum("oi,bihw->bohw", layer.weight[:, :, 0, 0], u) + layer.bias[:, None, None]


def gelu(u): return u * (1 + torch.erf(u / math.sqrt(2))) / 2


def test_a_block_of_the_operator_is_scaled_and_shifted_between_its_maps():
    block, u, embedding = randomised(no.FnoBlock(4, 2, 6)), normal(2, 4, 8, 8), normal(2, 6, seed=1)
    film = embedding @ block.film.weight.T + block.film.bias
    inner = no.spectral_convolution_2d(u, block.spectral.weight) + pointwise(block.pointwise, u)
    inner = inner * (1 + film[:, :4, None, None]) + film[:, 4:, None, None]
    torch.testing.assert_close(block(u, embedding), u + pointwise(block.mix, gelu(inner)))


def test_an_operator_hears_its_label_and_lifts_and_projects_its_function():
    config = no.FnoConfig(channels=2, width=4, modes=2, blocks=2, waves=6)
    operator, u, label = randomised(no.Fno(config)), normal(2, 2, 8, 8), torch.tensor([0.5, 7.0], dtype=torch.float64)
    angle = label[:, None] * torch.tensor([1.0, 1e-2, 1e-4])
    silu, (first, _, second, _) = (lambda x: x * x.sigmoid()), operator.embedding
    embedding = silu(silu(torch.cat([angle.sin(), angle.cos()], 1) @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    hidden = pointwise(operator.lift, u)
    for block in operator.blocks: hidden = block(hidden, embedding)
    wanted = pointwise(operator.project[2], gelu(pointwise(operator.project[0], hidden)))
    assert len(operator.blocks) == 2 and first.out_features == 12 and operator.project[0].out_channels == 8
    torch.testing.assert_close(operator(u, label), wanted)


def test_an_operator_answers_alike_on_a_finer_grid():
    "A block without its pointwise nonlinearity is the same function: here, its convolution."
    layer, place = no.SpectralConv2d(1, 1, 2).double().requires_grad_(False), lambda n: torch.arange(n, dtype=torch.float64) / n * 2 * math.pi
    function = lambda n: (torch.cos(place(n))[:, None] * torch.sin(2 * place(n)) + 0.5 * torch.sin(2 * place(n) - 0.3)[:, None])[None, None]
    torch.testing.assert_close(layer(function(24))[..., ::3, ::3], layer(function(8)))


def test_no_modes_are_refused():
    for layer in (no.SpectralConv1d, no.SpectralConv2d):
        with pytest.raises(ValueError, match="modes"): layer(1, 1, 0)
        assert layer(1, 1, 1).weight.numel() == (2 if layer is no.SpectralConv1d else 12)
    with pytest.raises(ValueError, match="modes"): no.fourier_matrices(4, 0, torch.zeros(()))
