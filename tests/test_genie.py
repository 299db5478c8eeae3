"""GENIE: every formula against numbers found otherwise: by hand, in closed form on Gaussians, or written out in NumPy."""
import functools
import math
import warnings
from types import SimpleNamespace

from extras import need

need("train", "data")

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusion_papers import genie
from diffusion_papers.core.data import digits
from diffusion_papers.core.denoisers import Denoiser
from diffusion_papers.core.diffusion import END
from diffusion_papers.core.generation import generate
from diffusion_papers.core.networks import MLPConfig, ResidualMLP
from diffusion_papers.core.processes import CosineVP, LinearVP
from diffusion_papers.core.training import step_seed
from diffusion_papers.evidence import genie as evidence

PROCESS, MEAN, STD = LinearVP(), 0.3, 0.5
seeded = lambda seed=0: torch.Generator().manual_seed(seed)
column = lambda values, like: torch.as_tensor(values).to(like).reshape(-1, *[1] * (like.ndim - 1))


def gamma_at(t):
    "sqrt(1 / alpha^2 - 1), with alpha = exp(-(0.1 t + 19.9 t^2 / 2) / 2)."
    return np.sqrt(np.expm1(0.1 * np.asarray(t, dtype=np.float64) + 9.95 * np.asarray(t, dtype=np.float64) ** 2))


def levels(steps, exponent=2.0, end=1e-3):
    "Noise levels of a grid whose roots of time fall linearly."
    return gamma_at(np.linspace(1, end ** (1 / exponent), steps + 1) ** exponent)


def pull(gamma): return STD**2 / (STD**2 + gamma**2)  # of a Gaussian's best denoiser towards what it sees


class Gaussian(nn.Module):
    "The best denoiser of N(mean + 0.1 class, 0.5^2), in the form of a `Denoiser`; it keeps what it was told."

    def __init__(self, shape=(1, 8, 8)):
        super().__init__()
        self.network, self.process, self.told = SimpleNamespace(shape=shape), PROCESS, []

    def forward(self, x, sigma, class_label=None, **cond):
        self.told.append({"sigma": sigma, "class_label": class_label, **cond})
        mean = MEAN if class_label is None else MEAN + column(0.1 * class_label, x)
        return mean + pull(column(sigma, x)) * (x - mean)

    def with_features(self, x, sigma, **cond): return self(x, sigma, **cond), 2 * x, sigma + 7


class Share(nn.Module):
    "A head that says a share of the Gaussian's exact derivative, s^2 (x - mean) / (s^2 + gamma^2)^2."

    def __init__(self, share=1.0):
        super().__init__()
        self.share, self.seen = nn.Parameter(torch.tensor(share, dtype=torch.float64)), []

    def forward(self, x, sigma, *rest):
        self.seen.append((x, sigma, *rest))
        return self.share.detach().to(x) * derivative(x, column(sigma, x))


def derivative(x, gamma): return STD**2 * (x - MEAN) / (STD**2 + gamma**2) ** 2


def gaussian_model(share=1.0): return genie.Genie(Gaussian(), Share(share), genie.CONFIGS["cpu"])


def walked(solver, x_T, gammas):
    "Where DDIM, or Taylor's method, leads on the Gaussian: each step multiplies the distance from the mean."
    x = x_T * np.sqrt(1 + gammas[0] ** 2)
    for now, then in zip(gammas, gammas[1:]):
        factor = pull(now) + then / now * (1 - pull(now))
        if solver in ("genie", "taylor"): factor += (then - now) ** 2 / 2 * STD**2 / (STD**2 + now**2) ** 2
        x = MEAN + factor * (x - MEAN)
    return x / np.sqrt(1 + gammas[-1] ** 2)


def exact(x_T, first, last):
    "Where the equation leads on the Gaussian: the distance from the mean goes with sqrt(s^2 + gamma^2)."
    return (MEAN + (x_T * np.sqrt(1 + first**2) - MEAN) * np.sqrt((STD**2 + last**2) / (STD**2 + first**2))) / np.sqrt(1 + last**2)


def squared_frechet(a, b):
    "Of two sets of vectors, by the eigenvalues of a product."
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    cross = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * cross


def randomised(module, std=0.3):
    for number, parameter in enumerate(module.parameters()): nn.init.normal_(parameter, std=std, generator=seeded(number))
    return module.double().requires_grad_(False).eval()


# ---- the head


@pytest.mark.parametrize("mixing, weights", [("full", {2.0: (-0.5, 0.4, 0.1), 0.5: (-2.0, 0.4, 1.6), 100.0: (-0.01, 100 / 10001, 1 / 1000100)}),
                                             ("leading", {2.0: (-0.5, 0, 0), 0.5: (-2.0, 0, 0)}), ("none", {2.0: (1, 0, 0)})])
def test_three_outputs_are_mixed_by_these_weights(mixing, weights):
    parts = torch.tensor([3.0, -5.0, 7.0], dtype=torch.float64)[:, None, None].expand(3, len(weights), 4)
    found = genie.mix(tuple(parts), torch.tensor([*weights], dtype=torch.float64), mixing)
    wanted = torch.tensor([[3 * a - 5 * b + 7 * c] * 4 for a, b, c in weights.values()], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def norm(x, layer): return F.layer_norm(x, x.shape[1:], layer.weight, layer.bias)


def test_the_vector_head_is_two_residual_blocks_over_everything_it_reads():
    head = randomised(genie.VectorHead(ResidualMLP(MLPConfig(shape=(2, 3), width=8, blocks=1))))
    shapes = ((2, 3), (2, 3), (8,), (8,))
    x_t, eps, features, embedding = (torch.randn(4, *shape, generator=seeded(n), dtype=torch.float64) for n, shape in enumerate(shapes))
    hidden = torch.cat([x_t.flatten(1), eps.flatten(1), norm(features, head.feature_norm)], 1) @ head.input.weight.T + head.input.bias
    for block in head.blocks:
        inner = norm(hidden, block.norm) @ block.inner.weight.T + block.inner.bias + embedding @ block.embed.weight.T + block.embed.bias
        hidden = hidden + (inner * inner.sigmoid()) @ block.outer.weight.T + block.outer.bias
    last = norm(hidden, head.output[0])
    wanted = (last * last.sigmoid()) @ head.output[2].weight.T + head.output[2].bias
    assert len(head.blocks) == 2
    torch.testing.assert_close(torch.stack(head(x_t, eps, features, embedding), 1), wanted.reshape(4, 3, 2, 3))


@pytest.mark.parametrize("feature_norm", [False, True])
def test_the_convolutional_head_is_one_block_between_two_convolutions(feature_norm):
    head = randomised(genie.ConvHead(16, channels=3, conditioning=2, feature_norm=feature_norm))
    shapes = ((5, 6, 6), (3, 6, 6), (16, 6, 6), (64,))
    x_t, eps, features, embedding = (torch.randn(2, *shape, generator=seeded(n), dtype=torch.float64) for n, shape in enumerate(shapes))
    conv = lambda layer, x: F.conv2d(x, layer.weight, layer.bias, padding=1)
    group = lambda layer, x: F.group_norm(x, 4, layer.weight, layer.bias, 1e-6)
    shown = group(head.feature_norm, features) if feature_norm else features
    start, block = conv(head.input, torch.cat([x_t, eps, shown], 1)), head.block
    told = F.silu(embedding) @ block.embed.weight.T + block.embed.bias
    hidden = conv(block.conv_in, F.silu(group(block.norm_in, start))) + told[:, :, None, None]
    hidden = (start + conv(block.conv_out, F.silu(group(block.norm_out, hidden)))) / math.sqrt(2)
    torch.testing.assert_close(block(start, embedding), hidden)  # the norm that follows would hide its scale
    wanted = conv(head.output, F.silu(group(head.output_norm, hidden)))
    torch.testing.assert_close(torch.cat(head(x_t, eps, features, embedding), 1), wanted)


def test_a_convolutional_head_has_at_most_32_groups():
    head = genie.ConvHead(256, feature_norm=True)
    assert [layer.num_groups for layer in (head.feature_norm, head.block.norm_in, head.block.norm_out, head.output_norm)] == [32] * 4


@pytest.mark.parametrize("scale, variance", [(0.0, 1e-10), (1.0, 1.0), (2.5, 2.5)])
def test_a_convolutional_head_starts_as_it_is_told(scale, variance):
    "The variance of its first weights is the scale over the mean of both fans; its last layer is nearly silent."
    torch.manual_seed(0)
    head = genie.ConvHead(64, channels=3, conditioning=3, first_scale=scale)
    wanted = math.sqrt(variance / (9 * (73 + 64) / 2))
    assert head.input.in_channels == 73 and head.input.weight.std().item() == pytest.approx(wanted, rel=0.02)
    assert head.output.weight.std().item() == pytest.approx(math.sqrt(1e-10 / (9 * (64 + 9) / 2)), rel=0.05) and not head.output.bias.any()


@pytest.mark.parametrize("config", [genie.CONFIGS["cpu"], genie.CONFIGS["shapes"]], ids=["digits", "scenes"])
def test_an_untrained_head_is_silent(config):
    model = genie.build(config)
    x = torch.randn(2, *model.shape, generator=seeded())
    eps, change = model.walk("genie")(x, torch.tensor([0.5, 3.0], dtype=torch.float64))
    assert eps.std() > 0.3 and change.abs().max() < 1e-4


class Body(nn.Module):
    "Keeps what it was shown and answers with three constants."
    def __init__(self): super().__init__(); self.seen = []

    def forward(self, *shown):
        self.seen.append(shown)
        return tuple(torch.full_like(shown[1], value) for value in (3.0, -5.0, 7.0))


@pytest.mark.parametrize("process", [LinearVP(), CosineVP()], ids=["linear", "cosine"])
def test_a_head_is_shown_the_state_with_variance_one_and_the_small_image_after_it(process):
    body, generator = Body(), seeded()
    x, eps, features, condition = (torch.randn(2, channels, 4, 4, generator=generator, dtype=torch.float64) for channels in (3, 3, 5, 2))
    sigma, embedding = torch.tensor([2.0, 0.5], dtype=torch.float64), torch.ones(2, 6)
    found = genie.DerivativeHead(body, process)(x, sigma, eps, features, embedding, condition)
    x_t, *others = body.seen[0]
    torch.testing.assert_close(x_t[:, :3], x / torch.sqrt(1 + sigma**2)[:, None, None, None])
    assert torch.equal(x_t[:, 3:], condition) and all(a is b for a, b in zip(others, (eps, features, embedding)))
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor([-1.5 - 2.0 + 0.7, -6 - 2 + 11.2], dtype=torch.float64))
    leading = genie.DerivativeHead(body, process, "leading")(x, sigma, eps, features, embedding)
    assert leading[1].unique().tolist() == [-6.0] and body.seen[1][0].shape[1] == 3


def test_both_derivatives_come_from_one_call():
    denoiser, head = Gaussian(), Share()
    x, sigma = torch.randn(3, 1, 8, 8, generator=seeded(), dtype=torch.float64), torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    eps, change = genie.distilled_slope(denoiser, head, condition=x + 1)(x, sigma)
    level = column(sigma, x)
    torch.testing.assert_close(eps, level * (x - MEAN) / (STD**2 + level**2))
    torch.testing.assert_close(change, derivative(x, level))
    seen = head.seen[0]
    assert len(denoiser.told) == 1 and torch.equal(seen[2], eps) and torch.equal(seen[3], 2 * x) and torch.equal(seen[4], sigma + 7)
    assert torch.equal(seen[5], x + 1) and torch.equal(denoiser.told[0]["condition"], x + 1)


# ---- calls and steps

BUDGETS = {  # solver, calls, first step, last call -> steps
    ("genie", 10, False, False): 10, ("genie", 10, True, False): 11, ("genie", 10, False, True): 9, ("genie", 10, True, True): 10,
    ("ddim", 1, False, False): 1, ("ddim", 1, True, True): 1, ("taylor", 7, False, False): 7, ("dpm_solver_pp", 6, True, False): 7,
    ("heun", 10, False, False): 5, ("heun", 11, False, False): 5, ("heun", 10, True, False): 6, ("heun", 10, False, True): 4,
    ("heun", 11, True, True): 6, ("midpoint", 9, False, False): 4, ("adams_bashforth", 5, False, False): 5, ("s_pndm", 10, False, False): 9,
    ("s_pndm", 10, True, True): 9, ("s_pndm", 2, False, False): 1, ("f_pndm", 13, False, False): 4, ("f_pndm", 20, False, True): 10,
    ("f_pndm", 14, True, True): 5}


@pytest.mark.parametrize("setting", BUDGETS, ids=str)
def test_a_budget_buys_so_many_steps(setting): assert genie.steps_within(*setting) == BUDGETS[setting]


@pytest.mark.parametrize("setting, fewest", [(("f_pndm", 12), 13), (("f_pndm", 13, True, True), 14), (("heun", 1), 2), (("heun", 2, False, True), 3),
                                             (("s_pndm", 1), 2), (("genie", 0), 1), (("genie", 1, False, True), 2), (("genie", 0, True), 1)])
def test_a_budget_that_buys_nothing_says_what_would(setting, fewest):
    with pytest.raises(ValueError, match=rf"calls: {setting[0]} needs at least {fewest}, got {setting[1]}"): genie.steps_within(*setting)


@pytest.mark.parametrize("setting, calls", [
    (("genie", 5), 5), (("genie", 5, True), 4), (("genie", 5, False, True), 6), (("genie", 5, True, True), 5), (("heun", 5), 10),
    (("heun", 5, True, True), 9), (("midpoint", 3), 6), (("s_pndm", 5), 6), (("s_pndm", 5, True), 5), (("f_pndm", 4), 13),
    (("f_pndm", 6, True, True), 15), (("genie", 1, True), 0), (("genie", 1, True, True), 1),
    (("s_pndm", 1, True), 0), (("f_pndm", 1, True, True), 1)], ids=str)
def test_a_run_costs_so_many_calls(setting, calls): assert genie.calls_for(*setting) == calls


def test_solvers_are_the_samplers_of_their_names():
    names = {"genie": "taylor", "ddim": "euler"}
    for name, solver in genie.SOLVERS.items(): assert solver.sampler.__name__ == names.get(name, name)
    assert {name: solver.derivative for name, solver in genie.SOLVERS.items() if solver.derivative} == {"genie": "distilled", "taylor": "exact"}


def test_too_few_steps_of_a_solver_are_refused():
    for setting in (("f_pndm", 3), ("f_pndm", 4, True)):
        with pytest.raises(ValueError, match="steps of f_pndm: expected at least 4, got 3"): genie.calls_for(*setting)


# ---- from noise to data

X_T = torch.linspace(-2, 2, 64, dtype=torch.float64).reshape(1, 1, 8, 8)


@pytest.mark.parametrize("solver", ["ddim", "genie", "taylor"])
@pytest.mark.parametrize("exponent, end", [(2.0, 1e-3), (1.0, 1e-3), (3.0, 0.05)])
def test_integrate_walks_on_its_grid_of_times(solver, exponent, end):
    found = genie.integrate(solver, gaussian_model().walk(solver), X_T, PROCESS, 6, exponent=exponent, end=end)
    np.testing.assert_allclose(found.numpy(), walked(solver, X_T.numpy(), levels(6, exponent, end)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", ["ddim", "genie"])
def test_the_analytical_step_goes_along_the_noise_itself(solver):
    "And the other steps go on from its end."
    found, gammas = genie.integrate(solver, gaussian_model().walk(solver), X_T, PROCESS, 6, first_step=True), levels(6)
    start = X_T.numpy() * (np.sqrt(1 + gammas[0] ** 2) - gammas[0] + gammas[1])
    np.testing.assert_allclose(found.numpy(), walked(solver, start / np.sqrt(1 + gammas[1] ** 2), gammas[1:]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", ["ddim", "genie"])
def test_the_last_call_returns_what_the_denoiser_sees(solver):
    found, gammas = genie.integrate(solver, gaussian_model().walk(solver), X_T, PROCESS, 4, denoise=True, end=0.1), levels(4, end=0.1)
    end = walked(solver, X_T.numpy(), gammas) * np.sqrt(1 + gammas[-1] ** 2)
    np.testing.assert_allclose(found.numpy(), MEAN + pull(gammas[-1]) * (end - MEAN), rtol=1e-7, atol=1e-9)


def test_integrate_keeps_the_precision_that_came_and_takes_wide_steps_where_it_must():
    "At the end of the cosine process the level is above 10,000; float32 would lose four digits."
    process, point = CosineVP(), lambda x, sigma: torch.full_like(x, 0.25)
    process.start = 1 - 1e-5
    found = genie.integrate("ddim", point, X_T.float(), process, 5, first_step=True)
    assert found.dtype == torch.float32 == genie.integrate("ddim", point, X_T.half(), process, 5).dtype
    assert (found - genie.integrate("ddim", point, X_T.float().double(), process, 5, first_step=True)).abs().max() < 1e-6


def test_a_single_analytical_step_asks_nothing_and_says_so():
    with pytest.warns(UserWarning, match="the model is never asked"): found = genie.integrate("ddim", None, X_T, PROCESS, 1, first_step=True)
    first, last = gamma_at([1, 1e-3])
    torch.testing.assert_close(found, X_T * float((math.sqrt(1 + first**2) - first + last) / math.sqrt(1 + last**2)))


# ---- distillation


@pytest.mark.parametrize("weighting, power", [("gamma2", 2), ("gamma3", 3), ("one", 0)])
@pytest.mark.parametrize("target", ["exact", "difference"])
def test_the_loss_is_the_weighted_squared_error_summed_over_an_image(weighting, power, target):
    "Of a head that says a fifth more than the exact derivative."
    generator = seeded()
    x0, noise = (torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = torch.tensor([0.1, 0.7, 4.0, 60.0], dtype=torch.float64)
    loss = genie.distillation_loss(Gaussian(), Share(1.2), x0, sigma, noise, weighting=weighting, target=target)
    level = column(sigma, x0)
    wanted = (level**power * (0.2 * derivative(x0 + level * noise, level)) ** 2).sum((1, 2, 3))
    torch.testing.assert_close(loss, wanted, rtol=1e-9 if target == "exact" else 4e-2, atol=0)


def test_a_target_by_a_difference_is_the_derivative_to_first_order():
    x0, sigma = torch.randn(4, 1, 8, 8, generator=seeded(), dtype=torch.float64), torch.tensor([0.1, 0.7, 4.0, 60.0], dtype=torch.float64)
    noise = torch.ones_like(x0)
    loss = genie.distillation_loss(Gaussian(), lambda x, *_: torch.zeros_like(x), x0, sigma, noise, target="difference")
    level = column(sigma, x0)
    wanted = (level * derivative(x0 + level * noise, level)).square().sum((1, 2, 3))
    torch.testing.assert_close(loss, wanted, rtol=2e-2, atol=0)


@pytest.mark.parametrize("head_eps", ["pred", "true"])
@pytest.mark.parametrize("target", ["exact", "difference"])
def test_the_head_is_shown_the_noise_that_was_asked_for(head_eps, target):
    denoiser, head, generator = Gaussian(), Share(), seeded()
    x0, noise = (torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma, cond = torch.tensor([0.2, 1.0, 9.0], dtype=torch.float64), {"condition": x0 + 1, "class_label": torch.zeros(3)}
    genie.distillation_loss(denoiser, head, x0, sigma, noise, head_eps=head_eps, target=target, **cond)
    (x, level, shown, features, embedding, condition), = head.seen
    torch.testing.assert_close(x, x0 + column(sigma, x0) * noise)
    predicted = column(sigma, x) * (x - MEAN) / (STD**2 + column(sigma, x) ** 2)
    torch.testing.assert_close(shown, predicted if head_eps == "pred" else noise)
    assert torch.equal(level, sigma) and torch.equal(features, 2 * x) and torch.equal(embedding, sigma + 7) and torch.equal(condition, x0 + 1)
    assert len(denoiser.told) == 2 and all(told["condition"] is condition for told in denoiser.told)


def test_targets_are_found_in_full_precision_under_autocast():
    model = randomised(genie.build(genie.CONFIGS["cpu"]), 0.1).float()
    x0, sigma = torch.randn(4, 1, 8, 8, generator=seeded()), torch.tensor([0.1, 0.7, 4.0, 60.0], dtype=torch.float64)
    silent = lambda x, *_: torch.zeros_like(x)
    for target in genie.TARGETS:
        loss = functools.partial(genie.distillation_loss, model.denoiser, silent, x0, sigma, x0.flip(0), target=target)
        with torch.autocast("cpu", torch.bfloat16): found = loss()
        torch.testing.assert_close(found, loss(), rtol=1e-4, atol=1e-6)


def test_a_targets_precision_is_given_back(monkeypatch):
    for before in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
        with genie._full_precision(torch.device("cpu")): assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32 == before


UPSAMPLER = genie.CONFIGS["cats512"].override(**{
    "diffusion.unet.image_size": 16, "diffusion.unet.width": 16, "diffusion.unet.multipliers": (1, 2), "diffusion.unet.blocks": 1,
    "diffusion.unet.attention": (8,), "diffusion.unet.head_width": 16, "diffusion.unet.norm_groups": "quarter", "diffusion.low_size": 8})


class Fixed:
    "Draws that are known: shares of the interval for uniform numbers, one number everywhere for normal ones."
    def __init__(self, *shares): self.shares, self.asked = list(shares), []

    def uniform(self, like, low=0.0, high=1.0):
        self.asked.append((low, high))
        return low + (high - low) * torch.full((len(like),), self.shares.pop(0))

    def normal(self, like): return torch.full_like(like, 0.5 + like.shape[-1] / 16)


def enlarged(low, level, noise):
    "What an up-sampler is shown: noisy at a time of the linear process, twice as large, bilinear."
    alpha = math.exp(-0.05 * level - 4.975 * level**2)
    return F.interpolate(alpha * low + math.sqrt(1 - alpha**2) * noise, scale_factor=2, mode="bilinear")


def test_the_heads_loss_is_of_uniform_times_and_of_what_the_configuration_says(monkeypatch):
    "An up-sampler's small image is noisy at a level of its own."
    calls = []
    monkeypatch.setattr(genie, "distillation_loss", lambda *args, **options: calls.append((args, options)))
    config = UPSAMPLER.override(weighting="gamma3", head_eps="true", target="difference")
    model, x0, draws = genie.build(config), torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1, Fixed(0.25, 0.75)
    genie.head_loss(model.head, {"x0": x0}, draws, config, model.denoiser)
    (denoiser, head, data, sigma, noise), options = calls[0]
    assert denoiser is model.denoiser and head is model.head and data is x0 and draws.asked == [(1e-3, 1.0)] * 2
    np.testing.assert_allclose(sigma, [gamma_at(0.25075)] * 2, rtol=1e-6)
    assert torch.equal(noise, torch.full_like(x0, 1.5)) and sigma.dtype == torch.float64
    assert (options.pop("weighting"), options.pop("head_eps"), options.pop("target")) == ("gamma3", "true", "difference")
    torch.testing.assert_close(options.pop("augmentation"), torch.full((2,), 0.75025))
    low = F.interpolate(x0, size=(8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(options.pop("condition"), enlarged(low, 0.75025, torch.ones(())), rtol=1e-4, atol=1e-4)
    assert not options


def test_the_heads_loss_of_a_model_with_classes_hides_some(monkeypatch):
    calls, config = [], genie.CONFIGS["cpu"]
    monkeypatch.setattr(genie, "distillation_loss", lambda *args, **options: calls.append((args, options)))
    model, batch = genie.build(config), {"x0": torch.zeros(2, 1, 8, 8), "class_label": torch.tensor([3, 4])}
    for share, wanted in ((0.29, [10, 10]), (0.31, [3, 4])):
        genie.head_loss(model.head, batch, Fixed(1.0, share), config, model.denoiser)
        (_, _, _, sigma, _), options = calls.pop()
        assert options["class_label"].tolist() == wanted and sigma.numpy() == pytest.approx(gamma_at(1.0), rel=1e-5)
        assert (options["weighting"], options["head_eps"], options["target"]) == ("gamma2", "pred", "exact")


def test_a_head_is_trained_beside_its_frozen_network(monkeypatch):
    "On the data of the network, with a seed of its own; one to go on from is where it starts."
    asked, config = [], genie.CONFIGS["cpu"].override(seed=3)
    monkeypatch.setattr(genie, "fit", lambda *args, **options: asked.append((args, options)) or args[0])
    denoiser, other = genie.build(config).denoiser.train(), randomised(genie.build(config).head).float()
    model = genie.train_head(config, denoiser, other, workers=7)
    (head, loss, data, training), options = asked[0]
    assert model.denoiser is denoiser and not denoiser.training and model.head is head and len(data) == 1797 and options["workers"] == 7
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(head.state_dict().values(), other.state_dict().values()))
    assert training.seed == step_seed(3, 1) % 2**31 and (training.steps, training.lr) == (config.head.steps, config.head.lr)
    assert loss.func is genie.head_loss and loss.keywords == {"config": config, "denoiser": denoiser}


def test_initial_heads_depend_on_their_own_seed_alone():
    torch.manual_seed(1)
    config, before = genie.CONFIGS["cpu"], torch.random.get_rng_state()
    first = genie.build(config)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    for changes, same_network, same_head in (({}, True, True), ({"seed": 1}, True, False), ({"diffusion.seed": 1}, False, True)):
        other = genie.build(config.override(**changes))
        assert torch.equal(first.denoiser.network.input.weight, other.denoiser.network.input.weight) == same_network
        assert torch.equal(first.head.body.input.weight, other.head.body.input.weight) == same_head


# ---- sampling


@pytest.mark.parametrize("solver", ["genie", "taylor", "ddim"])
def test_guidance_leads_away_from_what_is_drawn_without_a_class(solver):
    "(1 + w) times the one less w times the other; the unconditional model may be another, and keeps what else is told."
    model, other = gaussian_model(), gaussian_model(3.0)
    x, labels = torch.randn(2, 1, 8, 8, generator=seeded(), dtype=torch.float64), torch.tensor([4, 9])
    sigma = torch.tensor([0.3, 2.0], dtype=torch.float64)
    level = column(sigma, x)
    found = model.walk(solver, {"class_label": labels, "augmentation": 5}, 0.5, other)(x, sigma)
    with_class, without = (level * (x - mean) / (STD**2 + level**2) for mean in (MEAN + column(0.1 * labels, x), MEAN))
    eps = 1.5 * with_class - 0.5 * without
    torch.testing.assert_close(found[0] if solver != "ddim" else (x - found) / level, eps)
    if solver == "genie": torch.testing.assert_close(found[1], (1.5 - 0.5 * 3) * derivative(x, level))
    if solver == "taylor":  # of one Gaussian again, with the guided mean
        torch.testing.assert_close(found[1], STD**2 * (x - MEAN - 1.5 * column(0.1 * labels, x)) / (STD**2 + level**2) ** 2)
    assert all(told["augmentation"] == 5 for told in model.denoiser.told + other.denoiser.told)
    assert all(told["class_label"] is labels for told in model.denoiser.told) and all(told["class_label"] is None for told in other.denoiser.told)


def test_guided_slopes_are_mixed_term_by_term():
    slope = lambda *terms: lambda x, sigma: tuple(term * x for term in terms)
    found = genie.guided_slope(slope(2.0, 5.0), slope(1.0, -3.0), 0.5)(torch.ones(1), None)
    assert [term.item() for term in found] == [2.5, 9.0]
    only = slope(2.0, 5.0)
    assert genie.guided_slope(only, None, 0) is only


@pytest.mark.parametrize("options, gammas", [({}, levels(10)), (dict(calls=7, exponent=1.0), levels(7, 1.0)),
                                             (dict(calls=4, solver="ddim"), levels(4))])
def test_samples_are_walks_from_seeded_noise(options, gammas):
    found = genie.sample(gaussian_model(), 3, seed=5, **options)
    x_T = torch.randn(3, 1, 8, 8, generator=seeded(5)).double().numpy()
    np.testing.assert_allclose(found.numpy(), walked(options.get("solver", "genie"), x_T, gammas), rtol=1e-6, atol=1e-8)


def test_a_sample_is_told_its_class():
    model = gaussian_model()
    genie.sample(model, 3, class_label=2, cond={"augmentation": 1})
    genie.sample(model, 2, class_label=torch.tensor([1, 0]))
    assert len(model.denoiser.told) == 20 and model.denoiser.told[0]["class_label"].tolist() == [2, 2, 2]
    assert model.denoiser.told[0]["augmentation"] == 1 and model.denoiser.told[-1]["class_label"].tolist() == [1, 0]


def test_a_callback_is_shown_the_state_and_what_the_denoiser_makes_of_it():
    for walk in (functools.partial(genie.sample, x_T=X_T), lambda model, **options: genie.encode(model, X_T / 2, **options)):
        seen = []
        walk(gaussian_model(), calls=5, callback=lambda *args: seen.append(args))
        gammas = levels(5) if seen[0][1].abs().max() > 100 else levels(5)[::-1]
        assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
        for (_, x, x0), gamma in zip(seen, gammas): torch.testing.assert_close(x0, MEAN + float(pull(gamma)) * (x - MEAN))


def test_a_reference_is_where_the_equation_leads():
    model, first, last = gaussian_model(), *gamma_at([1, 1e-3])
    np.testing.assert_allclose(genie.reference_samples(model, X_T), exact(X_T.numpy(), first, last), atol=2e-4)
    assert len(model.denoiser.told) == 2 * (200 + 100)  # itself, and half as many steps to know its error
    shifted = genie.reference_samples(model, X_T, lambda x, sigma: model.denoiser(x - 1, sigma) + 1, steps=100)
    np.testing.assert_allclose(shifted, exact(X_T.numpy() - 1 / math.sqrt(1 + first**2), first, last) + 1 / math.sqrt(1 + last**2), atol=1e-3)


def test_codes_are_the_noise_that_leads_there():
    model, (first, last) = gaussian_model(), gamma_at([1, 1e-3])
    noise = X_T * 0.4
    data = torch.from_numpy(exact(noise.numpy(), first, last))
    assert data.abs().max() < 1
    for solver, calls, spent, tolerance in (("heun", 801, 800, 2e-3), ("genie", 400, 400, 2e-3), ("ddim", 2000, 2000, 1e-2)):
        model.denoiser.told.clear()
        torch.testing.assert_close(genie.encode(model, data, solver=solver, calls=calls), noise, rtol=0, atol=tolerance)
        assert len(model.denoiser.told) == spent
    model.denoiser.told.clear()
    genie.encode(model, data, class_label=3)
    assert [told["class_label"].tolist() for told in model.denoiser.told] == [[3]] * 40


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_encoding_walks_the_grid_backwards(exponent):
    "One Euler step after another, from the data's end."
    gammas = levels(5, exponent)[::-1]
    x = X_T.numpy() / 2 * np.sqrt(1 + gammas[0] ** 2)
    for now, then in zip(gammas, gammas[1:]): x = MEAN + (pull(now) + then / now * (1 - pull(now))) * (x - MEAN)
    found = genie.encode(gaussian_model(), X_T / 2, solver="ddim", calls=5, exponent=exponent)
    np.testing.assert_allclose(found.numpy(), x / np.sqrt(1 + gammas[-1] ** 2), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("level", [0.02, 0.1, 0.4])
def test_an_upsampler_is_shown_the_small_image_at_the_level_that_is_asked_for(level):
    "Clipped, noisy and enlarged; network and head see the same, and are told the level."
    model, told, shown = genie.build(UPSAMPLER), [], []
    found = model.denoiser.network.with_features
    model.denoiser.network.with_features = lambda *args, **cond: told.append(cond) or found(*args, **cond)
    model.head.body.register_forward_pre_hook(lambda body, args: shown.append(args[0]))
    low = torch.rand(2, 3, 8, 8, generator=seeded()) * 3 - 1.5
    images = genie.upsample(model, low, calls=2, seed=4, **({} if level == 0.1 else {"level": level}))
    noise = torch.randn(2, 3, 8, 8, generator=seeded(step_seed(4, 1)))
    wanted = enlarged(low.clamp(-1, 1), level, noise)
    assert images.shape == (2, 3, 16, 16) and len(told) == len(shown) == 2
    for cond, state in zip(told, shown):
        torch.testing.assert_close(cond["condition"], wanted, rtol=1e-4, atol=1e-5)
        assert cond["augmentation"].tolist() == pytest.approx([level] * 2) and torch.equal(state[:, 3:], cond["condition"])
    x_T = torch.randn(2, 3, 16, 16, generator=seeded(4))
    torch.testing.assert_close(shown[0][:, :3], x_T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", [-0.1, 0.0, 1.01])
def test_an_upsampler_refuses_a_level_outside_of_its_times(level):
    with pytest.raises(ValueError, match="level"): genie.upsample(genie.build(UPSAMPLER), torch.zeros(1, 3, 8, 8), level=level)


def test_an_upsampler_refuses_images_that_it_does_not_know():
    model = genie.build(UPSAMPLER)
    for low, message in ((torch.zeros(1, 3, 8, 16), r"low: expected shape \(B, 3, 8, 8\)"),
                         (torch.full((1, 3, 8, 8), -2.1), "low: expected values about")):
        with pytest.raises(ValueError, match=message): genie.upsample(model, low)
    with pytest.raises(ValueError, match="model: expected an up-sampler"): genie.upsample(gaussian_model(), torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="low_path: an up-sampler needs the folder"): genie.generate_data(model, "nowhere")
    with pytest.raises(ValueError, match="low_path: .* another model needs none"): genie.generate_data(gaussian_model(), "nowhere", low_path="somewhere")


def test_many_samples_of_an_upsampler_are_of_the_small_ones_in_their_order(tmp_path, monkeypatch):
    model = genie.build(UPSAMPLER)
    small = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 8, 8) * 50
    generate(lambda piece: {"images": small[list(piece)]}, 5, tmp_path / "small", size=2, device="cpu")
    asked = []
    def enlarged(model, low, *, seed, **options):
        asked.append((low, seed, options["calls"]))
        return low.mean((1, 2, 3), keepdim=True).expand(-1, *model.shape)
    monkeypatch.setattr(genie, "upsample", enlarged)
    made = genie.generate_data(model, tmp_path / "large", low_path=str(tmp_path / "small"), size=3, calls=4, device="cpu")
    assert len(made) == 5 and (made.__getitems__(range(5))["images"].flatten(1).float().mean(1) - torch.arange(5.0) * 50).abs().max() <= 1
    assert torch.equal(torch.cat([low for low, *_ in asked]), small / 127.5 - 1) and [calls for *_, calls in asked] == [4, 4]
    assert len({seed for _, seed, _ in asked}) == 2


PUBLISHED = {  # the network's prediction, steps, batch and rate; the head's
    "cifar10": ("eps", 400_000, 128, 2e-4, 20_000, 128, 5e-5), "church": ("eps", 300_000, 256, 3e-4, 35_000, 256, 1e-4),
    "bedroom": ("eps", 300_000, 256, 3e-4, 40_000, 256, 1e-4), "imagenet64": ("eps", 400_000, 1024, 2e-4, 25_000, 256, 1e-4),
    "imagenet64_cond": ("eps", 400_000, 1024, 2e-4, 15_000, 256, 1e-4), "cats128": ("v", 400_000, 128, 1e-4, 20_000, 64, 1e-4),
    "cats512": ("v", 150_000, 64, 3e-4, 20_000, 16, 1e-4)}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_models_are_trained_as_the_paper_says(preset):
    config = genie.CONFIGS[preset]
    network, head = config.diffusion.training, config.head
    assert PUBLISHED[preset] == (config.diffusion.prediction, network.steps, network.batch_size, network.lr, head.steps, head.batch_size, head.lr)
    assert (config.diffusion.label, config.diffusion.process, config.diffusion.pixel_sum) == ("time", "linear", True)
    assert (network.ema, head.ema) == (0.9999, 0.0)
    assert (config.mixing, config.weighting, config.head_eps, config.target, config.head_scale) == ("full", "gamma2", "pred", "exact", 0.0)


# ---- measures


def test_the_heads_error_is_the_share_of_the_loss_that_it_leaves():
    "A head that says a share s of the derivative leaves (1 - s)^2, whatever the times."
    x0 = torch.rand(50, 1, 8, 8, generator=seeded()) * 2 - 1
    for share in (0.0, 0.7, 1.0, 1.5): assert genie.head_error(gaussian_model(share), x0) == pytest.approx((1 - share) ** 2, abs=1e-9)


def test_the_heads_error_is_of_what_it_is_told():
    model, x0 = gaussian_model(), torch.rand(5, 1, 8, 8, generator=seeded())
    genie.head_error(model, x0, class_label=torch.arange(5))
    assert len(model.denoiser.told) == 4 and all(told["class_label"].tolist() == [0, 1, 2, 3, 4] for told in model.denoiser.told)


def test_the_heads_error_is_of_sums_over_uniform_times():
    "A head that is off by 1 / gamma everywhere: its weighted loss is the number of pixels."
    x0, generator = torch.rand(50, 1, 8, 8, generator=seeded()) * 2 - 1, seeded(6)
    model = gaussian_model()
    model.head.forward = lambda x, sigma, *_: derivative(x, column(sigma, x)) + 1 / column(sigma, x)
    gamma = torch.from_numpy(gamma_at(END + (1 - END) * torch.rand(50, generator=generator, dtype=torch.float64).numpy())).reshape(-1, 1, 1, 1)
    x = x0 + gamma * torch.randn(x0.shape, generator=generator)
    wanted = 50 * 64 / (gamma * derivative(x, gamma)).square().sum()
    assert genie.head_error(model, x0, seed=6) == pytest.approx(wanted.item(), rel=1e-6)


def test_the_heads_error_covers_the_times_of_its_process():
    "The mean of the loss of silence, in closed form: the integral of d gamma^2 s^4 / (s^2 + gamma^2)^3 over t."
    x0, model, told = MEAN + STD * torch.randn(4000, 1, 2, 2, generator=seeded(), dtype=torch.float64), gaussian_model(), []
    model.denoiser.network.shape = (1, 2, 2)
    model.head.forward = lambda x, sigma, *_: told.append(sigma) or derivative(x, column(sigma, x)) + column(1.0, x)
    t = np.linspace(END, 1, 200_001)
    integral = lambda values: torch.trapezoid(torch.from_numpy(values), torch.from_numpy(t)).item()
    gamma = gamma_at(t)
    silent, loud = integral(gamma**2 * STD**4 / (STD**2 + gamma**2) ** 3), integral(gamma**2)
    assert genie.head_error(model, x0) == pytest.approx(loud / silent, rel=0.1)
    assert told[0].min() < gamma_at(END + 2e-3) and told[0].max() > gamma_at(0.998)


def test_rows_hold_the_distance_to_the_exact_end_and_to_the_digits():
    model = gaussian_model()
    rows = genie.evaluate(model, 90, solvers=("genie", "ddim", "heun"), calls=(5,), exponents=(1.0, 2.0), seed=2)
    x_T = torch.randn(90, 1, 8, 8, generator=seeded(2)).double().numpy()
    end, data = exact(x_T, *gamma_at([1, 1e-3])), digits()[:]["x0"].flatten(1).numpy()
    assert [(row["solver"], row["budget"], row["calls"], row["exponent"]) for row in rows] == [
        (solver, 5, 4 if solver == "heun" else 5, exponent) for solver in ("genie", "ddim", "heun") for exponent in (1.0, 2.0)]
    for row in rows[:4]:
        images = walked(row["solver"], x_T, levels(5, row["exponent"]))
        assert row["error"] == pytest.approx(math.sqrt(((images - end) ** 2).mean()), rel=1e-3)
        assert row["frechet"] == pytest.approx(squared_frechet(images.reshape(90, 64).clip(-1, 1), data), rel=1e-3)


@pytest.mark.parametrize("share, warned", [(0.11, True), (0.09, False), (math.nan, True)])
def test_a_reference_may_have_a_tenth_of_the_smallest_error(monkeypatch, share, warned):
    model, ask = gaussian_model(), dict(solvers=("ddim",), calls=(5, 3))
    least = min(row["error"] for row in genie.evaluate(model, 4, **ask))
    found = genie.reference_and_error
    monkeypatch.setattr(genie, "reference_and_error", lambda *args: (found(*args)[0], share * least))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        genie.evaluate(model, 4, **ask)
    assert any("the reference has an error of about" in str(each.message) for each in seen) == warned


def test_as_many_are_drawn_as_the_configuration_says():
    model = gaussian_model()
    model.config = model.config.override(evaluated=7)
    genie.evaluate(model, solvers=("ddim",), calls=(3,))
    assert {len(told["sigma"]) for told in model.denoiser.told} == {7}


def test_an_upsampler_is_measured_on_small_versions_of_its_data(monkeypatch):
    config, asked = UPSAMPLER.override(**{"diffusion.data": "noise"}), []
    monkeypatch.setattr(genie, "reference_and_error", lambda walk, x_T, process: (x_T, 0.0))
    monkeypatch.setattr(genie, "sample", lambda model, x_T, cond, **options: asked.append(cond) or x_T + 0.5)
    rows = genie.evaluate(genie.build(config), 3, solvers=("ddim",), calls=(1,))
    data = torch.stack([genie.load_data(config.diffusion)[number]["x0"] for number in range(3)])
    low = F.interpolate(data, size=(8, 8), mode="bilinear", antialias=True)
    noise = torch.randn(3, 3, 8, 8, generator=seeded(step_seed(0, 1)))
    torch.testing.assert_close(asked[0]["condition"], enlarged(low, 0.1, noise), rtol=1e-4, atol=1e-5)
    assert asked[0]["augmentation"].tolist() == pytest.approx([0.1] * 3) and rows[0]["error"] == pytest.approx(0.5)


def test_budgets_that_buy_nothing_are_refused_before_anything_is_measured():
    model = gaussian_model()
    for wrong in (dict(solvers=("ddim", "f_pndm"), calls=(20, 5)), dict(solvers=("ddim",), exponents=(2.0, 8.5)), dict(calls=()),
                  dict(solvers=("rk4",))):
        with pytest.raises(ValueError, match="calls|exponents|solvers"): genie.evaluate(model, 4, **wrong)
    assert not model.denoiser.told


def test_rows_with_an_analytical_step_say_what_they_spent():
    rows = genie.evaluate(gaussian_model(), 4, solvers=("ddim",), calls=(3,), first_steps=(True, False))
    assert [(row["first_step"], row["calls"]) for row in rows] == [(True, 3), (False, 3)] and rows[0]["error"] != rows[1]["error"]


def test_the_fastest_of_the_repeats_is_reported(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(genie, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    row, = genie.evaluate(gaussian_model(), 3, solvers=("ddim",), calls=(3,), repeats=3)
    assert row["seconds"] == 2.0


def test_many_samples_are_clipped_bytes_of_all_classes(tmp_path):
    model = gaussian_model()
    made = genie.generate_data(model, tmp_path, count=25, size=10, seed=3, device="cpu", calls=4, solver="ddim").__getitems__(range(25))
    noise = torch.cat([torch.randn(count, 1, 8, 8, generator=seeded(step_seed(3, first))) for first, count in ((0, 10), (10, 10), (20, 5))])
    mean, x = MEAN + 0.1 * (torch.arange(25) % 10).double().reshape(-1, 1, 1, 1).numpy(), noise.double().numpy()
    gammas = levels(4)
    x = x * np.sqrt(1 + gammas[0] ** 2)
    for now, then in zip(gammas, gammas[1:]): x = mean + (pull(now) + then / now * (1 - pull(now))) * (x - mean)
    images = np.clip(x / np.sqrt(1 + gammas[-1] ** 2), -1, 1)
    seen = torch.from_numpy(((images / 2 + 0.5) * 255).astype(np.uint8))  # truncated
    assert (made["images"].int() - seen.int()).abs().max() <= 1 and (made["images"] != seen).float().mean() < 0.01  # a value may round across a level
    assert made["class_label"].tolist() == [number % 10 for number in range(25)]
    assert [told["class_label"].tolist() for told in model.denoiser.told[::4]] == [[*range(10)], [*range(10)], [0, 1, 2, 3, 4]]


# ---- the experiments


def test_a_demonstration_compares_equal_budgets(monkeypatch):
    errors, worse = {"genie": 0.1, "ddim": 0.4, "s_pndm": 0.2, "dpm_solver_pp": 0.25, "heun": 1.5}, {}
    rows = lambda model, count, solvers: [
        {"solver": solver, "budget": budget, "calls": budget - 1, "error": errors[solver] * 10 / budget * worse.get((solver, budget), 1),
         "frechet": 3.0, "seconds": 0.25} for solver in solvers for budget in (5, 10, 15, 20, 25)]
    monkeypatch.setattr(evidence, "evaluate", rows)
    monkeypatch.setattr(evidence, "load_pretrained", gaussian_model)
    shown = evidence.demonstrate()
    assert shown.holds and shown.verdict.endswith("0.40 at 5 calls (DPM-Solver++), 0.50 at 10 calls (S-PNDM), 0.50 at 20 calls (S-PNDM)")
    assert shown.curves["lines"]["Heun"] == ((19, 24), (0.75, 0.6)) and shown.curves["lines"]["GENIE"][0] == (4, 9, 14, 19, 24)
    assert shown.table[0] == {"solver": "GENIE", "calls": 4, "error": 0.2, "Frechet (pixels)": 3.0, "milliseconds": 250.0}
    x_T = torch.randn(16, 1, 8, 8, generator=seeded(5)).double().numpy()
    np.testing.assert_allclose(shown.images["GENIE, 5 calls"], walked("genie", x_T, levels(5)), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(shown.images["where the equation leads"], exact(x_T, *gamma_at([1, 1e-3])), atol=2e-4)
    worse["genie", 20] = 3  # where others are ahead anyway
    assert evidence.demonstrate().holds
    worse["genie", 5] = 2.3  # 0.92 of the best other
    assert not evidence.demonstrate().holds


def test_scenes_are_compared_with_where_the_equation_leads(monkeypatch):
    model = gaussian_model()
    monkeypatch.setattr(evidence, "load_pretrained", lambda name, device: model)
    rows = evidence.study_scenes({"seed": 2, "count": 7})["rows"]
    found = {(row["solver"], row["budget"], row["exponent"]): row for row in rows}
    assert len(rows) == len(found) == 5 * 3 * 2 + 3
    noise, classes = torch.randn(7, 1, 8, 8, generator=seeded(step_seed(2, 0))).double().numpy(), (np.arange(7) % 6).reshape(-1, 1, 1, 1)
    first, last = gamma_at([1, 1e-3])
    moved = lambda walk: walk(noise - 0.1 * classes / math.sqrt(1 + first**2)) + 0.1 * classes / math.sqrt(1 + last**2)  # to the mean of each class
    truth = moved(lambda x_T: exact(x_T, first, last))
    for solver, budget, exponent in (("ddim", 5, 1.0), ("ddim", 10, 2.0), ("taylor", 5, 1.0), ("taylor", 10, 1.0)):
        error = moved(lambda x_T: walked(solver, x_T, levels(budget, exponent))) - truth
        assert found[solver, budget, exponent]["error"] == pytest.approx(math.sqrt((error**2).mean()), abs=4e-4)
    assert [found[solver, 5, 1.0]["calls"] for solver in ("genie", "heun", "s_pndm", "taylor")] == [5, 4, 5, 5]


def test_quality_is_measured_on_clipped_samples_of_all_classes(monkeypatch):
    model, data = gaussian_model(), torch.rand(40, 1, 8, 8, generator=seeded()) - 0.5
    two = lambda images: images.double().unflatten(2, (2, 4)).mean((1, 3, 4))
    monkeypatch.setattr(evidence, "load_pretrained", lambda name, device: model)
    monkeypatch.setattr(evidence, "load_judge", lambda device: SimpleNamespace(features=two))
    monkeypatch.setattr(evidence, "judged", lambda judge, images: seen.append(images) or {"shape": torch.arange(len(images)) % 3})
    monkeypatch.setattr(evidence, "data_images", lambda config, count: data[:count])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model.denoiser.network = ResidualMLP(MLPConfig(width=4, blocks=1)).double()
    seen = []
    rows = evidence.study_quality({"seed": 1, "solver": "heun", "count": 130})["rows"]
    assert [(row["budget"], row["calls"]) for row in rows] == [(5, 4), (10, 10), (20, 20)]
    assert all(row["accuracy"] == pytest.approx(66 / 130) for row in rows)
    assert all(len(images) == 130 and images.abs().max() == 1 for images in seen)
    for row, images in zip(rows, seen): assert row["frechet"] == pytest.approx(squared_frechet(two(images), two(data)), rel=1e-4)
    noise = torch.cat([torch.randn(count, 1, 8, 8, generator=seeded(step_seed(1, first))) for first, count in ((0, 100), (100, 30))]).double()
    labels, gammas = torch.arange(130) % 6, levels(2, 1.0)
    mean, x = (MEAN + column(0.1 * labels, noise)).numpy(), noise.numpy() * math.sqrt(1 + gammas[0] ** 2)
    slope = lambda x, gamma: gamma * (x - mean) / (STD**2 + gamma**2)
    for now, then in zip(gammas, gammas[1:]):
        first = slope(x, now)
        x = x + (then - now) / 2 * (first + slope(x + (then - now) * first, then))
    np.testing.assert_allclose(seen[0], np.clip(x / math.sqrt(1 + gammas[-1] ** 2), -1, 1), atol=1e-6)


def test_the_claim_is_measured_on_both_grids_with_and_without_the_analytical_step(monkeypatch):
    asked = []
    monkeypatch.setattr(evidence, "_trained", lambda seed, changes: asked.append((seed, changes)) or gaussian_model(0.5))
    monkeypatch.setattr(evidence, "evaluate", lambda model, count, **options: asked.append((count, options)) or [len(asked)])
    found = evidence.study_claim({"seed": 2})
    assert found["head_error"] == pytest.approx(0.25) and found["rows"] == [2, 3] and asked[0] == (2, {})
    assert asked[1:] == [(1000, dict(exponents=(2.0, 1.0), repeats=3)),
                         (1000, dict(solvers=("genie", "taylor", "ddim"), exponents=(2.0, 1.0), first_steps=(True,), repeats=3))]


def test_three_seeds_of_everything_are_stored():
    counts = {study: sum(setting["study"] == study for setting in evidence.EXPERIMENTS) for study in evidence.STUDIES}
    assert counts == {"claim": 3, "ablation": 30, "scenes": 3, "quality": 15} and {setting["seed"] for setting in evidence.EXPERIMENTS} == {0, 1, 2}


def test_ablations_train_what_they_say(monkeypatch):
    "Network and head share a seed; the network is that of the changed configuration."
    asked = []
    monkeypatch.setattr(evidence, "_network", lambda config: config)
    monkeypatch.setattr(evidence, "train_head", lambda config, network, device: asked.append((config, network)) or gaussian_model())
    monkeypatch.setattr(evidence, "evaluate", lambda *args, **options: [])
    for variant in evidence.ABLATIONS: evidence.study_ablation({"seed": 2, "variant": variant})
    configs = dict(zip(evidence.ABLATIONS, (config for config, _ in asked)))
    assert all(config.seed == config.diffusion.seed == 2 and network == config.diffusion for config, network in asked)
    assert (configs["no mixing"].mixing, configs["-1/gamma term alone"].mixing, configs["no weighting"].weighting) == ("none", "leading", "one")
    assert (configs["weight gamma^3"].weighting, configs["target by a difference"].target) == ("gamma3", "difference")
    assert configs["head of one block"].head_blocks == 1
    assert (configs["true noise in training"].head_eps, configs["network predicts eps"].diffusion.prediction) == ("true", "eps")
    assert configs["rough embedding"].diffusion.mlp.highest == 64
    assert configs["as in the paper"] == genie.CONFIGS["cpu"].override(**{"seed": 2, "diffusion.seed": 2})


def test_the_peers_network_is_as_large_as_ours():
    pytest.importorskip("diffusers")
    config = evidence.unet_config("ddpm", image_size=16, width=32, multipliers=(1, 2, 2), blocks=2, attention=(8,))
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (evidence.UNet(config), evidence._peer_network(config))]
    assert sizes[0] == sizes[1]
