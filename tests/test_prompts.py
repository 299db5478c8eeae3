"""From texts to what a network is told: encoders, captioned scenes, silence in training."""
from extras import need

need("train", "data")

import pytest
import torch

from diffusion_papers.core.training import Draws
from diffusion_papers.topics.emoji_world import EmojiConfig, caption, draw_emoji, emoji_scenes
from diffusion_papers.topics.prompts import CaptionedScenes, Encoders, EncodersConfig, encode_prompts, encoders_of, training_prompt
from diffusion_papers.topics.text import BagOfWords, FixedStates, TextStates, load_tower, shipped_states


class Letters:
    "One token a letter, of its place in the alphabet."
    name, width, longest, pooling = "letters", 2, 64, "mean"

    def encode(self, captions):
        there = torch.arange(max(map(len, captions), default=0) or 1) < torch.tensor([len(text) for text in captions])[:, None]
        rows = [[float(ord(letter) % 32) for letter in text] + [0.0] * (there.shape[1] - len(text)) for text in captions]
        return TextStates(torch.tensor(rows)[..., None].expand(-1, -1, 2).clone(), there)


@pytest.fixture(scope="module")
def encoders():
    tower = load_tower()
    return Encoders(Letters(), BagOfWords(tower), tower.image)


def test_without_weights_the_shipped_captions_are_understood(monkeypatch):
    from diffusion_papers.topics import prompts
    def missing(): raise ImportError("pip install 'diffusion_papers[text]'")
    monkeypatch.setattr(prompts, "MiniLM", missing)
    encoders_of.cache_clear()
    try:
        found = encoders_of(EncodersConfig())
        assert isinstance(found.text, FixedStates) and encode_prompts(found, ["a red apple"]).text.there.any()
        with pytest.raises(ValueError, match=r"diffusion_papers\[text\]"): encode_prompts(found, ["a purple elephant on a unicycle"])
    finally: encoders_of.cache_clear()


@pytest.mark.parametrize("options, words", [(dict(text="t5"), "text_path"), (dict(clip="clip"), "clip_path")])
def test_encoders_of_ones_own_need_a_folder(options, words):
    with pytest.raises(ValueError, match=words): encoders_of(EncodersConfig(**options))


@pytest.mark.parametrize("options, words", [(dict(text="gpt"), "text"), (dict(clip="blip"), "clip"), (dict(drop_text=1.1), "drop_text"), (dict(drop_image=-0.1), "drop_image")])
def test_wrong_encoders_are_refused(options, words):
    with pytest.raises(ValueError, match=words): EncodersConfig(**options)


def test_an_empty_caption_is_silence():
    prompt = encode_prompts(Encoders(shipped_states(), BagOfWords(load_tower()), None), ["", "a dog"])
    assert not prompt.text.there[0].any() and not prompt.text.pooled()[0].any() and not prompt.clip.there[0].any() and prompt.text.there[1].any() and prompt.image is None


def test_a_bag_of_words_cannot_bind_and_the_text_encoder_can():
    prompt = encode_prompts(Encoders(shipped_states(), BagOfWords(load_tower()), None), ["a red apple and a green pear", "a green apple and a red pear"])
    assert torch.equal(prompt.clip.tokens[0], prompt.clip.tokens[1]) and (prompt.text.tokens[0] - prompt.text.tokens[1]).abs().max() > 0.05


def test_styles_are_vectors_of_pictures(encoders):
    pictures = draw_emoji(emoji_scenes(range(2)))[0]
    two, one = encode_prompts(encoders, ["a", "b"], pictures), encode_prompts(encoders, ["a", "b"], pictures[:1])
    with torch.no_grad(): vectors = encoders.image(pictures)
    assert torch.allclose(two.image, vectors, atol=1e-5) and torch.allclose(one.image, vectors[:1].expand(2, -1), atol=1e-5) and two.image_there is None
    with pytest.raises(ValueError, match="style"): encode_prompts(encoders, ["a", "b", "c"], pictures)


def test_batches_have_the_states_of_their_captions(encoders):
    world = EmojiConfig(contents=5, seed=3)
    data, what = CaptionedScenes(world, 32, encoders), emoji_scenes(range(5), world)
    batch = data.__getitems__([4, 9, 12])
    assert torch.equal(batch["x0"], draw_emoji(emoji_scenes([4, 9, 12], world))[0])
    for row, number in enumerate((4, 4, 2)):
        assert torch.equal(batch["text"][row][batch["text_there"][row]], Letters().encode([caption(what, number)]).tokens[0])
        assert torch.allclose(batch["clip"][row][batch["clip_there"][row]], encoders.clip.encode([caption(what, number)]).tokens[0], atol=2e-3)
    assert torch.equal(data[9]["x0"], batch["x0"][1])
    with pytest.raises(ValueError, match="contents"): CaptionedScenes(EmojiConfig(), 32, encoders)


def test_encoders_are_silent_independently_and_at_their_rates(encoders):
    data = CaptionedScenes(EmojiConfig(contents=5), 32, encoders)
    batch = {name: value.repeat(800, *[1] * (value.ndim - 1)) for name, value in data.__getitems__(range(5)).items()}
    config = EncodersConfig(drop_text=0.2, drop_clip=0.4, drop_image=0.7)
    prompt = training_prompt(batch, Draws(torch.Generator().manual_seed(0)), config, encoders, 64)
    silent = [~prompt.text.there.any(1), ~prompt.clip.there.any(1), ~prompt.image_there]
    for mask, rate in zip(silent, (0.2, 0.4, 0.7)): assert abs(mask.double().mean().item() - rate) < 3 * (rate * (1 - rate) / 4000) ** 0.5
    for a, b, rate in ((0, 1, 0.08), (0, 2, 0.14), (1, 2, 0.28)):
        assert abs((silent[a] & silent[b]).double().mean().item() - rate) < 3 * (rate * (1 - rate) / 4000) ** 0.5
    with torch.no_grad(): vectors = encoders.image(batch["x0"][:5])
    heard = prompt.image_there[:200].nonzero()[:, 0]
    assert torch.allclose(prompt.image[heard], vectors[heard % 5], atol=1e-3) and not prompt.image[~prompt.image_there].any()


def test_a_model_may_have_no_text_encoder():
    found = encoders_of(EncodersConfig(text="none"))
    assert found.text is None and encode_prompts(found, ["a red apple"]).text is None and len(encode_prompts(found, ["a", "an apple"])) == 2
    batch = CaptionedScenes(EmojiConfig(contents=3), 32, found).__getitems__(range(3))
    assert batch.keys() == {"x0", "clip", "clip_there"}
    assert training_prompt(batch, Draws(torch.Generator().manual_seed(0)), EncodersConfig(text="none"), found, 64).text is None


def test_states_are_pooled_as_their_encoder_says(encoders):
    batch = CaptionedScenes(EmojiConfig(contents=3), 32, encoders).__getitems__(range(3))
    prompt = training_prompt(batch, Draws(torch.Generator().manual_seed(0)), EncodersConfig(), encoders, 64)
    assert (prompt.text.pooling, prompt.clip.pooling) == (encoders.text.pooling, "sum") == (encode_prompts(encoders, ["a"]).text.pooling, encode_prompts(encoders, ["a"]).clip.pooling)


@pytest.mark.parametrize("where, kind", [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_t5_has_half_of_its_bits_on_a_gpu(monkeypatch, where, kind):
    from diffusion_papers.topics import prompts
    made = []
    monkeypatch.setattr(prompts, "check_device", lambda device: device)
    monkeypatch.setattr(prompts, "T5Encoder", lambda path, device, dtype: made.append((path, device, dtype)))
    prompts._t5(EncodersConfig(text="t5", text_path="here", device=where))
    assert made == [("here", where, kind)]



def test_pictures_are_seen_where_they_are(monkeypatch):
    "Training hands over pictures on a GPU: the tower that sees them must be there, too."
    from types import SimpleNamespace
    from diffusion_papers.topics import prompts
    words = load_tower().words
    monkeypatch.setattr(prompts, "load_tower", lambda device="cpu": SimpleNamespace(words=words, image=lambda pictures: str(device)))
    encoders_of.cache_clear()
    try: assert [encoders_of(EncodersConfig(text="none")).image(SimpleNamespace(device=torch.device(where))) for where in ("cpu", "cuda:1")] == ["cpu", "cuda:1"]
    finally: encoders_of.cache_clear()


def test_an_empty_caption_is_silence_for_a_clip_too():
    class Clip:  # start and end, as `ClipText` says of ""
        def encode(self, captions): return TextStates(torch.ones(len(captions), 2, 8), torch.ones(len(captions), 2, dtype=torch.bool), "last")
    prompt = encode_prompts(Encoders(None, Clip(), None), ["", "a dog"])
    assert prompt.clip.there.tolist() == [[False, False], [True, True]]


def test_without_an_encoder_of_pictures_no_style_is_told(encoders):
    alone = Encoders(encoders.text, encoders.clip, None)
    batch = CaptionedScenes(EmojiConfig(contents=3), 32, alone).__getitems__(range(3))
    prompt = training_prompt(batch, Draws(torch.Generator().manual_seed(0)), EncodersConfig(drop_image=0.0), alone, 64)
    assert prompt.image is None or not prompt.image_there.any()
