"""ODISE: names and their logits, grounding, fusion, the loss over processes, what is saved, released weights, users' pictures and vocabularies."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from extras import need

need("train", "data")
from diffusion_papers import odise
from diffusion_papers.core.training import Draws
from diffusion_papers.odise import (
    CONFIGS, agreement, authors_names, build, class_logits, cosine_logits, evaluate, fused, generate_data, grounding_loss, kept_maps, load_authors_checkpoint, load_data, load_model, look,
    named, odise_loss, output_loss, over_names, save_model, segment, segment_file, targets_of, train, with_no_object)
from diffusion_papers.topics.mask_decoder import MaskGeneratorConfig, Prediction
from diffusion_papers.topics.panoptic_data import Vocabulary, read_ids
from diffusion_papers.topics.segmentation import scores
from diffusion_papers.workbench.checkpoints import CheckpointError, digest, load_checkpoint
from test_distributed import launcher

SMALL = CONFIGS["cpu"].override(**{"pool": 64, "generator": MaskGeneratorConfig(channels=(16, 16), width=16, heads=2, queries=5, hidden=16, pixel_hidden=16, layers=2), "training.steps": 3, "training.batch_size": 4})
CAPTIONED = SMALL.override(**{"supervision": "caption", "generator.classes": 2})


def seeded(seed=0): return torch.Generator().manual_seed(seed)
def draws(seed=0): return Draws(seeded(seed))


# ---- names

def test_a_class_has_the_largest_logit_of_its_names_and_no_object_comes_last():
    vectors, texts, owners = torch.randn(3, 4, 8, generator=seeded()), torch.randn(6, 8, generator=seeded(1)), torch.tensor([0, 1, 1, 1, 2, 2])
    logits = class_logits(vectors, texts, owners, 7.0, texts[:1])
    cosine = torch.nn.functional.cosine_similarity(vectors[:, :, None], texts, dim=-1) * 7
    assert torch.allclose(logits[..., :3], torch.stack([cosine[..., 0], cosine[..., 1:4].amax(-1), cosine[..., 4:].amax(-1)], -1), atol=1e-5)
    assert torch.allclose(logits[..., 3], cosine[..., 0], atol=1e-5) and class_logits(vectors, texts, owners, 7.0).shape == (3, 4, 3)
    mixed = torch.tensor([1, 0, 2, 1, 0, 2])
    assert torch.allclose(over_names(cosine, mixed)[..., 0], cosine[..., [1, 4]].amax(-1), atol=1e-5)


def test_fusion_has_its_limits_its_weights_and_no_underflow():
    own, clip, seen = torch.randn(4, 6, generator=seeded(), dtype=torch.float64), torch.randn(4, 6, generator=seeded(1), dtype=torch.float64), torch.tensor([1, 0, 1, 0, 0, 1]).bool()
    assert torch.allclose(fused(own, clip, seen, 0, 0), own.log_softmax(-1)) and torch.allclose(fused(own, clip, seen, 1, 1), clip.log_softmax(-1))
    both = fused(own, clip, seen, 0.3, 0.7)
    weight = torch.where(seen, 0.3, 0.7).double()
    assert torch.allclose(both, (1 - weight) * own.softmax(-1).log() + weight * clip.softmax(-1).log())
    probabilities = with_no_object(both, torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64))
    assert torch.allclose(probabilities.sum(-1), torch.ones(4, dtype=torch.float64)) and torch.equal(probabilities[:, -1], torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64))
    assert fused(torch.tensor([[300.0, -300.0]]), torch.tensor([[-300.0, 300.0]]), torch.tensor([True, False]), 0.3, 0.7).isfinite().all()
    for name, pair in {"alpha": (-0.1, 0.5), "beta": (0.5, 1.1)}.items():
        with pytest.raises(ValueError, match=name): fused(own, clip, seen, *pair)


# ---- captions

def test_agreement_is_a_soft_maximum_over_masks_and_a_mean_over_words():
    masks, words = torch.randn(2, 3, 4, generator=seeded(), dtype=torch.float64), torch.randn(2, 5, 4, generator=seeded(1), dtype=torch.float64)
    found = agreement(masks, words, 6.0)
    for m in range(2):
        for n in range(2):
            similar = cosine_logits(masks[m], words[n], 6.0)  # masks down, words across
            assert abs(found[m, n] - (similar.softmax(0) * similar).sum(0).mean()) < 1e-12
    assert found.max() <= 6


def test_grounding_contrasts_both_ways_and_does_not_count_pictures_without_words():
    masks, words, there = torch.randn(4, 3, 6, generator=seeded()), torch.randn(4, 2, 6, generator=seeded(1)), torch.ones(4, 2, dtype=torch.bool)
    g = agreement(masks, words, 5.0)
    own = torch.arange(4)
    expected = 0.5 * (torch.nn.functional.cross_entropy(g, own) + torch.nn.functional.cross_entropy(g.T, own))
    assert torch.allclose(grounding_loss(masks, words, there, 5.0), expected, atol=1e-6)
    there[1:3] = False
    row, column = (torch.nn.functional.cross_entropy(table, own, reduction="none") for table in (g, g.T))
    kept = torch.tensor([1.0, 0, 0, 1])
    assert torch.allclose(grounding_loss(masks, words, there, 5.0), 0.5 * ((row * kept).sum() / 2 + (column * kept).mean()), atol=1e-6)
    assert grounding_loss(masks, words, there & False, 5.0).isfinite() and grounding_loss(masks[:1], words[:1], there[:1], 5.0) == 0


# ---- the loss

def given(batch, labels):
    masks = torch.zeros(batch, 2, 16, 16, dtype=torch.bool)
    masks[:, 0, 3:13, 2:7] = masks[:, 1, 3:13, 10:14] = True
    return {"x0": torch.zeros(batch, 3, 16, 16), "label": torch.tensor(labels).expand(batch, -1), "masks": masks}


def answered(batch, config=SMALL):
    "Masks and logits of queries that are right, and what the loss says."
    paint = torch.cat([12.0 * batch["masks"].float() - 6, torch.full((len(batch["x0"]), 1, 16, 16), -6.0)], 1)
    said = torch.full((len(batch["x0"]), 3, 4), -4.0)
    for row, label in enumerate([*batch["label"][0].tolist(), 3]): said[:, row, label] = 4 - row
    def loss(masks=paint, logits=said, config=config, seed=0):
        return output_loss(Prediction(masks, None, None, None), logits, targets_of(batch, draws(seed), config), config).item()
    return paint, said, loss


def test_the_loss_of_an_output_weighs_names_and_masks_and_knows_no_order():
    batch = given(2, [0, 2])
    paint, said, loss = answered(batch)
    only = lambda *weights: loss(config=replace(SMALL, weights=weights))
    assert abs(loss() - (2 * only(1.0, 0.0, 0.0) + 5 * only(0.0, 1.0, 0.0) + 5 * only(0.0, 0.0, 1.0))) < 0.05 * loss()
    order = [2, 1, 0]
    assert abs(loss(paint[:, order], said[:, order]) - loss()) < 0.2 * loss()
    assert loss(logits=said[..., [2, 1, 0, 3]]) > 1.5 * loss() and loss(masks=paint.roll(3, 3)) > 2 * loss()
    weights = torch.tensor([1.0, 1, 1, 0.1])
    expected = torch.nn.functional.cross_entropy(said.flatten(0, 1), torch.tensor([0, 2, 3] * 2), weights)
    assert abs(only(1.0, 0.0, 0.0) - expected) < 1e-5


def test_targets_that_are_not_there_do_not_count():
    assert targets_of(given(2, [0, -1]), draws(), SMALL).count == 2 and targets_of(given(2, [-1, -1]), draws(), SMALL).count == 0
    empty = given(2, [-1, -1])
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    masks = torch.zeros(2, 3, 16, 16, requires_grad=True)
    value = output_loss(Prediction(masks, None, None, None), logits, targets_of(empty, draws(), SMALL), SMALL)
    value.backward()
    assert torch.isfinite(value) and (masks.grad is None or not masks.grad.any()) and logits.grad.abs().sum() > 0


def test_captions_make_all_targets_objects():
    labels = targets_of(given(2, [0, 2]), draws(), CAPTIONED).labels
    assert labels.tolist() == [[0, 0], [0, 0]] and targets_of(given(2, [3, -1]), draws(), CAPTIONED).labels.tolist() == [[0, -1], [0, -1]]


@pytest.mark.parametrize("config", [SMALL, CAPTIONED, SMALL.override(caption="implicit")], ids=["label", "caption", "implicit"])
def test_training_moves_every_trained_part_and_no_frozen_one(config):
    before = [digest(part.state_dict(), {}) for part in build(config).equipment.at("cpu")]
    torch.manual_seed(0)
    model, first = train(config, device="cpu"), build(config)
    assert [digest(part.state_dict(), {}) for part in model.equipment.at("cpu")] == before
    still = [name for (name, now), was in zip(model.named_parameters(), first.parameters()) if torch.equal(now, was)]
    if config.caption == "implicit": still = [name for name in still if not name.startswith("captioner.")]  # its projections move once its gates are open
    assert not [name for name in still if "queries" not in name and "log_scale" not in name], still


def test_kept_maps_train_like_maps_that_are_computed():
    data = load_data(SMALL)
    kept = kept_maps(SMALL, 8)
    model = build(SMALL)
    names, numbers = named(model, data.vocabulary), [0, 3, 5, 6]
    with torch.no_grad(): model.null.copy_(torch.randn(model.null.shape, generator=seeded()))
    live, stored = (odise_loss(model, source.__getitems__(numbers), draws(), names) for source in (data, kept))
    assert torch.allclose(live, stored, rtol=2e-3) and live.shape == (4,) and (live == live[0]).all()
    for wrong in (SMALL.override(caption="implicit"), SMALL.override(tile=16), SMALL.override(seen=64)):
        with pytest.raises(ValueError, match="config"): kept_maps(wrong, 4)


SHARED = """
import functools, sys, torch
from diffusion_papers.core.training import fit
from diffusion_papers.odise import build, kept_maps, load_data, named, odise_loss, Names
from test_odise import CAPTIONED, SMALL
config = {"label": SMALL, "caption": CAPTIONED}[sys.argv[2]]
data = load_data(config)
model = build(config).double()
vocabulary = data.vocabulary if sys.argv[2] == "label" else None
_, clip = model.equipment.at("cpu")
names = named(model, data.vocabulary)
if sys.argv[2] == "label":
    with torch.no_grad(): model.null.copy_(torch.randn(model.null.shape, generator=torch.Generator().manual_seed(0)))
names = names._replace(own=names.own.double(), clip=names.clip.double())
class Double(torch.utils.data.Dataset):
    vocabulary, phrases = data.vocabulary, data.phrases
    def __len__(self): return 64
    def __getitems__(self, numbers):
        batch = kept.__getitems__(numbers)
        return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()} | ({"words": batch["words"] % 30} if "words" in batch else {})
kept = kept_maps(config, 64)
import diffusion_papers.odise as odise
fit(model, functools.partial(odise_loss, names=names), Double(), config.training, folder=sys.argv[1], device="cpu")
"""


@pytest.mark.parametrize("supervision", ["label", "caption"])
def test_two_processes_train_as_one(tmp_path, supervision):
    program = tmp_path / "program.py"
    program.write_text(SHARED)
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = subprocess.run([*(launcher(processes) if processes > 1 else [sys.executable]), str(program), str(folder), supervision], capture_output=True, text=True, timeout=300,
                              env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        found.append({name: value for name, value in load_checkpoint(folder / "run.safetensors")[0].items() if name.startswith("model.")})
    one, two = found
    assert one.keys() == two.keys() and all(torch.allclose(one[name].double(), two[name].double(), atol=1e-8) for name in one)


# ---- files

def test_a_file_has_the_trained_part_and_the_names_and_nothing_frozen(tmp_path):
    model = train(SMALL, device="cpu")
    save_model(tmp_path / "model.safetensors", model)
    again = load_model(tmp_path / "model.safetensors")
    assert again.taught == model.taught and len(Vocabulary.from_dict(again.taught)) == 423
    picture = load_data(SMALL, "test")[0]["x0"]
    assert torch.equal(look(model, picture[None]).masks, look(again, picture[None]).masks)
    assert not any(name.startswith(("equipment", "denoiser")) for name in again.state_dict())


@pytest.mark.parametrize("name, numbers", [("label", 28_067_009), ("caption", 28_066_755)])
def test_released_weights_load_by_name_and_their_number_is_the_papers(tmp_path, name, numbers):
    manifest = json.loads((Path(__file__).parent / "manifests" / f"odise-{name}.json").read_text())
    with torch.device("meta"): model = odise.Odise(CONFIGS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == numbers
    shapes = {theirs: list(model.state_dict()[ours].shape) for ours, theirs in authors_names(model)}
    buffers = {"criterion.empty_weight"}
    assert shapes == {key: shape for key, shape in manifest.items() if key not in buffers} and len(model.state_dict()) == len(shapes)


def test_a_released_file_is_read_and_another_one_is_refused_by_name(tmp_path):
    tiny = CONFIGS["label"].override(generator=MaskGeneratorConfig(channels=(16,) * 4, width=16, heads=2, queries=4, hidden=16, pixel_hidden=16, layers=3), groups=4)
    model = build(tiny)
    tensors = {theirs: torch.randn_like(model.state_dict()[ours]) for ours, theirs in authors_names(model)} | {"criterion.empty_weight": torch.ones(134)}
    torch.save({"model": tensors, "iteration": 3}, tmp_path / "label.pth")
    found = load_authors_checkpoint(tmp_path / "label.pth", config=tiny)
    assert all(torch.equal(found.state_dict()[ours], tensors[theirs]) for ours, theirs in authors_names(found))
    with pytest.raises(RuntimeError, match="taught"): odise.taught(found)
    captioned = tiny.override(**{"supervision": "caption", "generator.classes": 2})
    with pytest.raises(CheckpointError, match="word_head"): load_authors_checkpoint(tmp_path / "label.pth", config=captioned)
    torch.save({"model": {name: value for name, value in tensors.items() if "query_feat" not in name}}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match="queries"): load_authors_checkpoint(tmp_path / "less.pth", config=tiny)
    torch.save({"model": {"backbone.weight": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no checkpoint of ODISE"): load_authors_checkpoint(tmp_path / "other.pth")
    torch.save({"model": tensors | {"more": torch.ones(1)}}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match="more"): load_authors_checkpoint(tmp_path / "more.pth", config=tiny)


# ---- users

@pytest.fixture(scope="module")
def small(): return train(SMALL, device="cpu")


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 8, 8), (3, 50, 33), (3, 20, 300), (3, 700, 41)])
def test_pictures_of_any_size_come_back_at_their_size(small, shape):
    picture = torch.rand(shape, generator=seeded()) * 2 - 1
    found = segment(small, picture, "fox, cat; teapot; stuff: wood")
    assert found.panoptic.ids.shape == shape[1:] and found.vocabulary.things == (True, True, False)
    assert sum(row["area"] for row in found.rows) + int((found.panoptic.ids == 0).sum()) == shape[1] * shape[2]


def test_bad_vocabularies_and_pictures_are_named_before_the_work(small, tmp_path):
    picture = torch.zeros(3, 32, 32)
    for words, said in (("", "expected one or more"), ("fox;; cat", "class 1"), ("fox, ", "blank"), ("foxx", "foxx.*near it: fox"), ("a fox " * 20, "at most 16 words")):
        with pytest.raises(ValueError, match=said): segment(small, picture, words)
    with pytest.warns(UserWarning, match="fox"): segment(small, picture, "fox; fox, teapot")
    for wrong, said in (({"score": 1.5}, "score"), ({"overlap": -1}, "overlap"), ({"alpha": 2}, "alpha"), ({"side": 4}, "side")):
        with pytest.raises(ValueError, match=said): segment(small, picture, "fox", **wrong)
    with pytest.raises(ValueError, match="picture"): segment(small, torch.zeros(3, 4, 60), "fox")
    with pytest.raises(TypeError, match="vocabulary"): segment(small, picture, ["fox"])
    with pytest.raises(ValueError, match="words"): segment_file(tmp_path / "none.png", words=" ", model=small)
    for options in ({"on": "ade"}, {"path": "somewhere"}):
        with pytest.raises(ValueError, match="path"): generate_data(small, tmp_path / "made", **options)
    with pytest.raises(ValueError, match="picture"): segment(small, 300 * torch.ones(3, 32, 32), "fox")
    untaught = build(SMALL)
    untaught.taught = None
    with pytest.raises(RuntimeError, match="taught"): segment(untaught, picture, "fox")
    assert len(segment(small, picture, "fox").vocabulary) == 1


def test_the_image_text_model_weighs_less_for_names_that_had_masks(small):
    words = Vocabulary.parse("fox; whale; stuff: grass")
    small_words = Vocabulary.parse("fox; stuff: grass")
    seen, taught = look(small, load_data(SMALL, "test")[3]["x0"][None]), small.taught
    small.taught = small_words.to_dict()
    own, theirs, none = odise.opinions(small, seen, named(small, words))
    expected = with_no_object(fused(own, theirs, torch.tensor([True, False, True]), 0.3, 0.7), none)
    found = odise.answers(small, seen, words)
    small.taught = taught
    assert torch.allclose(found, expected, atol=1e-6) and not torch.allclose(found, with_no_object(fused(own, theirs, torch.tensor([False, True, False]), 0.3, 0.7), none), atol=1e-4)
    parts = odise._parts_of(Vocabulary.parse("fox; whale; stuff: grass; stuff: sand"), small_words)
    assert {name: None if chosen is None else chosen.tolist() for name, chosen in parts.items()} == {
        "all": None, "things seen": [True, False, False, False], "things held out": [False, True, False, False], "stuff": [False, False, True, True]}


def test_masks_lie_where_the_picture_is_and_not_its_frame(small, monkeypatch):
    def seen(model, images, maps=None):
        masks = torch.full((1, 2, 16, images.shape[3] // 2), -9.0)
        masks[0, 0, :, :11], masks[0, 1, :, 11:] = 9, 9  # the picture, 44 wide, ends at 22; its frame at 24
        return odise.Look(masks, torch.randn(1, 2, 16), torch.randn(1, 2, 64), None)
    monkeypatch.setattr(odise, "look", seen)
    monkeypatch.setattr(odise, "answers", lambda *args, **options: torch.tensor([[[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]]]))
    ids = segment(small, torch.zeros(3, 64, 88), "fox; teapot").panoptic.ids
    assert (ids[:, :42] == 1).all() and (ids[:, 46:] == 2).all()


def test_a_file_is_segmented_and_three_files_come(small, tmp_path):
    from PIL import Image
    Image.new("LA", (60, 40), (120, 200)).save(tmp_path / "photo.png")
    lines = []
    found = segment_file(tmp_path / "photo.png", words="fox; stuff: wood", model=small, output=tmp_path / "found.png", say=lines.append)
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["size"] == [40, 60] and told["segments"] == found.rows and [part["names"] for part in told["classes"]] == [["fox"], ["wood"]]
    assert torch.equal(read_ids(tmp_path / "found_ids.png"), found.panoptic.ids) and (tmp_path / "found.png").is_file() and "void" in lines[-1]
    for output in ("photo.png", "photo.jpg"):
        with pytest.raises(ValueError, match="output"): segment_file(tmp_path / "photo.png", words="fox", model=small, output=tmp_path / output)


def test_pieces_of_a_measurement_add_up_to_the_whole(small, tmp_path):
    rows = evaluate(small, 12, size=5)
    made = generate_data(small, tmp_path / "made", count=12, size=4, device="cpu")
    total = made.__getitems__(range(12))["sums"].sum(0)
    assert scores(total) == {name: value for name, value in rows[0].items() if name != "classes of"} and [row["classes of"] for row in rows] == ["all", "things seen", "things held out", "stuff"]


@pytest.mark.parametrize("changes, name", [({"alpha": 1.5}, "alpha"), ({"steps": (1000,)}, "steps"), ({"steps": ()}, "steps"), ({"weights": (1.0, 2.0)}, "weights"), ({"size": 30}, "size"),
                                           ({"features": "tower", "caption": "implicit"}, "caption"), ({"supervision": "caption"}, "generator.classes"), ({"kept": (2, 4, 8)}, "generator.channels"),
                                           ({"generator.channels": (64, 32)}, "generator.channels"), ({"features": "clip"}, "features"), ({"training.accumulate": 2}, "training.accumulate")])
def test_configurations_that_cannot_be(changes, name):
    with pytest.raises(ValueError, match=name): CONFIGS["cpu"].override(**changes)


def test_what_a_user_must_bring_is_said():
    with pytest.raises(ValueError, match="data_path"): load_data(CONFIGS["label"])
    with pytest.raises(ValueError, match="frozen_path"): build(CONFIGS["label"]).equipment.at("cpu")
