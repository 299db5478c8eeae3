"""DPDM's golden cases, as far as its network goes."""
import json
import math
from pathlib import Path

import numpy as np
import torch

from diffusion_papers.core.networks import UNet, authors_keys, unet_config

MANIFEST = Path(__file__).parents[1] / "manifests" / "dpdm-mnist_28.json"


def filled(number, name, shape, a, b):
    "Tensor `number` (from 1) of the reference network."
    values = np.sin(a * number + b * np.arange(math.prod(shape), dtype=np.float64))
    if len(shape) >= 2: values *= 1.5 / math.sqrt(values.size / shape[0])
    else: values = 1 + 0.2 * values if name.endswith("weight") else 0.2 * values
    return torch.from_numpy(values.reshape(shape)).float()


def compute(case, arrays):
    network = UNet(unet_config("ddpmpp", time_scale=1.0, class_form="early", image_size=28, in_channels=1, out_channels=1, width=32,
                               multipliers=(1, 2, 2), attention=(7,), classes=10)).eval()
    ours = {f"module.model.{theirs}": mine for mine, theirs in authors_keys(network, "ddpmpp")}
    manifest = json.loads(MANIFEST.read_text())
    network.load_state_dict({ours[name]: filled(number, name, shape, *arrays["fill"])
                             for number, (name, shape) in enumerate(manifest.items(), start=1)})
    x, c_noise, y = (torch.as_tensor(arrays[name]) for name in ("x", "c_noise", "y"))
    with torch.no_grad(): return {"out": network(x, c_noise, class_label=y).numpy()}


def compare(case, name, found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5, err_msg=name)
