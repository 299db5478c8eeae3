"""Every process against its definition, written out in plain numbers."""
import math

import pytest
import torch

from diffusion_papers.core.processes import EDM, BoundedCosineVP, CosineVP, DiscreteVP, LinearVP, VarianceExploding, precise

SHARES = (0.003, 0.1, 0.37, 0.5, 0.81, 0.97)


def linear_alpha(beta_min, beta_d):
    "exp(-1/2 of the integral of the rate), by Simpson's rule, which is exact for a straight line."
    rate = lambda t: beta_min + beta_d * t
    return lambda t: math.exp(-0.5 * t * (rate(0) + 4 * rate(t / 2) + rate(t)) / 6)


def cosine_alpha(offset):
    angle = lambda t: (t + offset) / (1 + offset) * math.pi / 2
    return lambda t: math.cos(angle(t)) / math.cos(angle(0))


def bounded_alpha(largest, smallest):
    "The angle whose cotangent is the square root of the signal-to-noise ratio moves at a constant speed."
    first, last = math.atan(math.exp(-largest / 2)), math.atan(math.exp(-smallest / 2))
    return lambda t: math.cos(first + t * (last - first))


def preserving(alpha): return lambda t: (alpha(t), math.sqrt(1 - alpha(t) ** 2))


CONTINUOUS = [
    (LinearVP(), preserving(linear_alpha(0.1, 19.9))), (LinearVP(0.3, 7.0), preserving(linear_alpha(0.3, 7.0))),
    (LinearVP(0.0, 12.0), preserving(linear_alpha(0.0, 12.0))), (LinearVP(2.0, 0.0), preserving(linear_alpha(2.0, 0.0))),
    (CosineVP(), preserving(cosine_alpha(0.008))), (CosineVP(0.05), preserving(cosine_alpha(0.05))),
    (BoundedCosineVP(), preserving(bounded_alpha(20, -20))), (BoundedCosineVP(7.0, -3.0), preserving(bounded_alpha(7, -3))),
    (VarianceExploding(), lambda t: (1.0, 0.01 * 5000**t)), (VarianceExploding(0.3, 6.0), lambda t: (1.0, 0.3 ** (1 - t) * 6**t)),
    (EDM(), lambda t: (1.0, t))]
EVERY = [process for process, _ in CONTINUOUS] + [DiscreteVP.linear(), DiscreteVP.cosine(50), DiscreteVP(torch.tensor([0.1, 0.5, 0.2]))]
name_of = lambda value: type(value).__name__ if hasattr(value, "time_at") else ""


@pytest.mark.parametrize("process, wanted", CONTINUOUS, ids=name_of)
def test_signal_and_noise_are_those_of_the_definition(process, wanted):
    for share in SHARES:
        t = torch.tensor([share * process.start], dtype=torch.float64)
        alpha, sigma = wanted(t.item())
        found = [function(t).item() for function in (process.alpha, process.sigma, process.noise_to_signal, process.log_alpha, process.log_snr)]
        assert found == pytest.approx([alpha, sigma, sigma / alpha, math.log(alpha), math.log(alpha**2 / sigma**2)], rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("process", EVERY, ids=name_of)
def test_a_noise_level_knows_its_time_signal_and_spread(process):
    "A state of unit variance (or, where variance explodes, of noise alone), divided by alpha, has the spread of its level."
    t = torch.tensor(SHARES, dtype=torch.float64) * process.start
    levels, alpha = process.noise_to_signal(t), process.alpha(t)
    assert process.time_at(levels) == pytest.approx(t, rel=1e-8)
    assert process.alpha_at(levels) == pytest.approx(alpha, rel=1e-12)
    exploding = isinstance(process, (VarianceExploding, EDM))
    assert process.spread_at(levels) == pytest.approx(levels if exploding else 1 / alpha, rel=1e-10)


@pytest.mark.parametrize("process", EVERY, ids=name_of)
@pytest.mark.parametrize("name", ["noise_to_signal", "time_at"])
def test_derivatives_are_those_of_differences(process, name):
    times = torch.tensor([0.21, 0.6], dtype=torch.float64) * process.start
    at, function = (times if name == "noise_to_signal" else process.noise_to_signal(times)).requires_grad_(), getattr(process, name)
    slope, = torch.autograd.grad(function(at).sum(), at)
    step = 1e-5 * at.detach()
    difference = (function(at + step) - function(at - step)).detach() / (2 * step)
    assert slope == pytest.approx(difference, rel=1e-6)


def test_processes_begin_where_nothing_but_noise_is_left():
    assert [process.start for process in (LinearVP(), BoundedCosineVP(), VarianceExploding(), EDM())] == [1, 1, 1, 80]
    assert DiscreteVP.linear(30).start == 29 and DiscreteVP.linear().start == 999
    start = torch.tensor(CosineVP.start, dtype=torch.float64)
    assert CosineVP().noise_to_signal(start).item() == pytest.approx(119, rel=5e-3)


def test_the_bounds_of_the_bounded_process_are_reached_at_its_ends():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert BoundedCosineVP().log_snr(ends) == pytest.approx(torch.tensor([20.0, -20.0], dtype=torch.float64))
    assert BoundedCosineVP(9.0, -4.0).log_snr(ends) == pytest.approx(torch.tensor([9.0, -4.0], dtype=torch.float64))


@pytest.mark.parametrize("process, betas", [
    (DiscreteVP.linear(), [1e-4 + (0.02 - 1e-4) * step / 999 for step in range(1000)]),
    (DiscreteVP.linear(7, 0.01, 0.3), [0.01 + 0.29 * step / 6 for step in range(7)]),
    (DiscreteVP(torch.tensor([0.2, 0.05, 0.6], dtype=torch.float64)), [0.2, 0.05, 0.6]),
    (DiscreteVP.cosine(), [min(0.999, 1 - (cosine_alpha(0.008)((step + 1) / 1000) / cosine_alpha(0.008)(step / 1000)) ** 2) for step in range(1000)]),
    (DiscreteVP.cosine(9, 0.02, 0.7), [min(0.7, 1 - (cosine_alpha(0.02)((step + 1) / 9) / cosine_alpha(0.02)(step / 9)) ** 2) for step in range(9)])],
    ids=["ddpm", "linear", "betas", "cosine", "short cosine"])
def test_discrete_steps_multiply_and_lie_on_straight_lines_between(process, betas):
    bars = [math.prod(1 - beta for beta in betas[:count]) for count in range(1, len(betas) + 1)]
    steps = torch.arange(len(betas), dtype=torch.float64)
    assert process.alpha(steps) ** 2 == pytest.approx(torch.tensor(bars, dtype=torch.float64), rel=1e-7, abs=0)
    log_levels = [math.log(math.sqrt((1 - bar) / bar)) for bar in bars]
    between = [0.75 * low + 0.25 * high for low, high in zip(log_levels, log_levels[1:])]
    levels = process.noise_to_signal(steps[:-1] + 0.25)
    assert levels.log() == pytest.approx(torch.tensor(between, dtype=torch.float64), abs=1e-9)
    assert process.time_at(levels) == pytest.approx(steps[:-1] + 0.25, abs=1e-6)


def test_times_are_at_least_in_single_precision():
    assert precise(torch.zeros(1, dtype=torch.bfloat16)).dtype == precise(torch.zeros(1, dtype=torch.int64)).dtype == torch.float32
    assert precise(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
