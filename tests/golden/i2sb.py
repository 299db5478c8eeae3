"""I2SB's golden cases: schedule, bridge, network and corruptions."""
import math

import numpy as np
import torch

from diffusion_papers.topics.corruptions import (
    CHROMA, LUMA, blur, centre_mask, jpeg, quantisation_table, reduced_and_repeated)
from diffusion_papers.core.networks import UNet, authors_keys, sinusoids, unet_config
from diffusion_papers.i2sb import (
    bridge_label, bridge_schedule, bridge_state, follow_bridge, posterior, time_indices)


def filled(number, name, shape, amplitude, omega, phase):
    "Tensor `number` of the reference network."
    values = amplitude * np.cos(omega * np.arange(math.prod(shape), dtype=np.float64) + phase * number)
    if len(shape) == 1 and name.endswith(".weight"): values = 1 + values
    return torch.from_numpy(values.reshape(shape)).float()


def network_case(arrays):
    about, (x, t) = arrays["_config"], (torch.as_tensor(arrays[name]) for name in ("x", "t"))
    theirs, size = about["config"], about["config"]["image_size"]
    network = UNet(unet_config(
        "adm", embedding="cosines_first", qkv_order="heads_first", image_size=size, in_channels=theirs["in_channels"],
        out_channels=theirs["out_channels"], width=theirs["model_channels"], multipliers=tuple(theirs["channel_mult"]),
        blocks=theirs["num_res_blocks"], attention=tuple(size // factor for factor in theirs["attention_resolutions"]),
        head_width=theirs["num_head_channels"])).eval()
    pairs, order = authors_keys(network, "adm"), about["parameter_order"]
    assert [name for _, name in pairs] == [name for name, _ in order]
    ours = {name: mine for mine, name in pairs}
    network.load_state_dict({ours[name]: filled(number, name, shape, **about["fill"]) for number, (name, shape) in enumerate(order)})
    with torch.no_grad(): out = network(x, t)
    return {"out": out.numpy(), "temb": sinusoids(t, theirs["model_channels"], cosines_first=True).numpy()}


def corrupted(images, name):
    "One output of the corruptions' case; its name says the settings."
    corruption, what = name.split("/")
    if corruption.startswith("jpeg"):
        quality = int(corruption.removeprefix("jpeg"))
        tables = {"q_luma": LUMA, "q_chroma": CHROMA}
        return quantisation_table(tables[what], quality) if what in tables else jpeg(images, quality)
    kind = corruption.split("-")[1]
    if corruption.startswith("sr4x-"): return reduced_and_repeated(images, kind, factor=4)
    if corruption.startswith("blur-"): return blur(images, {"uni": "uniform"}.get(kind, kind), mode=what)
    assert corruption == "inpaint-center"
    mask = centre_mask(*images.shape[2:])
    return mask if what == "mask" else torch.where(mask.bool(), 1.0, images)


def corruptions_case(arrays):
    images = torch.as_tensor(arrays["img"])
    return {name: corrupted(images, name).numpy() for name in arrays if name != "img"}


def schedule_case(arrays):
    found = {}
    for prefix in {name.split("/")[0] for name in arrays}:
        steps, beta_max = prefix.removeprefix("N").split("_b")
        schedule = bridge_schedule(int(steps), float(beta_max))
        of_x1 = schedule.weight_x1
        values = {"betas": schedule.betas, "std_fwd": schedule.forward, "std_bwd": schedule.backward, "std_sb": schedule.std,
                  "mu_x0": 1 - of_x1, "mu_x1": of_x1}
        found |= {f"{prefix}/{name}": value.float().numpy() for name, value in values.items()}
    return found


def sampled(arrays, name, schedule):
    "States and estimates of the way without noise, the last first."
    calls, what = int(name.split("/")[1].removeprefix("nfe")), name.split("/")[2]
    c, mask = torch.as_tensor(arrays["c"]), torch.as_tensor(arrays["mask"]) if "masked" in name else None
    states, estimates = [], []  # the states before each step, so the last is what comes back
    end = follow_bridge(lambda x, index: 0.5 * x + c, torch.as_tensor(arrays["x1"]), schedule, calls, mask=mask,
                        callback=lambda step, x, x0: (states.append(x), estimates.append(x0)))
    return torch.stack(list(reversed({"xs": [*states[1:], end], "pred_x0": estimates}[what])), dim=1)


def bridge_output(arrays, name, schedule):
    "One output of the bridge's case; its name says the settings."
    x0, x1, step = (torch.as_tensor(arrays[key]) for key in ("x0", "x1", "step"))
    if name.startswith("ode_sampling"): return sampled(arrays, name, schedule)
    if name.startswith("space_indices/"): return np.array(time_indices(len(schedule), int(name.split("/")[1])))
    if name.startswith("posterior_"):
        earlier, index = map(int, name.split("/")[1].split("_"))
        coefficients = posterior(schedule, index, earlier)
        return coefficients[0] * x0 + coefficients[1] * x1 if "mean" in name else np.array(coefficients, np.float32)
    state = bridge_state(schedule, x0, x1, step.long())
    return {"xt_ode": state, "label_ode": bridge_label(schedule, state, x0, step.long())}[name]


def bridge_case(arrays):
    schedule = bridge_schedule(1000, 0.3)
    return {name: np.asarray(bridge_output(arrays, name, schedule))
            for name in arrays if name not in ("x0", "x1", "step", "c", "mask")}


CASES = {"unet": network_case, "corruptions": corruptions_case, "schedule": schedule_case, "bridge": bridge_case}


def compute(case, arrays): return CASES[case](arrays)


def tolerance(name):
    "The largest absolute difference of an output."
    if name in ("out", "temb"): return {"out": 1e-3, "temb": 1e-5}[name]
    if name.endswith(("/q_luma", "/q_chroma", "/mask")): return 0
    corruption = name.split("/")[0].split("-")[0]
    return 1e-4 if corruption.startswith("jpeg") else {"sr4x": 1e-5, "blur": 1e-4, "inpaint": 1e-6}[corruption]


def compare(case, name, found, expected):
    assert found.shape == expected.shape, name
    if case == "schedule": return np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
    if case == "bridge":
        exact = name.startswith("space_indices/")
        return np.testing.assert_allclose(found, expected, rtol=0, atol=0 if exact else 1e-6 if "posterior" in name else 1e-5, err_msg=name)
    if name.endswith("/released"):  # equal singular values may come in any order
        assert np.abs(found - expected).mean() <= 0.02, name
    else: np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(name), err_msg=name)
