"""Frozen models with one interface: channels and strides, what they are told, gradients that pass, Stable Diffusion from a folder."""
import copy

import pytest
import torch
from extras import need

need("train", "data")
from diffusion_papers.topics.emoji_world import EmojiConfig, draw_emoji, emoji_scenes
from diffusion_papers.topics.frozen_features import scaled_linear, shared_noise
from diffusion_papers.topics.frozen_models import TOLD, EmojiPainter, PixelMaps, StableDiffusion, TowerMaps, added, check_folder, stable_diffusion_maps

MODELS = {"painter": EmojiPainter, "random": lambda: EmojiPainter(random=True), "tower": TowerMaps, "pixels": PixelMaps}


def pictures(count=3): return draw_emoji(emoji_scenes(range(count), EmojiConfig(seed=77)), 32)[0]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_maps_have_the_channels_and_strides_that_are_told(name):
    model, images = MODELS[name](), pictures()
    maps = model.maps(images)
    assert [tuple(found.shape) for found in maps] == [(3, channels, 32 // stride, 32 // stride) for channels, stride in zip(model.channels, model.strides)]
    assert all(torch.equal(a, b) for a, b in zip(maps, model.maps(images))) and copy.deepcopy(model) is model
    assert not any(weight.requires_grad for weight in model.parameters()) and not model.train().training
    other = images.clone(); other[1] = -other[1]
    changed = model.maps(other)
    assert all(torch.allclose(a[[0, 2]], b[[0, 2]], atol=1e-5) and not torch.equal(a[1], b[1]) for a, b in zip(maps, changed))  # pictures do not see each other


def test_null_tokens_say_nothing_and_gradients_pass_to_what_is_told():
    painter, images = EmojiPainter(), pictures()
    assert painter.empty.shape[:2] == (1, TOLD) and (painter.empty == painter.empty[:, :1]).all()
    states, time = painter.empty.expand(3, -1, -1).clone().requires_grad_(), torch.zeros(3, 1, painter.time_width, requires_grad=True)
    maps = painter.maps(images, states, time)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, painter.maps(images)))
    maps[-1].square().mean().backward()
    assert states.grad.any() and time.grad.any()
    with torch.no_grad(): assert not torch.allclose(painter.maps(images, states + torch.randn_like(states))[-1], maps[-1], atol=1e-3) and not torch.allclose(painter.maps(images, None, time + 1)[-1], maps[-1], atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(painter.maps(images), painter.maps(images)))  # hooks were taken away


@torch.no_grad()
def test_several_steps_give_their_maps_one_after_another():
    both, first, second = EmojiPainter(steps=(0, 300)), EmojiPainter(steps=(0,)), EmojiPainter(steps=(300,))
    images = pictures()
    maps = both.maps(images)
    assert all(torch.equal(a, b) for a, b in zip(maps, first.maps(images) + second.maps(images))) and both.channels == first.channels * 2
    noisy, level = second.noisy(images, 300)
    process = scaled_linear()
    ratio = process.noise_to_signal(torch.tensor(300.0, dtype=torch.float64)).item()
    assert torch.allclose(level, torch.full((3,), ratio)) and torch.allclose(noisy, images + ratio * shared_noise(3, 32, 32), atol=1e-5)
    assert torch.equal(EmojiPainter(steps=(-1,)).noisy(images, -1)[0], images)


@torch.no_grad()
def test_random_weights_are_a_function_of_the_seed_and_nothing_is_silent():
    images = pictures()
    one, again, other = (EmojiPainter(random=True, seed=seed).maps(images) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(one, again, other)) and all(found.std() > 0.01 for found in one)
    spread = [weight.std() * (weight.shape[1] * weight[0, 0].numel()) ** 0.5 for weight in EmojiPainter(random=True).denoiser.network.parameters() if weight.ndim > 1]
    assert min(spread) > 0.3  # in units of one over the root of the inputs


@torch.no_grad()
def test_the_towers_maps_are_its_patches_where_they_were():
    model, images = TowerMaps(), pictures()
    *_, last = model.tower.walk(images)
    maps = model.maps(images)
    assert torch.equal(maps[-1].flatten(2).mT, last[:, 1:]) and torch.equal(maps[-1][:, :, 0, 3], last[:, 4])


def test_a_term_is_added_while_a_network_runs_and_not_after():
    module = torch.nn.Linear(2, 3)
    x, term = torch.ones(4, 2), torch.randn(4, 3)
    plain = module(x)
    with added(module, term): assert torch.equal(module(x), plain + term)
    with added(module, None): assert torch.equal(module(x), plain)
    assert torch.equal(module(x), plain)
    with pytest.raises(RuntimeError), added(module, term): raise RuntimeError
    assert torch.equal(module(x), plain)


@pytest.mark.parametrize("wrong, name", [(lambda: EmojiPainter(steps=(1000,)), "steps"), (lambda: EmojiPainter(steps=()), "steps"), (lambda: EmojiPainter("emoji_tower"), "name"),
                                         (lambda: TowerMaps().maps(torch.zeros(1, 3, 32, 16)), "images"), (lambda: EmojiPainter().maps(pictures(), EmojiPainter().empty, None, object()), "prompt")])
def test_what_cannot_be_is_named(wrong, name):
    with pytest.raises(ValueError, match=name): wrong()


# ---- Stable Diffusion

def test_maps_of_stable_diffusion_are_those_of_the_paper():
    channels, strides = stable_diffusion_maps()
    assert channels == (512, 512, 2560, 1920, 960, 640, 512, 512) and strides == (4, 8, 64, 32, 16, 8, 8, 4)
    channels, strides = stable_diffusion_maps(steps=2)
    assert channels == (512, 512, 2560, 1920, 960, 640, 2560, 1920, 960, 640, 512, 512)


def test_a_folder_that_lacks_parts_is_told(tmp_path):
    with pytest.raises(ValueError, match="vae/config.json.*text_encoder"): check_folder(tmp_path)
    with pytest.raises(ValueError, match="path"): StableDiffusion(tmp_path)


@torch.no_grad()
def test_a_tiny_stable_diffusion_gives_the_inputs_of_the_blocks_of_its_autoencoder(tmp_path):
    pytest.importorskip("diffusers")
    from test_rehearse import rehearse
    (tmp_path / "sd").mkdir()
    rehearse.write_stable_diffusion(tmp_path / "sd")
    model = StableDiffusion(tmp_path / "sd", steps=(-1,))
    images = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    maps = model.maps(images)
    assert [tuple(found.shape) for found in maps] == [(2, channels, 64 // stride, 128 // stride) for channels, stride in zip(model.channels, model.strides)]
    encoder, decoder = model.vae.encoder, model.vae.decoder
    hidden = encoder.conv_in(images)
    for block in encoder.down_blocks[:2]: hidden = block(hidden)
    first = encoder.down_blocks[2].resnets[0](hidden, None)
    second = encoder.down_blocks[3].resnets[0](encoder.down_blocks[2](hidden), None)
    assert torch.allclose(maps[0], first, atol=1e-5) and torch.allclose(maps[1], second, atol=1e-5)
    hidden = decoder.mid_block(decoder.conv_in(model.vae.post_quant_conv(model.vae.encode(images).latent_dist.mean)))
    inside = hidden
    for block in decoder.up_blocks[0].resnets[:2]: inside = block(inside, None)
    assert torch.allclose(maps[-2], inside, atol=1e-4)
    inside = decoder.up_blocks[0](hidden)
    for block in decoder.up_blocks[1].resnets[:2]: inside = block(inside, None)
    assert torch.allclose(maps[-1], inside, atol=1e-4)
    assert model.empty.shape == (1, 77, 16) and model.time_width == 32
    told = model.maps(images, model.empty.expand(2, -1, -1) + torch.randn(2, 77, 16), torch.randn(2, 1, 32))
    assert all(torch.equal(a, b) for a, b in zip(maps[:2] + maps[-2:], told[:2] + told[-2:])) and not torch.equal(maps[2], told[2])
