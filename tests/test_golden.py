"""Every stored reference case against the public API.

A paper's cases lie in tests/golden/SLUG/, its answers in tests/golden/SLUG.py.
"""
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_papers import genie
from diffusion_papers.core.networks import UNet, authors_keys, unet_config

FOLDER = Path(__file__).parent / "golden"
CASES = [(path.parent.name, path.stem) for path in sorted(FOLDER.glob("*/*.npz"))]
INPUTS = {"schedule_and_grid": {"t"}, "losses": {"pred", "target", "weights"}, "blocks": {"x", "temb", "attn_x"},
          "net_uncond": {"x", "t"}, "net_cond": {"x", "t", "y"}, "schedule": {"t"}, "gaussian_samplers": {"x_T", "mu", "s"}, "gmm": {"means", "probs", "std", "t", "x_t", "x_T"},
          "corruptions": {"img"}, "bridge": {"x0", "x1", "step", "c", "mask"}}


def answers_of(slug):
    spec = importlib.util.spec_from_file_location(f"golden_{slug}", FOLDER / f"{slug}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs_of(case, names):
    "What a case hands in; everything else is an output."
    if case == "temporal_conv": return {name for name in names if name.endswith(("_x", "_w"))}
    return INPUTS.get(case, {"x", "eps", "xemb", "temb", "t"} if case.startswith("head_") else {"x", "t", "M"})


def companions(path):
    "The JSON files that belong to a case: its own configuration and keys, and the keys of others."
    found = {}
    for name, key in ((f"{path.stem}.json", "_config"), (f"{path.stem}_config.json", "_config"), (f"{path.stem}_keys.json", "_keys")):
        if (path.parent / name).is_file(): found[key] = json.loads((path.parent / name).read_text())
    for other in path.parent.glob("*_keys.json"):
        if other.stem != f"{path.stem}_keys": found[f"_{other.stem}"] = json.loads(other.read_text())
    return found


@pytest.mark.parametrize("slug, case", CASES, ids=["/".join(case) for case in CASES])
def test_golden_case(slug, case):
    module, path = answers_of(slug), FOLDER / slug / f"{case}.npz"
    arrays = dict(np.load(path))
    inputs = getattr(module, "inputs_of", inputs_of)(case, arrays)
    # What compute sees of the outputs are their names alone: an output that was passed through would come back as zeros.
    blinded = {name: values if name in inputs else np.zeros_like(values) for name, values in arrays.items()}
    computed = module.compute(case, blinded | companions(path))
    assert computed.keys() == arrays.keys() - inputs
    for name in sorted(computed): module.compare(case, name, computed[name], arrays[name])


PUBLISHED = {  # preset -> the manifests' names, parameters of the network and of the head
    "cifar10": ("cifar10", "cifar10", 106_632_579, 526_473),
    "church": ("church-and-bedroom", "church", 148_029_955, 526_729),
    "bedroom": ("church-and-bedroom", "bedroom", 148_029_955, 526_473),
    "imagenet64": ("imagenet64", "imagenet64", 281_820_099, 1_170_633),
    "imagenet64_cond": ("imagenet64-cond", "imagenet64-cond", 282_588_099, 1_170_633),
    "cats128": ("cats128", "cats128", 200_436_483, 1_170_633),
    "cats512": ("cats-upsampler", "cats-upsampler", 80_230_179, 302_217),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_configurations_have_the_authors_tensors(preset):
    of_network, of_head, network_count, head_count = PUBLISHED[preset]
    config = genie.CONFIGS[preset]
    with torch.device("meta"): model = genie.build(config)
    network, head = model.denoiser.network, model.head.body
    for module, pairs, name, count in (
            (network, authors_keys(network, config.family), f"genie-{of_network}-diffusion", network_count),
            (head, genie.head_authors_keys(head), f"genie-{of_head}-head", head_count)):
        manifest = json.loads((FOLDER.parent / "manifests" / f"{name}.json").read_text())
        state = module.state_dict()
        assert [theirs for _, theirs in pairs] == list(manifest)
        assert {theirs: list(state[ours].shape) for ours, theirs in pairs} == manifest
        assert sum(parameter.numel() for parameter in module.parameters()) == count


_adm = unet_config("adm", embedding="cosines_first", qkv_order="heads_first", image_size=256, width=256,
                   multipliers=(1, 1, 2, 2, 4, 4), attention=(32, 16, 8))
_dpdm = unet_config("ddpmpp", time_scale=1.0, class_form="early", image_size=32, width=32, multipliers=(1, 2, 2))


@pytest.mark.parametrize("name, prefix, family, config, count", [
    ("i2sb-adm256-uncond-3ch", "diffusion_model.", "adm", _adm, 552_807_171),
    ("i2sb-adm256-cond-6ch", "diffusion_model.", "adm", replace(_adm, conditioning=3), 552_814_083),
    ("dpdm-mnist_28", "module.model.", "ddpmpp",
     replace(_dpdm, image_size=28, in_channels=1, out_channels=1, attention=(7,), classes=10), 1_753_345),
    ("dpdm-cifar10_32", "module.model.", "ddpmpp", replace(_dpdm, attention=(16,), classes=10), 1_754_499),
    ("dpdm-celeba_32", "module.model.", "ddpmpp", replace(_dpdm, attention=(16, 8)), 1_804_451),
    ("dpdm-imagenet_32", "module.model.", "ddpmpp", replace(_dpdm, attention=(16, 8), classes=1000), 1_836_483),
    ("dpdm-celeba_64", "module.model.", "ddpmpp",
     replace(_dpdm, image_size=64, multipliers=(1, 1, 2, 2), attention=(16, 8)), 1_999_907)])
def test_further_networks_have_the_authors_tensors(name, prefix, family, config, count):
    with torch.device("meta"): network = UNet(config)
    manifest, state = json.loads((FOLDER.parent / "manifests" / f"{name}.json").read_text()), network.state_dict()
    found = [(prefix + theirs, list(state[ours].shape)) for ours, theirs in authors_keys(network, family)]
    assert dict(found) == manifest
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_authors_files_arrive_in_network_and_head(tmp_path):
    "Two files in the authors' layout, of a small up-sampler with a normalised head: the average for the one, plain weights for the other."
    config = genie.CONFIGS["cats512"].override(**{"diffusion.unet.image_size": 32, "diffusion.unet.width": 32, "diffusion.unet.multipliers": (1, 2), "diffusion.unet.blocks": 1,
                                                  "diffusion.unet.attention": (16,), "diffusion.unet.head_width": 16, "diffusion.low_size": 16, "head_norm": True})
    model = genie.build(config.override(seed=1))
    for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=0.2)
    network, head = model.denoiser.network, model.head.body
    state, pairs = network.state_dict(), authors_keys(network, "adm")
    frozen = {theirs for _, theirs in pairs if theirs.endswith(".W")}
    assert len(frozen) == 2
    raw = {f"module.{theirs}": state[ours] if theirs in frozen else torch.zeros_like(state[ours]) for ours, theirs in pairs}
    torch.save({"model": raw | {"module.sigmas": torch.ones(3)}, "optimizer": {"state": {}}, "step": 5,
                "ema": {"decay": 0.9999, "num_updates": 5, "shadow_params": [state[ours] for ours, theirs in pairs if theirs not in frozen]}},
               tmp_path / "checkpoint_5.pth")
    weights = head.state_dict()
    torch.save({"model": {f"module.{theirs}": weights[ours] for ours, theirs in genie.head_authors_keys(head)}, "step": 5}, tmp_path / "genie_5.pth")
    loaded = genie.load_authors_checkpoint(tmp_path / "checkpoint_5.pth", tmp_path / "genie_5.pth", config)
    low = torch.rand(2, 3, 16, 16)
    assert torch.equal(genie.upsample(loaded, low, calls=3), genie.upsample(model.eval(), low, calls=3))
    with pytest.raises(ValueError, match="genie_5.pth: lacks"):
        genie.load_authors_checkpoint(tmp_path / "checkpoint_5.pth", tmp_path / "genie_5.pth", config.override(head_norm=False))
