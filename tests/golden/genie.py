"""GENIE's golden cases, recomputed through the public API. `compute(case, arrays)` returns every output under its own key."""
import math
import re

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_papers import genie
from diffusion_papers.core.analytic import gaussian_denoiser, gaussian_flow, mixture_denoiser
from diffusion_papers.core.denoisers import Denoiser, per_sample
from diffusion_papers.core.networks import UNet, authors_keys, unet_config
from diffusion_papers.core.processes import LinearVP
from diffusion_papers.core.samplers import SAMPLERS, Counted, exact_slope, sigma_grid

TOLERANCES = {"schedule": dict(rtol=1e-9, atol=0),
              "gaussian_samplers": dict(rtol=1e-8, atol=1e-12),
              "gmm": dict(rtol=1e-7, atol=1e-12)}
FAMILY = {"ncsnpp": "ddpmpp", "ddpm": "ddpm", "openai": "adm"}
PROCESS = LinearVP()
OTHER_SAMPLERS = {"euler": "euler", "heun": "heun", "dpm_2": "midpoint",
                  "dpmpp_2m": "dpm_solver_pp", "lms": "adams_bashforth"}


def tensors(arrays, *names):
    return [torch.as_tensor(arrays[name], dtype=torch.float64) for name in names]


def run(key, denoise, x_T):
    "One of GENIE's own samplers, settings from the key: the samples, and the calls that they cost."
    found = re.fullmatch(r"(ddim|ttm2)_n(\d+)_q(\d)_afs(\d)(?:_den(\d))?", key)
    solver = {"ddim": "ddim", "ttm2": "taylor"}[found[1]]
    model = Counted(exact_slope(denoise) if solver == "taylor" else denoise)
    samples = genie.integrate(solver, model, x_T, PROCESS, int(found[2]), exponent=1.0 + int(found[3]),
                              first_step=found[4] == "1", denoise=found[5] == "1")
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
    answers = {"exact": (gaussian_flow(x_T / PROCESS.alpha_at(first), first, last, mu, s)
                         * PROCESS.alpha_at(last)).numpy()}
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
            answers[key] = (SAMPLERS[OTHER_SAMPLERS[found[1]]](denoise, x_T / PROCESS.alpha_at(sigmas[0]), sigmas)
                            * PROCESS.alpha_at(sigmas[-1])).numpy()
    return answers


def filled(position, name, shape):
    "The weights of the reference networks: a rule instead of a file."
    numbers = np.arange(math.prod(shape), dtype=np.float64)
    wave = np.cos(1.3 * numbers * (1 + 0.01 * position) + 0.7 * position)
    if len(shape) >= 2: wave *= math.sqrt(2 / (len(numbers) / shape[0]))
    elif name.endswith("weight"): wave = 1 + 0.1 * wave
    else: wave *= 2.0 if name.endswith(".W") else 0.1
    return torch.from_numpy(wave.reshape(shape)).float()


def network_of(kind, config, keys):
    "A reduced backbone of one family with the reference weights."
    family, size = FAMILY[kind], config["image_size"]
    resolutions = [size // r if family == "adm" else r for r in config["attn_resolutions"]]  # ADM lists factors
    width = keys[{"ddpmpp": "all_modules.2.weight", "ddpm": "conv_in.weight", "adm": "input_blocks.0.0.weight"}[family]][0]
    heads = {"head_width": config["num_head_channels"]} if "num_head_channels" in config else {}
    network = UNet(unet_config(family, image_size=size, width=width, multipliers=tuple(config["ch_mult"]), blocks=config["num_res_blocks"],
                               attention=tuple(resolutions), classes=config.get("num_classes") or 0, **heads))
    ours = {theirs: mine for mine, theirs in authors_keys(network, family)}
    network.load_state_dict({ours[name]: filled(position, name, shape) for position, (name, shape) in enumerate(keys.items())})
    return network.eval()


def backbone(kind, arrays):
    network = network_of(kind, arrays["_config"], arrays["_keys"])
    x, t = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["t"])
    with torch.no_grad(): output, features, embedding = network.with_features(x, t)
    answers = {"eps": output, "xemb": features, "temb": embedding}
    network, x, t = network.double(), x.double(), t.double()
    gamma = PROCESS.noise_to_signal(t)
    _, dt_dgamma = torch.func.jvp(PROCESS.time_at, (gamma,), (torch.ones_like(gamma),))
    alpha = per_sample(PROCESS.alpha(t), x)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attention kernel has no forward-mode derivative
        slope = exact_slope(Denoiser(network, PROCESS, "eps"))(x / alpha, gamma)
        answers["deps_dgamma"] = slope[1]
        answers["eps_if_v_model"] = exact_slope(Denoiser(network, PROCESS, "v"), order=1)(x / alpha, gamma)[0]
        level = per_sample(gamma, x)
        moves = slope[0] / torch.sqrt(1 + level**2) - level / (1 + level**2) * x  # d x_t / d gamma
        answers["jvp_x"] = torch.func.jvp(lambda x: network(x, t), (x,), (moves,))[1]
        answers["jvp_t"] = torch.func.jvp(lambda t: network(x, t), (t,), (dt_dgamma,))[1]
    return {name: value.numpy() for name, value in answers.items()} | {"dt_dgamma": dt_dgamma.numpy()}


def head(case, arrays):
    keys, t = arrays["_keys"], torch.from_numpy(arrays["t"])
    with_norm = case.endswith("norm1")
    width = keys[f"all_modules.0.all_modules.{int(with_norm)}.weight"][0]
    body = genie.ConvHead(width, arrays["x"].shape[1], feature_norm=with_norm)
    ours = {theirs: mine for mine, theirs in genie.head_authors_keys(body)}
    body.load_state_dict({ours[name]: filled(position, name, shape) for position, (name, shape) in enumerate(keys.items())})
    with torch.no_grad(): parts = body(*(torch.from_numpy(arrays[name]) for name in ("x", "eps", "xemb", "temb")))
    # The reference took gamma in float32 from 1 - alpha^2, which costs its sixth digit; ours, by expm1, is the accurate one.
    alpha = PROCESS.alpha(t.float())
    gamma = torch.sqrt((1 - alpha**2) / alpha**2)
    return {"heads": torch.cat(parts, dim=1).numpy(), "out": genie.mix(parts, gamma).numpy()}


def compute(case, arrays):
    "Every output of one case, under its own key."
    if case.startswith("net_"): return backbone(case.removeprefix("net_"), arrays)
    if case.startswith("head_"): return head(case, arrays)
    return {"schedule": schedule, "gaussian_samplers": gaussian_samplers, "gmm": gmm}[case](arrays)


def compare(case, name, found, expected):
    "The tolerances of the reference cases."
    if case.startswith("head_"): np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5, err_msg=name)
    elif case.startswith("net_"):
        if name.startswith(("jvp", "deps")): np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max(), err_msg=name)
        else: np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4, err_msg=name)
    else: np.testing.assert_allclose(found, expected, err_msg=name, **TOLERANCES[case])
