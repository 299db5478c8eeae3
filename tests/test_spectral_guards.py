"""Functions on grids: what has no trace is refused in every dimension; half precision is computed in float32, complex values are named."""
import math

import pytest
import torch

from diffusion_papers.topics.fluids import NavierStokes, energy, enstrophy
from diffusion_papers.topics.gaussian_fields import (CosineField, KernelField, Matern, PeriodicField, ReleasedCosineField,
                                                   SquaredExponential, feldman_hajek, half_plane_amplitudes, half_plane_field,
                                                   inner_product, log_shift_density)
from diffusion_papers.topics.neural_operators import SpectralConv1d, SpectralConv2d, spectral_convolution_2d, values_2d, waves_2d
from diffusion_papers.topics.spectral import autocovariance, cosine_transform, energy_spectrum, real_values, resample

seeded = lambda: torch.Generator().manual_seed(0)
PLANE = torch.randn(2, 8, 8, generator=seeded())


@pytest.mark.parametrize("field", [PeriodicField, CosineField])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_field_without_a_trace_is_refused_in_every_dimension(field, dim):
    with pytest.raises(ValueError, match=f"alpha: expected above {dim / 2:g} = d/2"): Matern(dim / 2, 3.0, dim=dim)
    assert field(Matern(dim / 2 + 0.1, 3.0, dim=dim), dim=dim).dim == dim
    assert field(Matern(dim / 2 - 0.2, 3.0, dim=dim, allow_rough=True), dim=dim)  # who asks for it gets it
    for other in {1, 2, 3} - {dim}:
        for spectrum in (Matern(2.0, 3.0, dim=other), SquaredExponential(0.1, dim=other)):
            with pytest.raises(ValueError, match=f"spectrum: expected one for {dim} dimensions, got .* for {other}; say .*dim={dim}"):
                field(spectrum, dim=dim)


@pytest.mark.parametrize("dim, sizes", [(1, (256, 1024, 4096)), (2, (32, 128, 512)), (3, (16, 32, 64))])
def test_the_guard_is_where_the_trace_diverges(dim, sizes):
    "Just above d/2 the trace's growth slows down; at d/2 each doubling adds the same, as of a logarithm."
    def growth(alpha):
        field = PeriodicField(Matern(alpha, 1.0, dim=dim, allow_rough=True), dim=dim)
        a, b, c = (field.trace((n,) * dim) for n in sizes)
        return (c - b) / (b - a)
    assert growth(dim / 2 + 0.5) < 0.75 and growth(dim / 2) > 0.9 and growth(dim / 2 - 0.3) > 1.2


def test_comparisons_name_a_spectrum_of_another_dimension():
    with pytest.raises(ValueError, match="second: expected one for 1 dimensions"):
        feldman_hajek(Matern(2.0, 3.0, dim=1), Matern(2.0, 3.0), dim=1)
    assert feldman_hajek(Matern(2.0, 3.0, dim=1), Matern(2.0, 4.0, dim=1), dim=1).verdict == "equivalent"
    with pytest.raises(ValueError, match="dim"): Matern(2.0, 3.0, dim=0)


FIELDS = {"waves": PeriodicField(Matern(2.0, 3.0)), "cosines": CosineField(Matern(2.0, 3.0)),
          "kernel": KernelField("matern 1/2", 0.3), "released": ReleasedCosineField()}


@pytest.mark.parametrize("name", FIELDS)
def test_a_grid_has_the_axes_of_the_box(name):
    for shape in ((8,), (8, 8, 8)):
        with pytest.raises(ValueError, match="shape: expected 2 numbers of points"): FIELDS[name].sample(2, shape, seeded())
        with pytest.raises(ValueError, match="shape: expected 2 numbers of points"): FIELDS[name].trace(shape)
    with pytest.raises(ValueError, match="u: expected functions on a grid of 2 axes"): FIELDS[name].apply(torch.ones(8))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fields_are_drawn_in_every_precision(name, dtype):
    drawn = FIELDS[name].sample(3, (8, 8), seeded(), dtype)
    assert drawn.shape == (3, 8, 8) and drawn.dtype == dtype and torch.isfinite(drawn).all()


flow = NavierStokes((8, 8), 1e-2)
FUNCTIONS = {
    "cosine_transform": ("u", cosine_transform), "inverse": ("u", lambda u: cosine_transform(u, inverse=True)),
    "resample": ("u", lambda u: resample(u, (12, 6))), "energy_spectrum": ("u", energy_spectrum), "autocovariance": ("u", autocovariance),
    "waves_2d": ("u", lambda u: waves_2d(u[:, None], 3, 2).abs()),
    "spectral_convolution_2d": ("u", lambda u: spectral_convolution_2d(u[:, None], torch.ones(1, 1, 3, 2, 2))),
    "enstrophy": ("w", enstrophy), "energy": ("w", lambda w: energy(flow, w - w.mean((1, 2), keepdim=True))),
    "inner_product": ("a", lambda u: inner_product(FIELDS["waves"], u, PLANE)),
    "log_shift_density": ("shift", lambda u: log_shift_density(FIELDS["waves"], u, PLANE)),
    "apply": ("u", FIELDS["waves"].apply), "color": ("white", FIELDS["waves"].color), "kernel": ("white", FIELDS["kernel"].color),
    "kernel, modes": ("u", FIELDS["kernel"].modes), "waves, modes": ("u", lambda u: FIELDS["waves"].modes(u).abs()),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision_is_computed_in_float32(name, dtype):
    function, half = FUNCTIONS[name][1], PLANE.to(dtype)
    found, wanted = function(half), function(half.float())
    assert found.dtype in (torch.float32, torch.float64) and (found - wanted).abs().max() <= 1e-2 * wanted.abs().max()
    if "energy" != name: assert torch.equal(found, wanted)  # (the test itself takes the mean away in half precision)


@pytest.mark.parametrize("wrong", [PLANE.to(torch.complex64), PLANE.long()], ids=["complex", "whole"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_kinds_are_refused_by_the_name_of_their_argument(name, wrong):
    argument, function = FUNCTIONS[name]
    if name == "energy": wrong, function = wrong, lambda w: energy(flow, w)
    with pytest.raises(TypeError, match=rf"^{argument}: expected (real )?floating-point values, got {wrong.dtype}"): function(wrong)


@pytest.mark.parametrize("name", ["resample", "energy_spectrum", "autocovariance", "cosine_transform", "apply"])
def test_too_few_axes_are_named(name):
    with pytest.raises(ValueError, match="u: expected functions on a grid of 2 axes, got shape"): FUNCTIONS[name][1](torch.ones(8))


def test_layers_name_what_they_cannot_transform():
    with pytest.raises(TypeError, match="u: expected real"): SpectralConv1d(1, 1, 2)(torch.ones(2, 8, 1, dtype=torch.complex64))
    with pytest.raises(TypeError, match="u: expected real"): SpectralConv2d(1, 1, 2)(torch.ones(2, 1, 8, 8, dtype=torch.complex64))
    with pytest.raises(TypeError, match="waves: expected complex"): values_2d(torch.ones(1, 1, 2, 3), (8, 8))
    with pytest.raises(TypeError, match="normals: expected real"):
        half_plane_field(half_plane_amplitudes((8, 8), (1.0, 1.0), 2.0, 3.0), torch.ones(8, 8, dtype=torch.complex64))
    with pytest.raises(ValueError, match="dtype: expected one of torch.float32, torch.float64"): NavierStokes((8, 8), 1e-2, dtype=torch.float16)


def test_real_functions_keep_their_bits():
    for dtype in (torch.float32, torch.float64):
        u = PLANE.to(dtype)
        assert real_values(u, "u", 2) is u
    assert math.isclose(energy_spectrum(PLANE).sum().item(), 2 * PLANE.square().mean().item(), rel_tol=1e-5)
