"""Networks that listen: prompts, contexts, cross-attention, both families, and how loud the words are."""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusion_papers.topics.listening import Watch, attention_shares, first_half, guided_by_prompt, mixed_by_guidance, text_influence
from diffusion_papers.topics.text import TextStates
from diffusion_papers.topics.text_unet import (
    ENCODERS, Context, CrossAttention, Prompt, TextAttention, TextUNetConfig, build_text_unet, dropped, token_places, without)

CONFIG = TextUNetConfig(text_width=12, clip_width=8, image_width=8, context_width=16, embedding_width=32, width=32, head_width=16)


def normal(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def states(batch, length, width, pooling="mean", seed=0):
    return TextStates(normal(batch, length, width, seed=seed), torch.ones(batch, length, dtype=torch.bool), pooling)


def some_prompt(batch=3, seed=0): return Prompt(states(batch, 4, 12, seed=seed), states(batch, 3, 8, "sum", seed + 1), normal(batch, 8, seed=seed + 2))


def awake(network):
    "All layers that begin at nothing get weights."
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        if parameter.ndim > 1 and parameter.abs().max() < 1e-4: nn.init.normal_(parameter.data, std=0.1, generator=generator)
    return network.eval()


def test_prompts_are_chosen_repeated_and_joined():
    prompt = some_prompt()
    assert len(prompt) == 3 and len(Prompt()) == 0
    chosen = prompt.select([2, 0])
    assert torch.equal(chosen.text.tokens, prompt.text.tokens[[2, 0]]) and torch.equal(chosen.image, prompt.image[[2, 0]]) and chosen.clip.pooling == "sum"
    assert torch.equal(prompt.repeat(2).image, prompt.image[[0, 0, 1, 1, 2, 2]])
    both = prompt.beside(without(prompt))
    assert len(both) == 6 and both.image_there.tolist() == [True] * 3 + [False] * 3 and not both.text.there[3:].any() and both.clip.pooling == "sum"
    moved = prompt.to(torch.float64)
    assert moved.text.tokens.dtype == torch.float64 and moved.text.there.dtype == torch.bool and moved.image.dtype == torch.float64
    with pytest.raises(ValueError, match="times"): prompt.repeat(0)


def test_dropping_silences_tokens_and_summary():
    mask = torch.tensor([True, False, False])
    prompt = dropped(some_prompt(), text=mask, clip=~mask, image=mask)
    assert prompt.text.there.sum(1).tolist() == [0, 4, 4] and not prompt.text.pooled()[0].any() and prompt.clip.there.sum(1).tolist() == [3, 0, 0]
    assert prompt.image_there.tolist() == [False, True, True] and not prompt.image[0].any()
    again = dropped(prompt, image=torch.tensor([False, True, False]))
    assert again.image_there.tolist() == [False, False, True]
    with pytest.raises(ValueError, match="silent"): dropped(prompt, sound=mask)
    assert without(some_prompt(), "text").clip.there.all() and not without(some_prompt(), "text").text.there.any()


def test_context_is_null_text_clip_image():
    torch.manual_seed(0)
    context, prompt = Context(CONFIG), some_prompt()
    tokens, there, vector = context(prompt, 3)
    places = token_places(prompt)
    assert places == {"null": slice(0, 1), "text": slice(1, 5), "clip": slice(5, 8), "image": slice(8, 9)}
    assert torch.allclose(tokens[:, places["text"]], context.text(prompt.text.tokens)) and torch.allclose(tokens[:, places["clip"]], context.clip(prompt.clip.tokens))
    assert torch.allclose(tokens[:, 8], context.image(prompt.image)) and torch.equal(tokens[1, 0], context.null) and there.all()
    expected = (context.pooled_text(prompt.text.tokens.mean(1)) + context.pooled_clip(F.normalize(prompt.clip.tokens.sum(1), dim=1)) + context.pooled_image(prompt.image))
    assert torch.allclose(vector, expected, atol=1e-6)
    without_text = context(without(prompt, "text"), 3)
    assert torch.allclose(without_text[2], expected - context.pooled_text(prompt.text.tokens.mean(1)), atol=1e-6)  # its bias is silent, too
    assert context(None, 3)[0].shape == (3, 1, 16)
    deaf = Context(replace(CONFIG, clip_width=0, image_width=0))
    assert deaf(prompt, 3)[0].shape == (3, 5, 16)


def test_cross_attention_is_what_the_formula_says():
    torch.manual_seed(0)
    layer, x = awake(CrossAttention(32, CONFIG)), normal(2, 32, 3, 5)
    tokens, there = normal(2, 6, 16, seed=1), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    context = layer.context_norm(tokens)
    query, key, value = layer.query(layer.norm(x)).flatten(2).transpose(1, 2), layer.key(context), layer.value(context)
    mixed = []
    for head in (slice(0, 16), slice(16, 32)):
        logits = (query[..., head] @ key[..., head].mT / math.sqrt(16)).masked_fill(~there[:, None], -math.inf)
        mixed.append(logits.softmax(-1) @ value[..., head])
    expected = x + layer.output(torch.cat(mixed, -1).transpose(1, 2).reshape(2, 32, 3, 5))
    assert torch.allclose(layer(x, tokens, there), expected, atol=1e-5)
    seen = []
    def look(logits, visible, shape): seen.append((logits.clone(), visible, shape)); return logits
    assert torch.allclose(layer(x, tokens, there, look), expected, atol=1e-5)
    assert seen[0][2] == (3, 5) and torch.allclose(seen[0][0][:, 1], query[..., 16:] @ key[..., 16:].mT, atol=1e-5) and torch.equal(seen[0][1], there)


def test_a_look_at_the_words_follows_every_look_at_the_picture():
    for family, sizes in (("adm", dict(attention=(8,), cross=(16,))), ("efficient", dict(attention=(8,)))):
        network = build_text_unet(replace(CONFIG, family=family, **sizes))
        looks = [module for module in network.modules() if isinstance(module, TextAttention)]
        assert all(isinstance(look.cross, CrossAttention) for look in looks)
        alone = [module for name, module in network.named_modules() if name.endswith(".own")]
        assert len(alone) == sum(look.own is not None for look in looks) and (family != "adm" or len(looks) > len(alone))
    large = build_text_unet(replace(CONFIG, family="efficient", attention=(), cross=(8,)))
    assert all(look.own is None for look in large.modules() if isinstance(look, TextAttention))  # no self-attention where it is not asked for


@pytest.mark.parametrize("family", ["adm", "efficient"])
def test_networks_hear_each_encoder_and_not_the_padding(family):
    network, x, label, prompt = awake(build_text_unet(replace(CONFIG, family=family))), normal(3, 3, 32, 32), torch.tensor([-1.0, 0, 1]), some_prompt()
    with torch.no_grad():
        answer = network(x, label, prompt)
        for name in ENCODERS: assert (network(x, label, without(prompt, name)) - answer).abs().max() > 1e-3, name
        longer = lambda part: TextStates(F.pad(part.tokens, (0, 0, 0, 3)), F.pad(part.there, (0, 3)), part.pooling)
        assert torch.allclose(network(x, label, replace(prompt, text=longer(prompt.text), clip=longer(prompt.clip))), answer, atol=1e-5)
        assert torch.allclose(network(x, label, without(prompt)), network(x, label), atol=1e-5)
        other = Prompt(states(3, 9, 12, seed=7), states(3, 2, 8, "sum", seed=8), normal(3, 8, seed=9))
        assert torch.allclose(network(x, label, without(other)), network(x, label), atol=1e-5)  # silence does not tell what was silenced
        assert (network(x, label + 0.1, prompt) - answer).abs().max() > 1e-4
        assert torch.allclose(network(x[[1]], label[[1]], prompt.select([1])), answer[[1]], atol=1e-4)


def test_the_picture_is_looked_at_before_the_words():
    torch.manual_seed(0)
    both, x, tokens, there = awake(TextAttention(32, CONFIG)), normal(2, 32, 4, 4), normal(2, 3, 16, seed=1), torch.ones(2, 3, dtype=torch.bool)
    with torch.no_grad():
        assert torch.allclose(both(x, tokens, there), both.cross(both.own(x), tokens, there), atol=1e-6)
        assert (both.own(x) - x).abs().max() > 1e-3 and TextAttention(32, CONFIG, looks=False).own is None


def test_efficient_skips_are_divided_by_the_root_of_two():
    network = awake(build_text_unet(replace(CONFIG, family="efficient")))
    seen = []
    network.up[0].blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad(): network(normal(1, 3, 32, 32), torch.zeros(1))
    below, skip = seen[0].chunk(2, dim=1)
    assert torch.allclose(skip * math.sqrt(2), below, atol=1e-5)  # at the lowest map both are the same


def test_checkpointing_changes_no_gradient():
    found = []
    for checkpointing in (False, True):
        network = awake(build_text_unet(replace(CONFIG, checkpointing=checkpointing)))
        network(normal(1, 3, 32, 32), torch.zeros(1), some_prompt(1)).square().sum().backward()
        found.append(network.input.weight.grad)
    assert torch.allclose(*found, atol=1e-4)


def test_super_resolution_asks_for_what_it_needs():
    network = build_text_unet(replace(CONFIG, conditioning=3, augmented=True))
    x, label = normal(1, 3, 32, 32), torch.zeros(1)
    for options, words in (({}, "condition"), ({"condition": x}, "augmentation"), ({"condition": x[:, :2], "augmentation": label}, "condition"),
                           ({"condition": normal(1, 3, 16, 16), "augmentation": label}, "condition")):
        with pytest.raises(ValueError, match=words): network(x, label, **options)
    with pytest.raises(ValueError, match="x:"): network(normal(1, 3, 30, 30), label, condition=normal(1, 3, 30, 30), augmentation=label)
    with pytest.raises(ValueError, match="augmentation"): build_text_unet(CONFIG)(x, label, augmentation=label)


@pytest.mark.parametrize("options, words", [
    (dict(family="vit"), "family"), (dict(blocks=(1,)), "blocks"), (dict(image_size=30), "image_size"), (dict(head_width=24), "head_width"), (dict(multipliers=()), "multipliers"),
    (dict(norm_groups="some"), "norm_groups"), (dict(text_width=-1), "text_width"), (dict(patch=0), "patch")])
def test_wrong_sizes_are_refused(options, words):
    with pytest.raises(ValueError, match=words): TextUNetConfig(**options)


# ---- listening

def loud(x, sigma, prompt, look=None):
    "1 with the prompt, 0 without; a look adds what it makes of zeros."
    answer = prompt.text.there.any(1).to(x)[:, None].expand_as(x)
    return answer if look is None else answer + look(torch.zeros(len(x), 1, 1, 1), prompt.text.there, (1, 1))[:, :, 0, 0]


def test_guidance_mixes_one_call_for_both():
    prompt, calls = Prompt(text=states(2, 3, 4)), []
    def model(x, sigma, prompt): calls.append(len(x)); return loud(x, sigma, prompt)
    for guidance, expected, batch in ((0.0, 0.0, 2), (1.0, 1.0, 2), (2.5, 2.5, 4), (0.5, 0.5, 4)):
        assert torch.equal(guided_by_prompt(model, prompt, guidance)(torch.zeros(2, 5), torch.ones(2)), torch.full((2, 5), expected))
        assert calls[-1] == batch
    a, b = normal(2, 3), normal(2, 3, seed=1)
    assert torch.equal(mixed_by_guidance(a, b, 1.0), a) and torch.equal(mixed_by_guidance(a, b, 0.0), b) and torch.allclose(mixed_by_guidance(a, b, 3.0), b + 3 * (a - b))
    with pytest.raises(ValueError, match="guidance"): guided_by_prompt(model, prompt, -1.0)


def test_brushes_touch_pictures_with_the_prompt_alone():
    class Brush:
        def at(self, sigma): return lambda logits, there, shape: logits + sigma.max()
    prompt = Prompt(text=states(2, 3, 4))
    plain = guided_by_prompt(loud, prompt, 1.0, Brush())(torch.zeros(2, 1), torch.full((2,), 5.0))
    assert plain.flatten().tolist() == [6.0, 6.0]
    guided = guided_by_prompt(loud, prompt, 3.0, Brush())(torch.zeros(2, 1), torch.full((2,), 5.0))
    assert guided.flatten().tolist() == [0 + 3 * 6.0] * 2  # the silent half stays 0
    with pytest.raises(ValueError, match="guidance: expected above 0 beside a brush"): guided_by_prompt(loud, prompt, 0.0, Brush())
    halved = first_half(lambda logits, there, shape: logits * 0)(torch.ones(4, 1, 2, 3), torch.ones(4, 3, dtype=torch.bool), (1, 2))
    assert halved[:2].sum() == 0 and halved[2:].min() == 1


def test_conditions_are_doubled_for_guidance():
    seen = []
    def model(x, sigma, prompt, condition): seen.append(condition); return loud(x, sigma, prompt)
    guided_by_prompt(model, Prompt(text=states(2, 3, 4)), 2.0, condition=torch.arange(2.0))(torch.zeros(2, 5), torch.ones(2))
    assert seen[0].tolist() == [0, 1, 0, 1]


def test_watch_notes_shares_of_each_encoder():
    prompt, watch = some_prompt(1), Watch(some_prompt(1), 16)
    logits = torch.zeros(1, 2, 4, 9)
    logits[..., 0] = 4 * math.log(3)  # divided by the root of 16, then three times as likely as each other token
    assert torch.equal(watch.at(torch.tensor([2.0]))(logits, torch.ones(1, 9, dtype=torch.bool), (2, 2)), logits)
    (level, shape, shares), = watch.seen
    assert (level, shape) == (2.0, (2, 2)) and shares == pytest.approx({"null": 3 / 11, "text": 4 / 11, "clip": 3 / 11, "image": 1 / 11})
    hidden = torch.ones(1, 9, dtype=torch.bool); hidden[:, 1:] = False
    watch.at(torch.tensor([2.0]))(logits, hidden, (2, 2))
    assert watch.seen[-1][2]["null"] == pytest.approx(1.0)


def test_attention_shares_are_means_over_looks():
    from diffusion_papers.core.denoisers import Denoiser
    from diffusion_papers.core.processes import EDM
    model = Denoiser(awake(build_text_unet(CONFIG)), EDM(), "edm", "log_sigma")
    shares = attention_shares(model, normal(3, 3, 32, 32), some_prompt(), torch.tensor([0.1, 1.0, 10.0]), 16)
    assert shares.keys() == {"null", *ENCODERS} and [sum(shares[name][n] for name in shares) for n in range(3)] == pytest.approx([1.0] * 3)


def test_influence_is_in_units_of_the_datas_variance():
    x0, prompt = normal(400, 3), Prompt(text=states(400, 2, 4))
    def model(x, sigma, prompt): return x0 + 2 * x0.std() * (~prompt.text.there.any(1)).to(x)[:, None]
    found = text_influence(model, x0, prompt, torch.tensor([1.0]))
    assert found["with"] == [0.0] and found["without"][0] == pytest.approx(4.0, rel=1e-5) and found["change"][0] == pytest.approx(4.0, rel=1e-5)


@pytest.mark.parametrize("family", ["adm", "efficient"])
def test_summaries_reach_the_blocks_beside_the_tokens(family):
    network, prompt = awake(build_text_unet(replace(CONFIG, family=family))), some_prompt()
    same_tokens = replace(prompt, text=TextStates(prompt.text.tokens, prompt.text.there, "last"))  # another summary of the same tokens
    with torch.no_grad(): found = [network(normal(3, 3, 32, 32), torch.zeros(3), told) for told in (prompt, same_tokens)]
    assert (found[0] - found[1]).abs().max() > 1e-4


def test_every_look_is_asked_once():
    for family, number in (("adm", 2 + 1 + 3), ("efficient", 1 + 1)):  # on the way down, in the middle, on the way up
        network, shapes = awake(build_text_unet(replace(CONFIG, family=family, blocks=(1, 2)))), []
        def look(logits, there, shape): shapes.append(shape); return logits
        with torch.no_grad(): network(normal(1, 3, 32, 32), torch.zeros(1), some_prompt(1), look=look)
        assert shapes == [(8, 8)] * number == [(8, 8)] * sum(isinstance(module, TextAttention) for module in network.modules())


def test_noise_levels_are_told_as_waves_that_scale_and_shift():
    from diffusion_papers.core.networks import sinusoids
    network = build_text_unet(replace(CONFIG, time_scale=40.0))
    label = torch.tensor([-0.3, 0.7])
    assert torch.allclose(network.embedding.waves(label, None), sinusoids(40.0 * label, 32, network.embedding.config.embedding == "cosines_first"))
    assert CONFIG.parts.injection == "scale_shift" and network.down[0].blocks[0].embed.out_features == 2 * 32


def test_curves_are_of_noisy_pictures():
    x0, prompt, seen = normal(64, 3, 8, 8), Prompt(text=states(64, 2, 4)), []
    def model(x, sigma, prompt, look=None):
        seen.append((x, sigma))
        if look is not None: look(torch.zeros(64, 1, 1, 3), torch.ones(64, 3, dtype=torch.bool), (1, 1))
        return x
    attention_shares(model, x0, prompt, torch.tensor([2.0]), 16, seed=1)
    text_influence(model, x0, prompt, torch.tensor([2.0]), seed=1)
    for x, sigma in seen: assert (x - x0).std().item() == pytest.approx(2.0, rel=0.03) and sigma.tolist() == [2.0] * 64 and torch.equal(x, seen[0][0])
    assert len(seen) == 3
