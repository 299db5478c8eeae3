"""DFNO's golden cases, recomputed through the public API."""
import math

import numpy as np
import torch

from diffusion_papers import dfno
from diffusion_papers.core.denoisers import Denoiser
from diffusion_papers.core.networks import Attention, ConvBlock, UNet, leaves, sinusoids, unet_config
from diffusion_papers.topics.neural_operators import spectral_convolution
from diffusion_papers.core.processes import BoundedCosineVP

PROCESS = BoundedCosineVP()


def filled(number, name, shape):
    "Tensor `number` of a reference network."
    values = np.cos(1.3 * np.arange(math.prod(shape), dtype=np.float64) * (1 + 0.01 * number) + 0.7 * number)
    if name.endswith("weights1"): values /= shape[0]
    elif name.endswith(".W"): values *= math.sqrt(2 / shape[0])
    elif len(shape) >= 2: values *= math.sqrt(2 / (values.size / shape[0]))
    elif name.endswith("weight"): values = 1 + 0.1 * values
    else: values *= 0.1
    return torch.from_numpy(values.reshape(shape)).float()


def fill(module, pairs, keys):
    "Load the reference weights; the authors' names must come in their order."
    assert [theirs for _, theirs in pairs] == list(keys)
    ours = {theirs: mine for mine, theirs in pairs}
    module.load_state_dict({ours[name]: filled(number, name, shape) for number, (name, shape) in enumerate(keys.items())})
    return module.eval()


def schedule_and_grid(arrays):
    t = torch.as_tensor(arrays["t"], dtype=torch.float64)
    angle = Denoiser(torch.nn.Identity(), PROCESS, "x0", "angle").label_at(PROCESS.noise_to_signal(t))
    answers = {"logsnr": PROCESS.log_snr(t).numpy(), "logsnr_input": angle.numpy(),
               "emb16": sinusoids(1000 * angle.float(), 16).numpy()}
    for key in arrays:
        if not key.endswith("_idx"): continue
        name, points = key.removesuffix("_idx"), len(arrays[key]) - 1
        kept = tuple(16 // points * index for index in range(points + 1))
        steps = 16 if name == "imagenet" else 512
        idx = kept if name == "imagenet" else dfno.quadratic_steps(512, 17, kept)
        times = dfno.solver_times(steps, 1.0, 0.0)[list(idx)]
        answers |= {f"{name}_idx": np.array(idx), f"{name}_t": times.numpy(), f"{name}_logsnr": PROCESS.log_snr(times[1:]).numpy(),
                    f"{name}_weights": dfno.state_weights(PROCESS, times[1:]).numpy()}
    return answers


def temporal_conv(arrays):
    answers = {}
    for key in arrays:
        if not key.endswith("_x"): continue
        x, weight = (torch.as_tensor(arrays[key[:-1] + part]) for part in ("x", "w"))
        block = dfno.TemporalBlock(x.shape[2], weight.shape[2])
        block.load_state_dict({"convolution.weight": weight})
        with torch.no_grad(): answers |= {key[:-1] + "spectral": spectral_convolution(x, weight).numpy(), key[:-1] + "timeconv": block(x).numpy()}
    return answers


def blocks(arrays):
    "Residual blocks and attentions; in the reference their time axis is a part of the batch."
    answers = {}
    temb = torch.as_tensor(arrays["temb"])
    family = dict(width=16, embedding_width=temb.shape[-1])
    for key in arrays:
        if key.startswith("res_"):
            x = torch.as_tensor(arrays["x"])
            out, change = (32 if key == "res_wide" else 16), {"res_up": "up", "res_down": "down"}.get(key)
            module = ConvBlock(16, out, unet_config("distillation", **family), change)
            fill(module, leaves(module, "", "", "distillation"), arrays["_config"] if f"_{key}_keys" not in arrays else arrays[f"_{key}_keys"])
            call = lambda rows: module(rows, temb.flatten(0, 1))
        elif key.startswith("attn_h"):
            x, heads = torch.as_tensor(arrays["attn_x"]), int(key[-1])
            module = Attention(64, unet_config("distillation", head_width=64 // heads if heads > 1 else 0, multipliers=(1,), width=64))
            fill(module, leaves(module, "", "", "distillation"), arrays["_attn_keys"])
            call = module
        else: continue
        with torch.no_grad(): answers[key] = call(x.flatten(0, 1)).unflatten(0, x.shape[:2]).numpy()
    return answers


def losses(arrays):
    pred, target, weights = (torch.as_tensor(arrays[name]) for name in ("pred", "target", "weights"))
    answers = {}
    for name, distance in dfno.DISTANCES.items():
        answers[name] = dfno.weighted_loss(pred, target, weights, distance).mean().numpy()
        answers[f"{name}_t"] = np.array([dfno.weighted_loss(pred[:, m:m + 1], target[:, m:m + 1], torch.ones(1), distance).mean()
                                         for m in range(len(weights))])
    return answers


def network(arrays):
    about = arrays["_config"]
    unet = UNet(unet_config("distillation", image_size=about["image_size"], width=about["nf"], multipliers=tuple(about["ch_mult"]),
                            blocks=about["num_res_blocks"], attention=tuple(about["attn_resolutions"]), classes=about.get("num_classes", 0),
                            head_width=about.get("head_dim", 0), embedding_width=about["temb_dim"]))
    student = dfno.Student(Denoiser(unet, PROCESS, "x0", "angle"), about["num_modes"])
    fill(student, dfno.student_authors_keys(student), arrays["_keys"])
    x, t = (torch.as_tensor(arrays[name]) for name in ("x", "t"))
    cond = {"class_label": torch.as_tensor(arrays["y"]).long()} if "y" in arrays else {}
    with torch.no_grad():
        out = student(x, t, **cond)
        for block in student.temporal: block.convolution.weight.zero_()
        alone = student(x, t, **cond)
    logsnr = PROCESS.log_snr(t.double())
    return {"out": out.numpy(), "out_zero_temporal": alone.numpy()} | ({"logsnr": logsnr.numpy()} if "logsnr" in arrays else {})


def compute(case, arrays):
    if case.startswith("net_"): return network(arrays)
    return {"schedule_and_grid": schedule_and_grid, "temporal_conv": temporal_conv, "blocks": blocks, "losses": losses}[case](arrays)


def compare(case, name, found, expected):
    if case == "schedule_and_grid":
        if name in ("logsnr", "logsnr_input"): tolerance = dict(rtol=1e-9, atol=1e-10)
        elif name == "emb16": tolerance = dict(rtol=0, atol=2e-3)
        elif name.endswith("_idx"): tolerance = dict(rtol=0, atol=0)
        elif name.endswith("_weights"): tolerance = dict(rtol=1e-4, atol=0)
        else: tolerance = dict(rtol=1e-6, atol=1e-6)
    elif case == "losses": tolerance = dict(rtol=1e-6, atol=0)
    else: tolerance = dict(rtol=0, atol={"temporal_conv": 1e-5, "blocks": 2e-5}.get(case, 2e-4))
    np.testing.assert_allclose(found, expected, err_msg=name, **tolerance)
