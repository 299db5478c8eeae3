"""Mask tokens: what they see, that nobody sees them, weights from folders, the small image-text model."""
import math

import pytest
import torch
from extras import need

need("train", "data")
from diffusion_papers.core.training import Draws
from diffusion_papers.topics.emoji_world import BACKGROUNDS, COLOURS, EmojiConfig, emoji_scenes, nouns
from diffusion_papers.topics.mask_tokens import LONGEST, TOWERS, EmojiClip, LocalClip, NamedEmoji, TowerConfig, VisionTower, clip_loss, load_clip, load_tower_folder, named_parts
from diffusion_papers.topics.text import vocabulary, words_of
from diffusion_papers.workbench.checkpoints import CheckpointError

PLAIN = TowerConfig(size=16, patch=4, width=24, layers=2, heads=2, hidden=40, out=8, stem=())


def tower(config=PLAIN):
    torch.manual_seed(0)
    return VisionTower(config).eval()


def pictures(count=2, size=16, seed=0): return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def painted(*squares, size=16):
    masks = torch.full((1, len(squares), size, size), -5.0)
    for number, (rows, columns) in enumerate(squares): masks[0, number, rows, columns] = 5
    return masks


def test_a_patch_is_seen_where_a_mask_is_one_half_anywhere_in_it():
    seen = tower().allowed(painted((slice(3, 5), slice(0, 1)), (slice(8, 12), slice(8, 12)), (slice(0, 0), slice(0, 0))))
    assert seen[0, :, 0].all() and seen[0].sum(-1).tolist() == [3, 2, 1]
    assert seen[0, 0].nonzero()[:, 0].tolist() == [0, 1, 5] and seen[0, 1].nonzero()[:, 0].tolist() == [0, 11]
    half = torch.full((1, 1, 16, 16), -1e-6); half[0, 0, 0, 0] = 0.0  # exactly one half counts
    assert tower().allowed(half)[0, 0].nonzero()[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize("config", [PLAIN, TowerConfig(size=16, patch=4, width=24, layers=2, heads=2, hidden=40, out=8, stem=(8,))], ids=["patches", "stem"])
@torch.no_grad()
def test_a_full_mask_says_what_the_picture_says_and_nobody_sees_mask_tokens(config):
    model, images = tower(config), pictures()
    masks = torch.cat([torch.full((2, 1, 16, 16), 3.0), painted((slice(0, 8), slice(0, 8)), (slice(0, 0), slice(0, 0))).expand(2, -1, -1, -1)], 1)
    whole, parts = model(images, masks)
    assert torch.allclose(parts[:, 0], whole, atol=1e-5) and torch.equal(model(images)[0], whole) and parts.isfinite().all()
    assert torch.allclose(model(images, masks[:, 1:])[1], parts[:, 1:], atol=1e-6)  # masks do not see each other
    outside = images.clone(); outside[..., 8:, 8:] += 1
    direct = VisionTower(config.override(layers=0)); direct.load_state_dict(model.state_dict(), strict=False)
    assert torch.allclose(direct(images, masks)[1][:, 1], direct(outside, masks)[1][:, 1])


@torch.no_grad()
def test_a_mask_token_sees_the_state_before_each_layer():
    model, images, masks = tower(), pictures(), painted((slice(0, 8), slice(4, 16))).expand(2, -1, -1, -1)
    states = [*model.walk(images)]
    asked = states[0][:, :1]
    for layer, tokens in zip(model.layers, states):
        keys, query = layer.norm(tokens), layer.norm(asked)
        asked = asked + layer.attention(query, keys, keys, model.allowed(masks))
        hidden = layer.expand(layer.hidden_norm(asked))
        asked = asked + layer.contract(hidden * torch.sigmoid(1.702 * hidden))
    assert torch.allclose(model.project(model.after(asked)), model(images, masks)[1], atol=1e-6)


def test_masks_of_any_size_are_squeezed_like_the_picture():
    model, masks = tower(), painted((slice(0, 8), slice(0, 8)))
    large = torch.nn.functional.interpolate(masks, scale_factor=4, mode="nearest")
    assert torch.equal(model.allowed(large), model.allowed(masks))


@pytest.mark.parametrize("changes, name", [({"patch": 5}, "patch"), ({"heads": 5}, "heads"), ({"size": 0}, "size"), ({"stem": (8, 8, 8)}, "patch")])
def test_towers_that_cannot_be(changes, name):
    with pytest.raises(ValueError, match=name): PLAIN.override(**changes)


def test_wrong_pictures_and_masks_are_named():
    for images, masks, said in ((torch.zeros(1, 3, 20, 20), None, "images"), (torch.zeros(1, 1, 16, 16), None, "images"), (torch.zeros(2, 3, 16, 16), torch.zeros(1, 2, 16, 16), "masks"),
                                (torch.zeros(1, 3, 16, 16), torch.zeros(1, 16, 16), "masks")):
        with pytest.raises(ValueError, match=said): tower()(images, masks)


# ---- CLIP from a folder

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    half = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    letters = "abcdefghijklmnopqrstuvwxyz."
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=half | {"vocab_size": len(tokens), "bos_token_id": 0, "eos_token_id": 1}, vision_config=half | {"image_size": 28, "patch_size": 7},
                                                           projection_dim=16)).eval()
    model.save_pretrained(path)
    (path / "vocab.json").write_text("{" + ", ".join(f'"{token}": {number}' for number, token in enumerate(tokens)) + "}")
    (path / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizerFast(str(path / "vocab.json"), str(path / "merges.txt")).save_pretrained(path)
    return path, model


@torch.no_grad()
def test_a_folder_of_transformers_fills_our_tower(folder):
    path, theirs = folder
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    expected = theirs.visual_projection(theirs.vision_model(pixel_values=images).pooler_output)
    assert torch.allclose(load_tower_folder(path)(images)[0], expected, atol=1e-5)


@torch.no_grad()
def test_a_local_clip_is_asked_for_pictures_parts_and_texts(folder):
    path, theirs = folder
    clip = LocalClip(path)
    assert abs(clip.scale - theirs.logit_scale.exp().item()) < 1e-3 and clip.width == 16
    picture = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(2)) * 2 - 1
    whole, parts = clip.pictures(picture, torch.full((1, 2, 10, 15), 4.0))
    assert whole.shape == (1, 16) and torch.allclose(parts[:, 0], whole, atol=1e-5)
    assert clip.texts(["a fox", "fox"]).shape == (2, 16)
    with pytest.raises(ValueError, match="prompts.*77 tokens.*number 1"): clip.texts(["fox", "fox " * 40])


def test_a_folder_without_a_tensor_is_refused(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file
    path = tmp_path / "less"
    shutil.copytree(folder[0], path)
    tensors = load_file(path / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if "layers.1.self_attn.k_proj.weight" not in name or "vision" not in name}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="layers.1.attention.qkv.weight"): load_tower_folder(path)
    with pytest.raises(ValueError, match="path"): load_tower_folder(tmp_path / "nowhere")


def test_the_papers_tower_has_clips_number_of_parameters():
    with torch.device("meta"): model = VisionTower(TOWERS["ViT-L/14-336"])
    assert sum(p.numel() for p in model.parameters()) == 304_293_888 and len(model.authors_keys()) == len(model.state_dict())


# ---- the small model

def test_what_is_said_is_a_part_of_what_there_is():
    data, spoken = NamedEmoji(EmojiConfig(seed=3), count=400), {number: word for word, number in vocabulary().items()}
    indices = range(0, 200)
    batch, scenes = data.__getitems__(indices), emoji_scenes(indices, EmojiConfig(seed=3))
    lengths = []
    for row, ids in enumerate(batch["ids"].tolist()):
        said = {spoken[number] for number in ids if number}
        names = {word for noun in scenes.noun[row, :scenes.count[row]].tolist() for word in words_of(nouns()[noun])}
        names |= {word + ending for word in names for ending in ("s", "es")} | {word[:-1] + "ies" for word in names}
        allowed = names | set(COLOURS) | {word for word in words_of(BACKGROUNDS[scenes.background[row]])} | {"background"}
        if not (scenes.same[row] and scenes.count[row] > 1): assert said <= allowed, (said, allowed)
        assert said
        lengths.append(len(said))
    assert min(lengths) == 1 and max(lengths) >= 5 and torch.equal(batch["x0"][:3], data.__getitems__(indices)["x0"][:3])
    assert 10 < sum({spoken[number] for number in ids if number} <= {*" ".join(BACKGROUNDS).split(), "background"} for ids in batch["ids"].tolist()) < 35


def test_the_contrast_pulls_pictures_to_their_words_and_counts_equal_words_as_right():
    torch.manual_seed(0)
    model = EmojiClip(TowerConfig(width=24, heads=2, hidden=24, layers=1, stem=(8, 16)))
    batch = NamedEmoji(count=100).__getitems__(range(6))
    def loss(ids): return clip_loss(model, batch | {"ids": ids}, Draws(torch.Generator().manual_seed(0))).mean().item()
    same = batch["ids"][:1].expand(6, -1)
    assert abs(loss(same) - math.log(6)) < 0.05  # all say the same: nothing can be told apart, and every picture is as right
    twice = batch["ids"].clone(); twice[3] = twice[0]
    quiet = type("Quiet", (), {"uniform": lambda self, x, low, high: torch.zeros(len(x)), "normal": lambda self, x: torch.zeros_like(x)})()
    cosines = torch.nn.functional.normalize(model.picture(batch["x0"])[0], dim=-1) @ torch.nn.functional.normalize(model.words(twice).sum(1), dim=-1).T
    same = torch.eye(6); same[0, 3] = same[3, 0] = 1
    target, logits = same / same.sum(1, keepdim=True), cosines * model.scale
    expected = -((target * logits.log_softmax(1)).sum(1) + (target * logits.log_softmax(0)).sum(1)) / 2
    assert torch.allclose(clip_loss(model, batch | {"ids": twice}, quiet), expected, atol=1e-5)


def test_the_shipped_model_names_parts_far_above_chance_and_knows_its_words():
    model = load_clip()
    found = named_parts(model, 150)
    assert found["things"][1] > 0.4 and not any(parameter.requires_grad for parameter in model.parameters())  # chance 5 / 567
    assert torch.allclose(model.texts(["red fox"])[0], model.texts(["red"])[0] + model.texts(["fox"])[0], atol=1e-5) and not model.texts([""]).any()
    for wrong, said in ((["fox", "foxx"], "foxx.*near it: fox"), (["fox " * (LONGEST + 1)], "at most 16 words")):
        with pytest.raises(ValueError, match=said): model.texts(wrong)
