"""The parts of the networks against their formulas, written out; and the weights with which they begin."""
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from diffusion_papers.core.networks import (FAMILIES, Attention, ConvBlock, Downsample, FilmBlock, FilmConfig, FilmNet, FourierEmbedding, Matrix,
                                            MLPConfig, NoiseEmbedding, OneHotLinear, ResidualBlock, ResidualMLP, UNet, UNetConfig, Upsample,
                                            check_classes, class_embedding, group_norm, resample, sinusoids, unet_config, variance_scaling)

SMALL = UNetConfig(image_size=8, width=8, multipliers=(1, 2), blocks=1, attention=(4,), norm_groups="quarter")
silu = lambda x: x / (1 + torch.exp(-x))


def randomised(module, seed=0):
    "A module in double precision whose weights are all random: no zero hides a fault."
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters(): parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module.eval().requires_grad_(False)


def random(*shape, seed=1): return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normed(x, norm, groups, eps=1e-6):
    "Group normalisation in plain means."
    parts = x.reshape(len(x), groups, -1)
    parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, unbiased=False, keepdim=True) + eps).sqrt()
    return parts.reshape(x.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]


def close(found, wanted): torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# embeddings

def test_fourier_features_are_sines_and_cosines_of_geometric_frequencies():
    values = torch.tensor([0.3, -2.0], dtype=torch.float64)
    frequencies = [9.0 ** (k / 3) for k in range(4)]
    wanted = [[math.sin(f * v) for f in frequencies] + [math.cos(f * v) for f in frequencies] for v in values.tolist()]
    assert FourierEmbedding(8, 9.0)(values) == pytest.approx(torch.tensor(wanted, dtype=torch.float64), abs=1e-5)
    assert FourierEmbedding(6).frequencies.tolist() == pytest.approx([1, 2, 4])


def test_sinusoids_have_the_frequencies_of_their_families():
    "DDPM's last is 1e-4; ADM's would be the one after the last, and its cosines come first."
    level = torch.tensor([0.7, 300.0], dtype=torch.float64)
    for first, last in ((False, 3), (True, 4)):
        angles = [[value * 1e-4 ** (k / last) for k in range(4)] for value in level.tolist()]
        sines, cosines = ([[wave(angle) for angle in row] for row in angles] for wave in (math.sin, math.cos))
        wanted = [a + b for a, b in zip(*((cosines, sines) if first else (sines, cosines)))]
        assert sinusoids(level, 8, first) == pytest.approx(torch.tensor(wanted, dtype=torch.float64), abs=1e-4)


@pytest.mark.parametrize("kind, scale", [("sinusoidal", 30.0), ("cosines_first", 1.0)])
def test_a_noise_level_goes_through_two_layers(kind, scale):
    config = replace(SMALL, embedding=kind, time_scale=scale)
    module, level = randomised(NoiseEmbedding(config)), random(3).abs()
    waves = sinusoids(scale * level, 8, kind == "cosines_first")
    close(module(level), module.output(silu(module.hidden(waves))))
    close(module(level, early=waves), module.output(silu(module.hidden(2 * waves))))


def test_random_frequencies_see_the_logarithm_of_each_noise_level():
    module = NoiseEmbedding(replace(SMALL, embedding="fourier", augmented=True, width=4000, embedding_width=8)).double()
    level, other = torch.tensor([0.3, 7.0], dtype=torch.float64), torch.tensor([2.0, 0.1], dtype=torch.float64)
    angles = [2 * math.pi * value.log()[:, None] * frequencies for value, frequencies in
              ((level, module.frequencies), (other, module.augmentation_frequencies))]
    close(module.waves(level, other), torch.cat([angles[0].sin(), angles[0].cos(), angles[1].sin(), angles[1].cos()], dim=1))
    assert module.frequencies.std().item() == pytest.approx(16, rel=0.05) and not torch.equal(module.frequencies, module.augmentation_frequencies)


def test_classes_become_vectors():
    linear = randomised(OneHotLinear(3, 5))
    close(linear(torch.tensor([2, 0])), F.one_hot(torch.tensor([2, 0]), 3).double() @ linear.weight.T + linear.bias)
    of = lambda **options: class_embedding(replace(SMALL, classes=3, **options))
    assert of(null_class=False).weight.shape == (3, 32) and of().weight.shape == (4, 32) and of(class_form="early").weight.shape == (4, 8)
    assert of(class_form="linear").weight.shape == (32, 4)


@pytest.mark.parametrize("form", ["table", "early", "linear"])
def test_an_early_class_joins_the_waves_and_any_other_the_embedding(form):
    network = randomised(UNet(replace(SMALL, classes=3, class_form=form)))
    level, labels = random(2).abs(), torch.tensor([1, 3])
    vectors, waves, inside = network.class_embedding(labels), sinusoids(level, 8), network.embedding
    through = lambda waves: inside.output(silu(inside.hidden(waves)))
    close(network.embed(level, labels), through(waves + vectors) if form == "early" else through(waves) + vectors)


def test_no_class_is_the_number_after_the_last():
    label = torch.zeros(2)
    assert check_classes(None, label, 10).tolist() == [10, 10] and check_classes(None, label, 0) is None
    for allowed, null_class in ((10, True), (9, False)):
        assert check_classes(torch.tensor([0, allowed]), label, 10, null_class).tolist() == [0, allowed]
        with pytest.raises(ValueError, match="class_label: expected 0 to 9"): check_classes(torch.tensor([0, allowed + 1]), label, 10, null_class)
    with pytest.raises(ValueError, match="class_label: expected 0 to 9"): check_classes(torch.tensor([-1, 0]), label, 10)
    with pytest.raises(ValueError, match="knows no 'none'"): check_classes(None, label, 10, False)


# perceptron

def test_a_perceptron_is_its_formula():
    network = randomised(ResidualMLP(MLPConfig(shape=(1, 2, 3), width=8, blocks=2, classes=4, fourier=6, highest=5.0)))
    x, label, labels = random(3, 1, 2, 3), random(3), torch.tensor([0, 4, 2])
    plain = lambda x, norm: (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    waves = FourierEmbedding(6, 5.0)(label)
    embedding = silu(network.noise_embedding[1](waves)) + network.class_embedding.weight[labels]
    hidden = network.input(x.flatten(1))
    for block in network.blocks: hidden = hidden + block.outer(silu(block.inner(plain(hidden, block.norm)) + block.embed(embedding)))
    output, features, told = network.with_features(x, label, labels)
    close(features, hidden); close(told, embedding)
    close(output, network.output[1](plain(hidden, network.output[0])).reshape(x.shape)); close(network(x, label, class_label=labels), output)
    assert torch.equal(network(x, label), network(x, label, class_label=torch.full((3,), 4)))


def test_what_comes_after_a_block_is_told_its_number():
    network, numbers = randomised(ResidualMLP(MLPConfig(shape=(2,), width=8, blocks=3))), []
    network.with_features(random(1, 2), random(1), after=lambda features, number: numbers.append(number) or features)
    assert numbers == [0, 1, 2]
    replaced = network.with_features(random(1, 2), random(1), after=lambda features, number: torch.full_like(features, number))
    assert torch.equal(replaced[1], torch.full((1, 8), 2.0, dtype=torch.float64))


# initial weights

@pytest.mark.parametrize("make", [lambda scale: variance_scaling(torch.nn.Linear(300, 100), scale), lambda scale: Matrix(300, 100, scale)])
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.0])
def test_initial_weights_are_uniform_with_the_variance_that_is_asked_for(make, scale):
    layer = make(scale)
    assert layer.weight.var().item() == pytest.approx(max(scale, 1e-10) / 200, rel=0.05) and (layer.bias == 0).all()
    assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(3 * max(scale, 1e-10) / 200), rel=0.01)


def test_a_convolution_counts_its_window_in_both_fans():
    assert variance_scaling(torch.nn.Conv2d(40, 20, 3)).weight.var().item() == pytest.approx(1 / (9 * 30), rel=0.05)


def test_networks_begin_with_silence_and_blocks_as_the_identity():
    torch.manual_seed(0)
    x, level, embedding = random(2, 8, 8, 8).float(), torch.rand(2), torch.randn(2, 32)
    assert UNet(SMALL)(x[:, :3], level).abs().max() < 1e-3 and (FilmNet(FilmConfig(width=8))(x[:, :1], level) == 0).all()
    assert (ResidualMLP(MLPConfig(shape=(8, 8, 8), width=8))(x, level) == 0).all()
    assert torch.equal(FilmBlock(8, 1, torch.nn.Identity)(x, embedding), x)
    assert torch.equal(ResidualBlock(8, 4)(x[:, 0, 0], embedding[:, :4]), x[:, 0, 0])
    for form in ("separate", "matrices", "joint", "joint_matrix"):
        assert (Attention(8, replace(SMALL, projections=form))(x) - x).abs().max() < 1e-4, form
    assert (ConvBlock(8, 8, SMALL)(x, embedding) - x).abs().max() < 1e-3
    query = Attention(64, replace(SMALL, width=64)).query.weight
    assert query.var().item() == pytest.approx(0.1 / 64, rel=0.1)


# blocks of the U-Net

def test_groups_of_a_norm_are_those_of_the_family():
    groups = lambda kind, channels, in_block=False: group_norm(channels, replace(SMALL, norm_groups=kind), in_block).num_groups
    assert [groups("all", 64), groups("all", 64, True)] == [32, 32]
    assert [groups("quarter", 64), groups("quarter", 64, True), groups("quarter", 256)] == [16, 16, 32]
    assert [groups("blocks", 64), groups("blocks", 64, True)] == [32, 16] and group_norm(32, replace(SMALL, norm_eps=1e-5)).eps == 1e-5


def test_resolutions_are_halved_by_means_and_doubled_by_repetition():
    x = random(1, 2, 4, 6)
    close(resample(x, "down"), (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4)
    close(resample(x, "up"), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert resample(x, None) is x


@pytest.mark.parametrize("options", [{}, {"injection": "scale_shift"}, {"rescale": True}, {"skip_form": "matrix"}], ids=str)
@pytest.mark.parametrize("resampling", [None, "down", "up"])
def test_a_block_is_its_formula(options, resampling):
    block = randomised(ConvBlock(8, 16, replace(SMALL, dropout=0.5, **options), resampling))
    x, embedding = random(2, 8, 4, 4), random(2, 32)
    hidden = F.conv2d(resample(silu(normed(x, block.norm_in, 2)), resampling), block.conv_in.weight, block.conv_in.bias, padding=1)
    injected = (silu(embedding) @ block.embed.weight.T + block.embed.bias)[:, :, None, None]
    if options.get("injection") == "scale_shift": hidden = normed(hidden, block.norm_out, 4) * (1 + injected[:, :16]) + injected[:, 16:]
    else: hidden = normed(hidden + injected, block.norm_out, 4)
    hidden = F.conv2d(silu(hidden), block.conv_out.weight, block.conv_out.bias, padding=1)
    weight = block.skip.weight.T if "skip_form" in options else block.skip.weight[:, :, 0, 0]
    total = hidden + torch.einsum("dc,bchw->bdhw", weight, resample(x, resampling)) + block.skip.bias[:, None, None]
    close(block(x, embedding), total / (2**0.5 if "rescale" in options else 1))


def test_a_skip_is_mapped_where_its_channels_change_or_the_family_wants_it():
    skips = lambda c_out, resampling, kind: ConvBlock(8, c_out, replace(SMALL, skip_projection=kind), resampling).skip is not None
    assert [skips(8, None, "channels"), skips(8, "up", "channels"), skips(16, None, "channels")] == [False, False, True]
    assert [skips(8, None, "resamples"), skips(8, "up", "resamples"), skips(16, "down", "resamples")] == [False, True, True]


def test_dropout_is_before_the_last_convolution_and_in_training_alone():
    block = randomised(ConvBlock(8, 8, replace(SMALL, dropout=0.25)))
    block.conv_out.weight.zero_(); block.conv_out.bias.zero_()
    for channel in range(8): block.conv_out.weight[channel, channel, 1, 1] = 1
    x, embedding = random(50, 8, 4, 4), random(50, 32)
    kept = block(x, embedding) - x
    found = block.train()(x, embedding) - x
    gone = (found.abs() < 1e-9) & (kept.abs() > 1e-6)
    assert gone.double().mean().item() == pytest.approx(0.25, abs=0.02)
    close(found[~gone], kept[~gone] / 0.75)


@pytest.mark.parametrize("projections", ["separate", "matrices", "joint", "joint_matrix"])
@pytest.mark.parametrize("order", ["parts_first", "heads_first"])
@pytest.mark.parametrize("rescale", [False, True])
def test_attention_is_its_formula(projections, order, rescale):
    "Softmax of query times key over the root of a head's channels, head by head."
    module = randomised(Attention(8, replace(SMALL, projections=projections, head_width=4, qkv_order=order, rescale=rescale)))
    x = random(2, 8, 2, 3)
    flat = normed(x, module.norm, 2).flatten(2)
    def mapped(part, values):
        weight = part.weight.T if projections.endswith(("matrices", "matrix")) else part.weight.flatten(1)
        return weight @ values + part.bias[:, None]
    if projections in ("separate", "matrices"): query, key, value = (mapped(part, flat) for part in (module.query, module.key, module.value))
    else:
        joint = mapped(module.qkv, flat)
        first = lambda part, head: 12 * head + 4 * part if order == "heads_first" else 8 * part + 4 * head
        numbers = [[range(first(part, head), first(part, head) + 4) for head in range(2)] for part in range(3)]
        query, key, value = (joint[:, [channel for head in part for channel in head]] for part in numbers)
    mixed = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = torch.softmax(query[:, head].transpose(1, 2) @ key[:, head] / 2, dim=2)  # (B, pixel that asks, pixel that answers)
        mixed.append(value[:, head] @ weights.transpose(1, 2))
    total = x + mapped(module.output, torch.cat(mixed, dim=1)).reshape(x.shape)
    close(module(x), total / 2**0.5 if rescale else total)


def test_strided_convolutions_look_right_and_down():
    module, x = randomised(Downsample(2)), random(1, 2, 4, 4)
    wide = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    wide[:, :, :4, :4] = x
    found = module(x, None)
    for i in range(2):
        for j in range(2):
            window = wide[0, :, 2 * i:2 * i + 3, 2 * j:2 * j + 3]
            close(found[0, :, i, j], (module.conv.weight * window).sum((1, 2, 3)) + module.conv.bias)
    up = randomised(Upsample(2))
    close(up(x, None), F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), up.conv.weight, up.conv.bias, padding=1))


# the whole U-Net

@pytest.mark.parametrize("attention_up, resampling", [("every", "block"), ("last", "conv")])
def test_the_way_up_takes_what_the_way_down_left_in_reverse(attention_up, resampling):
    config = replace(SMALL, blocks=2, attention_up=attention_up, resampling=resampling, conditioning=1, attention=(8,))
    network = randomised(UNet(config))
    x, level, condition = random(2, 3, 8, 8), random(2).abs(), random(2, 1, 8, 8, seed=2)
    embedding = network.embedding(level)
    fine, coarse = network.down
    kept = [network.input(torch.cat([x, condition], dim=1))]
    for block, attention in zip(fine.blocks, fine.attentions): kept.append(attention(block(kept[-1], embedding)))
    kept.append(fine.resampling(kept[-1], embedding))
    for block in coarse.blocks: kept.append(block(kept[-1], embedding))
    assert coarse.resampling is None and not len(coarse.attentions)
    first, middle, second = network.middle
    hidden = second(middle(first(kept[-1], embedding)), embedding)
    coarse, fine = network.up
    for block in coarse.blocks: hidden = block(torch.cat([hidden, kept.pop()], dim=1), embedding)
    hidden = coarse.resampling(hidden, embedding)
    for number, block in enumerate(fine.blocks):
        hidden = block(torch.cat([hidden, kept.pop()], dim=1), embedding)
        if attention_up == "every": hidden = fine.attentions[number](hidden)
        elif number == 2: hidden = fine.attentions[0](hidden)
    assert not kept
    output, features, told = network.with_features(x, level, condition=condition)
    close(features, hidden); close(told, embedding)
    close(output, F.conv2d(silu(normed(hidden, network.output_norm, 2)), network.output.weight, network.output.bias, padding=1))
    numbers = []
    network.with_features(x, level, condition=condition, after=lambda hidden, number: numbers.append((number, len(hidden[0]))) or hidden)
    assert numbers == list(enumerate([8, 8, 16, 16, 16, 16, 16, 16, 8, 8, 8]))


def test_recomputed_blocks_have_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        network = randomised(UNet(replace(SMALL, checkpointing=checkpointing))).requires_grad_(True)
        network(random(1, 3, 8, 8), torch.ones(1, dtype=torch.float64)).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for plain, again in zip(*gradients): close(again, plain)


def test_families_have_the_constants_of_their_papers():
    assert unet_config("ddpmpp").time_scale == 999 and unet_config("distillation").time_scale == 1000
    assert unet_config("adm").norm_eps == 1e-5 and unet_config("adm").head_width == 64 and unet_config("ddpm").norm_eps == 1e-6
    assert [name for name in FAMILIES if unet_config(name).rescale] == ["ddpmpp"] and unet_config("adm", width=64).embedded == 256
    assert unet_config("adm", embedding_width=10).embedded == 10 and unet_config("ddpm", image_size=16).shape == (3, 16, 16)


@pytest.mark.parametrize("make, name", [
    (lambda: replace(SMALL, image_size=9), "image_size"), (lambda: replace(SMALL, head_width=3), "head_width"),
    (lambda: replace(SMALL, dropout=1.0), "dropout"), (lambda: FilmConfig(width=12), "width"), (lambda: FilmConfig(width=9, groups=9), "width"),
    (lambda: FilmConfig(patch=3), "patch"),
    (lambda: MLPConfig(fourier=7), "fourier"), (lambda: MLPConfig(highest=0.0), "highest"), (lambda: FourierEmbedding(2), "size")])
def test_sizes_that_do_not_fit_are_named(make, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"): make()


def test_heads_have_the_width_that_is_asked_for():
    "Only channels that attend must be multiples of it: the 16 at 4 pixels, not the 8 at 8 pixels."
    assert Attention(16, replace(SMALL, head_width=16)).heads == 1 and Attention(16, replace(SMALL, head_width=4)).heads == 4
    assert Attention(16, SMALL).heads == 1


@pytest.mark.parametrize("wrong, name", [(dict(x=(1, 3, 8, 4)), "x"), (dict(condition=(1, 2, 8, 8)), "condition"),
                                         (dict(condition=None), "condition"), (dict(augmentation=None), "augmentation")], ids=str)
def test_a_u_net_is_asked_what_it_was_built_for(wrong, name):
    network = UNet(replace(SMALL, conditioning=1, augmented=True, embedding="fourier"))
    shapes = dict(x=(1, 3, 8, 8), condition=(1, 1, 8, 8), augmentation=(1,)) | wrong
    x, condition, augmentation = (None if shape is None else torch.ones(shape) for shape in shapes.values())
    with pytest.raises(ValueError, match=f"^{name}: "): network(x, torch.ones(1), condition=condition, augmentation=augmentation)


# the small network

@pytest.mark.parametrize("groups", [0, 2])
def test_the_small_network_is_its_formula(groups):
    network = randomised(FilmNet(FilmConfig(channels=2, size=4, width=8, dilations=(1, 2), patch=2, groups=groups, conditioning=1, time_scale=50.0)))
    norm = lambda x, module: normed(x, module, groups, 1e-5) if groups else x
    x, label, condition = random(2, 2, 4, 8), random(2).abs(), random(2, 1, 4, 8, seed=2)
    first, _, second, _ = network.embedding
    embedding = silu(second(silu(first(sinusoids(50 * label, 8, True)))))
    pixels = torch.cat([x, condition], dim=1).reshape(2, 3, 2, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 2, 4)
    hidden = F.conv2d(pixels, network.input.weight, network.input.bias, padding=1)
    for block, reach in zip(network.blocks, (1, 2)):
        scale, shift = block.film(embedding)[:, :8, None, None], block.film(embedding)[:, 8:, None, None]
        inner = F.conv2d(silu(norm(hidden, block.norm_in)), block.conv_in.weight, block.conv_in.bias, padding=reach, dilation=reach)
        inner = norm(inner, block.norm_out) * (1 + scale) + shift
        hidden = hidden + F.conv2d(silu(inner), block.conv_out.weight, block.conv_out.bias, padding=reach, dilation=reach)
    output = F.conv2d(silu(norm(hidden, network.output_norm)), network.output.weight, network.output.bias, padding=1)
    close(network(x, label, condition), output.reshape(2, 2, 2, 2, 2, 4).permute(0, 1, 4, 2, 5, 3).reshape(x.shape))


def test_an_image_beside_the_input_is_missed_and_refused():
    for conditioning, condition in ((0, torch.zeros(1, 1, 8, 8)), (1, None)):
        with pytest.raises(ValueError, match="^condition: this network (needs an|takes no) image"):
            FilmNet(FilmConfig(width=8, conditioning=conditioning))(torch.zeros(1, 1, 8, 8), torch.ones(1), condition)
