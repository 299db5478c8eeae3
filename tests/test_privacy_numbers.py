"""Privacy in numbers: divergences and their conversion, budgets, Poisson samples, clipping, noise, and each layer's gradients."""
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusion_papers.topics import privacy
from diffusion_papers.topics.privacy import Ledger, Mechanism, public_generator

ORDERS = [1 + number / 10 for number in range(1, 100)] + list(range(12, 64))
WIDE = ORDERS + [72, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 768, 1024]


def binomial(q, sigma, alpha):
    "Divergence at a whole order (Mironov et al. 2019, equation for integers), in logarithms."
    terms = [math.lgamma(alpha + 1) - math.lgamma(k + 1) - math.lgamma(alpha - k + 1) + (alpha - k) * math.log1p(-q) + k * math.log(q)
             + k * (k - 1) / (2 * sigma**2) for k in range(alpha + 1)]
    return np.logaddexp.reduce(terms) / (alpha - 1)


@pytest.mark.parametrize("q, sigma", [(1e-3, 0.7), (0.01, 4.0), (0.07, 2.5), (0.5, 5.5), (0.5, 0.3), (0.9, 40.0)])
def test_divergences_of_whole_orders_are_binomial_sums(q, sigma):
    orders = [2, 3, 8, 32, 256]
    expected = [binomial(q, sigma, alpha) for alpha in orders]
    assert privacy.subsampled_gaussian_rdp(q, sigma, orders).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("q, sigma, alpha", [(0.07, 2.5, 1.1), (0.5, 1.0, 3.7), (0.01, 0.8, 5.5)])
def test_divergences_of_broken_orders_are_integrals(q, sigma, alpha):
    integrate = pytest.importorskip("scipy.integrate")
    def density(x):
        normal = math.exp(-0.5 * (x / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        return normal * (1 - q + q * math.exp((2 * x - 1) / (2 * sigma**2))) ** alpha
    moment = sum(integrate.quad(density, low, low + 2, epsabs=1e-13)[0] for low in range(-30, 50, 2))
    assert privacy.subsampled_gaussian_rdp(q, sigma, [alpha]).item() == pytest.approx(math.log(moment) / (alpha - 1), rel=1e-5)


def test_beside_the_formula_everybody_and_nobody_take_part():
    rdp = lambda q, sigma: privacy.subsampled_gaussian_rdp(q, sigma, [1.5, 4]).tolist()
    assert rdp(1.0, 3.0) == pytest.approx([1.5 / 18, 4 / 18]) and rdp(0.0, 3.0) == [0, 0] and rdp(0.5, 0.0) == [math.inf] * 2
    assert rdp(0.5, 0.005) == pytest.approx([1.5 / 5e-5, 4 / 5e-5])  # hardly any noise: the bound by everybody


def converted(divergence, orders, delta):
    "Canonne, Kamath and Steinke (2020), proposition 12, for the best order."
    return max(0.0, min(divergence(a) + math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in orders))


@pytest.mark.parametrize("sigma, steps, delta", [(30.0, 100, 1e-5), (5.0, 3, 1e-7), (200.0, 1, 1e-3), (5.0, 900, 1e-5)])
def test_prices_are_the_best_orders_conversion(sigma, steps, delta):
    whole = lambda alpha: steps * alpha / (2 * sigma**2)  # everybody in every batch
    for accountant, orders in (("rdp", ORDERS), ("rdp_wide", WIDE)):
        assert privacy.epsilon_spent(1.0, sigma, steps, delta, accountant) == pytest.approx(converted(whole, orders, delta), rel=1e-9)
    assert privacy.ORDERS == tuple(ORDERS) and privacy.WIDE_ORDERS == tuple(WIDE)
    epsilon, order = privacy.epsilon_from_rdp(torch.tensor([steps * alpha / (2 * sigma**2) for alpha in (2, 5, 9)]), [2, 5, 9], delta)
    single = {alpha: converted(whole, [alpha], delta) for alpha in (2, 5, 9)}
    assert epsilon == pytest.approx(min(single.values())) and epsilon == pytest.approx(single[order])


@pytest.mark.parametrize("sigma, steps, delta", [(1.0, 1, 1e-5), (20.0, 50, 1e-3), (4.0, 1000, 1e-9)])
def test_the_exact_price_is_the_root_of_its_equation(sigma, steps, delta):
    "Balle and Wang (2018), theorem 8, by SciPy."
    stats, optimize = pytest.importorskip("scipy.stats"), pytest.importorskip("scipy.optimize")
    mu = math.sqrt(steps) / sigma
    def too_much(epsilon): return stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu)) - delta
    assert privacy.gaussian_epsilon(sigma, steps, delta) == pytest.approx(optimize.brentq(too_much, 0, 500, xtol=1e-13), rel=1e-6)


@pytest.mark.parametrize("target", [0.05, 1.0, 8.0])
def test_a_budget_asks_for_the_least_noise(target):
    found = privacy.noise_multiplier_for(target, 1.0, 40, 1e-5, "rdp_wide", tolerance=1e-6)
    assert privacy.epsilon_spent(1.0, found, 40, 1e-5, "rdp_wide") <= target < privacy.epsilon_spent(1.0, found * (1 - 1e-4), 40, 1e-5, "rdp_wide")


def test_a_mechanism_knows_its_batch_and_its_price_so_far():
    plan = Mechanism(2000, 0.15, 20.0, 1e-4, 300, "rdp_wide")
    assert plan.expected_batch == pytest.approx(300)
    assert plan.epsilon(7) == privacy.epsilon_spent(0.15, 20.0, 7, 1e-4, "rdp_wide") < plan.epsilon()
    assert plan.epsilon() == privacy.epsilon_spent(0.15, 20.0, 300, 1e-4, "rdp_wide")
    Mechanism(9999, delta=1e-4)
    with pytest.raises(ValueError, match="delta: expected less than 1/N"): Mechanism(10_000, delta=1e-4)


def test_totals_add_divergences_and_the_smaller_bound_counts(monkeypatch):
    ledgers = [Ledger("a run", Mechanism(1000, 1.0, sigma, 1e-5, 500, "rdp_wide"), steps) for sigma, steps in ((20.0, 30), (20.0, 5), (35.0, 90))]
    together = lambda alpha: alpha / 2 * (35 / 20**2 + 90 / 35**2)
    assert privacy._composed_total(ledgers, 1e-6, "rdp_wide") == privacy.total_spent(ledgers, 1e-6) == pytest.approx(converted(together, WIDE, 1e-6))
    apart = sum(converted(lambda alpha: alpha / 2 * steps / sigma**2, WIDE, 1e-6 / 3) for sigma, steps in ((20.0, 30), (20.0, 5), (35.0, 90)))
    assert privacy._sum_of_prices(ledgers, 1e-6, "rdp_wide") == pytest.approx(apart)
    monkeypatch.setattr(privacy, "_composed_total", lambda *_: 9.0); monkeypatch.setattr(privacy, "_sum_of_prices", lambda *_: 7.0)
    assert privacy.total_spent(ledgers) == 7


# ---- batches, clipping and noise


def test_everybody_is_drawn_with_the_rate_and_apart_from_others():
    batches = [privacy.poisson_batch(5000, 0.03, public_generator(seed)) for seed in range(200)]
    sizes = np.array([len(batch) for batch in batches])
    assert sizes.mean() == pytest.approx(150, abs=3) and sizes.std() == pytest.approx(math.sqrt(5000 * 0.03 * 0.97), rel=0.2)
    often = torch.bincount(torch.cat(batches), minlength=5000).float()
    assert often.var().item() == pytest.approx(200 * 0.03 * 0.97, rel=0.1) and all((batch.diff() > 0).all() for batch in batches)


def test_factors_of_clipping_shorten_and_never_lengthen():
    norms = torch.tensor([0.0, 0.2, 0.5, 1.0, 40.0, math.inf, math.nan], dtype=torch.float64)
    assert privacy.clip_factors(norms, 0.5).tolist() == pytest.approx([1, 1, 1, 0.5, 0.0125, 0, 0], abs=2e-6)


def test_noise_is_of_the_clipping_norm_and_all_is_divided_by_the_expected_batch():
    sums = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(4, dtype=torch.float64)}
    free = privacy.noisy_mean(sums, 0.3, 0.0, 8.0, public_generator(0))
    torch.testing.assert_close(free["weight"], sums["weight"] / 8)
    noisy, generator = privacy.noisy_mean(sums, 0.3, 2.0, 8.0, public_generator(3)), public_generator(3)
    for name, value in sums.items():
        z = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(noisy[name], ((value + 0.6 * z) / 8).to(value.dtype), rtol=1e-6, atol=1e-7)
    many = privacy.noisy_mean({"weight": torch.zeros(100_000)}, 0.3, 2.0, 8.0, public_generator(1))["weight"]
    assert many.std().item() == pytest.approx(0.6 / 8, rel=0.01) and many.mean().item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("clipped", [privacy.clipped_sum, privacy.ghost_clipped_sum])
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_clipped_sum_is_that_of_a_plain_loop(clipped, chunk):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    x[1] = math.nan
    loss = lambda model, batch: model(batch["x"]).square().sum((1, 2))
    total, lengths = [0.0 for _ in model.parameters()], []
    for row in x:
        gradients = torch.autograd.grad(loss(model, {"x": row[None]})[0], list(model.parameters()))
        length = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients))
        lengths.append(length)
        if math.isfinite(length): total = [before + gradient * min(1, 0.8 / length) for before, gradient in zip(total, gradients)]
    sums, norms = clipped(model, loss, {"x": x}, 0.8, chunk)
    assert norms.tolist() == pytest.approx(lengths, rel=1e-9, nan_ok=True) and min(lengths[2:]) < 0.8 < max(lengths)
    for value, expected in zip(sums.values(), total): torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-8)


class Turned(nn.Module):
    "A layer that no rule is written for."
    def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.randn(4, 1, 1))
    def forward(self, x): return torch.sin(self.scale * x)


@pytest.mark.parametrize("layers", [
    lambda: (nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), nn.GroupNorm(2, 4, eps=0.1)),
    lambda: (nn.Conv2d(2, 4, 3, padding="same"), Turned()),
    lambda: (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", bias=False), nn.GroupNorm(4, 4, eps=0.01)),
    lambda: (nn.Conv2d(2, 3, 3), nn.Flatten(2), nn.Linear(36, 5), nn.LayerNorm(5))])
@pytest.mark.parametrize("draws", [1, 3])
def test_gradients_by_layer_are_those_of_each_example_alone(layers, draws):
    torch.manual_seed(0)
    model, x = nn.Sequential(*layers()).double(), torch.randn(3, draws, 2, 8, 8, dtype=torch.float64)
    for parameter in model.parameters(): nn.init.normal_(parameter, std=0.5)
    def loss(model, batch): return (F.softplus(model(batch["x"].flatten(0, 1))).flatten(1) ** 2).mean(1).reshape(-1, draws).mean(1)
    found = privacy.gradients_by_layer(model, loss, {"x": x})
    for index in range(3):
        alone = torch.autograd.grad(loss(model, {"x": x[index:index + 1]}).sum(), list(model.parameters()))
        for (name, _), expected in zip(model.named_parameters(), alone):
            torch.testing.assert_close(found[name][index], expected, rtol=1e-7, atol=1e-10)
