"""Published networks on functions, layer by layer: against whole Fourier transforms and loops written out."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffusion_papers.topics.operator_networks import (BiasedSpectralConv, FnoUNet, FnoUNetConfig, Gano, GanoConfig, Resampled,
                                                       SpectralGroupNorm, TimedBlock, TuckerKernel, TwoCornerConv, UBlock, UShapedConfig,
                                                       UShapedOperator, _low_pass, places, resampling_matrix, tucker_ranks,
                                                       without_aliases)

close = lambda found, expected, tolerance=1e-10: torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def draws(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(network, seed=0):
    "The network in float64, every parameter another one than it began with."
    generator = torch.Generator().manual_seed(seed)
    network = network.double().requires_grad_(False)
    for p in network.parameters(): p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return network.eval()


def convolved(u, weight, size=None):
    "A spectral convolution by whole transforms; weight (out, in, rows, columns), its second half of rows for negative waves."
    (n, m), size, half = u.shape[2:], size or u.shape[2:], weight.shape[2] // 2
    waves, rows = torch.fft.fft2(u, norm="forward"), [*range(weight.shape[2] - half), *range(-half, 0)]
    out = torch.zeros(len(u), weight.shape[0], *size, dtype=torch.complex128)
    for row, k in enumerate(rows):
        for column in range(weight.shape[3]):
            value = torch.einsum("oi,bi->bo", weight[:, :, row, column], waves[:, :, k % n, column % m])
            angle = 2 * math.pi * (k * torch.arange(size[0])[:, None].double() / size[0] + column * torch.arange(size[1]).double() / size[1])
            out += (2 if column else 1) * value[..., None, None] * torch.polar(torch.ones_like(angle), angle)
    return out.real


def pointwise(layer, u):
    found = torch.einsum("oi,bixy->boxy", layer.weight[..., 0, 0], u)
    return found if layer.bias is None else found + layer.bias[:, None, None]


def resized(u, size):
    return u if u.shape[2] == size else F.interpolate(u, (size, size), mode="bicubic", align_corners=True, antialias=True)


def everywhere(linear, u): return torch.einsum("oi,bixy->boxy", linear.weight, u) + (0 if linear.bias is None else linear.bias[:, None, None])


@pytest.mark.parametrize("reach", [4, 9, 16])  # three branches of Kaiser's rule
def test_the_low_pass_is_kaisers_averaged_over_two_places(reach):
    windows, signal = pytest.importorskip("scipy.signal.windows"), pytest.importorskip("scipy.signal")
    attenuation = signal.kaiser_atten(2 * reach + 1, 2**0.3 - 1)
    sinc = windows.kaiser(2 * reach + 1, signal.kaiser_beta(attenuation)) * np.sinc(np.arange(-reach, reach + 1) / 2)
    sinc /= sinc.sum()
    doubled = np.concatenate([sinc[:reach + 1], sinc[reach:]])  # the middle stands twice
    expected = np.convolve(doubled, [1, 1]) / (2 * sinc[reach:].sum() * (5 * math.pi)**0.25)
    assert _low_pass(reach).numpy() == pytest.approx(expected, abs=1e-9) and len(expected) == 2 * reach + 3


@pytest.mark.parametrize("finer, points", [(True, 7), (True, 16), (False, 6), (False, 16)])
def test_a_change_of_grid_is_a_filter_over_mirror_images(finer, points):
    kernel, u = _low_pass(9).numpy(), draws(points).numpy()
    x = np.pad(u, 4, mode="reflect")
    if finer: x = np.stack([2 * x, 0 * x], 1).ravel()
    y = np.convolve(np.pad(x, 10, mode="symmetric"), kernel[::-1], mode="valid")
    expected = y[8:-8] if finer else y[4:-4:2]
    assert (resampling_matrix(points, finer).numpy() @ u) == pytest.approx(expected) and len(expected) == (2 * points if finer else points // 2)


def test_both_axes_change_their_grid():
    u = draws(1, 1, 6, 8)
    first, second = resampling_matrix(6, True), resampling_matrix(8, True)
    close(without_aliases(u, True), torch.einsum("ax,bcxy,dy->bcad", first, u, second))
    assert without_aliases(torch.ones(1, 1, 16, 16, dtype=torch.float64), True).mean().item() == pytest.approx(1.00925, abs=1e-5)
    wave = lambda k: torch.cos(2 * math.pi * k * (torch.arange(32).double() + 0.5) / 32).expand(1, 1, 32, 32)
    fast, slow = (without_aliases(wave(k), False)[..., 3:-3].abs().max() for k in (13, 2))
    assert fast < 0.05 and slow > 0.9


def test_the_norm_divides_each_group_by_the_root_of_its_waves_energies():
    norm, u = shaken(SpectralGroupNorm(2, 4, 6)), draws(3, 4, 8, 9)
    waves = torch.fft.rfft2(u, norm="forward")
    kept = torch.zeros(8, 5, dtype=torch.bool)
    kept[[0, 1, 2, -3, -2, -1], :4] = True
    low, expected = waves * kept, torch.empty_like(u)
    for channel in range(4):
        group = low[:, channel // 2 * 2:channel // 2 * 2 + 2]
        size = group.abs().square().sum((1, 2, 3)).sqrt()[:, None, None]
        columns = torch.fft.irfft2(low[:, channel], s=(8, 9), norm="forward")
        expected[:, channel] = norm.weight[0, channel] * columns / size + norm.bias[0, channel]
    close(norm(u), expected)


def test_a_layer_adds_a_convolution_in_space_one_at_each_point_and_a_bias():
    layer, u = shaken(BiasedSpectralConv(3, 2, 6)), draws(2, 3, 8, 9)
    close(layer(u), convolved(u, torch.view_as_complex(layer.weight)) + pointwise(layer.pointwise, u) + layer.bias)
    torch.manual_seed(0)
    assert BiasedSpectralConv(64, 64, 8).weight.std().item() == pytest.approx(math.sqrt(2) / 8, rel=5e-3)
    assert TwoCornerConv(64, 32, 6).positive.std().item() == pytest.approx(1 / math.sqrt(2 * 64), rel=5e-3)


@pytest.mark.parametrize("finer", [True, False])
def test_a_grid_is_changed_before_the_convolution(finer):
    part, u = shaken(Resampled(3, 4, finer)), draws(2, 3, 12, 12)
    moved = without_aliases(u, finer)
    close(part(u), convolved(moved, torch.view_as_complex(part.conv.weight)) + pointwise(part.conv.pointwise, moved) + part.conv.bias)


def timed(block, u, embedding):
    "A timed block, written out."
    silu = lambda x: x * torch.sigmoid(x)
    conv = lambda layer, x: convolved(x, torch.view_as_complex(layer.weight)) + pointwise(layer.pointwise, x) + layer.bias
    hidden = conv(block.conv1, silu(block.norm1(u)))
    scale, shift = (silu(embedding) @ block.time.weight.T + block.time.bias).split(hidden.shape[1], dim=1)
    hidden = conv(block.conv2, silu(block.norm2(hidden) * (1 + scale[..., None, None]) + shift[..., None, None]))
    return hidden + (u if u.shape[1] == hidden.shape[1] else pointwise(block.shortcut, u))


@pytest.mark.parametrize("channels", [(4, 6), (4, 4)])
def test_a_block_is_scaled_and_shifted_by_the_time(channels):
    block, u, embedding = shaken(TimedBlock(*channels, 4, 2, 5)), draws(2, channels[0], 8, 8), draws(2, 5, seed=1)
    close(block(u, embedding), timed(block, u, embedding))


def test_the_unet_keeps_what_went_in_for_the_way_up():
    config = FnoUNetConfig(width=4, modes=8, multipliers=(1, 2, 3), blocks=1, groups=2)
    network, u, time = shaken(FnoUNet(config)), draws(2, 1, 20, 20), torch.tensor([0.2, 0.9], dtype=torch.float64)
    found = network(u, time)
    angle = time[:, None] * torch.tensor([1.0, 1e-4], dtype=torch.float64)
    first, _, second = network.time
    hidden = torch.cat([angle.sin(), angle.cos()], 1) @ first.weight.T + first.bias
    embedding = (hidden * torch.sigmoid(hidden)) @ second.weight.T + second.bias
    row = (torch.arange(20).double() / 20)[:, None].expand(20, 20)
    x = pointwise(network.lift, torch.cat([u, torch.stack([row, row.T]).expand(2, 2, 20, 20)], 1))
    a = timed(network.down[0], x, embedding); half = network.down[1](a)
    b = timed(network.down[2], half, embedding); quarter = network.down[3](b)
    c = timed(network.down[4], quarter, embedding)
    y = timed(network.middle[1], timed(network.middle[0], c, embedding), embedding)
    together = lambda part, y, z: timed(network.up[part], torch.cat([y, z], 1), embedding)
    y = network.up[2](together(1, together(0, y, c), quarter))
    y = network.up[5](together(4, together(3, y, b), half))
    y = together(7, together(6, y, a), x)
    close(found, pointwise(network.project, y * torch.sigmoid(y)), 1e-6)  # the frequencies of the time are float32
    modes = [part.conv.weight.shape[2] for part in [*network.down, *network.up] if isinstance(part, Resampled)]
    assert modes == [4, 2, 2, 4] and half.shape[2] == 10 and quarter.shape[2] == 5


def test_places_are_shares_of_a_torus_or_of_a_box_with_its_end():
    u = torch.zeros(2, 1, 4, 5)
    assert places(u)[1, 0, :, 3].tolist() == [0, 0.25, 0.5, 0.75] and places(u)[0, 1, 2].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert places(u, end=True)[1, 0, :, 3].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1]) and places(u, end=True)[0, 1, 2, -1] == 1


@pytest.mark.parametrize("shape, fraction", [((128, 128, 32, 32), 0.1), ((16, 24, 8, 8), 0.5), ((8, 8, 4, 4), 0.02), ((30, 20, 10, 10), 0.9)])
def test_ranks_make_core_and_factors_have_their_share_of_the_numbers(shape, fraction):
    optimize = pytest.importorskip("scipy.optimize")
    numbers = lambda scale: math.prod(n * scale for n in shape) + sum(n * n * scale for n in shape)
    scale = optimize.brentq(lambda scale: numbers(scale) - fraction * math.prod(shape), 0, 2)
    assert tucker_ranks(shape, fraction) == tuple(max(round(n * scale), 1) for n in shape)


def test_a_kernel_is_its_core_times_a_matrix_for_each_axis():
    kernel = TuckerKernel((6, 5, 4, 3), 0.5).double()
    core, a, b, c, d = (torch.view_as_complex(p) for p in kernel.parameters())
    close(kernel().detach(), torch.einsum("pqrs,ip,jq,kr,ls->ijkl", core, a, b, c, d).detach())


def test_kernels_of_all_ranks_begin_with_the_same_size_for_their_channels():
    "The mean square of the product, from those of its parts, is as one over the channels in and out."
    torch.manual_seed(0)
    def relative(shape, fraction):
        kernel = TuckerKernel(shape, fraction)
        ranks = kernel.core.shape[:4]
        return shape[0] * shape[1] * math.prod(ranks) * math.prod(p.square().sum(-1).mean().item() for p in kernel.parameters())
    one, *others = (relative(shape, fraction) for shape, fraction in (((96, 96, 24, 24), 0.1), ((96, 48, 24, 24), 0.4), ((48, 96, 40, 40), 0.2)))
    assert [one, *others] == pytest.approx([1.0] * 3, rel=0.15)


def test_the_bias_of_a_u_begins_as_small_as_its_kernel():
    torch.manual_seed(0)
    assert UBlock(4, 4096, 4, 4, UShapedConfig(rank=1e-3)).bias.std().item() == pytest.approx(1 / math.sqrt(4 * 4096), rel=0.04)


def u_shaped(network, u, sigma):
    "The U-shaped operator, written out; every convolution goes from one grid to another."
    config, n = network.config, u.shape[2]
    times = n // config.size
    full = config.size + config.pad
    sizes = [times * size for size in (full, full * 3 // 4, full // 2, full // 4, full // 2, full * 3 // 4, full, full)]
    end = (torch.arange(n).double() / (n - 1))[:, None].expand(n, n)
    lifted = pointwise(network.lift, torch.cat([u, torch.stack([end, end.T]).expand(len(u), 2, n, n)], 1))
    hidden, kept = F.pad(lifted, (0, times * config.pad, 0, times * config.pad)), {}
    for number, (block, size) in enumerate(zip(network.blocks, sizes)):
        if number in (5, 6, 7): hidden = torch.cat([hidden, kept[7 - number]], 1)
        weight = torch.cat([block.kernels[0](), block.kernels[1]()], 2).transpose(0, 1)
        sums = convolved(hidden, weight, (size, size)) + block.bias + resized(pointwise(block.pointwise, hidden), size)
        kept[number] = hidden = 0.5 * sums * (1 + torch.erf(sums / math.sqrt(2)))
    return pointwise(network.project, torch.cat([hidden[..., :n, :n], lifted], 1)) / sigma[:, None, None, None]


@pytest.mark.parametrize("times", [1, 2])
def test_the_u_shaped_operator_is_the_same_on_a_finer_grid(times):
    network = shaken(UShapedOperator(UShapedConfig(width=2, size=12, pad=4, rank=0.5, multipliers=(1, 2, 3, 4))))
    expected_sizes = [(16, 12), (12, 8), (8, 4), (4, 8), (8, 12), (12, 16)]
    assert [block.scale for block in network.blocks[1:7]] == pytest.approx([after / before for before, after in expected_sizes])
    u, sigma = draws(2, 2, 12 * times, 12 * times), torch.tensor([0.5, 3.0], dtype=torch.float64)
    close(network(u, sigma), u_shaped(network, u, sigma), 1e-8)


def test_a_blocks_waves_are_a_share_of_its_points():
    network = UShapedOperator(UShapedConfig(width=2, size=24, pad=8, modes=0.5, rank=0.5))
    assert [block.kernels[0]().shape[2] for block in network.blocks] == [8, 8, 6, 4, 2, 4, 6, 8]


def gano(network, u):
    "Generator or critic, written out."
    n, gelu = u.shape[2], lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    end = (torch.arange(n).double() / (n - 1))[:, None].expand(n, n)
    where = torch.stack([end, end.T]).expand(len(u), 2, n, n)
    lifted = hidden = everywhere(network.lift, torch.cat([u, where], 1))
    kept = {}
    for number, size in enumerate((n, n // 2, n // 4, n // 8, n // 4, n // 2, n, n)):
        if number > 4: hidden = torch.cat([hidden, kept[7 - number]], 1)
        corner = network.spectral[number]
        weight = torch.view_as_complex(torch.cat([corner.positive, corner.negative], 2)).transpose(0, 1)
        hidden = gelu(convolved(hidden, weight, (size, size)) + resized(pointwise(network.pointwise[number], hidden), size))
        kept[number] = hidden
    values = everywhere(network.project[2], gelu(everywhere(network.project[0], torch.cat([hidden, lifted], 1))))
    if network.place is None: return torch.tanh(values)
    first, _, second, _, last = network.place
    return (values * everywhere(last, gelu(everywhere(second, gelu(everywhere(first, where)))))).mean((1, 2, 3))


@pytest.mark.parametrize("critic", [False, True])
def test_generator_and_critic_are_a_u_of_convolutions(critic):
    network, u = shaken(Gano(GanoConfig(width=2, modes=8, critic=critic))), draws(2, 1, 24, 24)
    close(network(u), gano(network, u), 1e-8)


def test_modes_are_halved_on_each_level_of_the_generator():
    network = Gano(replace(GanoConfig(), width=2))
    assert [part.positive.shape[2] for part in network.spectral] == [16, 8, 4, 2, 2, 4, 8, 16]
