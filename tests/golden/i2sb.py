"""I2SB's golden cases, as far as its network goes."""
import math

import numpy as np
import torch

from diffusion_papers.core.networks import UNet, authors_keys, sinusoids, unet_config


def filled(number, name, shape, amplitude, omega, phase):
    "Tensor `number` of the reference network."
    values = amplitude * np.cos(omega * np.arange(math.prod(shape), dtype=np.float64) + phase * number)
    if len(shape) == 1 and name.endswith(".weight"): values = 1 + values
    return torch.from_numpy(values.reshape(shape)).float()


def compute(case, arrays):
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


def compare(case, name, found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol={"out": 1e-3, "temb": 1e-5}[name], err_msg=name)
