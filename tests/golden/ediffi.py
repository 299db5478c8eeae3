"""eDiff-I's golden cases: preconditioning, the tree of noise levels, paint-with-words, guidance, trajectories of one expert and of three."""
import math
import re

import numpy as np
import torch

from diffusion_papers.core.analytic import gaussian_denoiser, gaussian_flow
from diffusion_papers.core.denoisers import Denoiser
from diffusion_papers.core.processes import EDM
from diffusion_papers.core.samplers import SAMPLERS
from diffusion_papers.ediffi import (
    Brush, Ensemble, NoiseLevels, draw_levels, ensemble_intervals, mixed_by_guidance, node, noise_grid, paint_weight)
from diffusion_papers.topics.painted_words import at_map_size

GIVEN = {"precond/sigma", "interval_sampling/u", "pww/Q", "pww/K", "pww/V", "pww/A", "mask/full", "ode/mu", "ode/std", "ode/x_start",
         "cfg/cond", "cfg/uncond", "ensemble/mu_low_mid_high"}
TOLERANCES = {"precond": dict(rtol=1e-9, atol=0), "interval_sampling": dict(rtol=1e-5, atol=0), "pww": dict(rtol=1e-8, atol=1e-12),
              "mask": dict(rtol=0, atol=1e-12), "ode": dict(rtol=1e-7, atol=1e-9), "cfg": dict(rtol=1e-12, atol=1e-14),
              "ensemble": dict(rtol=1e-7, atol=1e-9), "boundaries": dict(rtol=1e-6, atol=0), "level": dict(rtol=1e-6, atol=0)}


def inputs_of(case, names): return GIVEN


def preconditioning_case(a, sigma_data):
    sigma, model = a["precond/sigma"], Denoiser(torch.nn.Identity(), EDM(), "edm", "log_sigma", sigma_data)
    skip, out, scale, label = model.coefficients(sigma[:, None], sigma)
    skip, out, scale = (part[:, 0] for part in (skip, out, scale))
    return {"precond/c_skip": skip, "precond/c_out": out, "precond/c_in": scale, "precond/c_noise": label, "precond/loss_weight": 1 / out**2}


def sampling_case(a, names, noise):
    found = {}
    for name in names:
        if key := re.fullmatch(r"interval_sampling/l(\d+)_i(\d+)", name):
            found[name] = draw_levels(a["interval_sampling/u"], node(int(key[1]), int(key[2])), noise)
    return found


def painting_case(a, names):
    query, key, value, painted = (a[f"pww/{name}"] for name in "QKVA")
    width, batch, tokens = query.shape[-1], len(query), key.shape[2]
    regions, logits = painted.T[None, :, :, None].expand(batch, -1, -1, -1), query @ key.mT
    there, found = torch.ones(batch, tokens, dtype=torch.bool), {"pww/plain_out": (logits / math.sqrt(width)).softmax(-1) @ value}
    for name in names:
        if not (settings := re.fullmatch(r"pww/wp([\d.]+)_sigma([\d.]+)/out", name)): continue
        amount, sigma = float(settings[1]), torch.full((batch,), float(settings[2]), dtype=torch.float64)
        look = Brush(regions, amount, "max", "global").at(sigma)
        attention = (look(logits, there, (painted.shape[0], 1)) / math.sqrt(width)).softmax(-1)
        prefix = name.removesuffix("/out")
        found |= {name: attention @ value, f"{prefix}/col_mass": attention.mean((0, 1, 2)),
                  f"{prefix}/w": paint_weight(logits, there, sigma, amount, "max", "global")[0, 0, 0, 0]}
    return found


def states_of(solver, denoise, start, steps):
    "All states of a trajectory, and its noise levels."
    states = []
    end = SAMPLERS[solver](denoise, start, noise_grid(steps), callback=lambda step, x, x0: states.append(x))
    return torch.stack([*states, end]), noise_grid(steps)


def independent(mean, std):
    "The exact denoiser of independent Gaussians, number by number."
    each = [gaussian_denoiser(m, s.item()) for m, s in zip(mean.split(1), std)]
    return lambda x, sigma: torch.cat([denoise(part, sigma) for denoise, part in zip(each, x.split(1, dim=1))], dim=1)


def trajectory_case(a, names, noise):
    mean, std, start = a["ode/mu"], a["ode/std"], a["ode/x_start"]
    first, last = (torch.tensor(level, dtype=torch.float64) for level in (80.0, 0.0))
    found = {"ode/exact_end": torch.cat([gaussian_flow(part, first, last, m, s.item()) for part, m, s in zip(start.split(1, 1), mean.split(1), std)], 1)}
    for name in names:
        if key := re.fullmatch(r"ode/n(\d+)_(heun|euler)/xs", name):
            found[name], found[name.replace("xs", "sigmas")] = states_of(key[2], independent(mean, std), start, int(key[1]))
    experts = [independent(mean, std) for mean in a["ensemble/mu_low_mid_high"]]
    steps = len(a["ensemble/sigmas"]) - 1
    found["ensemble/xs"], found["ensemble/sigmas"] = states_of("heun", Ensemble(experts, ensemble_intervals(3), noise), start, steps)
    return found


def guidance_case(a, names):
    return {name: mixed_by_guidance(a["cfg/cond"], a["cfg/uncond"], float(name.removeprefix("cfg/g"))) for name in names if name.startswith("cfg/g")}


def intervals(content):
    "The JSON case: bounds of nodes, and who owns which noise level."
    noise, found = NoiseLevels(content["p_mean"], content["p_std"]), {}
    for name, values in content["boundaries"].items():
        level = int(name.removeprefix("level"))
        bounds = [node(level, index).bounds(noise) for index in range(len(values) - 1)]
        edges = [bounds[0][0], *(high for _, high in bounds)]
        found[f"boundaries/{name}"] = np.array([np.nan if edge in (0.0, math.inf) else edge for edge in edges])
    for name in content:
        if key := re.fullmatch(r"level(\d+)_(first_upper|last_lower)", name):
            level = int(key[1])
            found[name] = node(level, 0).bounds(noise)[1] if key[2] == "first_upper" else node(level, 2**level - 1).bounds(noise)[0]
    ensemble = Ensemble([None] * 3, ensemble_intervals(3), noise)
    owners = ensemble.owner(torch.tensor(content["routing"]["sigmas"], dtype=torch.float64))
    found["routing/experts"] = np.array([("low", "mid", "high")[owner] for owner in owners.tolist()])
    return found


def compute(case, arrays, p_mean=-1.2, p_std=1.2, sigma_data=0.5):
    "What the README calls outputs; the constants that it gives in words are arguments."
    if case == "intervals": return intervals(arrays)
    a = {name: torch.as_tensor(values) for name, values in arrays.items() if isinstance(values, np.ndarray)}
    names, noise = list(arrays), NoiseLevels(p_mean, p_std)
    found = (preconditioning_case(a, sigma_data) | sampling_case(a, names, noise) | painting_case(a, names) | trajectory_case(a, names, noise)
             | guidance_case(a, names) | {name: at_map_size(a["mask/full"][None, None], (size, size)).reshape(size, size)
                                          for name in names if name.startswith("mask/area") for size in [int(name.removeprefix("mask/area"))]})
    return {name: value.numpy() for name, value in found.items()}


def compare(case, name, computed, stored):
    if name == "routing/experts": return np.testing.assert_array_equal(computed, stored)
    kind = next(kind for kind in TOLERANCES if name.startswith(kind))
    np.testing.assert_allclose(computed, np.asarray(stored, dtype=np.float64), **TOLERANCES[kind], err_msg=name)
