"""Linear networks: what they compute, written out layer by layer."""
import math

import pytest
import torch

from torch import nn

from diffusion_papers.topics.linear_networks import Block, Embedding, Mixer, MixerConfig, Perceptron, PerceptronConfig


def scattered(network, seed=0):
    "With weights from nowhere, in double precision."
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters(): nn.init.normal_(parameter, std=0.3, generator=generator)
    return network.double()


def silu(x): return x / (1 + torch.exp(-x))


def affine(layer, x): return torch.einsum("oi,...i->...o", layer.weight, x) + layer.bias


def embedded(module, label, number):
    "Waves of the level and the class' column, mixed."
    half = module.waves // 2
    rates = [10_000 ** (-place / (half - 1)) for place in range(half)]
    waves = torch.tensor([math.sin(label * rate) for rate in rates] + [math.cos(label * rate) for rate in rates], dtype=torch.float64)
    if module.classes: waves = waves + module.class_vector.weight[:, number] + module.class_vector.bias
    return silu(affine(module.mix, waves))


def blocked(block, hidden, embedding):
    "A residual block on one vector."
    centred = hidden - hidden.mean()
    inner = torch.cat([centred / torch.sqrt(centred.square().mean() + 1e-5), embedding])
    return hidden + affine(block.outer, silu(affine(block.inner, inner)))


@pytest.mark.parametrize("classes", [0, 4])
def test_an_embedding_knows_level_and_class(classes):
    module = scattered(Embedding(PerceptronConfig(classes=classes, waves=6)))
    labels, numbers = torch.tensor([-1.2, 0.3, 7.0], dtype=torch.float64), torch.tensor([0, 3, 4])
    for given, of in ((numbers, numbers.tolist()), (None, [4] * 3)):
        found = module(labels, given)
        for row, label, number in zip(found, labels.tolist(), of):
            torch.testing.assert_close(row, embedded(module, label, number), rtol=1e-5, atol=1e-6)


def test_a_perceptron_is_the_one_written_out():
    network = scattered(Perceptron(PerceptronConfig(channels=2, size=4, classes=3, width=10, blocks=2, waves=6)))
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels, numbers = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64), [2, 0, 3]
    found = network(x, labels, torch.tensor(numbers))
    for image, label, number, answer in zip(x, labels.tolist(), numbers, found):
        embedding, hidden = embedded(network.embedding, label, number), affine(network.input, image.flatten())
        for block in network.blocks: hidden = blocked(block, hidden, embedding)
        torch.testing.assert_close(answer, affine(network.output, silu(hidden)).reshape(2, 4, 4), rtol=1e-5, atol=1e-6)


def test_a_mixer_works_along_patches_and_then_along_channels():
    network = scattered(Mixer(MixerConfig(channels=2, size=6, classes=3, width=5, blocks=2, waves=6, patch=2)))
    x, label = torch.randn(1, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 0.7
    embedding = embedded(network.embedding, label, 1)
    corners = [(row, column) for row in (0, 2, 4) for column in (0, 2, 4)]
    hidden = torch.stack([affine(network.input, x[0, :, row:row + 2, column:column + 2].flatten()) for row, column in corners])  # (patches, width)
    for along_patches, along_channels in zip(network.blocks[::2], network.blocks[1::2]):
        hidden = torch.stack([blocked(along_patches, channel, embedding) for channel in hidden.T]).T
        hidden = torch.stack([blocked(along_channels, patch, embedding) for patch in hidden])
    expected = torch.zeros(2, 6, 6, dtype=torch.float64)
    for (row, column), patch in zip(corners, affine(network.output, silu(hidden))):
        expected[:, row:row + 2, column:column + 2] = patch.reshape(2, 2, 2)
    torch.testing.assert_close(network(x, torch.tensor([label]).double(), torch.tensor([1]))[0], expected, rtol=1e-5, atol=1e-6)


def test_networks_begin_at_zero_and_blocks_as_the_identity():
    torch.manual_seed(0)
    for network, shape in ((Perceptron(PerceptronConfig(strength=0.7)), (1, 8, 8)), (Mixer(MixerConfig(strength=0.7)), (3, 32, 32))):
        assert (network(torch.randn(2, *shape), torch.zeros(2)) == 0).all()
        assert network.embedding.mix.weight.std().item() == pytest.approx(0.7, abs=0.03)
        assert network.embedding.class_vector.weight.std().item() == pytest.approx(1, abs=0.2)
    hidden = torch.randn(4, 7)
    assert torch.equal(Block(7, 3)(hidden, torch.randn(4, 3)), hidden)
