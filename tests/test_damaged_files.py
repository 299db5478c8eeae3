"""Damaged files of every kind: a clear error each time, and nothing half-loaded."""
import math

import numpy as np
import pytest
import torch

from extras import need

need("train", "data", "dev")

from hypothesis import HealthCheck, given, settings, strategies as st

from diffusion_papers import genie
from diffusion_papers.workbench.checkpoints import CheckpointError, load_checkpoint, load_foreign, save_checkpoint
from diffusion_papers.core.data import ImageFolder, cifar_images, digits, idx_images
from diffusion_papers.core.diffusion import DiffusionConfig
from diffusion_papers.core.networks import authors_keys, unet_config
from diffusion_papers.core.training import TrainingConfig, fit
from diffusion_papers.core.metrics import Moments

TINY = genie.GenieConfig().override(**{"diffusion.mlp.width": 8, "diffusion.mlp.blocks": 1, "head_blocks": 1, "diffusion.mlp.fourier": 4})
AUTHORS = genie.GenieConfig(DiffusionConfig(data="images", family="adm", label="time", label_dropout=0.0, unet=unet_config(
    "adm", image_size=8, width=32, multipliers=(1,), blocks=1, attention=(), head_width=16)))
MANY = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def spoiled(tensors, draw):
    "The tensors with one of them missing, renamed, of another shape or kind, or not finite; or with one more."
    tensors = dict(tensors)
    name = draw(st.sampled_from(sorted(tensors)), label="tensor")
    value = tensors.pop(name)
    how = draw(st.sampled_from(["missing", "renamed", "longer", "flat", "integer", "complex", "nan", "infinite", "more"]), label="how")
    changed = {"renamed": {name + "_": value}, "longer": {name: torch.cat([value.reshape(-1), torch.zeros(1)])},
               "flat": {name: value[None]}, "integer": {name: value.long()}, "complex": {name: value.to(torch.complex64)},
               "nan": {name: torch.full_like(value, math.nan)}, "infinite": {name: torch.full_like(value, math.inf)},
               "more": {name: value, "another": torch.zeros(2)}}
    return tensors | changed.get(how, {})


def cut_or_flipped(content, draw):
    "A file cut off somewhere, or with some bytes changed."
    if draw(st.booleans(), label="cut"): return content[:draw(st.integers(0, len(content) - 1), label="length")]
    places = draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4, unique=True), label="places")
    changed = bytearray(content)
    for place in places: changed[place] ^= draw(st.integers(1, 255), label="bits")
    return bytes(changed)


@MANY
@given(data=st.data())
def test_spoiled_models_are_refused(tmp_path, data):
    path = tmp_path / "model.safetensors"
    genie.save_model(path, genie.build(TINY))
    tensors, about = load_checkpoint(path)
    if data.draw(st.booleans(), label="description"):
        about = dict(about)
        change = data.draw(st.sampled_from(["kind", "no config", "unknown field", "wrong value", "wrong size", "no object"]))
        if change == "kind": about["kind"] = "run"
        elif change == "no config": del about["config"]
        elif change == "no object": about["config"] = 7
        else: about["config"] |= {"unknown field": {"colour": 1}, "wrong value": {"mixing": "half"}, "wrong size": {"head_blocks": 2}}[change]
    else: tensors = spoiled(tensors, data.draw)
    save_checkpoint(path, tensors, about)
    with pytest.raises(CheckpointError, match="model.safetensors"): genie.load_model(path)


@MANY
@given(data=st.data())
def test_spoiled_runs_are_refused_and_nothing_is_loaded(tmp_path, data):
    config, loss = TrainingConfig(steps=2, batch_size=4, checkpoint_every=1), lambda model, batch, draws: model(batch["x0"].flatten(1)).square().mean(1)
    network = lambda: torch.nn.Sequential(torch.nn.Linear(64, 2), torch.nn.Linear(2, 1))
    folder = tmp_path / "run"
    if not folder.exists(): fit(network(), loss, digits(), config, folder=folder, device="cpu")
    tensors, about = load_checkpoint(folder / "run.safetensors")
    (tmp_path / "spoiled").mkdir(exist_ok=True)
    save_checkpoint(tmp_path / "spoiled" / "run.safetensors", spoiled(tensors, data.draw), about)
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="run.safetensors"):
        fit(model, loss, digits(), config, folder=tmp_path / "spoiled", resume=True, device="cpu")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@MANY
@given(data=st.data())
def test_spoiled_files_of_the_authors_are_refused(tmp_path, data):
    model = genie.build(AUTHORS)
    state, pairs = model.denoiser.network.state_dict(), authors_keys(model.denoiser.network, "adm")
    raw = {f"module.{theirs}": state[ours] for ours, theirs in pairs}
    average = [state[ours] for ours, theirs in pairs if theirs != "time_embed.0.W"]
    content = {"model": raw, "ema": {"decay": 0.9999, "shadow_params": list(average)}, "step": 1}
    how = data.draw(st.sampled_from(["cut", "name", "frequencies", "average", "short", "no average", "list", "text"]))
    place = data.draw(st.integers(0, len(average) - 1))
    if how == "name": del raw[data.draw(st.sampled_from(sorted(raw)))]
    elif how == "frequencies": raw["module.time_embed.0.W"] = data.draw(st.sampled_from([torch.zeros(3), torch.full((32,), math.nan)]))
    elif how == "average":
        content["ema"]["shadow_params"][place] = data.draw(st.sampled_from(
            [torch.zeros(3, 3, 3), torch.full_like(average[place], math.nan), average[place].long(), 0.5, None]))
    elif how == "short": content["ema"]["shadow_params"].pop(place)
    elif how == "no average": content["ema"] = data.draw(st.sampled_from([{}, [], {"shadow_params": 3}]))
    path = tmp_path / "checkpoint_1.pth"
    torch.save({"list": average, "text": "weights"}.get(how, content), path)
    if how == "cut": path.write_bytes(path.read_bytes()[:data.draw(st.integers(0, path.stat().st_size - 1))])
    with pytest.raises(CheckpointError, match="checkpoint_1.pth"): genie.load_authors_checkpoint(path, config=AUTHORS)


@MANY
@given(data=st.data())
def test_damaged_data_files_are_read_rightly_or_refused(tmp_path, data):
    "A changed pixel cannot be noticed; whatever comes back has the right form and range."
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 6), dtype=np.uint8)
    images = bytes([0, 0, 8, 3]) + b"".join(int(n).to_bytes(4, "big") for n in pixels.shape) + pixels.tobytes()
    labels = bytes([0, 0, 8, 1, 0, 0, 0, 4, 1, 2, 3, 4])
    kind = data.draw(st.sampled_from(["images", "labels", "cifar", "picture"]))
    right = {"images": images, "labels": labels, "cifar": bytes([3]) + bytes(3072), "picture": picture()}
    for name, content in right.items():
        place = tmp_path / ("folder/picture.png" if name == "picture" else name)
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(cut_or_flipped(content, data.draw) if name == kind else content)
    try:
        found = (idx_images(tmp_path / "images", tmp_path / "labels") if kind in ("images", "labels") else
                 cifar_images([tmp_path / "cifar"]) if kind == "cifar" else ImageFolder(tmp_path / "folder", 8))
        sample = found[0]["x0"]
    except ValueError as error: assert ":" in str(error)
    else: assert sample.ndim == 3 and sample.dtype == torch.float32 and sample.abs().max() <= 1


def picture():
    "A small PNG."
    import io
    from PIL import Image
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def test_moments_of_another_kind_are_refused(tmp_path):
    save_checkpoint(tmp_path / "other.safetensors", {"w": torch.ones(2)}, {"kind": "genie"})
    with pytest.raises(ValueError, match="expected moments"): Moments.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected 3 values"): Moments(3).add(torch.randn(4, 3)).distance(Moments(2).add(torch.randn(4, 2)))


def test_a_lack_of_memory_is_no_damage(tmp_path, monkeypatch):
    "Else somebody would remove a run that is whole."
    import safetensors
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, {"w": torch.zeros(3)}, {})
    torch.save({"w": torch.zeros(3)}, tmp_path / "model.pt")
    def full(*args, **kwargs): raise RuntimeError("unable to mmap 12 bytes: Cannot allocate memory (12)")
    monkeypatch.setattr(safetensors, "safe_open", full)
    monkeypatch.setattr(torch, "load", full)
    for read in (lambda: load_checkpoint(path), lambda: load_foreign(tmp_path / "model.pt")):
        with pytest.raises(MemoryError, match="not enough memory to read its"): read()
