"""GENIE's golden cases, recomputed through the public API. `compute(case, arrays)` returns every output under its own key."""
import re

import torch

from diffusion_papers import genie
from diffusion_papers.core.analytic import gaussian_denoiser, gaussian_flow, mixture_denoiser
from diffusion_papers.core.processes import LinearVP
from diffusion_papers.core.samplers import SAMPLERS, Counted, exact_slope, sigma_grid

TOLERANCES = {"schedule": dict(rtol=1e-9, atol=0), "gaussian_samplers": dict(rtol=1e-8, atol=1e-12), "gmm": dict(rtol=1e-7, atol=1e-12)}
PROCESS = LinearVP()
OTHER_SAMPLERS = {"euler": "euler", "heun": "heun", "dpm_2": "midpoint", "dpmpp_2m": "dpm_solver_pp", "lms": "adams_bashforth"}


def tensors(arrays, *names):
    return [torch.as_tensor(arrays[name], dtype=torch.float64) for name in names]


def run(key, denoise, x_T):
    "One of GENIE's own samplers, settings from the key: the samples, and the calls that they cost."
    found = re.fullmatch(r"(ddim|ttm2)_n(\d+)_q(\d)_afs(\d)(?:_den(\d))?", key)
    solver = {"ddim": "ddim", "ttm2": "taylor"}[found[1]]
    model = Counted(exact_slope(denoise) if solver == "taylor" else denoise)
    samples = genie.integrate(solver, model, x_T, PROCESS, int(found[2]), exponent=1.0 + int(found[3]), first_step=found[4] == "1", denoise=found[5] == "1")
    return samples.numpy(), model.calls


def schedule(arrays):
    t, = tensors(arrays, "t")
    gamma = PROCESS.noise_to_signal(t)
    _, dt_dgamma = torch.func.jvp(PROCESS.time_at, (gamma,), (torch.ones_like(gamma),))
    return {"alpha": PROCESS.alpha(t).numpy(), "gamma": gamma.numpy(), "dt_dgamma": dt_dgamma.numpy()}


def gaussian_samplers(arrays):
    x_T, mu, s = tensors(arrays, "x_T", "mu", "s")
    s = s.item()
    first, last = sigma_grid(PROCESS, 1)
    answers = {"exact": (gaussian_flow(x_T / PROCESS.alpha_at(first), first, last, mu, s) * PROCESS.alpha_at(last)).numpy()}
    for key in arrays:
        if key.startswith(("ddim", "ttm2")) and not key.endswith("_nfe"):
            answers[key], calls = run(key, gaussian_denoiser(mu, s), x_T)
            answers[f"{key}_nfe"] = calls
    return answers


def gmm(arrays):
    means, probs, t, x_t, x_T = tensors(arrays, "means", "probs", "t", "x_t", "x_T")
    denoise = mixture_denoiser(means, float(arrays["std"]), probs)
    eps, change = exact_slope(denoise)(x_t / PROCESS.alpha(t)[:, None], PROCESS.noise_to_signal(t))
    answers = {"eps": eps.numpy(), "deps_dgamma": change.numpy()}
    for key in arrays:
        if key.startswith(("ddim", "ttm2")): answers[key], _ = run(key, denoise, x_T)
        if found := re.fullmatch(r"kd_(\w+)_n(\d+)_q(\d)", key):
            sigmas = sigma_grid(PROCESS, int(found[2]), 1.0 + int(found[3]))
            answers[key] = (SAMPLERS[OTHER_SAMPLERS[found[1]]](denoise, x_T / PROCESS.alpha_at(sigmas[0]), sigmas) * PROCESS.alpha_at(sigmas[-1])).numpy()
    return answers


def compute(case, arrays):
    "Every output of one case, under its own key."
    return {"schedule": schedule, "gaussian_samplers": gaussian_samplers, "gmm": gmm}[case](arrays)
