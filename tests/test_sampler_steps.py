"""Every sampler, step by step, against its paper's formula in plain numbers; grids and derivatives against closed forms."""
import math
import warnings
from itertools import cycle, pairwise

import pytest
import torch

from diffusion_papers.core.analytic import gaussian_denoiser, gaussian_flow
from diffusion_papers.core.processes import EDM, CosineVP, LinearVP
from diffusion_papers.core.samplers import (REFERENCE_ERROR, REFERENCE_STEPS, SAMPLERS, as_state, check_noise, check_sigmas, convergence_order,
                                            derivative_by_difference, euler_in_time, exact_slope, guarded, heun, karras_grid, log_grid,
                                            noise_estimate, reference_and_error, reference_grid, reference_solution, runge_kutta_45, sigma_grid,
                                            slope_derivative, taylor, time_grid, white, widened)

LEVELS = [5.0, 2.5, 2.0, 0.7, 0.4]
START = 3.0
DRAWS = [0.3, -1.2, 0.7, 0.9, -0.4, 1.5, 0.1, -0.8, 0.6, -1.1]
double = lambda values: torch.as_tensor(values, dtype=torch.float64)


def D(x, sigma):
    "A denoiser that bends, of a number."
    return math.tanh(0.5 * x) / (1 + sigma**2) + 0.1 * x / (1 + sigma)


def denoise(x, sigma):
    "The same, of a batch."
    level = sigma[:, None]
    return torch.tanh(0.5 * x) / (1 + level**2) + 0.1 * x / (1 + level)


def solved(name, levels, **options):
    "Where a sampler leads from START, with the draws in their order."
    draws = cycle(DRAWS)
    return SAMPLERS[name](denoise, double([[START]]), double(levels), noise=lambda x: torch.full_like(x, next(draws)), **options).item()


def preserving(sigma):
    "alpha and the noise's standard deviation of a variance-preserving state, at a noise-to-signal ratio."
    return 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)


def in_their_variables(levels, step):
    "A sampler of variance-preserving states: step(x, noise-to-signal now, then, estimate of x_0 from a state)."
    x = START * preserving(levels[0])[0]
    for now, then in pairwise(levels): x = step(x, now, then, lambda x, sigma: D(x / preserving(sigma)[0], sigma))
    return x / preserving(levels[-1])[0]


def slope(x, sigma): return (x - D(x, sigma)) / sigma


@pytest.mark.parametrize("levels", [LEVELS, [*LEVELS, 0.0], LEVELS[::-1]], ids=["down", "to zero", "up"])
def test_euler_is_ddim(levels):
    "Song et al. 2021 (DDIM), equation 12 without noise."
    def step(x, now, then, estimate):
        (alpha, sigma), (alpha_then, sigma_then) = preserving(now), preserving(then)
        x0 = estimate(x, now)
        return alpha_then * x0 + sigma_then * (x - alpha * x0) / sigma
    assert solved("euler", levels) == pytest.approx(in_their_variables(levels, step), rel=1e-12)


@pytest.mark.parametrize("levels", [LEVELS, [*LEVELS, 0.0], LEVELS[::-1]], ids=["down", "to zero", "up"])
def test_heun_is_algorithm_1_of_edm(levels):
    x = START
    for now, then in pairwise(levels):
        d = slope(x, now)
        guess = x + (then - now) * d
        x = guess if then == 0 else x + (then - now) * (0.5 * d + 0.5 * slope(guess, then))
    assert solved("heun", levels) == pytest.approx(x, rel=1e-12)


def test_midpoint_is_dpm_solver_2():
    "Lu et al. 2022, algorithm 1 with r = 1/2, in half the log signal-to-noise ratio."
    def step(x, now, then, estimate):
        eps = lambda x, sigma: (x - preserving(sigma)[0] * estimate(x, sigma)) / preserving(sigma)[1]
        h = math.log(now) - math.log(then)
        middle = math.exp((math.log(now) + math.log(then)) / 2)
        halfway = preserving(middle)[0] / preserving(now)[0] * x - preserving(middle)[1] * math.expm1(h / 2) * eps(x, now)
        return preserving(then)[0] / preserving(now)[0] * x - preserving(then)[1] * math.expm1(h) * eps(halfway, middle)
    assert solved("midpoint", LEVELS) == pytest.approx(in_their_variables(LEVELS, step), rel=1e-12)
    ended = solved("midpoint", LEVELS)
    assert solved("midpoint", [*LEVELS, 0.0]) == pytest.approx(D(ended, LEVELS[-1]), rel=1e-12)


@pytest.mark.parametrize("levels", [LEVELS, [*LEVELS, 0.0]], ids=["down", "to zero"])
def test_adams_bashforth_integrates_the_line_through_two_slopes(levels):
    x, known = START, []
    for now, then in pairwise(levels):
        known.append((now, slope(x, now)))
        (before, earlier), (_, latest) = known[-2:] if len(known) > 1 else (known[-1], known[-1])
        at_end = latest if before == now else earlier + (latest - earlier) * (then - before) / (now - before)
        x += (then - now) * (latest + at_end) / 2
    assert solved("adams_bashforth", levels) == pytest.approx(x, rel=1e-12)


def test_s_pndm_begins_with_the_mean_of_two_slopes_and_goes_on_with_three_halves():
    "Liu et al. 2022, equations 12 and 13 of second order; the transfer is a straight line in these variables."
    now, then = LEVELS[:2]
    first = slope(START, now)
    x, before = START + (then - now) * (first + slope(START + (then - now) * first, then)) / 2, first
    for now, then in pairwise(LEVELS[1:]):
        latest = slope(x, now)
        x, before = x + (then - now) * (3 * latest - before) / 2, latest
    assert solved("s_pndm", LEVELS) == pytest.approx(x, rel=1e-12)


def test_f_pndm_is_exact_for_slopes_of_third_degree():
    "On equal steps, however it starts; and where the slope is the state, its start is the series of the exponential."
    cubic, integral = lambda s: 1 - 2 * s + 0.5 * s**2 - 0.3 * s**3, lambda s: s - s**2 + s**3 / 6 - 0.075 * s**4
    levels = torch.linspace(4, 1, 7, dtype=torch.float64)
    end = SAMPLERS["f_pndm"](lambda x, sigma: x - (sigma * cubic(sigma))[:, None], double([[START]]), levels)
    assert end.item() == pytest.approx(START + integral(1.0) - integral(4.0), rel=1e-12)
    states = []
    SAMPLERS["f_pndm"](lambda x, sigma: x - 0.8 * sigma[:, None] * x, double([[START]]), levels, callback=lambda step, x, x0: states.append(x.item()))
    growth = sum((-0.4) ** power / math.factorial(power) for power in range(5))
    assert states[:4] == pytest.approx([START * growth**step for step in range(4)], rel=1e-12)


@pytest.mark.parametrize("levels", [LEVELS, [*LEVELS, 0.0]], ids=["down", "to zero"])
def test_dpm_solver_pp_is_its_second_algorithm(levels):
    "Lu et al. 2022 (DPM-Solver++), algorithm 2; a step to 0 is one of first order."
    past = []
    def step(x, now, then, estimate):
        past.append((now, estimate(x, now)))
        if then == 0: return past[-1][1]
        h, wanted = math.log(now / then), past[-1][1]
        if len(past) > 1:
            r = math.log(past[-2][0] / now) / h
            wanted = (1 + 1 / (2 * r)) * past[-1][1] - 1 / (2 * r) * past[-2][1]
        return preserving(then)[1] / preserving(now)[1] * x - preserving(then)[0] * math.expm1(-h) * wanted
    assert solved("dpm_solver_pp", levels) == pytest.approx(in_their_variables(levels, step), rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ancestral_is_stochastic_ddim_and_ddpm(eta):
    "Song et al. 2021 (DDIM), equations 12 and 16; with eta = 1 the posterior of Ho et al. 2020, equation 7."
    draws = iter(DRAWS)
    def step(x, now, then, estimate):
        bar, bar_then = preserving(now)[0] ** 2, preserving(then)[0] ** 2
        x0 = estimate(x, now)
        eps = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
        fresh = eta * math.sqrt((1 - bar_then) / (1 - bar) * (1 - bar / bar_then))
        mean = math.sqrt(bar_then) * x0 + math.sqrt(1 - bar_then - fresh**2) * eps
        if eta == 1:
            beta = 1 - bar / bar_then
            posterior = (math.sqrt(bar_then) * beta * x0 + math.sqrt(1 - beta) * (1 - bar_then) * x) / (1 - bar)
            assert mean == pytest.approx(posterior) and fresh**2 == pytest.approx((1 - bar_then) / (1 - bar) * beta)
        return mean + (fresh * next(draws) if eta else 0)
    assert solved("ancestral", LEVELS, eta=eta) == pytest.approx(in_their_variables(LEVELS, step), rel=1e-12)
    if eta == 1: assert solved("ancestral", LEVELS) == solved("ancestral", LEVELS, eta=1.0)
    assert solved("ancestral", [*LEVELS, 0.0], eta=eta) == pytest.approx(D(solved("ancestral", LEVELS, eta=eta), 0.4))


def test_euler_maruyama_steps_along_the_score_and_adds_the_noise_of_the_step():
    "Song et al. 2021, equation 6 with sigma(t) = t: dx = -2 sigma score dsigma + sqrt(2 sigma) dw, backwards."
    x, draws = START, iter(DRAWS)
    for now, then in pairwise(LEVELS):
        score, dt = (D(x, now) - x) / now**2, now - then
        x = x + 2 * now * score * dt + math.sqrt(2 * now) * math.sqrt(dt) * next(draws)
    assert solved("euler_maruyama", LEVELS) == pytest.approx(x, rel=1e-12)
    assert solved("euler_maruyama", [*LEVELS, 0.0]) == pytest.approx(D(x, LEVELS[-1]), rel=1e-12)


@pytest.mark.parametrize("options, levels", [
    ({}, [*LEVELS, 0.0]), (dict(s_churn=0.5), [60.0, 50.0, *LEVELS]), (dict(s_churn=0.5), [2.0, 0.06, 0.05, 0.04]),
    (dict(s_churn=3.0, s_min=0.7, s_max=2.0, s_noise=1.1, limit=0.9), [*LEVELS, 0.0]), (dict(s_churn=0.0), LEVELS)],
    ids=["defaults", "above", "below", "options", "none"])
def test_churn_is_algorithm_2_of_edm(options, levels):
    defaults = dict(s_churn=40, s_min=0.05, s_max=50, s_noise=1.003, limit=math.sqrt(2) - 1)
    s_churn, s_min, s_max, s_noise, limit = (defaults | options).values()
    x, draws, steps = START, iter(DRAWS), len(levels) - 1
    for now, then in pairwise(levels):
        gamma = min(s_churn / steps, limit) if s_min <= now <= s_max else 0
        raised = now + gamma * now
        if gamma: x += math.sqrt(raised**2 - now**2) * s_noise * next(draws)
        d = slope(x, raised)
        end = x + (then - raised) * d
        x = end if then == 0 else x + (then - raised) * (0.5 * d + 0.5 * slope(end, then))
    assert solved("churn", levels, **options) == pytest.approx(x, rel=1e-12)


def test_annealed_langevin_takes_its_steps_at_every_level():
    "Song and Ermon 2019, algorithm 1: x + a/2 score + sqrt(a) z, with a in units of sigma^2."
    x, draws = START, iter(DRAWS)
    for sigma in LEVELS[:3]:
        for _ in range(3):
            score, a = (D(x, sigma) - x) / sigma**2, 0.5 * sigma**2
            x = x + a / 2 * score + math.sqrt(a) * next(draws)
    options = dict(inner_steps=3, step_size=0.5)
    assert solved("annealed_langevin", LEVELS[:3], **options) == pytest.approx(x, rel=1e-12)
    assert solved("annealed_langevin", [*LEVELS[:3], 0.0], **options) == pytest.approx(D(x, LEVELS[2]), rel=1e-12)
    plain = solved("annealed_langevin", LEVELS[:2])
    assert plain == solved("annealed_langevin", LEVELS[:2], inner_steps=5, step_size=0.3)


def test_taylor_is_exact_for_polynomials_of_its_order():
    p = lambda s: (2 - s + 0.5 * s**2, -1 + s, torch.ones_like(s))
    end = taylor(lambda x, sigma: tuple(part[:, None] for part in p(sigma)), double([[START]]), double(LEVELS))
    integral = lambda s: 2 * s - s**2 / 2 + s**3 / 6
    assert end.item() == pytest.approx(START + integral(0.4) - integral(5.0), rel=1e-12)


def test_callbacks_are_told_the_step_its_state_and_its_estimate():
    for name in SAMPLERS:
        told = []
        options = {"s_churn": 0.0} if name == "churn" else {}
        solved(name, LEVELS, callback=lambda step, x, x0: told.append((step, x.item(), x0.item())), **options)
        levels = LEVELS if name == "annealed_langevin" else LEVELS[:-1]
        assert [step for step, _, _ in told] == list(range(len(levels))) and told[0][1] == START
        assert [x0 for _, _, x0 in told] == pytest.approx([D(x, level) for (_, x, _), level in zip(told, levels)]), name
    told = []
    taylor(exact_slope(denoise), double([[START]]), double(LEVELS), callback=lambda step, x, x0: told.append((step, x.item(), x0.item())))
    assert [(step, x0) for step, _, x0 in told] == [(step, pytest.approx(D(x, LEVELS[step]))) for step, x, _ in told]


def test_euler_in_time_steps_in_t():
    "Song et al. 2021, equations 13 and 6: dx = (-1/2 beta x - 1/2 beta score) dt; with noise the whole score, and sqrt(beta) dw."
    process, times = LinearVP(0.2, 9.0), [1.0, 0.8, 0.5, 0.45]
    for noisy in (False, True):
        x, draws, told = START, iter(DRAWS), []
        for now, then in pairwise(times):
            beta, log_alpha = 0.2 + 9.0 * now, -0.5 * (0.2 * now + 4.5 * now**2)
            alpha, variance = math.exp(log_alpha), 1 - math.exp(2 * log_alpha)
            x0 = D(x / alpha, math.sqrt(variance) / alpha)
            score, dt = (alpha * x0 - x) / variance, then - now
            told.append((x / alpha, x0))
            x = x + (-0.5 * beta * x - (beta if noisy else 0.5 * beta) * score) * dt + (math.sqrt(beta * -dt) * next(draws) if noisy else 0)
        fresh, seen = iter(DRAWS), []
        noise = (lambda x: torch.full_like(x, next(fresh))) if noisy else None
        found = euler_in_time(denoise, double([[START]]), double(times), process, noise=noise,
                              callback=lambda step, x, x0: seen.append((x.item(), x0.item())))
        assert found.item() == pytest.approx(x, rel=1e-10) and seen == [pytest.approx(pair) for pair in told]


def test_the_adaptive_method_keeps_to_its_tolerance():
    pytest.importorskip("scipy")
    x, first, last = double([[3.0, -1.0]]), double(8.0), double(0.05)
    wanted, errors = gaussian_flow(x, first, last, 0.3, 0.5), []
    for tolerance in (1e-3, 1e-8):
        calls = []
        found = runge_kutta_45(gaussian_denoiser(0.3, 0.5), x, double([8.0, 1.0, 0.05]), tolerance=tolerance,
                               callback=lambda call, x, x0: calls.append(call))
        errors.append((found - wanted).abs().max().item())
        assert calls == list(range(len(calls)))
    assert 1e-6 < errors[0] < 5e-3 and errors[1] < 1e-7


def gaussian_path(sigma, mean=0.3, std=0.5, c=1.7):
    "State, slope and its derivatives at a level, of one path of a Gaussian: x = mean + c sqrt(std^2 + sigma^2)."
    total = std**2 + sigma**2
    return mean + c * math.sqrt(total), c * sigma / math.sqrt(total), c * std**2 / total**1.5, -3 * c * std**2 * sigma / total**2.5


@pytest.mark.parametrize("sigma", [0.1, 0.6, 4.0])
def test_slopes_and_their_derivatives_are_those_of_the_path(sigma):
    x, *wanted = gaussian_path(sigma)
    model, state, level = gaussian_denoiser(0.3, 0.5), double([[x, x]]), double([sigma])
    assert [part[0, 1].item() for part in exact_slope(model, 3)(state, level)] == pytest.approx(wanted)
    assert len(exact_slope(model)(state, level)) == 2
    eps = noise_estimate(model)(state, level)
    assert eps[0, 0].item() == pytest.approx(wanted[0]) and slope_derivative(model, state, level, eps)[0, 0].item() == pytest.approx(wanted[1])
    for step, tolerance in ((1e-5, 1e-4), (None, 1e-2)):
        options = {} if step is None else {"step": step}
        assert derivative_by_difference(model, state, level, model(state, level), **options)[0, 0].item() == pytest.approx(wanted[1], rel=tolerance)


def test_the_difference_is_taken_at_a_step_relative_to_the_level():
    asked = []
    derivative_by_difference(lambda x, sigma: asked.append((x, sigma)) or x, double([[3.0]]), double([2.0]), double([[1.0]]))
    assert asked[0][0].item() == pytest.approx(3 + 3e-3 * 2) and asked[0][1].item() == pytest.approx(2 + 3e-3 * 2)


def test_the_order_of_convergence_is_the_exponent():
    assert convergence_order([5, 10, 40], [3 * count**-2.5 for count in (5, 10, 40)]) == pytest.approx(2.5)
    assert convergence_order([1, 2, 4], [math.e**-1, math.e**-2, math.e**-4]) == pytest.approx(1.5 / math.log(2))


@pytest.mark.parametrize("exponent", [1.0, 2.0, 7.0])
def test_roots_of_times_fall_linearly(exponent):
    times = time_grid(4, exponent, 0.9, 0.01)
    wanted = [((1 - n / 4) * 0.9 ** (1 / exponent) + n / 4 * 0.01 ** (1 / exponent)) ** exponent for n in range(5)]
    assert times.tolist() == pytest.approx(wanted) and times[-1] == 0.01
    assert time_grid(2).tolist() == pytest.approx([1, 0.5005, 1e-3])


def test_grids_of_levels_are_those_of_their_papers():
    wanted = [(80 ** (1 / 7) + n / 5 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for n in range(6)]  # Karras et al. 2022, equation 5
    assert karras_grid(5).tolist() == pytest.approx(wanted)
    assert karras_grid(3, 10.0, 0.1, 2.0).tolist() == pytest.approx([(10**0.5 + n / 3 * (0.1**0.5 - 10**0.5)) ** 2 for n in range(4)])
    assert log_grid(4).tolist() == pytest.approx([80 * (0.002 / 80) ** (n / 4) for n in range(5)])
    times = [(1 - n / 3 + n / 3 * 1e-3**0.5) ** 2 for n in range(4)]
    assert sigma_grid(LinearVP(), 3).tolist() == pytest.approx([math.sqrt(math.expm1(0.1 * t + 19.9 * t**2 / 2)) for t in times])
    assert sigma_grid(EDM(), 2, 1.0, 0.5).tolist() == [80, 40.25, 0.5]


def test_states_get_wide_above_a_thousand_and_plain_again():
    for level, inside in ((1000.0, torch.float32), (1001.0, torch.float64)):
        levels = double([level, 1.0])
        assert widened(torch.zeros(1), levels).dtype == inside
        assert SAMPLERS["euler"](denoise, torch.ones(1, 1), levels).dtype == torch.float32
    assert as_state(torch.zeros(1).half()).dtype == torch.float32 and as_state(double([0.0])).dtype == torch.float64


def test_a_function_is_asked_at_one_level_for_all_and_must_answer_finitely():
    asked = []
    answer = guarded(lambda x, sigma: asked.append(sigma.tolist()) or (x / (sigma[:, None] - 2)), "solver")
    answer(torch.ones(3, 1), torch.tensor(4.0))
    assert asked == [[4.0] * 3]
    with pytest.raises(FloatingPointError, match="^solver: call 2 of the model, at noise level 2,"): answer(torch.ones(3, 1), torch.tensor(2.0))


def test_a_reference_says_where_it_is_none():
    "A root mean square of 2e-3 is a quarter of one of 256 levels between -1 and 1."
    assert (REFERENCE_ERROR, REFERENCE_STEPS) == (2e-3, 200)
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    with pytest.warns(UserWarning, match="^steps: this reference is not one: 4 steps and 2 disagree"):
        reference_solution(gaussian_denoiser(0.3, 0.1), x_T, LinearVP(), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = reference_solution(gaussian_denoiser(0.3, 0.5), x_T, LinearVP())
    first, last = sigma_grid(LinearVP(), 1)
    assert found == pytest.approx(gaussian_flow(x_T * (1 + first**2).sqrt(), first, last, 0.3, 0.5) / (1 + last**2).sqrt(), abs=1e-3)


@pytest.mark.parametrize("wrong", [[1.0], [1.0, 1.0], [1.0, 2.0, 1.5], [0.0, 1.0], [1.0, -0.1], [2.0, 0.0, 1.0]])
def test_grids_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="^sigmas: expected at least two"): check_sigmas(torch.tensor(wrong))


def test_randomness_falls_and_has_a_source():
    with pytest.raises(ValueError, match="^sigmas: euler_maruyama is stochastic"): check_noise(lambda x: x, torch.tensor([1.0, 2.0]),
                                                                                               "euler_maruyama")
    with pytest.raises(TypeError, match="^noise: churn draws noise"): check_noise(None, torch.tensor([2.0, 1.0]), "churn")
    draws = white(torch.Generator().manual_seed(0))(torch.zeros(100_000))
    assert abs(draws.mean()) < 0.01 and draws.std().item() == pytest.approx(1, abs=0.01)


def test_the_grid_of_a_reference_divides_its_leaps_evenly():
    "Parts of a step have equal ratios, as few of them as keep each below exp(40 / steps)."
    levels = sigma_grid(CosineVP(), 30)
    wanted = []
    for now, then in pairwise(levels.tolist()):
        parts = 1
        while math.log(now / then) / parts > 40 / 30: parts += 1
        wanted += [now * (then / now) ** (part / parts) for part in range(parts)]
    assert len(wanted) > 30 and reference_grid(CosineVP(), 30).tolist() == pytest.approx([*wanted, levels[-1].item()])


def test_a_reference_takes_a_third_of_the_difference_for_its_error():
    "Half as many steps of second order have four times the error, so three times of it is what differs."
    process, x_T = LinearVP(), torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    def walked(steps):
        levels = reference_grid(process, steps)
        return heun(gaussian_denoiser(0.3, 0.5), x_T * math.sqrt(1 + levels[0].item() ** 2), levels) / math.sqrt(1 + levels[-1].item() ** 2)
    found, error = reference_and_error(gaussian_denoiser(0.3, 0.5), x_T, process, 60)
    assert found == pytest.approx(walked(60), rel=1e-10) and error == pytest.approx((walked(60) - walked(30)).square().mean().sqrt().item() / 3)
