"""Weights of flax: layers computed in flax's own layout, names by hand, and files byte by byte."""
from extras import need

need("flax")

import math

import msgpack
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusion_papers.core.networks import UNet, unet_config
from diffusion_papers.topics.flax_weights import flax_tensors, read_msgpack, teacher_places, teacher_tensors, write_msgpack
from diffusion_papers.workbench.checkpoints import CheckpointError

SIZES = dict(image_size=8, width=32, multipliers=(1, 2), blocks=1, attention=(4,), classes=3)


def network_of(**changes):
    network = UNet(unet_config("distillation", **SIZES | changes))
    for number, parameter in enumerate(network.parameters()): nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
    return network.requires_grad_(False).eval()


def test_modules_have_these_names():
    "The way up counts from the coarsest level, and theirs from the finest."
    places = dict(teacher_places(network_of(multipliers=(1, 2, 3), blocks=1)))
    assert len(set(places.values())) == len(places)
    first = ("embedding.hidden", "embedding.output", "class_embedding", "input")
    assert [places[name] for name in first] == ["dense0", "dense1", "class_emb", "conv_in"]
    assert (places["down.0.blocks.0"], places["down.0.resampling"]) == ("down_0.block_0", "down_0.downsample")
    assert places["down.1.attentions.0"] == "down_1.attn_0"
    assert [places[f"middle.{number}"] for number in range(3)] == ["mid.block_1", "mid.attn_1", "mid.block_2"]
    assert (places["up.0.blocks.1"], places["up.0.resampling"], places["up.1.attentions.1"]) == ("up_2.block_1", "up_2.upsample", "up_1.attn_1")
    assert (places["up.2.blocks.0"], places["output_norm"], places["output"]) == ("up_0.block_0", "norm_out", "conv_out")
    assert "up.2.resampling" not in places and "down.2.resampling" not in places
    assert "class_embedding" not in dict(teacher_places(network_of(classes=0)))


def computed(tree, name, x):
    "A plain layer of flax on channels that come last: x @ kernel + bias, with a kernel (height, width, in, out) at each offset."
    kernel, bias = tree[f"{name}.kernel"], tree[f"{name}.bias"]
    if kernel.ndim == 2: return x @ kernel + bias
    padded, (_, height, width, _) = F.pad(x, (0, 0, 1, 1, 1, 1)), x.shape
    return sum(padded[:, i:i + height, j:j + width] @ kernel[i, j] for i in range(3) for j in range(3)) + bias


def normalised(tree, name, x, groups):
    parts = x.unflatten(-1, (groups, -1))
    mean, variance = parts.mean((1, 2, 4), keepdim=True), parts.var((1, 2, 4), keepdim=True, unbiased=False)
    return ((parts - mean) / torch.sqrt(variance + 1e-6)).flatten(-2) * tree[f"{name}.scale"] + tree[f"{name}.bias"]


def filled(network):
    "Arrays of the forms that flax has, by their names, and the network that holds them."
    tree = {name: torch.randn(value.shape, generator=torch.Generator().manual_seed(number)) * 0.2
            for number, (name, value) in enumerate(flax_tensors(network).items())}
    network.load_state_dict(teacher_tensors(network, tree))
    torch.manual_seed(0)
    return tree


last, first = (lambda x: x.permute(0, 2, 3, 1)), (lambda x: x.permute(0, 3, 1, 2))


def test_dense_layers_and_convolutions_compute_what_flax_does():
    network = network_of()
    tree, x, vector = filled(network), torch.randn(2, 3, 8, 8), torch.randn(2, 32)
    torch.testing.assert_close(network.input(x), first(computed(tree, "conv_in", last(x))), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.embedding.hidden(vector), computed(tree, "dense0", vector), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.class_embedding(torch.tensor([2, 0])), computed(tree, "class_emb", F.one_hot(torch.tensor([2, 0]), 3).float()))
    wide = torch.randn(2, 32, 8, 8)
    torch.testing.assert_close(network.output_norm(wide), first(normalised(tree, "norm_out", last(wide), 32)), rtol=1e-4, atol=1e-4)


def test_a_block_computes_what_flax_does():
    network = network_of()
    tree, x, embedding = filled(network), torch.randn(2, 32, 4, 4), torch.randn(2, 128)
    at = lambda part: f"down_1.block_0.{part}"
    hidden = computed(tree, at("conv1"), F.silu(normalised(tree, at("norm1"), last(x), 8)))
    scale, shift = computed(tree, at("temb_proj"), F.silu(embedding))[:, None, None].chunk(2, dim=-1)
    hidden = computed(tree, at("conv2"), F.silu(normalised(tree, at("norm2"), hidden, 16) * (1 + scale) + shift))
    wanted = first(hidden + computed(tree, at("nin_shortcut"), last(x)))
    torch.testing.assert_close(network.down[1].blocks[0](x, embedding), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [0, 16, 32])
def test_attention_with_its_heads_as_an_axis_computes_what_flax_does(width):
    network = network_of(head_width=width)
    tree, x, at = filled(network), torch.randn(2, 64, 4, 4), lambda part: f"mid.attn_1.{part}"
    heads = 64 // width if width else 1
    assert tree[at("q.kernel")].shape == (64, heads, 64 // heads) and tree[at("proj_out.kernel")].shape == (heads, 64 // heads, 64)
    seen = normalised(tree, at("norm"), last(x), 32).flatten(1, 2)
    query, key, value = (torch.einsum("bpc,chd->bphd", seen, tree[at(f"{part}.kernel")]) + tree[at(f"{part}.bias")] for part in "qkv")
    share = torch.softmax(torch.einsum("bphd,bqhd->bhpq", query, key) / math.sqrt(64 // heads), dim=-1)
    mixed = torch.einsum("bhpq,bqhd->bphd", share, value)
    wanted = x + first((torch.einsum("bphd,hdc->bpc", mixed, tree[at("proj_out.kernel")]) + tree[at("proj_out.bias")]).unflatten(1, (4, 4)))
    torch.testing.assert_close(network.middle[1](x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"head_width": 16, "classes": 0}, {"multipliers": (1, 2, 2), "blocks": 2}], ids=str)
def test_weights_come_back_from_flax(changes):
    network = network_of(**changes)
    state, found = network.state_dict(), teacher_tensors(network, flax_tensors(network))
    assert found.keys() == state.keys() and all(torch.equal(found[name], value) for name, value in state.items())


def test_what_a_tree_lacks_is_named():
    network = network_of()
    tree = flax_tensors(network)
    for gone in ("conv_in.bias", "mid.attn_1.q.kernel", "up_0.block_1.norm2.scale"):
        with pytest.raises(CheckpointError, match=rf"mine: lacks, or has in another form: {gone.split('.')[0]}"):
            teacher_tensors(network, {name: value for name, value in tree.items() if name != gone}, "mine")
    with pytest.raises(CheckpointError, match=r"dense0, dense1, class_emb, conv_in, down_0.block_0 and \d+ more"): teacher_tensors(network, {})
    with pytest.raises(CheckpointError, match=r"another form: dense0, dense1, class_emb, conv_in, norm_out and 1 more"):
        teacher_tensors(network, {name: value for name, value in tree.items() if name.count(".") > 1})


# ---- files


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32", "int64", "uint32"])
def test_a_file_of_flax_is_read(tmp_path, dtype):
    "As flax writes it: an extension of type 1 with shape, kind and bytes, row by row."
    values = np.arange(6).reshape(2, 3).astype(dtype) * (3 if "int" in dtype else 0.5)
    packed = msgpack.ExtType(1, msgpack.packb((values.shape, dtype, values.tobytes()), use_bin_type=True))
    (tmp_path / "file").write_bytes(msgpack.packb({"params": {"dense": {"kernel": packed}}, "step": 7}))
    found = read_msgpack(tmp_path / "file")
    kernel = found["params"]["dense"]["kernel"]
    assert found["step"] == 7 and kernel.tolist() == values.tolist() and str(kernel.dtype) == f"torch.{dtype}"


def test_a_file_is_written_as_flax_does(tmp_path):
    values = torch.arange(6.0).reshape(2, 3)
    write_msgpack(tmp_path / "file", {"params": {"dense.kernel": values.T, "dense.bias": values[0]}, "step": 7})
    found = msgpack.unpackb((tmp_path / "file").read_bytes(), ext_hook=lambda code, content: (code, msgpack.unpackb(content)))
    shape = lambda tensor: (1, [list(tensor.shape), "float32", np.ascontiguousarray(tensor.numpy()).tobytes()])
    assert found == {"params": {"dense": {"kernel": shape(values.T), "bias": shape(values[0])}}, "step": 7}


def test_files_of_other_kinds_are_refused(tmp_path):
    place = tmp_path / "file"
    for content, message in ((msgpack.packb([1, 2]), "expected a tree of names, got list"), (b"\xc1", "expected a msgpack file of flax"),
                             (msgpack.packb({"a": msgpack.ExtType(2, b"")}), "expected arrays, got an extension of type 2"),
                             (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((1,), "object", b"")))}),
                              "expected numbers, got an array of object"),
                             (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(((2,), "float32", b"1234")))}),
                              "expected a msgpack file of flax")):
        place.write_bytes(content)
        with pytest.raises(CheckpointError, match=message): read_msgpack(place)
    with pytest.raises(FileNotFoundError): read_msgpack(tmp_path / "nothing")
