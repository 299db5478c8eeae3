"""Deformable attention, position codes, masked attention, hard pooling, and the released names of a mask generator."""
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusion_papers.topics.mask_decoder import (
    MASK_GENERATORS, DeformableAttention, MaskDecoder, MaskEmbedding, MaskGenerator, MaskGeneratorConfig, MultiHeadAttention, PixelDecoder, PixelLayer, QueryLayer,
    allowed_keys, authors_keys, build_mask_generator, deformable_attention, mask_pooling, mlp3, position_sine, star)
from diffusion_papers.topics.segmentation import pixel_centres

MANIFESTS = Path(__file__).parent / "manifests"
TINY = MaskGeneratorConfig(channels=(6, 10, 12), width=16, heads=2, points=3, pixel_layers=2, pixel_hidden=24, queries=5, layers=3, hidden=20, classes=2, norm_groups=4)


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5): return a.shape == b.shape and (a - b).abs().max().item() <= tolerance


def shaken(module, seed=0, scale=0.3):
    "The module with other weights everywhere, also where it begins at nothing."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters(): parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def pyramid(batch=2, channels=TINY.channels, sides=((12, 20), (6, 10), (3, 5)), seed=0):
    return [normal(batch, width, *side, seed=seed + number) for number, (width, side) in enumerate(zip(channels, sides))]


# ---- deformable attention

SHAPES = [(3, 5), (6, 4), (2, 2)]


def some_points(batch=2, queries=4, heads=2, points=3, channels=5, seed=0, dtype=torch.float32):
    "Values, locations of which some lie outside, weights."
    generator = torch.Generator().manual_seed(seed)
    places = sum(height * width for height, width in SHAPES)
    value = torch.randn(batch, places, heads, channels, generator=generator, dtype=dtype)
    locations = torch.rand(batch, queries, heads, len(SHAPES), points, 2, generator=generator, dtype=dtype) * 1.6 - 0.3
    weights = torch.randn(batch, queries, heads, len(SHAPES) * points, generator=generator, dtype=dtype).softmax(-1)
    return value, locations, weights.unflatten(-1, (len(SHAPES), points))


def by_loops(value, shapes, locations, weights):
    "Point after point, neighbour after neighbour."
    out = torch.zeros(*locations.shape[:3], value.shape[-1], dtype=value.dtype)
    for b, q, h in np.ndindex(*locations.shape[:3]):
        start = 0
        for level, (height, width) in enumerate(shapes):
            for point in range(locations.shape[4]):
                x, y = locations[b, q, h, level, point].tolist()
                x, y = x * width - 0.5, y * height - 0.5
                for row, column in ((math.floor(y) + i, math.floor(x) + j) for i in (0, 1) for j in (0, 1)):
                    if 0 <= row < height and 0 <= column < width:
                        share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[b, q, h, level, point]
                        out[b, q, h] += share * value[b, start + row * width + column, h]
            start += height * width
    return out.flatten(2)


def test_deformable_attention_is_two_loops():
    value, locations, weights = some_points()
    assert close(deformable_attention(value, SHAPES, locations, weights), by_loops(value, SHAPES, locations, weights))


def test_deformable_attention_is_that_of_transformers():
    other = pytest.importorskip("transformers.models.mask2former.modeling_mask2former", exc_type=ImportError).multi_scale_deformable_attention
    value, locations, weights = some_points(seed=3)
    assert close(deformable_attention(value, SHAPES, locations, weights), other(value, SHAPES, locations, weights))


def test_deformable_attention_has_the_right_derivatives():
    value, locations, weights = (x.requires_grad_() for x in some_points(1, 2, 2, 2, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *inputs: deformable_attention(inputs[0], SHAPES, *inputs[1:]), (value, locations, weights), eps=1e-7, atol=1e-5)


def test_a_point_on_a_centre_reads_that_place_and_one_outside_reads_nothing():
    value = torch.arange(15.0)[None, :, None, None]
    at = lambda x, y: deformable_attention(value, [(3, 5)], torch.tensor([x, y]).view(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1)).item()
    assert at(0.5 / 5, 0.5 / 3) == pytest.approx(0, abs=1e-5) and at(3.5 / 5, 1.5 / 3) == pytest.approx(8, abs=1e-4) and at(4 / 5, 1.5 / 3) == pytest.approx(8.5, abs=1e-4)
    assert at(1.5, 0.5) == 0 and at(1.0, 2.5 / 3) == pytest.approx(7, abs=1e-4)  # on the edge: half of the last place


def test_deformable_attention_stays_in_float32_inside_autocast(monkeypatch):
    seen = []
    sample = F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda *inputs, **options: (seen.append([x.dtype for x in inputs[:2]]), sample(*inputs, **options))[1])
    generator = shaken(build_mask_generator(TINY), scale=0.05).eval()
    whole = generator.pixels(pyramid())[0]
    for kind in (torch.bfloat16, torch.float16):
        seen.clear()
        with torch.autocast("cpu", dtype=kind):
            mixed, _ = generator.pixels(pyramid())
            predictions = generator(pyramid())
        assert len(seen) == 2 * 2 * 2 and all(types == [torch.float32] * 2 for types in seen)  # twice: layers times levels
        assert mixed.dtype == kind and (mixed.float() - whole).abs().max() < 0.1 * whole.abs().max()
        assert all(torch.isfinite(part).all() for part in predictions[-1])
    attention = generator.pixels.layers[0].attention
    inputs = normal(1, 18, 16), normal(1, 75, 16), pixel_centres(3, 6)[0], [(3, 5), (6, 10)]
    with torch.autocast("cpu", dtype=torch.bfloat16): inside = attention(*inputs)
    assert inside.dtype == torch.float32 and torch.equal(inside, attention(*inputs))  # the projections as well


def test_deformable_attention_of_half_values_is_computed_in_float32():
    value, locations, weights = some_points()
    short = deformable_attention(value.bfloat16(), SHAPES, locations, weights)
    assert short.dtype == torch.bfloat16 and torch.equal(short, deformable_attention(value.bfloat16().float(), SHAPES, locations, weights).bfloat16())


def test_the_star_has_evenly_spread_directions_and_growing_steps():
    found = star(8, 3, 4)
    assert found.shape == (8, 3, 4, 2) and torch.equal(found[:, 0], found[:, 2])
    assert torch.allclose(found[:, 0, 0], torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1.0]]), atol=1e-6)
    assert torch.allclose(found[:, 1, 3], 4 * found[:, 1, 0]) and torch.allclose(found.abs().amax(-1)[0, 0], torch.arange(1.0, 5.0))
    assert torch.allclose(star(3, 1, 1)[1, 0, 0], torch.tensor([-1 / math.sqrt(3), 1.0]), atol=1e-6)


def test_the_module_begins_with_the_star_and_equal_weights():
    attention = DeformableAttention(TINY)
    locations, weights = attention.points(normal(2, 4, 16), torch.tensor([[0.5, 0.25]]).expand(4, 2), [(3, 5), (6, 10)])
    assert torch.allclose(weights, torch.tensor(1 / 6)) and locations.shape == (2, 4, 2, 2, 3, 2)
    assert torch.allclose(locations[0, 0, 0, 0, :, 0], 0.5 + torch.arange(1, 4) / 5) and torch.allclose(locations[0, 0, 0, 1, :, 0], 0.5 + torch.arange(1, 4) / 10)
    assert torch.allclose(locations[0, 0, :, :, :, 1], torch.tensor(0.25), atol=1e-6)
    assert not attention.value.bias.any() and not attention.output.bias.any() and attention.value.weight.abs().max() <= math.sqrt(6 / 32)


def test_offsets_are_pixels_of_each_map_and_weights_sum_to_one_over_all_levels():
    attention = shaken(DeformableAttention(TINY))
    query, centres, shapes = normal(1, 3, 16), torch.rand(3, 2), [(4, 8), (8, 16)]
    locations, weights = attention.points(query, centres, shapes)
    offsets = attention.offsets(query).view(1, 3, 2, 2, 3, 2)
    expected = centres.view(1, 3, 1, 1, 1, 2) + offsets / torch.tensor([[8.0, 4.0], [16.0, 8.0]]).view(1, 1, 1, 2, 1, 2)
    assert close(locations, expected, 1e-6) and torch.allclose(weights.sum((-1, -2)), torch.ones(1, 3, 2)) and weights.std() > 0.01


# ---- places

def test_position_code_tells_rows_first_with_sine_and_cosine_by_turns():
    code = position_sine(8, (4, 6))
    row, column = 3 * 2 * math.pi / 4, 5 * 2 * math.pi / 6
    expected = [f(angle / scale) for angle in (row, column) for scale in (1, 100) for f in (math.sin, math.cos)]
    assert code[:, 2, 4].tolist() == pytest.approx(expected, abs=1e-5)
    assert position_sine(8, (2, 2), dtype=torch.float64).dtype == torch.float64 and position_sine(8, (2, 2), dtype=torch.float16).dtype == torch.float16
    assert position_sine(8, (2, 2), device="meta").device.type == "meta"
    for wrong in (6, 0):
        with pytest.raises(ValueError, match="channels"): position_sine(wrong, (2, 2))


# ---- masked attention

def test_a_query_reads_where_its_mask_says_so_at_the_size_of_the_map():
    masks = torch.full((1, 2, 4, 8), -3.0)
    masks[0, 0, :2, :4] = 3
    masks[0, 1, :, 6:] = 0  # one half is enough
    allowed = allowed_keys(masks, (2, 4)).view(1, 2, 2, 4)
    assert allowed[0, 0].tolist() == [[True, True, False, False], [False] * 4] and allowed[0, 1].tolist() == [[False, False, False, True]] * 2
    mixed = torch.tensor([[5.0, -1.0, -1.0, -1.0]]).view(1, 1, 2, 2)  # probabilities would average to 0.45, logits to 0.5
    assert allowed_keys(torch.cat([mixed, mixed - 9], 1), (1, 1)).tolist() == [[[True], [True]]]
    assert allowed_keys(F.pad(mixed, (0, 2), value=-9.0), (1, 2)).tolist() == [[[True, False]]]


def test_a_query_that_is_forbidden_everything_reads_everything():
    attention = shaken(MultiHeadAttention(16, 2))
    query, memory = normal(2, 3, 16), normal(2, 12, 16, seed=1)
    allowed = allowed_keys(torch.full((2, 3, 6, 8), -5.0), (3, 4))
    found = attention(query, memory, memory, allowed)
    assert allowed.all() and torch.isfinite(found).all() and close(found, attention(query, memory, memory), 1e-6)


def test_an_empty_initial_mask_gives_what_unmasked_attention_gives():
    decoder = shaken(MaskDecoder(replace(TINY, layers=1)))
    with torch.no_grad(): decoder.mask[-1].weight.zero_(); decoder.mask[-1].bias.copy_(-torch.ones(16))
    open_one = MaskDecoder(replace(TINY, layers=1, masked=False))
    open_one.load_state_dict(decoder.state_dict())
    embedding, maps = normal(1, 16, 8, 8).abs(), [normal(1, 16, 2, 2), normal(1, 16, 4, 4)]
    predictions, others = decoder(embedding, maps), open_one(embedding, maps)
    assert (predictions[0].masks < 0).all() and all(close(a, b) for a, b in zip(predictions[1], others[1]))
    some = MaskDecoder(replace(TINY, layers=1)); some.load_state_dict(decoder.state_dict())
    with torch.no_grad(): some.mask[-1].weight.copy_(normal(16, 16))
    differently = MaskDecoder(replace(TINY, layers=1, masked=False)); differently.load_state_dict(some.state_dict())
    embedding = normal(1, 16, 8, 8, seed=5)
    assert not close(some(embedding, maps)[1].queries, differently(embedding, maps)[1].queries, 1e-3)


def test_attention_is_that_of_torch():
    ours, theirs = shaken(MultiHeadAttention(16, 4)), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict({"in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias, "out_proj.weight": ours.output.weight, "out_proj.bias": ours.output.bias})
    query, key, value, allowed = normal(2, 3, 16), normal(2, 7, 16, seed=1), normal(2, 7, 16, seed=2), torch.rand(2, 3, 7) < 0.7
    allowed[..., 0] = True
    assert close(ours(query, key, value), theirs(query, key, value)[0])
    assert close(ours(query, key, value, allowed), theirs(query, key, value, attn_mask=(~allowed).repeat_interleave(4, 0))[0])


def test_masks_of_attention_get_no_gradient():
    masks = normal(1, 2, 4, 4).requires_grad_()
    assert not allowed_keys(masks, (2, 2)).requires_grad
    decoder = shaken(MaskDecoder(replace(TINY, layers=1)))
    decoder(normal(1, 16, 8, 8), [normal(1, 16, 2, 2), normal(1, 16, 4, 4)])[1].queries.sum().backward()
    assert decoder.mask[0].weight.grad is None  # the queries of layer 1 know of the first masks, not of how they came about


# ---- content

def test_an_empty_mask_pools_to_zeros_in_every_type_and_no_gradient_reaches_the_masks():
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        features, masks = normal(1, 4, 300, 300).to(kind).requires_grad_(), torch.full((1, 3, 300, 300), 2.0, dtype=kind)
        masks[:, 1], masks[:, 2, :, 150:] = -1, 0  # empty; and a half: exactly one half does not belong to it
        masks.requires_grad_()
        pooled = mask_pooling(features, masks)
        assert pooled.dtype == kind and not pooled[0, 1].any() and torch.isfinite(pooled).all()
        for row, part in ((0, features[0]), (2, features[0, :, :, :150])): assert torch.allclose(pooled[0, row].float(), part.float().mean((1, 2)), atol=2e-3)
        pooled.sum().backward()
        assert masks.grad is None and features.grad.abs().sum() > 0
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.isfinite(mask_pooling(normal(1, 4, 8, 8), torch.full((1, 1, 8, 8), -1.0))).all()


def test_no_gradient_reaches_the_masks_through_their_embeddings():
    decoder = shaken(MaskDecoder(replace(TINY, layers=0)))
    prediction = decoder(normal(1, 16, 8, 8), [normal(1, 16, 2, 2), normal(1, 16, 4, 4)])[0]
    prediction.embeddings.square().sum().backward()
    assert all(parameter.grad is None for parameter in decoder.mask.parameters()) and decoder.content.pooled.weight.grad.abs().sum() > 0


def test_the_content_is_projected_added_and_transformed():
    content = shaken(MaskEmbedding(16))
    features, masks, queries = normal(1, 16, 4, 4), normal(1, 3, 4, 4), normal(1, 3, 16)
    pooled = content.pooled(content.pooled_norm(mask_pooling(features, masks)))
    assert close(content(features, masks, queries), content.output(content.norm(pooled + queries)))
    assert MaskEmbedding(16).scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    with torch.no_grad(): content.log_scale.fill_(9.0)
    assert content.scale == 100 and [type(layer) for layer in mlp3(4)] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


# ---- the whole

@pytest.mark.parametrize("name, extra", [("label", 0), ("caption", 514)])
def test_published_sizes_have_the_authors_tensors(name, extra):
    manifest = json.loads((MANIFESTS / f"odise-{name}.json").read_text())
    with torch.device("meta"): generator = MaskGenerator(MASK_GENERATORS[name])
    state = generator.state_dict()
    found = {theirs: list(state[ours].shape) for ours, theirs in authors_keys(generator)}
    expected = {key: shape for key, shape in manifest.items() if key.startswith(("sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."))}
    assert found == expected and list(found) == list(expected) and len(found) == len(state)
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())
    assert count(generator.pixels) == 5_577_152 and count(generator.decoder) == 14_722_817 + extra


def test_a_state_of_the_authors_names_goes_there_and_back():
    first, second = shaken(build_mask_generator(TINY)), build_mask_generator(TINY, seed=1)
    state, pairs = first.state_dict(), authors_keys(first)
    theirs = {name: state[ours] for ours, name in pairs}
    second.load_state_dict({ours: theirs[name] for ours, name in pairs})
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values())) and len(theirs) == len(state)
    with torch.no_grad(): assert torch.equal(first(pyramid())[-1].masks, second(pyramid())[-1].masks)


def test_each_picture_is_computed_for_itself():
    generator = shaken(build_mask_generator(TINY))
    with torch.no_grad():
        both, alone = generator(pyramid()), generator([features[1:] for features in pyramid()])
    for a, b in zip(both, alone): assert all(close(x[1:], y, 1e-4) for x, y in zip(a, b))


def test_permuted_queries_permute_what_is_said():
    first, second, order = shaken(build_mask_generator(TINY)), build_mask_generator(TINY), [3, 0, 4, 1, 2]
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for name in ("queries", "positions"): getattr(second.decoder, name).copy_(getattr(first.decoder, name)[order])
        for a, b in zip(first(pyramid())[-1], second(pyramid())[-1]): assert close(a[:, order], b, 1e-4)


def test_layers_read_the_maps_in_turn_from_the_coarsest():
    generator, seen = build_mask_generator(TINY), []
    for layer in generator.decoder.layers: layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2].shape[1]))
    predictions = generator(pyramid())
    assert seen == [15, 60, 15] and len(predictions) == 4
    assert predictions[-1].masks.shape == (2, 5, 12, 20) and predictions[-1].logits.shape == (2, 5, 2)
    assert build_mask_generator(replace(TINY, classes=0))(pyramid())[-1].logits is None


def test_positions_are_added_to_queries_and_keys_alone():
    layer, seen = QueryLayer(TINY), []
    for attention in (layer.cross, layer.own): attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    queries, positions, keys, values = normal(1, 5, 16), normal(5, 16, seed=1), normal(1, 15, 16, seed=2), normal(1, 15, 16, seed=3)
    layer(queries, positions, keys, values, None)
    (query, key, value, _), (own_query, own_key, own_value) = seen
    assert torch.equal(query, queries + positions) and torch.equal(key, keys) and torch.equal(value, values)
    assert torch.equal(own_query, own_value + positions) and torch.equal(own_key, own_query)


def test_a_pixel_layer_reads_values_without_positions():
    layer, seen = PixelLayer(TINY), []
    layer.attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    tokens, positions = normal(1, 18, 16), normal(18, 16, seed=1)
    layer(tokens, positions, torch.rand(18, 2), [(3, 5), (3, 1)])
    assert torch.equal(seen[0][0], tokens + positions) and torch.equal(seen[0][1], tokens)


def test_initial_weights_are_those_of_the_specification():
    generator = build_mask_generator(replace(TINY, width=64, hidden=96, pixel_hidden=80))
    pixels, decoder = generator.pixels, generator.decoder
    xavier = lambda weight: math.sqrt(6 / (weight.shape[0] + weight.shape[1]))
    layer, query_layer = pixels.layers[0], decoder.layers[0]
    for weight in (layer.expand.weight, layer.contract.weight, layer.attention.value.weight, query_layer.cross.qkv.weight, query_layer.own.output.weight, query_layer.expand.weight,
                   query_layer.contract.weight, pixels.inputs[0][0].weight[..., 0, 0]):
        assert 0.95 * xavier(weight) < weight.abs().max() <= xavier(weight)
    for conv in (pixels.fine, pixels.smooth, pixels.embedding):
        bound = math.sqrt(3 / (conv.weight.numel() / len(conv.weight)))
        assert 0.95 * bound < conv.weight.abs().max() <= bound
    assert not any(bias.any() for bias in (pixels.inputs[0][0].bias, pixels.embedding.bias, query_layer.cross.qkv.bias, query_layer.cross.output.bias))
    assert pixels.fine.bias is None and pixels.smooth.bias is None and 0.8 < decoder.queries.std() < 1.2 and 0.8 < pixels.level.std() < 1.2
    assert all(torch.equal(a, b) for a, b in zip(generator.parameters(), build_mask_generator(generator.config).parameters()))
    assert not torch.equal(decoder.queries, build_mask_generator(generator.config, seed=1).decoder.queries)


# ---- bad input

@pytest.mark.parametrize("change, words", [
    ({"heads": 3}, "heads: expected a divisor"), ({"norm_groups": 5}, "norm_groups: expected a divisor"), ({"width": 18, "heads": 2, "norm_groups": 2}, "width: expected a multiple of 4"),
    ({"channels": (8,)}, "channels: expected those of at least 2"), ({"channels": ()}, "channels"), ({"points": 0}, "points"), ({"queries": 0}, "queries"), ({"classes": -1}, "classes"),
    ({"channels": (8, 0)}, "channels")])
def test_impossible_sizes_are_refused(change, words):
    with pytest.raises(ValueError, match=words): replace(TINY, **change)


@pytest.mark.parametrize("change, words", [
    (lambda maps: maps[:2], "expected 3 maps"), (lambda maps: maps[::-1], "map 0"), (lambda maps: [maps[0], maps[1], maps[2][:1]], "map 2"),
    (lambda maps: [maps[0], maps[1], maps[2][0]], "map 2"), (lambda maps: [F.interpolate(maps[0], size=(4, 4)), *maps[1:]], "from fine to coarse")])
def test_wrong_pyramids_are_refused(change, words):
    with pytest.raises(ValueError, match=words): build_mask_generator(TINY)(change(pyramid()))


def test_arguments_that_do_not_fit_are_refused():
    value, locations, weights = some_points()
    for inputs, words in (((value[:, 1:], locations, weights), "value"), ((value[0], locations, weights), "value"), ((value, locations[..., :1], weights), "locations"),
                          ((value, locations[:, :, :1], weights[:, :, :1]), "locations"), ((value, locations, weights[..., :2]), "weights")):
        with pytest.raises(ValueError, match=f"^{words}: expected"): deformable_attention(inputs[0], SHAPES, *inputs[1:])
    for masks in (torch.zeros(1, 2, 4, 5), torch.zeros(2, 2, 4, 4), torch.zeros(2, 4, 4)):
        with pytest.raises(ValueError, match="masks: expected"): mask_pooling(torch.zeros(1, 3, 4, 4), masks)


def test_everything_runs_in_double_precision():
    generator = shaken(build_mask_generator(TINY)).double()
    predictions = generator([features.double() for features in pyramid()])
    assert all(part.dtype == torch.float64 for part in predictions[-1])
