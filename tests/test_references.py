"""References that check themselves: fine solutions on every process, against mixtures that are known exactly."""
import warnings
from types import SimpleNamespace

from extras import need

need("train", "data")

import pytest
import torch

from diffusion_papers import dfno, genie
from diffusion_papers.core.analytic import gaussian_denoiser, mixture_denoiser, ring
from diffusion_papers.core.diffusion import DiffusionConfig, random_times
from diffusion_papers.core.processes import EDM, BoundedCosineVP, CosineVP, DiscreteVP, LinearVP, VarianceExploding
from diffusion_papers.core.samplers import (REFERENCE_STEPS, euler_in_time, exact_slope, heun, log_grid, reference_and_error, reference_grid,
                                            reference_solution, runge_kutta_45, sigma_grid, time_grid)

PROCESSES = [LinearVP(), CosineVP(), BoundedCosineVP(), DiscreteVP.linear(), DiscreteVP.cosine(), VarianceExploding()]
name_of = lambda process: type(process).__name__
MIXTURE = mixture_denoiser(ring(), 0.15)
X_T = torch.randn(300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def truth(process, x_T=X_T):
    "Where the equation leads, on a grid of a thousand equal steps of the log noise level."
    grid = sigma_grid(process, 2)
    levels = log_grid(1000, grid[0].item(), grid[-1].item())
    return heun(MIXTURE, x_T.double() * process.spread_at(levels[0]), levels) * process.alpha_at(levels[-1])


def rms(difference): return difference.square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("process", PROCESSES, ids=name_of)
def test_the_reference_is_right_on_every_process(process, dtype):
    x_T = X_T.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = reference_solution(MIXTURE, x_T, process)
    assert found.dtype == dtype and rms(found - truth(process, x_T)) < 2e-4


@pytest.mark.parametrize("process", PROCESSES + [EDM()], ids=name_of)
def test_a_reference_knows_its_error(process):
    found, error = reference_and_error(MIXTURE, X_T, process, 80)
    assert 0.5 < error / rms(found - truth(process)) < 2


def test_the_reference_of_the_linear_process_has_the_bits_that_it_had():
    for steps in range(1, 500):
        assert torch.equal(reference_grid(LinearVP(), steps), sigma_grid(LinearVP(), steps))
    x_T = X_T[:5].float()
    found = reference_solution(MIXTURE, x_T, LinearVP())
    assert torch.equal(found, genie.integrate("heun", MIXTURE, x_T, LinearVP(), REFERENCE_STEPS))


@pytest.mark.parametrize("process", PROCESSES + [EDM()], ids=name_of)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 200])
def test_the_grid_of_a_reference_does_not_leap(process, steps):
    levels, asked = reference_grid(process, steps), sigma_grid(process, steps)
    assert (levels.diff() < 0).all() and (levels[:-1] / levels[1:]).log().max() <= 40 / steps * (1 + 1e-9)
    assert all((levels == level).any() for level in asked)  # no step that was asked for is lost


def test_a_coarse_reference_says_so():
    with pytest.warns(UserWarning, match=r"steps: this reference is not one: 6 steps and 3 disagree .* error is about"):
        reference_solution(MIXTURE, X_T, LinearVP(), 6)
    with pytest.raises(ValueError, match="steps: expected at least 2, got 1"):
        reference_solution(MIXTURE, X_T, LinearVP(), 1)


def test_a_study_says_where_its_errors_are_those_of_the_reference():
    model = genie.load_pretrained()
    with pytest.warns(UserWarning, match="more than a tenth of the smallest that is measured"):
        rows = genie.evaluate(model, 8, solvers=("ddim", "heun"), calls=(2, 300))
    assert len(rows) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        genie.evaluate(model, 8, solvers=("ddim",), calls=(5,))


def test_many_taylor_steps_have_their_true_error_on_the_bounded_process():
    "Measured with the reference, and with the truth: the same."
    process, solver = BoundedCosineVP(), "taylor"
    found = genie.integrate(solver, exact_slope(MIXTURE), X_T, process, 60, exponent=1.0)
    reference = reference_solution(MIXTURE, X_T, process)
    assert abs(rms(found - reference) / rms(found - truth(process)) - 1) < 0.05


def test_adaptive_solutions_keep_their_digits_at_high_levels():
    pytest.importorskip("scipy")
    levels = torch.tensor([1e6, 0.01], dtype=torch.float64)
    x = 1e6 * torch.linspace(-3, 3, 7)[:, None]
    found = runge_kutta_45(gaussian_denoiser(0.3, 0.0), x, levels, tolerance=1e-6)
    assert (found - (0.3 + 1e-8 * (x.double() - 0.3))).abs().max() < 1e-5


@pytest.mark.parametrize("solver", [lambda denoise: runge_kutta_45(denoise, torch.ones(2, 1), torch.tensor([9.0, 0.5])),
                                    lambda denoise: euler_in_time(denoise, torch.ones(2, 1), time_grid(4), LinearVP())])
def test_solvers_of_other_forms_are_guarded(solver):
    with pytest.raises(FloatingPointError, match=r"(runge_kutta_45|euler_in_time): call 1 of the model, at noise level"):
        solver(lambda x, sigma: torch.full_like(x, torch.nan))


def test_times_of_training_are_those_of_sampling():
    for name, process in (("linear", LinearVP()), ("cosine", CosineVP()), ("bounded_cosine", BoundedCosineVP())):
        assert DiffusionConfig(process=name)
        times = random_times(SimpleNamespace(uniform=lambda like, low, high: torch.tensor([low, high])), None, process)
        assert torch.isfinite(process.noise_to_signal(times.double())).all() and times[1] == process.start


def test_trajectories_name_a_process_that_they_do_not_know():
    with pytest.raises(ValueError, match="process: expected a variance-preserving process, got EDM"):
        dfno.trajectory(gaussian_denoiser(), torch.zeros(2, 1), EDM(), torch.tensor([80.0, 1.0, 0.0]), (0, 2))
