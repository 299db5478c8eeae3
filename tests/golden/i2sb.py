"""I2SB's golden cases: its network and its corruptions."""
import math

import numpy as np
import torch

from diffusion_papers.core.corruptions import (
    CHROMA, LUMA, blur, centre_mask, jpeg, quantisation_table, reduced_and_repeated)
from diffusion_papers.core.networks import UNet, authors_keys, sinusoids, unet_config


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


CASES = {"unet": network_case, "corruptions": corruptions_case}


def compute(case, arrays): return CASES[case](arrays)


def tolerance(name):
    "The largest absolute difference of an output."
    if name in ("out", "temb"): return {"out": 1e-3, "temb": 1e-5}[name]
    if name.endswith(("/q_luma", "/q_chroma", "/mask")): return 0
    corruption = name.split("/")[0].split("-")[0]
    return 1e-4 if corruption.startswith("jpeg") else {"sr4x": 1e-5, "blur": 1e-4, "inpaint": 1e-6}[corruption]


def compare(case, name, found, expected):
    assert found.shape == expected.shape, name
    if name.endswith("/released"):  # equal singular values may come in any order
        assert np.abs(found - expected).mean() <= 0.02, name
    else: np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance(name), err_msg=name)
