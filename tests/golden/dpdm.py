"""DPDM's golden cases, recomputed through the public API. (The accountant's are in tests/test_privacy.py.)"""
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from diffusion_papers import dpdm
from diffusion_papers.core.metrics import gaussian_frechet
from diffusion_papers.core.networks import UNet, authors_keys, unet_config
from diffusion_papers.topics.privacy import clipped_sum, per_example_gradients
from diffusion_papers.core.samplers import churn, euler, euler_maruyama, karras_grid
from diffusion_papers.core.training import update_average

MANIFEST = Path(__file__).parents[1] / "manifests" / "dpdm-mnist_28.json"
TOLERANCES = {"ncsnpp_mnist_fill": dict(rtol=0, atol=5e-5), "precond": dict(rtol=1e-8, atol=1e-12),
              "losses": dict(rtol=1e-8, atol=1e-12), "clip_average": dict(rtol=1e-8, atol=1e-12),
              "samplers": dict(rtol=1e-9, atol=1e-12), "ema_frechet": dict(rtol=1e-8, atol=1e-12)}

INPUTS = {"precond": {"sigma"}, "clip_average": {"x", "W", "sigma", "n", "C", "expected_batch"},
          "ema_frechet": {"ema_params", "ema_decay", "fd_mu1", "fd_cov1", "fd_mu2", "fd_cov2"},
          "ncsnpp_mnist_fill": {"x", "c_noise", "y", "fill"}}


def inputs_of(case, names):
    "What a case hands in; everything else is an output."
    if case == "losses":
        return {name for name in names
                if not name.endswith(("_sigma", "_label", "_loss", "_grad_norm", "_clipped_sum"))}
    if case == "samplers": return {name for name in names if name in ("mean", "var", "x", "settings") or "noise" in name}
    if case.startswith("ncsnpp_small"):
        return {name for name in names if name in ("x", "c_noise", "y", "config") or name.startswith("w/")}
    return INPUTS[case]


def filled(number, name, shape, a, b):
    "Tensor `number` (from 1) of the reference network."
    values = np.sin(a * number + b * np.arange(math.prod(shape), dtype=np.float64))
    if len(shape) >= 2: values *= 1.5 / math.sqrt(values.size / shape[0])
    else: values = 1 + 0.2 * values if name.endswith("weight") else 0.2 * values
    return torch.from_numpy(values.reshape(shape)).float()


def mnist_network(arrays):
    network = UNet(dpdm.CONFIGS["mnist"].unet).eval()
    ours = {f"module.model.{theirs}": mine for mine, theirs in authors_keys(network, "ddpmpp")}
    manifest = json.loads(MANIFEST.read_text())
    network.load_state_dict({ours[name]: filled(number, name, shape, *arrays["fill"])
                             for number, (name, shape) in enumerate(manifest.items(), start=1)})
    x, c_noise, y = (torch.as_tensor(arrays[name]) for name in ("x", "c_noise", "y"))
    with torch.no_grad(): return {"out": network(x, c_noise, class_label=y).numpy()}


def small_network(arrays):
    "A network of the family with its weights, and the norms of the gradients of each picture alone."
    about = json.loads(str(arrays["config"]))
    config = dpdm.DpdmConfig(public=True, family="unet", unet=unet_config(
        "ddpmpp", time_scale=1.0, class_form="early", image_size=about["image_size"], in_channels=about["num_in_channels"],
        out_channels=about["num_out_channels"], width=about["nf"], multipliers=tuple(about["ch_mult"]),
        blocks=about["num_res_blocks"], attention=tuple(about["attn_resolutions"]), classes=about["label_dim"]))
    model = dpdm.build(config)
    weights = {name.removeprefix("w/"): torch.as_tensor(value) for name, value in arrays.items() if name.startswith("w/")}
    plain = {name.removeprefix("module.").removeprefix("model."): value for name, value in weights.items()}
    model.network.load_state_dict({ours: plain[theirs] for ours, theirs in authors_keys(model.network, "ddpmpp")})
    batch = {"x0": torch.as_tensor(arrays["x"]), "level": torch.as_tensor(arrays["c_noise"])}
    if "y" in arrays: batch["class_label"] = torch.as_tensor(arrays["y"])
    answer = lambda model, batch: model.answer(batch["x0"], batch["level"], batch.get("class_label"))
    with torch.no_grad(): out = answer(model, batch)
    gradients = per_example_gradients(model, lambda model, batch: answer(model, batch).square().flatten(1).mean(1), batch)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    return {"out": out.numpy(), "grad_norm": norms.numpy()}


def precond(arrays):
    sigma = torch.as_tensor(arrays["sigma"])
    found = {kind: torch.stack(dpdm.coefficients(kind, sigma), dim=1) for kind in dpdm.PARAMETERISATIONS}
    weights = {f"lambda_{kind}": 1 / values[:, 1] ** 2 for kind, values in found.items()}
    return {name: values.numpy() for name, values in (found | weights).items()} | {
        "sigma_data": dpdm.DATA_STD, "vp_beta_min": dpdm._VP.beta_min, "vp_beta_max": dpdm._VP.beta_min + dpdm._VP.beta_d,
        "vp_M": 999.0}


class Linear(nn.Module):
    "The inner network of the losses' case."
    def __init__(self, A, E, b):
        super().__init__()
        self.A, self.E, self.b = (nn.Parameter(torch.as_tensor(value)) for value in (A, E, b))
    def forward(self, u, level, class_label):
        return (u.flatten(1) @ self.A.T + self.b * torch.tanh(level)[:, None] + self.E[class_label]).reshape(u.shape)


def losses(arrays):
    x, draws, found = torch.as_tensor(arrays["x"]), int(arrays["K"]), {}
    for kind in dpdm.PARAMETERISATIONS:
        of = lambda name: torch.as_tensor(arrays[f"{kind}_{name}"])
        model = dpdm.PrivateDenoiser(Linear(arrays["A"], arrays["E"], arrays["b"]), dpdm.DpdmConfig(public=True, kind=kind))
        label = torch.where(of("drop") > 0, 10, torch.as_tensor(arrays["y"]).long())
        sigma = dpdm.noise_levels(kind, of("u"))
        batch = {"x0": x, "sigma": sigma, "noise": of("eps").reshape(len(x), draws, *x.shape[1:]), "class_label": label}
        gradients = per_example_gradients(model, dpdm.multiplied_loss, batch)
        clip = float(arrays[f"{kind}_clip_C"])
        sums, norms = clipped_sum(model, dpdm.multiplied_loss, batch, clip)
        order = [f"network.{name}" for name in ("A", "E", "b")]
        found |= {f"{kind}_sigma": sigma, f"{kind}_label": label.repeat_interleave(draws),
                  f"{kind}_loss": dpdm.multiplied_loss(model, batch).detach(),
                  f"{kind}_grad_norm": torch.cat([gradients[name].flatten(1) for name in order], 1).norm(dim=1),
                  f"{kind}_clipped_sum": torch.cat([sums[name].flatten() for name in order])}
    return {name: value.numpy() for name, value in found.items()}


def clip_average(arrays):
    x, sigma, noise = (torch.as_tensor(arrays[name]) for name in ("x", "sigma", "n"))
    model, clip = nn.Linear(3, 3, bias=False).double(), float(arrays["C"])
    model.weight.data = torch.as_tensor(arrays["W"])
    def loss(model, batch):
        clean, sigma = batch["x0"][:, None], batch["sigma"][..., None]
        return ((model(clean + sigma * batch["noise"]) - clean) / sigma).square().mean((1, 2))
    batch = {"x0": x, "sigma": sigma, "noise": noise}
    draws = {"x0": x.repeat_interleave(sigma.shape[1], 0), "sigma": sigma.reshape(-1, 1), "noise": noise.reshape(-1, 1, 3)}
    sums, norms = clipped_sum(model, loss, batch, clip)
    return {"loss": loss(model, batch).detach().numpy(), "norm": norms.numpy(),
            "grad": per_example_gradients(model, loss, batch)["weight"].flatten(1).numpy(),
            "clipped_sum": sums["weight"].flatten().numpy(),
            "wrong_clip_each_draw_sum":  # clips every draw, and averages over them afterwards
                clipped_sum(model, loss, draws, clip)[0]["weight"].flatten().numpy() / sigma.shape[1]}


def samplers(arrays):
    settings, found = json.loads(str(arrays["settings"])), {}
    mean, variance, x = (torch.as_tensor(arrays[name]) for name in ("mean", "var", "x"))
    denoise = lambda x, sigma: (variance * x + sigma[:, None] ** 2 * mean) / (variance + sigma[:, None] ** 2)
    for number, how in enumerate(settings):
        grid = karras_grid(how["num_steps"] - 1, how["tmax"], how["tmin"], how["rho"])
        whole = torch.cat([grid, torch.zeros(1, dtype=torch.float64)])
        drawn = iter(torch.as_tensor(arrays.get(f"s{number}_noise", np.zeros((0, 1)))))
        noise, start = (lambda x: next(drawn)), x * how["tmax"]
        if how.get("stochastic"): end = euler_maruyama(denoise, start, whole, noise=noise)
        elif how["sampler"] == "ddim": end = euler(denoise, start, whole)
        else:
            end = churn(denoise, start, whole, noise=noise, s_churn=how.get("s_churn", 0.0), s_min=how.get("s_min", 0.05),
                        s_max=how.get("s_max", 50.0), s_noise=how.get("s_noise", 1.0), limit=how.get("churn_limit", 1.0))
        assert next(drawn, None) is None  # all of the recorded noise was asked for
        found |= {f"s{number}_sigmas": grid.numpy(), f"s{number}_out": end.numpy()}
    return found


def ema_frechet(arrays):
    model, average = nn.Linear(5, 1, bias=False).double(), nn.Linear(5, 1, bias=False).double()
    rows, decay = torch.as_tensor(arrays["ema_params"]), float(arrays["ema_decay"])
    average.weight.data = rows[0][None].clone()
    shadow = [rows[0]]
    for n, row in enumerate(rows[1:], start=1):
        model.weight.data = row[None]
        update_average(average, model, min(decay, (1 + n) / (10 + n)))
        shadow.append(average.weight.detach()[0].clone())
    found = torch.stack(shadow) if len(arrays["ema_shadow"]) == len(rows) else torch.stack(shadow[1:])
    moments = [torch.as_tensor(arrays[f"fd_{name}"]) for name in ("mu1", "cov1", "mu2", "cov2")]
    return {"ema_shadow": found.numpy(), "fd_value": gaussian_frechet(*moments)}


def compute(case, arrays):
    return {"ncsnpp_mnist_fill": mnist_network, "ncsnpp_small_cond": small_network, "ncsnpp_small_uncond": small_network,
            "precond": precond, "losses": losses, "clip_average": clip_average, "samplers": samplers,
            "ema_frechet": ema_frechet}[case](arrays)


def compare(case, name, found, expected):
    if case.startswith("ncsnpp_small"): tolerance = dict(rtol=1e-4, atol=0) if name == "grad_norm" else dict(rtol=0, atol=2e-5)
    else: tolerance = TOLERANCES[case]
    np.testing.assert_allclose(found, expected, err_msg=name, **tolerance)
