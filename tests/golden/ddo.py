"""DDO's golden cases, recomputed through the public API."""
import math

import numpy as np
import torch

from diffusion_papers import ddo
from diffusion_papers.topics import fluids, gaussian_fields
from diffusion_papers.topics.function_data import circular_moments
from diffusion_papers.core.samplers import annealed_langevin
from diffusion_papers.core.networks import sinusoids
from diffusion_papers.topics.operator_networks import (BiasedSpectralConv, FnoUNet, FnoUNetConfig, SpectralGroupNorm,
                                                     UShapedConfig, UShapedOperator, operator_keys, without_aliases)
from diffusion_papers.topics.spectral import cosine_transform

TOLERANCES = {  # relative to the largest absolute value of the compared array
    "grf_periodic": 1e-10, "grf_neumann": 1e-10, "grf_rbf_code": 1e-4, "gp_exponential": 1e-4, "schedule": 1e-5,
    "blur_steps": 1e-4, "metrics": 1e-6, "dsm_loss": 1e-5, "navier_stokes": 1e-8, "navier_stokes_converged": 1.5e-2,
    "langevin_gaussian": 1e-5, "langevin_code_rule": 1e-5, "layers": 1e-4, "fnounet_small": 2e-3,
    "uno_small": 1e-3}

INPUTS = {
    "grf_periodic": {"n", "L", "alpha", "tau", "xi"}, "grf_neumann": {"alpha", "tau", "z"},
    "grf_rbf_code": {"n", "scale", "eps", "z"}, "gp_exponential": {"white"}, "schedule": {"t"},
    "blur_steps": {"z_t", "eps_hat", "t", "num_steps"}, "metrics": {"x", "ladder_args"},
    "dsm_loss": {"u", "z", "F", "sigma"},
    "navier_stokes": {"n", "Re", "T", "dt", "tg_k", "tg_w0", "force", "w0", "unit_w0", "unit_nu", "unit_dt", "unit_steps"},
    "navier_stokes_converged": {"n", "T", "Re", "force", "w0"},
    "langevin_gaussian": {"noise_eig", "data_eig", "sigmas", "steps_per_level", "c", "z0", "Z"},
    "langevin_code_rule": {"noise_eig", "data_eig", "sigma", "steps_per_level", "epsilon", "x0", "Z"},
    "layers": {"x", "modes", "x8", "temb_t"}, "fnounet_small": {"t", "ch_mult", "x16", "x32"},
    "uno_small": {"x", "sigma", "s", "pad", "rank", "factorization"},
}


def inputs_of(case, names):
    "What a case hands in; everything else is an output."
    return {name for name in names if name in INPUTS[case] or name.startswith("_")}


def filled(shapes):
    "The README's fill of a state dict, name -> shape."
    found = {}
    for number, name in enumerate(sorted(shapes)):
        shape = tuple(shapes[name])
        scale = math.sqrt(2 / shape[1]) if len(shape) >= 2 and shape[0] > 1 else 0.1
        if ".core" in name or ".factors." in name: scale *= 0.5
        values = scale * np.sin(12.9898 * (np.arange(math.prod(shape)) + 1) + 0.7 * number)
        if len(shape) == 2 and shape[0] == 1 and name.endswith("weight"): values = values + 1
        found[name] = torch.from_numpy(values.reshape(shape)).float()
    return found


def with_fill(network, keys):
    weights = filled(keys)
    network.load_state_dict({ours: weights[theirs] for ours, theirs in operator_keys(network)})
    return network.requires_grad_(False).eval()


def tensors(arrays): return {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()
                             if not name.startswith("_") and np.asarray(value).dtype.kind != "U"}


def grf_periodic(a):
    table = gaussian_fields.half_plane_amplitudes(tuple(a["n"].tolist()), tuple(a["L"].tolist()), a["alpha"].item(), a["tau"].item())
    return {"sqrt_eig": table, "u": gaussian_fields.half_plane_field(table, a["xi"])}


def grf_neumann(a):
    alpha, tau = a["alpha"].item(), a["tau"].item()
    spectrum = gaussian_fields.Matern(alpha, tau, scale=tau**(alpha - 1))
    shape = tuple(a["z"].shape)
    coefficients = gaussian_fields.CosineField(spectrum, mean_free=False).eigenvalues(shape).sqrt()
    field = gaussian_fields.CosineField(spectrum)
    return {"coeff": coefficients, "u": field.color(cosine_transform(a["z"], inverse=True))}


def grf_rbf_code(a):
    n = int(a["n"])
    field = gaussian_fields.KernelField("matern 1/2", 2 * a["scale"].item()**2, jitter=a["eps"].item()**2)
    return {"C_row0": field.covariance((n, n))[0], "u": field.color(a["z"].reshape(n, n))}


def gp_exponential(a, names):
    found = {}
    for name in names:
        if not name.startswith("amp_"): continue
        points, index, length = (float(part[1:]) for part in name.split("_")[1:])
        found[name] = gaussian_fields.cosine_amplitudes(int(points), length, index)
    first = next(name for name in found if "p2" in name)
    field = gaussian_fields.ReleasedCosineField(float(first.split("_")[3][1:]))
    return found | {name: field.color(a["white"]) for name in names if name.startswith("sample_")}


def schedule(a):
    process, t = ddo.BlurredVP(released=True), a["t"]
    ratio, low, high = process.log_snr(t), process.log_snr_last, process.log_snr_first
    shape, inside = (8, 8), (ratio >= low) & (ratio <= high)
    return {"logsnr": ratio, "logsnr_normalised": (ratio - low) / (high - low),
            "pdf": torch.where(inside, -1 / process.slope(t), 0.0), "alpha": process.alpha(t), "sigma": process.sigma(t),
            "f": process.drift(t), "g": process.diffusion(t), "sigma_blur": process.blur(t),
            "alpha_freq": process.alpha_by_wave(t, shape), "f_freq": process.drift_by_wave(t, shape),
            "g_freq": process.diffusion_by_wave(t, shape)}


def blur_steps(a):
    process, v, noise, t = ddo.BlurredVP(released=True), a["z_t"], a["eps_hat"], a["t"]
    mean, variance = ddo.blurred_step(process, v, noise, t, t - 1 / int(a["num_steps"]))
    blurred = process.alpha_by_wave(t, tuple(v.shape[1:])) * cosine_transform(v)
    return {"denoise_mean": mean, "denoise_var_freq": variance, "diffuse_mean": cosine_transform(blurred, inverse=True),
            "em_ode_mean_dt001": ddo.blurred_flow_step(process, v, noise, t, 0.01)}


def metrics(a):
    spread, skewness = circular_moments(a["x"].movedim(-1, 1))
    first, last, levels = a["ladder_args"].tolist()
    return {"circ_var": spread, "circ_skew": skewness, "sigma_ladder": ddo.ladder(first, last, int(levels))}


def dsm_loss(a):
    u, noise, answer = (a[name].movedim(-1, 1) for name in ("u", "z", "F"))
    seen = []
    def score(v, sigma):
        seen.append(v)
        return answer
    loss = ddo.score_matching_loss(score, u, a["sigma"], noise, variance=True).mean()
    return {"u_noised": seen[0].movedim(1, -1), "loss": loss}


def navier_stokes(a):
    n, time, dt = int(a["n"]), a["T"].item(), a["dt"].item()
    flow, force = fluids.ReleasedHeun((n, n), 1 / a["Re"].item()), a["force"][None]
    run = lambda w, force, step: fluids.solve(flow, w, force, time=time, dt=step)[0]
    place = torch.arange(n, dtype=torch.float64) / n
    wave = 2 * math.pi * (place[:, None] + place)
    unit = fluids.ReleasedEuler((n, n), a["unit_nu"].item())
    unit_dt = a["unit_dt"].item()
    return {"tg_wT": run(a["tg_w0"][None], 0.0, dt), "wT": run(a["w0"][None], force, dt),
            "wT_fine": run(a["w0"][None], force, dt / 4), "wT_from_rest": run(torch.zeros_like(force), force, dt),
            "unit_wT": fluids.solve(unit, a["unit_w0"][None], 0.1 * (wave.sin() + wave.cos())[None],
                                    time=int(a["unit_steps"]) * unit_dt, dt=unit_dt)[0]}


def navier_stokes_converged(a):
    n = int(a["n"])
    flow = fluids.NavierStokes((n, n), 1 / a["Re"].item())
    return {"wT": fluids.solve(flow, a["w0"][None], a["force"][None], time=a["T"].item(), dt=0.01)[0]}


class Table:
    "A measure whose eigenvalues a case gives, as multipliers of white noise."
    def __init__(self, table): self.table, self.dim = table, 2
    def eigenvalues(self, shape, half=False): return self.table[:, :shape[1] // 2 + 1] if half else self.table
    def color(self, white): return torch.fft.ifft2(self.table.sqrt() * torch.fft.fft2(white)).real


def langevin_gaussian(a):
    data, noise, c, inner = Table(a["data_eig"]), Table(a["noise_eig"]), a["c"].item(), int(a["steps_per_level"])
    variances = ddo.variance_recursion(data.table, noise.table, a["sigmas"], c, inner)
    replay = iter(a["Z"].double().flatten(0, 1))
    end = annealed_langevin(gaussian_fields.gaussian_operator(data, noise), a["sigmas"][0] * noise.color(a["z0"][None]), a["sigmas"],
                                noise=lambda v: noise.color(next(replay)[None]), inner_steps=inner, step_size=c)
    levels = len(variances)
    return {"mode_var_after_level": variances[[0, levels // 2, levels - 1]], "u_end": end[0],
            "stationary_last": ddo.stationary_variance(data.table, noise.table, a["sigmas"][-1].item(), c)}


def langevin_code_rule(a):
    data, noise = Table(a["data_eig"]), Table(a["noise_eig"])
    fields = lambda x: x.movedim(-1, 1).double().flatten(0, 1)
    def score(v, sigma):
        level = sigma.sqrt()
        return (gaussian_fields.gaussian_operator(data, noise)(v, level) - v) / sigma[:, None, None]
    replay = iter(a["Z"])
    start = fields(a["x0"])
    end = ddo.released_langevin(score, start, a["sigma"], noise=lambda v: noise.color(fields(next(replay))),
                                inner_steps=int(a["steps_per_level"]), epsilon=a["epsilon"].item())
    return {"x_end": end.reshape(-1, 2, *end.shape[1:]).movedim(1, -1)}


def layers(a, keys):
    modes, x = int(a["modes"]), a["x"]
    channels, out = x.shape[1], 6
    conv, norm = BiasedSpectralConv(channels, out, modes), SpectralGroupNorm(2, channels, modes)
    weights = filled({"_weight": conv.weight.shape, "bias": conv.bias.shape, "skip.conv.weight": conv.pointwise.weight.shape})
    conv.load_state_dict({"weight": weights["_weight"], "bias": weights["bias"], "pointwise.weight": weights["skip.conv.weight"]})
    norm.load_state_dict(filled({name: value.shape for name, value in norm.state_dict().items()}))
    return {"spectral_conv": conv(x), "spectral_group_norm": norm(x), "up2": without_aliases(x, True), "down2": without_aliases(x, False),
            "up4": without_aliases(without_aliases(a["x8"], True), True), "temb16": sinusoids(a["temb_t"], 16)}


def fnounet_small(a, keys):
    width = keys["lifting.weight"][0]
    modes = keys["down_modules.0.0a_0a_block.conv1._weight"][2]
    network = with_fill(FnoUNet(FnoUNetConfig(width=width, modes=modes, multipliers=tuple(a["ch_mult"].tolist()), blocks=1)), keys)
    time = a["t"].reshape(1).float()
    return {f"y{n[1:]}": network(a[n], time) for n in a if n.startswith("x")} | {
        "nparam": torch.tensor(sum(p.numel() for p in network.parameters()))}


def uno_small(a, keys):
    config = UShapedConfig(width=keys["init_conv.weight"][0], size=int(a["s"]), pad=int(a["pad"]), rank=a["rank"].item(),
                           legacy_resample=True)
    network = with_fill(UShapedOperator(config), keys)
    return {"y": network(a["x"].movedim(-1, 1), a["sigma"].float()).movedim(1, -1)}


def compute(case, arrays):
    a, keys = tensors(arrays), arrays.get("_keys")
    if case == "gp_exponential": found = gp_exponential(a, arrays)
    elif case in ("layers", "fnounet_small", "uno_small"): found = globals()[case](a, keys)
    else: found = globals()[case](a)
    return {name: value.detach().numpy() for name, value in found.items()}


def compare(case, name, computed, expected):
    "At the README's tolerance, with two finer ones that it gives to single arrays."
    tolerance = {"mode_var_after_level": 1e-10, "stationary_last": 1e-10, "circ_var": 1e-9, "circ_skew": 1e-9}.get(
        name, TOLERANCES[case])
    assert computed.shape == expected.shape, f"{case}/{name}: {computed.shape} against {expected.shape}"
    error = np.abs(computed - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{case}/{name}: off by {error:.2e}, allowed {tolerance:.0e}"
