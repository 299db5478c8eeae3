"""Every stored reference case against the public API.

A paper's cases lie in tests/golden/SLUG/, its answers in tests/golden/SLUG.py.
"""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_papers import genie
from diffusion_papers.core.networks import UNet, authors_keys, unet_config

FOLDER = Path(__file__).parent / "golden"
CASES = [(path.parent.name, path.stem) for path in sorted(FOLDER.glob("*/*.npz"))]
INPUTS = {"schedule": {"t"}, "gaussian_samplers": {"x_T", "mu", "s"}, "gmm": {"means", "probs", "std", "t", "x_t", "x_T"}}


def answers_of(slug):
    spec = importlib.util.spec_from_file_location(f"golden_{slug}", FOLDER / f"{slug}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    arrays, inputs = dict(np.load(path)), INPUTS.get(case, {"x", "eps", "xemb", "temb", "t"} if case.startswith("head_") else {"x", "t", "M"})
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


@pytest.mark.parametrize("name, sizes, count", [
    ("cifar10", dict(width=256, multipliers=(1, 1, 1), blocks=3, attention=(16, 8), dropout=0.2), 60_004_099),
    ("imagenet64", dict(image_size=64, width=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8), head_width=64, classes=1000),
     295_900_035)])
def test_distillation_networks_have_the_authors_tensors(name, sizes, count):
    "As far as the network goes: the file lists a student, whose temporal layers stand between the network's modules."
    with torch.device("meta"): network = UNet(unet_config("distillation", **sizes))
    manifest = json.loads((FOLDER.parent / "manifests" / f"dfno-{name}.json").read_text())
    unnumbered = lambda name: name.split(".", 2)[2]  # without all_modules.NUMBER
    expected = [(unnumbered(theirs), shape) for theirs, shape in manifest.items() if "t_conv" not in theirs]
    state = network.state_dict()
    assert [(unnumbered(theirs), list(state[ours].shape)) for ours, theirs in authors_keys(network, "distillation")] == expected
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
