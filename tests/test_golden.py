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


ADM = dict(image_size=64, width=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(8,))
PUBLISHED = {  # file -> family, sizes, number of parameters
    "cifar10": ("ddpmpp", dict(blocks=8, dropout=0.1), 106_632_579),
    "church-and-bedroom": ("ddpm", dict(image_size=128, multipliers=(1, 1, 2, 2, 4, 4, 4)), 148_029_955),
    "imagenet64": ("adm", ADM, 281_820_099),
    "imagenet64-cond": ("adm", ADM | dict(classes=1000, null_class=False), 282_588_099),
    "cats128": ("adm", ADM | dict(image_size=128, multipliers=(1, 2, 2, 3, 3), blocks=2, attention=(16, 8)), 200_436_483),
    "cats-upsampler": ("adm", dict(image_size=512, conditioning=3, width=96, multipliers=(1, 1, 2, 2, 3, 3, 4), attention=(16, 8),
                                   head_width=32, augmented=True), 80_230_179),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_the_authors_tensors(name):
    family, sizes, count = PUBLISHED[name]
    with torch.device("meta"): network = UNet(unet_config(family, **sizes))
    manifest = json.loads((FOLDER.parent / "manifests" / f"genie-{name}-diffusion.json").read_text())
    pairs, state = authors_keys(network, family), network.state_dict()
    assert [theirs for _, theirs in pairs] == list(manifest)
    assert {theirs: list(state[ours].shape) for ours, theirs in pairs} == manifest
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize("name, width, conditioning, feature_norm, count", [
    ("cifar10", 128, 0, False, 526_473), ("church", 128, 0, True, 526_729), ("bedroom", 128, 0, False, 526_473),
    ("imagenet64", 192, 0, False, 1_170_633), ("imagenet64-cond", 192, 0, False, 1_170_633),
    ("cats128", 192, 0, False, 1_170_633), ("cats-upsampler", 96, 3, False, 302_217)])
def test_published_heads_have_the_authors_tensors(name, width, conditioning, feature_norm, count):
    with torch.device("meta"): head = genie.ConvHead(width, 3, conditioning, feature_norm)
    manifest = json.loads((FOLDER.parent / "manifests" / f"genie-{name}-head.json").read_text())
    state = head.state_dict()
    assert [theirs for _, theirs in genie.head_authors_keys(head)] == list(manifest)
    assert {theirs: list(state[ours].shape) for ours, theirs in genie.head_authors_keys(head)} == manifest
    assert sum(parameter.numel() for parameter in head.parameters()) == count
