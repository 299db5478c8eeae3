"""DDO, formula by formula: losses with known random numbers, the blurring process against its derivatives, samplers step by step."""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from extras import need

need("train", "data")

from diffusion_papers import ddo
from diffusion_papers.core.training import step_seed
from diffusion_papers.evidence import ddo as evidence
from diffusion_papers.topics.fluids import NavierStokes
from diffusion_papers.topics.gaussian_fields import Matern, PeriodicField, gaussian_operator
from diffusion_papers.workbench.checkpoints import data_folder

seeded = lambda seed=0: torch.Generator().manual_seed(seed)
close = lambda found, expected, tolerance=1e-10: torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
double = lambda *numbers: torch.tensor(numbers, dtype=torch.float64)
WHITE = replace(ddo.VORTICITY, noise="white", points=8)
PROCESS = ddo.BlurredVP()


def draws(*shape, seed=0): return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


class Fixed:
    "Random numbers of a step that are known."
    def __init__(self, share, eta): self.share, self.eta = share, eta
    def uniform(self, like, low=0.0, high=1.0): return low + (high - low) * self.share
    def normal(self, like): return self.eta


class Stub(nn.Module):
    "A network that answers what is wanted, and remembers what it was asked."
    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked, self.weight = answer, [], nn.Parameter(torch.zeros(1))

    def forward(self, v, label):
        self.asked.append((v, label))
        return self.answer(v, label)


class Known(ddo.FunctionModel):
    "A model whose estimate is the network's answer."
    def forward(self, v, level): return self.network(v, level)


def cosines(u, inverse=False):
    "The orthonormal cosine transform of the last two axes, written out."
    for axis in (-2, -1):
        k = torch.arange(u.shape[axis], dtype=torch.float64)
        matrix = torch.cos(math.pi / len(k) * k[:, None] * (k + 0.5)) * ((1 + (k > 0).double()) / len(k)).sqrt()[:, None]
        u = torch.movedim(torch.movedim(u, axis, -1) @ (matrix if inverse else matrix.T), -1, axis)
    return u


def angle(t): return math.atan(math.exp(-5)) + (math.atan(math.exp(5)) - math.atan(math.exp(-5))) * t  # log SNR from 10 to -10


def blurring(t, shape):
    "What multiplies each cosine at a time, and the size of the noise."
    squared = torch.tensor([[i * i + j * j for j in range(shape[1])] for i in range(shape[0])], dtype=torch.float64)
    blur = 0.05 + 0.2 * math.sin(math.pi / 2 * t)**2
    return math.cos(angle(t)) * torch.exp(-squared * blur**2 / 2), math.sin(angle(t))


@pytest.mark.parametrize("variance", [False, True])
def test_score_matching_compares_the_score_with_the_noise(variance):
    x0, eta, sigma, answer = draws(2, 1, 3, 4), draws(2, 1, 3, 4, seed=1), double(0.5, 3.0), draws(2, 1, 3, 4, seed=2)
    network, expected = Stub(lambda v, level: answer), []
    found = ddo.score_matching_loss(network, x0, sigma, eta, "sum", variance)
    for row, level in enumerate((0.5, 3.0)):
        std = math.sqrt(level) if variance else level
        close(network.asked[0][0][row], x0[row] + std * eta[row])
        expected.append(((math.sqrt(level) if variance else 1) * eta[row] + level * answer[row]).square().sum().item())
    assert found.tolist() == pytest.approx(expected) and network.asked[0][1] is sigma
    assert ddo.score_matching_loss(network, x0, sigma, eta, variance=variance).tolist() == pytest.approx([e / 12 for e in expected])


def test_a_ladder_falls_by_equal_factors_or_steps():
    assert ddo.ladder(8.0, 1.0, 4).tolist() == pytest.approx([8, 4, 2, 1]) and ddo.ladder(8.0, 1.0, 1).tolist() == [8]
    assert ddo.ladder(7.0, 1.0, 4, "linear").tolist() == pytest.approx([7, 5, 3, 1]) and ddo.ladder(2.0, 2.0, 2).tolist() == [2, 2]


def test_variances_follow_a_chain_that_is_written_out():
    "A step is v + c/2 (D - v) + sqrt(c) sigma zeta, with D = s / (s + sigma^2 lambda) v."
    s, lam, c, v = 0.3, 0.7, 0.9, 4 * 0.7
    found = ddo.variance_recursion(double(s), double(lam), double(2.0, 0.5), c, 2)[:, 0]
    for level, sigma in enumerate((2.0, 0.5)):
        for _ in range(2): v = (1 + c / 2 * (s / (s + sigma**2 * lam) - 1))**2 * v + c * sigma**2 * lam
        assert found[level].item() == pytest.approx(v)


def test_a_variance_stays_where_the_formula_says():
    data, noise, sigma = double(0.0, 0.3, 2.0), double(0.7, 0.7, 0.1), 0.6
    long = ddo.variance_recursion(data, noise, double(sigma), 0.9, 3000)[-1]
    close(ddo.stationary_variance(data, noise, sigma, 0.9), long)
    assert ddo.stationary_variance(data, noise, sigma, 0.9)[0].item() == pytest.approx(0.36 * 0.7 / (1 - 0.9 / 4))


@pytest.mark.parametrize("preconditioned", [True, False])
def test_the_longest_step_is_where_a_wave_turns_over_without_shrinking(preconditioned):
    data, noise = double(2.0, 0.3, 0.05, 0.0), double(0.5, 0.6, 0.1, 0.0)
    rate = lambda step: (step / 2 * (noise if preconditioned else 1) / (data + 0.49 * noise))[:3]
    longest = ddo.step_limit(data, noise, 0.7, preconditioned)
    assert (1 - rate(longest)).abs().max().item() == pytest.approx(1) and (1 - rate(longest)).min().item() == pytest.approx(-1)


def test_a_denoiser_mixes_its_input_and_its_network_by_their_variances():
    network, v, std = Stub(lambda v, label: draws(2, 1, 4, 4, seed=1)), draws(2, 1, 4, 4), 0.8
    found = ddo.FunctionModel(network, replace(WHITE, data_std=std))(v, double(0.5, 3.0))
    for row, sigma in enumerate((0.5, 3.0)):
        total = sigma**2 + std**2
        close(found[row], std**2 / total * v[row] + sigma * std / math.sqrt(total) * draws(2, 1, 4, 4, seed=1)[row])
        close(network.asked[0][0][row], v[row] / math.sqrt(total))
    assert network.asked[0][1].tolist() == pytest.approx([math.log(0.5), math.log(3.0)])


@pytest.mark.parametrize("name", ["mnist_sdf", "volcano"])
def test_networks_of_the_released_processes_answer_for_themselves(name):
    network, v, level = Stub(lambda v, label: 2 * v), draws(2, 1, 4, 4), double(0.5, 0.7)
    close(ddo.FunctionModel(network, ddo.CONFIGS[name])(v, level), 2 * v)
    assert torch.equal(network.asked[0][1], level) and torch.equal(network.asked[0][0], v)


def test_every_process_is_trained_by_its_own_loss():
    assert ddo.LOSSES == {"ve": ddo.denoising_loss, "blurred": ddo.blurred_loss, "ladder": ddo.ladder_loss}
    assert [ddo.CONFIGS[name].process for name in ("cpu", "mnist_sdf", "volcano")] == ["ve", "blurred", "ladder"]
    assert ddo.CONFIGS["volcano"].length == pytest.approx(2 * 0.05**2) and ddo.CONFIGS["mnist_sdf"].norm == "sum"


@pytest.mark.parametrize("norm", ["mean", "sum"])
def test_the_denoising_loss_is_the_networks_error_whatever_the_level(norm):
    "The weights are such that what the network has to answer has the same size at all levels."
    answer, config = draws(3, 1, 4, 4, seed=2), replace(WHITE, data_std=0.8, sigma_max=4.0, sigma_min=0.25, norm=norm)
    network, x0, eta = Stub(lambda v, label: answer), draws(3, 1, 4, 4), draws(3, 1, 4, 4, seed=1)
    found = ddo.denoising_loss(ddo.FunctionModel(network, config), {"x0": x0}, Fixed(double(0.0, 0.5, 0.75), eta))
    for row, sigma in enumerate((0.25, 1.0, 2.0)):
        v, total = x0[row] + sigma * eta[row], sigma**2 + 0.8**2
        target = (x0[row] - 0.8**2 / total * v) * math.sqrt(total) / (sigma * 0.8)
        assert found[row].item() == pytest.approx((answer[row] - target).square().sum().item() / (16 if norm == "mean" else 1))
        assert network.asked[0][1][row].item() == pytest.approx(math.log(sigma))


def test_the_ladders_loss_takes_a_random_rung_for_a_variance():
    config = replace(ddo.CONFIGS["volcano"], noise="white", sigma_max=8.0, sigma_min=1.0, levels=4)
    answer, x0, eta = draws(3, 2, 4, 4, seed=2), draws(3, 2, 4, 4), draws(3, 2, 4, 4, seed=1)
    network = Stub(lambda v, level: answer)
    found = ddo.ladder_loss(ddo.FunctionModel(network, config), {"x0": x0}, Fixed(double(0.0, 0.49, 0.999), eta))
    assert network.asked[0][1].tolist() == pytest.approx([8, 4, 1])
    for row, level in enumerate((8.0, 4.0, 1.0)):
        close(network.asked[0][0][row], x0[row] + math.sqrt(level) * eta[row])
        assert found[row].item() == pytest.approx((math.sqrt(level) * eta[row] + level * answer[row]).square().mean().item())


def test_the_blurred_loss_is_half_the_error_of_the_noise_at_times_spread_evenly():
    config = replace(ddo.CONFIGS["mnist_sdf"], length=0.2)
    answer, x0, plain = draws(4, 1, 5, 6, seed=2), draws(4, 1, 5, 6), draws(4, 1, 5, 6, seed=1)
    network, eta = Stub(lambda v, time: answer), ddo.colored(config, plain)
    found = ddo.blurred_loss(ddo.FunctionModel(network, config), {"x0": x0}, Fixed(double(0.8, 0.1, 0.2, 0.3), plain))
    assert network.asked[0][1].tolist() == pytest.approx([0.8, 0.05, 0.3, 0.55])
    for row, t in enumerate((0.8, 0.05, 0.3, 0.55)):
        by_wave, sigma = blurring(t, (5, 6))
        close(network.asked[0][0][row, 0], cosines(by_wave * cosines(x0[row, 0]), inverse=True) + sigma * eta[row, 0], 1e-6)
        assert found[row].item() == pytest.approx((answer[row] - eta[row]).square().sum().item() / 2)


def test_the_law_of_the_noise_is_what_the_configuration_says():
    numbers = np.fft.fftfreq(512, 1 / 512)
    table = (numbers[:, None]**2 + numbers**2 + 9.0)**-2.5
    for mean_free in (True, False):
        measure = replace(ddo.VORTICITY, alpha=2.5, mean_free=mean_free).measure()
        total = table.sum() - mean_free * 9.0**-2.5
        assert measure.eigenvalues((8, 8))[1, 2].item() == pytest.approx(14**-2.5 / total)
        assert measure.eigenvalues((8, 8))[0, 0].item() == pytest.approx(0 if mean_free else 9**-2.5 / total)
    covariance = replace(ddo.CONFIGS["volcano"], length=0.3).measure().covariance((4, 4))
    assert covariance[0, 5].item() == pytest.approx(math.exp(-math.sqrt(2) / 4 / 0.3)) and covariance[3, 3].item() == pytest.approx(1.0001)
    cosine = replace(ddo.CONFIGS["mnist_sdf"], length=0.2).measure()
    assert (cosine.length, cosine.index, cosine.dim) == (0.2, 2.0, 2) and WHITE.measure() is None


def test_white_noise_is_plain_or_rescaled_by_the_grid():
    v, plain = torch.zeros(2, 1, 24, 24), torch.randn(2, 1, 24, 24, generator=seeded())
    assert torch.equal(ddo.field_noise(WHITE, seeded())(v), plain)
    close(ddo.field_noise(WHITE, seeded(), "rescaled")(v), 3 * plain, 1e-6)
    close(ddo.field_noise(ddo.VORTICITY, seeded())(v), ddo.VORTICITY.measure().color(plain), 0)


def test_the_schedule_turns_by_an_angle():
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    known = double(*(angle(each) for each in t.tolist()))
    close(PROCESS.alpha(t), known.cos()); close(PROCESS.sigma(t), known.sin()); close(PROCESS.log_snr(t), -2 * known.tan().log())
    assert PROCESS.log_snr(double(0.0, 1.0)).tolist() == pytest.approx([10, -10])
    assert PROCESS.blur(double(0.0, 0.5, 1.0)).tolist() == pytest.approx([0.05, 0.15, 0.25])
    assert PROCESS.squared((2, 3)).tolist() == [[0, 1, 4], [1, 2, 5]] and PROCESS.squared((2, 2, 2))[1, 1, 1] == 3
    close(PROCESS.alpha_by_wave(double(0.3), (4, 5))[0], blurring(0.3, (4, 5))[0])


def by_derivative(function, t):
    "d function / dt by automatic differentiation, for each wave."
    return torch.autograd.functional.jacobian(function, t)[..., 0]


def test_drift_and_diffusion_are_derivatives_of_mean_and_variance():
    "d mean / dt = f mean, d variance / dt = 2 f variance + g^2; the plain process, and each wave."
    for time in (0.1, 0.6, 0.9):
        t, shape = double(time), (3, 4)
        close(PROCESS.slope(t), by_derivative(PROCESS.log_snr, t), 1e-8)
        close(PROCESS.drift(t), by_derivative(lambda t: PROCESS.alpha(t).log(), t))
        growth = by_derivative(lambda t: PROCESS.sigma(t)**2, t)
        close(PROCESS.diffusion(t)**2, growth - 2 * PROCESS.drift(t) * PROCESS.sigma(t)**2)
        drift = by_derivative(lambda t: PROCESS.alpha_by_wave(t, shape).log(), t)
        close(PROCESS.drift_by_wave(t, shape), drift)
        close(PROCESS.diffusion_by_wave(t, shape)**2, growth - 2 * drift * PROCESS.sigma(t)**2)


def test_the_released_drift_has_a_factor_too_many():
    t, shape = double(0.4), (3, 4)
    blur = 0.05 + 0.2 * math.sin(0.2 * math.pi)**2
    factor = torch.exp(-PROCESS.squared(shape) * blur**2 / 2)
    plain = PROCESS.drift(t)
    close(ddo.BlurredVP(released=True).drift_by_wave(t, shape)[0] - plain, (PROCESS.drift_by_wave(t, shape)[0] - plain) * factor)


def posterior(v_k, eta_k, t, s):
    "Mean and variance of a wave at s < t by Bayes: what it came from, and what it became; in units of the noise's eigenvalue."
    (a_t, sigma_t), (a_s, sigma_s) = (blurring(time, v_k.shape) for time in (t, s))
    ratio = a_t / a_s
    clean, between = (v_k - sigma_t * eta_k) / a_t, sigma_t**2 - ratio**2 * sigma_s**2
    precision = 1 / sigma_s**2 + ratio**2 / between
    return (a_s * clean / sigma_s**2 + ratio * v_k / between) / precision, 1 / precision


def test_an_ancestral_step_is_bayes_rule_for_each_cosine():
    v, eta = draws(2, 5, 4), draws(2, 5, 4, seed=1)
    mean, variance = ddo.blurred_step(PROCESS, v, eta, double(0.9, 0.5), double(0.8, 0.2))
    for row, (t, s) in enumerate(((0.9, 0.8), (0.5, 0.2))):
        known, spread = posterior(cosines(v[row]), cosines(eta[row]), t, s)
        close(cosines(mean[row]), known, 1e-8); close(variance[row], spread, 1e-8)


def test_ancestral_sampling_takes_a_step_after_another_and_no_noise_at_the_end():
    x, times, fresh = draws(2, 5, 4), (1.0, 0.6, 0.3, 0.1), [draws(2, 5, 4, seed=seed) for seed in (1, 2, 3)]
    predict, seen, replay = (lambda x, t: torch.tanh(x) * t[:, None, None]), [], iter(fresh)
    found = ddo.blurred_sample(predict, x, double(*times), noise=lambda v: next(replay),
                               callback=lambda step, v, estimate: seen.append((step, v, estimate)))
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        eta = predict(x, double(t, t))
        close(seen[step][1], x, 1e-8)
        close(seen[step][2], (x - math.sin(angle(t)) * eta) / math.cos(angle(t)), 1e-6)
        parts = [posterior(cosines(x[row]), cosines(eta[row]), t, s) for row in range(2)]
        x = torch.stack([cosines(mean + (spread.sqrt() * cosines(fresh[step][row]) if step < 2 else 0), inverse=True)
                         for row, (mean, spread) in enumerate(parts)])
    close(found, x, 1e-7)
    assert next(replay) is fresh[2]
    with pytest.raises(ValueError, match="times: expected at most 1"): ddo.blurred_sample(predict, x, double(1.1, 0.5), noise=lambda v: v)


def test_a_step_of_the_flow_goes_back_along_the_path_of_mean_and_noise():
    "For one function and one noise the path is a_t u + sigma_t eta, and Euler's step has its slope."
    u, eta, t = draws(1, 3, 4), draws(1, 3, 4, seed=1), double(0.6)
    path = lambda t: PROCESS.alpha_by_wave(t, (3, 4)) * cosines(u) + PROCESS.sigma(t) * cosines(eta)
    slope = by_derivative(path, t)
    found = ddo.blurred_flow_step(PROCESS, cosines(path(t), inverse=True), eta, t, 0.01)
    close(cosines(found), path(t) - 0.01 * slope)


def test_implicit_langevin_keeps_the_law_of_the_noise_for_every_step():
    "Without data a wave has the gain (1 - c/4) / (1 + c/4), and the variance of the noise stays, even for c above 4."
    for c in (0.5, 3.0, 9.0):
        step = lambda x, noise: ddo.crank_nicolson_langevin(lambda x, sigma: 0 * x, x, double(0.7, 0.7001).flip(0)[:2], noise=lambda v: noise,
                                                            inner_steps=1, step_size=c)
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        gain = step(one, zero).item()  # over two levels that are almost one
        assert gain == pytest.approx(((1 - c / 4) / (1 + c / 4))**2)
        pushed = step(zero, one).item() / 0.7 / (1 + (1 - c / 4) / (1 + c / 4))
        assert pushed**2 + abs(gain) == pytest.approx(1, rel=1e-3)


def test_implicit_langevin_returns_the_estimate_where_the_last_level_is_zero():
    asked = Stub(lambda x, sigma: x + 1)
    fresh = iter(double(0.3, -0.2, 0.5, 0.1))
    found = ddo.crank_nicolson_langevin(asked, double(2.0), double(0.7, 0.2, 0.0), noise=lambda v: next(fresh), inner_steps=2, step_size=0.8)
    assert [sigma.item() for _, sigma in asked.asked] == pytest.approx([0.7, 0.7, 0.2, 0.2, 0.2])
    x = 2.0
    for sigma, zeta in zip((0.7, 0.7, 0.2, 0.2), (0.3, -0.2, 0.5, 0.1)):  # x' - x = c/2 (D - (x + x') / 2) + sqrt(c) sigma zeta
        x = ((1 - 0.2) * x + 0.4 * (x + 1) + math.sqrt(0.8) * sigma * zeta) / 1.2
    assert found.item() == pytest.approx(x + 1)


def test_the_released_langevin_has_steps_of_squared_variances_and_ends_without_noise():
    smooth, rough = (PeriodicField(Matern(alpha, 3.0).unit()) for alpha in (3.0, 1.5))
    denoise, x, seen = gaussian_operator(smooth, rough), draws(2, 6, 6), []
    score = lambda v, variance: (denoise(v, variance.sqrt()) - v) / variance[:, None, None]
    fresh = [draws(2, 6, 6, seed=seed) for seed in range(1, 5)]
    replay = iter(fresh)
    found = ddo.released_langevin(score, x, double(2.0, 0.5), noise=lambda v: next(replay), inner_steps=2, epsilon=0.02,
                                  callback=lambda level, v, estimate: seen.append((level, v, estimate)))
    for step, (level, alpha) in enumerate(((2.0, 0.32), (2.0, 0.32), (0.5, 0.02), (0.5, 0.02))):
        estimate = denoise(x, double(level, level).sqrt())
        if step in (0, 2): close(seen[step // 2][1], x); close(seen[step // 2][2], estimate); assert seen[step // 2][0] == step // 2
        x = x + alpha / 2 * (estimate - x) / level + (math.sqrt(alpha) * fresh[step] if step < 3 else 0)
    close(found, x)
    assert len(seen) == 2 and next(replay) is fresh[3]


def drawn_with(config, estimate=lambda v, level: 0 * v, **options):
    "What `sample_functions` returns, and what it asked a model whose estimate is known."
    model = Known(Stub(estimate), config)
    return ddo.sample_functions(model, 2, **options), model.network.asked


def test_a_draw_starts_at_the_first_level_and_visits_a_geometric_ladder():
    levels = [20.0 * 0.0005**(i / 4) for i in range(5)]
    start = 20 * ddo.field_noise(ddo.VORTICITY, seeded(step_seed(3, 7)))(torch.zeros(2, 1, 48, 48))
    for solver in ("ode", "sde"):
        found, asked = drawn_with(ddo.VORTICITY, lambda v, level: 0 * v + 2, points=48, solver=solver, calls=5, seed=3)
        assert [level[0].item() for _, level in asked] == pytest.approx(levels) and found.shape == (2, 1, 48, 48)
        close(asked[0][0], start, 1e-5); close(found, 0 * start + 2, 1e-5)
        if solver == "ode": close(asked[3][0], 2 + levels[3] / levels[0] * (start - 2), 1e-4)
        else: assert (asked[3][0] - (2 + levels[3] / levels[0] * (start - 2))).abs().max() > 0.1


def test_langevin_takes_inner_steps_and_one_last_estimate():
    found, asked = drawn_with(WHITE, lambda v, level: 0 * v + 2, solver="langevin", calls=9, inner_steps=3, step_size=0.4, seed=3)
    assert [level[0].item() for _, level in asked] == pytest.approx([20] * 3 + [0.01] * 4) and found.shape == (2, 1, 8, 8)
    draw = ddo.field_noise(WHITE, seeded(step_seed(3, 7)))
    first = 20 * draw(asked[0][0])
    close(asked[0][0], first, 1e-5); close(asked[1][0], first + 0.2 * (2 - first) + math.sqrt(0.4) * 20 * draw(first), 1e-4)
    with pytest.warns(UserWarning, match="step_size: above 1"): drawn_with(WHITE, solver="langevin", calls=8, inner_steps=3, step_size=1.5)


def test_rescaled_noise_is_what_a_draw_is_made_of():
    _, asked = drawn_with(WHITE, points=16, noise="rescaled", solver="ode", calls=3)
    close(asked[0][0], 40 * torch.randn(2, 1, 16, 16, generator=seeded(step_seed(0, 7))), 1e-4)


def test_the_released_ladder_starts_unscaled_and_shares_its_calls():
    config = replace(ddo.CONFIGS["volcano"], noise="white", points=8)
    for calls, inner, rungs in ((6, 3, [30.0, 0.01]), (12, 4, [30.0, math.sqrt(0.3), 0.01])):
        found, asked = drawn_with(config, calls=calls, inner_steps=5 if calls == 6 else 4, seed=3)
        assert [level[0].item() for _, level in asked] == pytest.approx([rung for rung in rungs for _ in range(inner)])
        close(asked[0][0], torch.randn(2, 2, 8, 8, generator=seeded(step_seed(3, 7))), 1e-6)
    assert found.shape == (2, 2, 8, 8)


def test_the_blurred_process_is_drawn_in_equal_steps_from_one_to_zero():
    config = replace(ddo.CONFIGS["mnist_sdf"], points=8)
    found, asked = drawn_with(config, calls=4, seed=3)
    assert [time[0].item() for _, time in asked] == pytest.approx([1, 0.75, 0.5, 0.25]) and found.shape == (2, 1, 8, 8)
    close(asked[0][0], ddo.field_noise(config, seeded(step_seed(3, 7)))(torch.zeros(2, 1, 8, 8)), 1e-6)


def test_nested_noise_is_another_one_at_every_call_and_reaches_coarser_grids():
    draw = ddo._nested_noise(ddo.VORTICITY, 3)
    first, second = draw(torch.zeros(2, 1, 16, 16)), draw(torch.zeros(2, 1, 16, 16))
    for call, noise in enumerate((first, second)):
        seed = step_seed(step_seed(3, 8, call), 16)
        close(noise[:, 0], ddo.VORTICITY.measure().sample(2, (16, 16), seeded(seed)), 0)


def test_pictures_show_three_standard_deviations():
    model = Known(Stub(lambda v, level: 0 * v + 1.5), replace(WHITE, data_std=2.0))
    close(ddo.sample(model, 2, calls=3), torch.full((2, 1, 8, 8), 0.25))
    assert ddo.sample(Known(Stub(lambda v, level: 0 * v - 9), WHITE), 2, calls=3, points=12).unique().tolist() == [-1]


def test_functions_are_compared_with_real_ones_on_each_grid(monkeypatch):
    real, asked = draws(40, 16, 16).float(), []
    def drawn(model, count, points, *, seed, calls=50):
        asked.append((count, points, seed, calls))
        first = sum(count for count, n, *_ in asked[:-1] if n == points)
        return real[first:first + count, None, ::16 // points, ::16 // points]
    monkeypatch.setattr(ddo, "sample_functions", drawn)
    rows = ddo.evaluate(Known(Stub(None), WHITE), 40, points=(16, 8), seed=5, data=real, calls=7)
    assert asked == [(count, n, step_seed(5, first), 7) for n in (16, 8) for first, count in ((0, 32), (32, 8))]
    assert [(row["points"], row["calls"]) for row in rows] == [(16, 7), (8, 7)]
    for row, w in zip(rows, (real, real[:, ::2, ::2])):
        assert row["spectrum"] == row["histogram"] == 0 and row["std"] == pytest.approx(w.std().item())


def test_data_are_those_that_the_configuration_names():
    from diffusion_papers.workbench.checkpoints import load_checkpoint
    stored = load_checkpoint(data_folder() / "samples" / "vorticity_train.safetensors")[0]["w"].float()
    assert torch.equal(ddo.load_data(replace(WHITE, points=16)).tensors["x0"], stored[:, None, ::2, ::2])
    bumps = ddo.load_data(replace(ddo.CONFIGS["volcano"], data="bumps", points=8)).tensors["x0"]
    assert bumps.shape == (1000, 2, 8, 8)
    with pytest.raises(ValueError, match="channels: the data have 2, the network 1"): ddo.load_data(replace(WHITE, data="bumps"))


def test_the_gradient_penalty_is_taken_between_and_beyond_both_kinds():
    "Of half a squared norm the gradient is the function itself."
    real, made, mix = draws(3, 1, 4, 4), draws(3, 1, 4, 4, seed=1), double(0.3, -0.5, 1.7)
    found = evidence.gradient_penalty(lambda u: u.square().sum((1, 2, 3)) / 2, real, made, mix)
    sizes = [(w * real[row] + (1 - w) * made[row]).norm().item() for row, w in enumerate((0.3, -0.5, 1.7))]
    assert found.item() == pytest.approx(sum((size - 1 / 4)**2 for size in sizes) / 3)
    weight = torch.full((1,), 2.0, requires_grad=True)  # it can be learned from
    evidence.gradient_penalty(lambda u: weight * u.mean((1, 2, 3)), real.float(), made.float(), mix.float()).backward()
    assert weight.grad.item() == pytest.approx(2 * (2 / 4 - 1 / 4) / 4)


@pytest.mark.parametrize("steps, every, moves", [(1, 1, 1), (3, 2, 1), (4, 2, 2), (1, 2, 0)])
def test_critic_and_generator_go_opposite_ways(monkeypatch, steps, every, moves):
    "A critic c mean(u) and a generator of the constant b, against real ones of 2, by plain gradient steps."
    made = {}
    class Part(nn.Module):
        def __init__(self, critic):
            super().__init__()
            self.critic, self.number = critic, nn.Parameter(torch.tensor(3.0 if critic else 0.0))
            made[critic] = self

        def forward(self, u): return self.number * u.mean((1, 2, 3)) if self.critic else self.number + 0 * u

    monkeypatch.setattr(evidence, "Gano", lambda config: Part(config.critic))
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    functions, field = torch.full((5, 1, 8, 8), 2.0), PeriodicField(Matern(2.0, 3.0))
    generator = evidence.train_gano(functions, field, evidence.GanoConfig(), steps=steps, every=every, batch=3, lr=0.1, penalty=5.0)
    c, b = 3.0, 0.0
    for step in range(steps):
        c_before = c
        c -= 0.1 * ((b - 2) + 5 * 2 * (c_before / 8 - 1 / 8) / 8)
        if step % every == every - 1: b += 0.1 * c
    assert made[True].number.item() == pytest.approx(c) and generator.number.item() == pytest.approx(b) and (b > 0) == (moves > 0)


def test_the_plain_step_is_the_solvers():
    flow = NavierStokes((12, 12), 0.1, lengths=(2 * math.pi, 3.0))
    w, force = (flow.prepared(PeriodicField(Matern(3.0, 3.0)).sample(2, (12, 12), seeded(seed), torch.float64), "w") for seed in (0, 1))
    close(evidence.plain_step(flow, w, force, 0.2), flow.step(w, force, 0.2)[0])


@pytest.mark.parametrize("field, white, rescaled, holds", [
    ((0.1, 0.14), (0.1, 0.31), 0.1, True), ((0.1, 0.16), (0.1, 0.31), 0.2, False), ((0.1, 0.14), (0.1, 0.29), 0.1, False),
    ((0.1, 0.14), (0.1, 0.31), 0.09, False)])
def test_the_demonstration_holds_where_the_field_stays_and_white_noise_does_so_by_hand_alone(monkeypatch, field, white, rescaled, holds):
    errors = {("ddo_vorticity", None): field, ("ddo_vorticity_white", None): white, ("ddo_vorticity_white", "rescaled"): (0.1, rescaled)}
    monkeypatch.setattr(evidence, "load_pretrained", lambda name: name)
    monkeypatch.setattr(evidence, "sample", lambda model, count, points, solver: torch.zeros(count, 1, points, points))
    monkeypatch.setattr(evidence, "evaluate", lambda model, count, points, solver, noise=None: [{"spectrum": error} for error in errors[model, noise]])
    assert evidence.demonstrate().holds is holds


def test_a_call_on_a_finer_grid_is_compared_with_what_transforms_cost(monkeypatch):
    monkeypatch.setattr(evidence, "paired", lambda ours, peer, device: {})
    assert evidence._call_row(64, "cpu")["n^2 log n"] == pytest.approx(4 * 6 / 5)


def test_each_variant_is_drawn_in_its_own_ways(monkeypatch):
    monkeypatch.setattr(evidence, "train", lambda config, device: config)
    monkeypatch.setattr(evidence, "evaluate", lambda config, **options: [options | {"alpha": config.alpha, "law": config.noise}])
    rows = {variant: evidence.study_claim({"variant": variant, "seed": 2})["rows"] for variant in ("field", "white", "alpha 1.2")}
    three = (32, 64, 128)
    assert [(row["way"], row["points"], row.get("solver"), row.get("calls"), row["seed"]) for row in rows["field"]] == [
        ("sde", three, None, None, 2), ("ode", three, "ode", None, 2), ("langevin", (32, 64), "langevin", 201, 2)]
    assert [(row["way"], row["law"], row.get("noise")) for row in rows["white"]] == [("sde", "white", None), ("rescaled", "white", "rescaled")]
    assert [(row["way"], row["alpha"]) for row in rows["alpha 1.2"]] == [("sde", 1.2)]
    assert [(row["way"], row["law"], row["noise"], row["solver"], row["points"], row["seed"]) for row in evidence.study_rescaled({"seed": 2})["rows"]] == [
        ("rescaled, ode", "white", "rescaled", "ode", three, 2), ("rescaled, langevin", "white", "rescaled", "langevin", (32, 64), 2)]
