"""Our samplers against those of an independent library, and properties that hold for any settings."""
import math

import pytest
import torch

from extras import need

need("train", "data", "dev")

from hypothesis import given, settings, strategies as st

from diffusion_papers import genie
from diffusion_papers.core.analytic import gaussian_denoiser, gaussian_flow, mixture_denoiser, ring
from diffusion_papers.core.denoisers import Denoiser, guided
from diffusion_papers.core.networks import MLPConfig, ResidualMLP
from diffusion_papers.core.processes import EDM, BoundedCosineVP, CosineVP, DiscreteVP, LinearVP, VarianceExploding
from diffusion_papers.core.samplers import (SAMPLERS, Counted, dpm_solver_pp, euler, euler_in_time, exact_slope, heun,
                                            log_grid, sigma_grid, taylor, time_grid, white)

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


DETERMINISTIC = ("euler", "heun", "midpoint", "adams_bashforth", "s_pndm", "f_pndm", "dpm_solver_pp", "taylor")
STOCHASTIC = ("ancestral", "euler_maruyama", "churn", "annealed_langevin")


def solve(name, denoise, x, sigmas, **options):
    "Any sampler, or Taylor's method of second order."
    if name == "taylor": return taylor(exact_slope(denoise), x, sigmas, **options)
    if name in STOCHASTIC:
        first = torch.Generator().manual_seed(1)  # the same draws whatever the precision
        options["noise"] = lambda x: torch.randn(x.shape, generator=first).to(x)
    return SAMPLERS[name](denoise, x, sigmas, **options)


def test_every_sampler_is_tried_at_high_levels(): assert set(SAMPLERS) <= {*DETERMINISTIC, *STOCHASTIC}


@pytest.mark.parametrize("level", [150.0, 2e4, 1e5, 1e6])
@pytest.mark.parametrize("name", DETERMINISTIC + STOCHASTIC)
def test_float32_loses_nothing_at_high_noise_levels(name, level):
    denoise = mixture_denoiser(ring(), 0.15)
    sigmas = torch.cat([torch.tensor([level], dtype=torch.float64), log_grid(30, 60.0, 0.01)])  # as the cosine process leaps
    x = level * torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    narrow, wide = solve(name, denoise, x, sigmas), solve(name, denoise, x.double(), sigmas)
    assert narrow.dtype == torch.float32 and wide.dtype == torch.float64
    assert (narrow - wide).square().mean().sqrt() < 2e-5


@pytest.mark.parametrize("level", [2e4, 1e6])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_one_point_is_reached_exactly_from_high_noise_levels(name, level):
    sigmas = torch.cat([torch.tensor([level], dtype=torch.float64), log_grid(12, 60.0, 0.01)])
    x = level * torch.linspace(-3, 3, 7)[:, None]
    wanted = 0.3 + sigmas[-1] / sigmas[0] * (x.double() - 0.3)
    assert (solve(name, gaussian_denoiser(0.3, 0.0), x, sigmas) - wanted).abs().max() < 1e-6


def test_a_gaussian_is_reached_from_high_noise_levels():
    x, sigmas = 1e5 * torch.linspace(-3, 3, 7)[:, None], log_grid(500, 1e5, 0.01)
    wanted = gaussian_flow(x.double(), sigmas[0], sigmas[-1], 0.3, 0.5)
    for name in ("heun", "midpoint", "f_pndm", "taylor"):
        assert (solve(name, gaussian_denoiser(0.3, 0.5), x, sigmas) - wanted).abs().max() < 1e-3, name


@pytest.mark.parametrize("name", ("heun", "adams_bashforth", "ancestral", "taylor"))
def test_a_model_and_a_callback_see_the_precision_that_came(name):
    network = ResidualMLP(MLPConfig(shape=(1, 2, 2), width=8, blocks=1, classes=0)).requires_grad_(False)
    seen, denoiser = [], Denoiser(network, BoundedCosineVP(), "v", "log_sigma").eval()
    x = 2e4 * torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    end = solve(name, denoiser, x, log_grid(10, 2e4, 0.01), callback=lambda step, x, x0: seen.append((x.dtype, x0.dtype)))
    assert end.dtype == torch.float32 and set(seen) == {(torch.float32, torch.float32)}


def test_noise_is_the_same_above_and_below_the_level_where_the_state_gets_wide():
    silent, drawn = (lambda x, sigma: torch.zeros_like(x)), []
    noise = white(torch.Generator().manual_seed(0))
    SAMPLERS["ancestral"](silent, torch.zeros(2, 3), torch.tensor([5000.0, 100.0, 1.0]),
                          noise=lambda x: drawn.append(noise(x)) or drawn[-1])
    again = white(torch.Generator().manual_seed(0))
    assert all(torch.equal(each, again(torch.zeros(2, 3))) for each in drawn) and len(drawn) == 2


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("kind", [tuple, list])
def test_every_part_of_a_slope_is_guarded(part, kind):
    def slope(x, sigma):
        parts = [torch.ones_like(x) for _ in range(3)]
        if sigma[0] < 1: parts[part][0] = math.nan
        return kind(parts)
    with pytest.raises(FloatingPointError, match=r"taylor: call 3 of the model, at noise level 0\.5"):
        taylor(slope, torch.zeros(2, 1), torch.tensor([4.0, 2.0, 0.5, 0.1]))


@pytest.mark.parametrize("solver", ["genie", "ddim"])
def test_the_last_step_of_integrate_is_guarded(solver):
    def explode(x, sigma):
        found = torch.zeros_like(x) if sigma[0] > 0.02 else torch.full_like(x, math.nan)
        return (found, found) if genie.SOLVERS[solver].derivative else found
    with pytest.raises(FloatingPointError, match=f"{solver}, last step"):
        genie.integrate(solver, explode, torch.zeros(2, 1), LinearVP(), 5, denoise=True)


@pytest.mark.parametrize("process", [VarianceExploding(), EDM(), LinearVP(), BoundedCosineVP()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("solver", ["genie", "ddim", "heun", "dpm_solver_pp"])
def test_integrate_starts_where_a_process_says(process, first_step, solver):
    "From standard normal noise to the process's last level; for one point at 0, every solver is exact."
    point = gaussian_denoiser(0.0, 0.0)
    x_T = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    end = genie.integrate(solver, exact_slope(point) if genie.SOLVERS[solver].derivative else point, x_T, process, 12,
                          first_step=first_step)
    sigmas = sigma_grid(process, 12)
    exploding = isinstance(process, (VarianceExploding, EDM))
    start = x_T * (sigmas[0] if exploding else torch.sqrt(1 + sigmas[0]**2))
    wanted = start * sigmas[-1] / sigmas[0] * process.alpha_at(sigmas[-1])
    # the analytical first step knows no data: it takes x_T for the noise, which it is up to 1 / sigma^2
    assert (end - wanted).abs().max() < (1e-3 if first_step and not exploding else 1e-10)


@pytest.mark.parametrize("process", [VarianceExploding(), EDM(), LinearVP()], ids=lambda p: type(p).__name__)
def test_codes_are_standard_normal_for_every_process(process):
    network = ResidualMLP(MLPConfig(shape=(1, 4, 4), width=8, blocks=1, classes=0))
    model = genie.build(genie.CONFIGS["cpu"])
    model.denoiser = Denoiser(network, process, "v", "log_sigma").eval()
    data = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    codes = genie.encode(model, data, solver="ddim", calls=30)
    back = genie.integrate("ddim", model.walk("ddim"), codes, process, 30)
    assert codes.shape == data.shape and codes.abs().max() < 10 and torch.isfinite(back).all()


def test_euler_in_time_names_a_process_that_it_does_not_know():
    with pytest.raises(ValueError, match="process: expected a LinearVP.*EDM"):
        euler_in_time(gaussian_denoiser(), torch.zeros(2, 1), time_grid(4), EDM())


ENDS = [(LinearVP(), 1.0), (LinearVP(beta_min=0.0), 1.0), (CosineVP(), 1.0), (CosineVP(offset=0.0), 1.0), (BoundedCosineVP(), 1.0),
        (DiscreteVP.linear(), 999.0), (DiscreteVP.cosine(), 999.0), (DiscreteVP.linear(2), 1.0), (VarianceExploding(), 1.0), (EDM(), 80.0)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("process, last", ENDS, ids=lambda p: type(p).__name__ if not isinstance(p, float) else "")
def test_no_end_of_a_process_is_nan(process, last, dtype):
    t = torch.tensor([0.0, last]).to(dtype)
    levels = process.noise_to_signal(t)
    values = [process.log_alpha(t), process.alpha(t), process.sigma(t), levels, process.log_snr(t), process.time_at(levels),
              process.alpha_at(levels), process.spread_at(levels)]
    for value in values: assert not value.isnan().any() and value.dtype in (torch.float32, torch.float64)
    assert torch.isfinite(process.alpha(t)).all() and torch.isfinite(process.sigma(t)).all()
    assert torch.allclose(process.time_at(levels), t.to(levels), atol=1e-6 * last, rtol=1e-5)
    assert (levels.diff() > 0).all() and (process.alpha(t).diff() <= 0).all()


def test_the_cosine_process_ends_in_noise_alone():
    for dtype in (torch.float64, torch.float32, torch.float16):
        process, one = CosineVP(), torch.ones(1, dtype=dtype)
        assert process.alpha(one) == 0 and process.sigma(one) == 1 and process.log_snr(one) == -math.inf
        assert process.alpha_at(process.noise_to_signal(one)) == 0


@pytest.mark.parametrize("process, last", ENDS, ids=lambda p: type(p).__name__ if not isinstance(p, float) else "")
def test_float32_knows_the_levels_of_float64(process, last):
    t = torch.cat([torch.logspace(-6, -0.01, 200), 1 - torch.logspace(-5, -1, 200)]) * last
    for value in (process.noise_to_signal, process.alpha, process.sigma):
        exact = value(t.double())
        assert ((value(t) - exact) / exact).abs().max() < 1e-5  # an exponential of 10 loses a digit


@settings(max_examples=60, deadline=None, derandomize=True)
@given(share=st.floats(0.0, 1.0), offset=st.floats(0.0, 0.1))
def test_the_cosine_process_is_the_cosine(share, offset):
    t = torch.tensor([share], dtype=torch.float64)
    angle = lambda t: (t + offset) / (1 + offset) * (math.pi / 2)
    assert abs(CosineVP(offset).alpha(t).item() - max(0.0, math.cos(angle(share)) / math.cos(angle(0)))) < 1e-14


def test_processes_without_noise_are_refused():
    for wrong, name in ((lambda: LinearVP(0.0, 0.0), "beta_d"), (lambda: BoundedCosineVP(5.0, 5.0), "largest"),
                        (lambda: VarianceExploding(1.0, 1.0), "sigma_max"), (lambda: DiscreteVP(torch.tensor([0.1])), "betas")):
        with pytest.raises(ValueError, match=name): wrong()
