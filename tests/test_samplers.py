"""Our samplers against those of an independent library, and properties that hold for any settings."""
import pytest
import torch

from extras import need

need("train", "data", "dev")

from hypothesis import given, settings, strategies as st

from diffusion_papers import genie
from diffusion_papers.core.analytic import gaussian_denoiser, mixture_denoiser, ring
from diffusion_papers.core.denoisers import guided
from diffusion_papers.core.processes import EDM, BoundedCosineVP, CosineVP, DiscreteVP, LinearVP, VarianceExploding
from diffusion_papers.core.samplers import (Counted, dpm_solver_pp, euler, exact_slope, heun,
                                            sigma_grid, taylor, time_grid)

PROCESSES = [LinearVP(), CosineVP(), BoundedCosineVP(), DiscreteVP.linear(), DiscreteVP.cosine(), VarianceExploding(), EDM()]


@pytest.fixture(scope="module")
def model():
    return genie.load_pretrained()


def walk_with(scheduler, denoise, x, to_prediction):
    "Run one of diffusers' schedulers in its own variables; it asks for a prediction at each of its time steps."
    for index, t in enumerate(scheduler.timesteps):
        x = scheduler.step(to_prediction(x, t, index), t, x).prev_sample
    return x


def variance_preserving(scheduler, denoise):
    "The scheduler's state is x_t and it wants eps."
    def predict(x, t, index):
        alpha_bar = scheduler.alphas_cumprod[t].double()
        sigma = torch.sqrt((1 - alpha_bar) / alpha_bar)
        x_bar = x / torch.sqrt(alpha_bar).to(x)
        return (x_bar - denoise(x_bar, sigma.repeat(len(x)))) / sigma.to(x)
    return predict


def relative(a, b): return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_ddim_equals_diffusers(model, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02,
                                        clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    x_T = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = walk_with(scheduler, model.denoiser, x_T, variance_preserving(scheduler, model.denoiser))
    times = torch.cat([scheduler.timesteps, torch.zeros(1, dtype=torch.long)])
    alpha_bar = scheduler.alphas_cumprod[times].double()
    # the last step of the scheduler goes from its last time to final_alpha_cumprod = alpha_bar[0];
    # where the last time is 0 already it is no step
    sigmas = torch.sqrt((1 - alpha_bar) / alpha_bar)[:-1] if times[-2] == 0 else torch.sqrt((1 - alpha_bar) / alpha_bar)
    ours = euler(model.denoiser, x_T / alpha_bar[0].sqrt().float(), sigmas) * alpha_bar[-1].sqrt().float()
    assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_dpm_solver_pp_equals_diffusers(model, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02,
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
        lower_order_final=False, final_sigmas_type="sigma_min", timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    x_T = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = walk_with(scheduler, model.denoiser, x_T, variance_preserving(scheduler, model.denoiser))
    sigmas = scheduler.sigmas.double()
    ours = (dpm_solver_pp(model.denoiser, x_T * torch.sqrt(1 + sigmas[0] ** 2).float(), sigmas)
            / torch.sqrt(1 + sigmas[-1] ** 2).float())
    assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_heun_equals_diffusers(model, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.HeunDiscreteScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02,
                                                prediction_type="epsilon", timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    x_T = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    x = x_T * scheduler.sigmas[0]
    # its state is x_bar; each level but the first and the last stands twice in its list
    for index, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[scheduler.step_index if scheduler.step_index is not None else 0]
        if scheduler.step_index is not None and not scheduler.state_in_first_order:
            sigma = scheduler.sigmas[scheduler.step_index]
        x = scheduler.step((x - model.denoiser(x, sigma.double().repeat(32))) / sigma, t, x).prev_sample
    levels = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double()
    assert len(levels) == steps + 1
    ours = heun(model.denoiser, x_T * levels[0].float(), levels)
    assert relative(ours, x) < 1e-4


@settings(max_examples=60, deadline=None)
@given(process=st.sampled_from(PROCESSES), share=st.floats(1e-3, 1.0))
def test_time_and_noise_level_are_inverse(process, share):
    t = torch.tensor([share * process.start], dtype=torch.float64)
    assert torch.allclose(process.time_at(process.noise_to_signal(t)), t, rtol=1e-9, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 200), exponent=st.floats(0.5, 8.0), end=st.floats(1e-5, 0.5))
def test_time_grids_fall_and_end_where_they_should(steps, exponent, end):
    times = time_grid(steps, exponent, 1.0, end)
    assert len(times) == steps + 1 and times[0] == 1 and times[-1] == end and (times.diff() < 0).all()


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 12), exponent=st.floats(1.0, 3.0), mean=st.floats(-2, 2))
def test_one_point_is_reached_exactly(steps, exponent, mean):
    process, point = LinearVP(), gaussian_denoiser(mean, 0.0)
    sigmas = sigma_grid(process, steps, exponent)
    start = torch.linspace(-150, 150, 6, dtype=torch.float64)[:, None]
    expected = mean + sigmas[-1] / sigmas[0] * (start - mean)
    for end in (euler(point, start, sigmas), taylor(exact_slope(point), start, sigmas)):
        assert (end - expected).abs().max() < 1e-10


@settings(max_examples=20, deadline=None)
@given(solver=st.sampled_from(sorted(genie.SOLVERS)), steps=st.integers(5, 9),
       first_step=st.booleans(), denoise=st.booleans())
def test_calls_are_counted_honestly(solver, steps, first_step, denoise):
    denoiser = mixture_denoiser(ring(), 0.15)
    model = Counted(exact_slope(denoiser) if genie.SOLVERS[solver].derivative else denoiser)
    genie.integrate(solver, model, torch.randn(3, 2, dtype=torch.float64), LinearVP(), steps,
                    first_step=first_step, denoise=denoise)
    assert model.calls == genie.calls_for(solver, steps, first_step, denoise)


def test_guidance_of_scale_zero_is_conditional(model):
    plain = genie.sample(model, 8, class_label=3)
    assert torch.equal(plain, genie.sample(model, 8, class_label=3, guidance=0.0))
    conditional = lambda x, sigma: model.denoiser(x, sigma, class_label=torch.full((len(x),), 3))
    x_T = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ddim = lambda walk: genie.integrate("ddim", walk, x_T, model.process, 10)
    assert (ddim(guided(conditional, model.denoiser, 0.0))
            - genie.sample(model, x_T=x_T, class_label=3, solver="ddim")).abs().max() < 1e-6


def test_samples_do_not_depend_on_the_batch(model):
    x_T = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    together, alone = genie.sample(model, x_T=x_T), genie.sample(model, x_T=x_T[:1])
    assert (together[:1] - alone).abs().max() < 1e-4


@pytest.mark.parametrize("device", [
    "cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))])
def test_a_model_samples_where_it_lies(device):
    model = genie.load_pretrained(device=device)
    images = genie.sample(model, 4, class_label=1, guidance=1.0)
    assert images.device.type == device and torch.isfinite(images).all()
    on_cpu = genie.sample(genie.load_pretrained(), 4, class_label=1, guidance=1.0)
    assert (images.cpu() - on_cpu).abs().max() < 1e-3
