"""Taps, shared noise, the gated captioner, the pyramid and tiles; the reference cases are in test_golden."""
from extras import need

need("train", "data")

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusion_papers.topics.frozen_features import (
    Bottleneck, FeaturePyramid, GatedProjection, ImplicitCaptioner, frozen_denoiser, noised, scaled_linear, shared_noise, tapped, tiled, tiles_of)

MANIFESTS = Path(__file__).parent / "manifests"


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- noise

def test_the_process_is_stable_diffusions():
    process = scaled_linear()
    levels = process.noise_to_signal(torch.tensor([0.0, 100, 200, 500, 999], dtype=torch.float64))
    assert (1 / (1 + levels**2)).tolist() == pytest.approx([0.99915, 0.894223, 0.753692, 0.276333, 0.004660], abs=1e-6)


def test_noise_is_the_same_for_all_pictures_and_resized_for_other_maps():
    first = shared_noise(4, 64, 64)
    assert torch.equal(first, shared_noise(4, 64, 64)) and first.std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(shared_noise(4, 32, 48), F.interpolate(first, size=(32, 48), mode="bicubic", align_corners=False))
    clean, process = normal(3, 4, 16, 16), scaled_linear()
    kept = 0.276333**0.5
    noise = (noised(clean, 500, process) - kept * clean) / (1 - 0.276333) ** 0.5
    assert torch.allclose(noise, shared_noise(4, 16, 16).expand(3, -1, -1, -1), atol=1e-4)
    assert torch.equal(noised(clean, -1, process), clean) and not torch.equal(noised(clean, 0, process), clean)
    assert noised(clean.double(), 3, process).dtype == torch.float64
    for wrong in (-2, 1000):
        with pytest.raises(ValueError, match="step"): noised(clean, wrong, process)


# ---- taps

def test_taps_keep_inputs_in_order_pass_gradients_and_are_taken_away():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = normal(5, 3).requires_grad_()
    with tapped([network[2], network[0]]) as inside: network(x)
    assert inside[1] is x and torch.allclose(inside[0], network[1](network[0](x)))
    inside[0].sum().backward()
    assert x.grad.abs().sum() > 0
    with pytest.raises(RuntimeError):
        with tapped([network[0]]): network(normal(5, 4))
    assert not any(module._forward_pre_hooks for module in network)


def test_taps_of_diffusers_unet_have_the_channels_of_both_sides():
    library = pytest.importorskip("diffusers")
    unet = library.UNet2DConditionModel(sample_size=16, block_out_channels=(8, 16, 24, 32), layers_per_block=2, cross_attention_dim=8, norm_num_groups=4, attention_head_dim=2)
    with torch.no_grad(), tapped([level.resnets[2] for level in unet.up_blocks]) as inside: unet(normal(1, 4, 16, 16), 0, normal(1, 5, 8))
    assert [tuple(x.shape[1:]) for x in inside] == [(32 + 24, 2, 2), (24 + 16, 4, 4), (16 + 8, 8, 8), (8 + 8, 16, 16)]


def test_the_shipped_model_is_read_as_it_was_written_and_does_not_learn():
    from diffusion_papers import ediffi
    frozen, written = frozen_denoiser(), ediffi.load_pretrained("ediffi_nouns").experts[0]
    x, sigma = normal(2, 3, 32, 32), torch.tensor([0.1, 3.0])
    with torch.no_grad(): assert torch.allclose(frozen(x, sigma), written(x, sigma), atol=1e-5)
    assert not frozen.training and not any(parameter.requires_grad for parameter in frozen.parameters())
    with pytest.raises(ValueError, match="name"): frozen_denoiser("ediffi_nothing")


# ---- captioner

def test_the_captioner_begins_with_the_empty_caption_and_its_gate_learns_first():
    torch.manual_seed(0)
    captioner, empty, vector = ImplicitCaptioner(6, 5, 8, 10, steps=2), normal(1, 5, 8), normal(3, 6, seed=1)
    states, terms = captioner(vector, empty)
    assert torch.equal(states, empty.expand(3, -1, -1)) and terms.shape == (3, 2, 10) and not terms.any()
    ((states - 1) ** 2).sum().add(((terms - 1) ** 2).sum()).backward()
    for part in (captioner.caption, captioner.time):
        assert part.gate.grad.abs().min() > 0 and not part.linear.weight.grad.any() and not part.positions.grad.any()
    assert captioner.time.gate.shape == (10,) and captioner.caption.gate.shape == (1, 5, 8)
    with pytest.raises(ValueError, match="empty"): captioner(vector, empty[:, :4])


def test_a_gate_is_bounded_and_multiplies_the_whole_projection():
    part, vector = GatedProjection(6, 5, 8), normal(3, 6)
    part.gate.data.fill_(50.0)
    assert torch.allclose(part(vector), part.linear(vector)[:, None] + part.positions)
    part.gate.data.fill_(-0.5)
    assert torch.allclose(part(vector), torch.tanh(torch.tensor(-0.5)) * (part.linear(vector)[:, None] + part.positions), atol=1e-6)


def test_published_sizes_have_the_authors_tensors():
    for name in ("label", "caption"):
        manifest = json.loads((MANIFESTS / f"odise-{name}.json").read_text())
        with torch.device("meta"):
            parts = {"backbone.feature_extractor.": ImplicitCaptioner(768, 77, 768, 1280), "backbone.": FeaturePyramid((512, 512, 2560, 1920, 960, 640, 512, 512), (4, 8, 64, 32, 16, 8, 8, 4))}
        found = {prefix + theirs: list(part.state_dict()[ours].shape) for prefix, part in parts.items() for ours, theirs in part.authors_keys()}
        expected = {key: shape for key, shape in manifest.items() if key.startswith("backbone.") and "time_embed" not in key}
        assert found.items() >= expected.items()
        assert {key for key in found if "time_embed" not in key} == expected.keys()


# ---- pyramid

def test_maps_of_equal_stride_are_added_and_strides_are_limited():
    torch.manual_seed(0)
    pyramid = FeaturePyramid((4, 6, 8, 4), (1, 4, 8, 16), kept=(2, 4, 8), width=8, groups=2)
    maps = [normal(2, 4, 16, 16), normal(2, 6, 4, 4), normal(2, 8, 2, 2), normal(2, 4, 1, 1)]
    made = pyramid(maps, (16, 16))
    assert pyramid.joined == (2, 4, 8, 8) and [tuple(x.shape) for x in made] == [(2, 8, 8, 8), (2, 8, 4, 4), (2, 8, 2, 2)]
    resized = [F.interpolate(x, size=(16 // stride,) * 2, mode="nearest") for x, stride in zip(maps, pyramid.joined)]
    assert torch.allclose(made[2], pyramid.blocks[2](resized[2]) + pyramid.blocks[3](resized[3])) and torch.allclose(made[0], pyramid.blocks[0](resized[0]))
    for channels, strides in (((4,), (2, 4)), ((4, 4), (2, 2)), ((4, 4, 4, 4), (2, 4, 8, 6))):
        with pytest.raises(ValueError, match="strides"): FeaturePyramid(channels, strides, kept=(2, 4, 8), width=8, groups=2)
    with pytest.raises(ValueError, match="maps"): pyramid(maps[:3], (16, 16))


def test_a_block_has_a_shortcut_where_channels_differ():
    same, other = Bottleneck(8, 4, 8, 2), Bottleneck(6, 4, 8, 2)
    assert isinstance(same.shortcut, nn.Identity) and isinstance(other.shortcut, nn.Sequential)
    for norm in (same.third[1],): nn.init.zeros_(norm.weight); nn.init.zeros_(norm.bias)
    x = normal(1, 8, 3, 3)
    assert torch.equal(same(x), F.relu(x)) and (other(normal(1, 6, 3, 3)) >= 0).all()
    assert same.second[0].kernel_size == (3, 3) and all(layer[0].bias is None for layer in (same.first, same.second, same.third))


# ---- tiles

def test_tiles_cover_a_picture_and_the_last_are_shifted_inwards():
    assert tiles_of(128, 160, 64) == [(top, left, 64) for top in (0, 64) for left in (0, 64, 96)]
    assert tiles_of(40, 100, 64) == [(0, 0, 40), (0, 40, 40), (0, 60, 40)] and tiles_of(8, 8, 64) == [(0, 0, 8)]


def test_tiles_change_nothing_for_single_places_and_overlaps_are_averaged():
    single = lambda crop, size: [torch.sin(F.avg_pool2d(crop, stride)) for stride in (4, 8)]
    picture = normal(2, 3, 32, 40)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(tiled(single, picture, (4, 8), 16), single(picture, None)))
    calls = iter(range(100))
    numbered = lambda crop, size: [torch.full((2, 1, size[0] // 8, size[1] // 8), float(next(calls)))]
    [found] = tiled(numbered, picture, (8,), 16)
    assert found[0, 0].tolist() == [[0, 0, 1, 1.5, 2]] * 2 + [[3, 3, 4, 4.5, 5]] * 2


def test_a_network_sees_tiles_at_its_own_size_and_answers_at_the_tiles():
    asked = []
    def network(crop, size):
        asked.append((tuple(crop.shape[2:]), size))
        return [crop.new_ones(len(crop), 1, size[0] // 8, size[1] // 8)]
    [found] = tiled(network, normal(1, 3, 32, 32), (8,), 16, seen=24)
    assert asked == [((24, 24), (16, 16))] * 4 and torch.equal(found, torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="picture: .* multiples of 8"): tiled(network, normal(1, 3, 30, 32), (8,), 16)


def test_gradients_pass_tiles():
    picture = normal(1, 3, 16, 24).requires_grad_()
    tiled(lambda crop, size: [F.avg_pool2d(crop, 8)], picture, (8,), 16)[0].sum().backward()
    assert torch.allclose(picture.grad, torch.full_like(picture, 1 / 64))
