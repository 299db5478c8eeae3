"""Regions of words: colours of a painting, phrases, feature maps."""
import math
import warnings

from extras import need

need("data")

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_papers.topics import painted_words
from diffusion_papers.topics.painted_words import Stroke, at_map_size, paint_levels, painted_regions, regions_of_colours, strokes_of_painting
from diffusion_papers.topics.prompts import Encoders, encode_prompts
from diffusion_papers.topics.text import BagOfWords, load_tower
from diffusion_papers.topics.text_unet import token_places
from words import Words


@pytest.fixture
def encoders():
    tower = load_tower()
    return Encoders(Words(), BagOfWords(tower), tower.image)


# ---- paintings

def flat(*colours, side=8):
    "Upright stripes of equal width, as a tensor in [-1, 1]."
    return torch.stack([paint_levels(colour) for colour in colours], 1)[:, None].repeat_interleave(side, 2).expand(3, side, -1) / 127.5 - 1


def test_colours_have_names_and_numbers():
    assert paint_levels(" Red ").tolist() == [255, 0, 0] and paint_levels("#0a0B0c").tolist() == [10, 11, 12] and paint_levels("yellow").tolist() == [255, 255, 0]
    for wrong in ("reddish", "#fff", "#gg0000", 3):
        with pytest.raises(ValueError, match="colour: expected one of red"): paint_levels(wrong)


def test_every_colour_gets_its_pixels():
    red, blue = regions_of_colours(flat("red", "white", "blue", "red"), ["red", "blue"])
    assert red[0].tolist() == [1] * 8 + [0] * 16 + [1] * 8 and blue[0].tolist() == [0] * 16 + [1] * 8 + [0] * 8 and red.shape == (8, 32)
    grey = regions_of_colours(flat("grey", "black"), ["grey"], ground="black")
    assert grey[0, 0].tolist() == [1] * 8 + [0] * 8


def test_soft_edges_go_to_the_nearest_colour_within_the_tolerance():
    edge = torch.tensor([[255.0] * 4, [0, 100, 160, 255], [0, 100, 160, 255]])[:, None] / 127.5 - 1
    assert regions_of_colours(edge, ["red"])[0, 0].tolist() == [1, 1, 0, 0]
    with pytest.warns(UserWarning, match=r"50.0% of the pixels .* most of them are #ff(6464|a0a0)"): strict = regions_of_colours(edge, ["red"], tolerance=100)
    assert strict[0, 0].tolist() == [1, 0, 0, 0]
    with pytest.warns(UserWarning): assert regions_of_colours(edge, ["red"], tolerance=134)[0, 0].tolist() == [1, 0, 0, 0]  # 100 * sqrt(2) is 141
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regions_of_colours(edge, ["red"], tolerance=142)


def test_a_colour_that_nobody_named_is_told():
    with pytest.warns(UserWarning, match="33.3% of the pixels have none of the colours and are not painted; most of them are #0000ff"):
        assert regions_of_colours(flat("red", "blue", "white"), ["red"])[0, 0].sum() == 8


def test_a_colour_near_none_is_not_painted_although_one_is_nearest():
    with pytest.warns(UserWarning, match="most of them are #400000"):
        assert regions_of_colours(flat("red", "#400000", "white"), ["red"], tolerance=150)[0, 0].tolist() == [1] * 8 + [0] * 16


def test_what_is_transparent_is_ground(tmp_path):
    pixels = np.zeros((4, 8, 4), np.uint8)
    pixels[:, :4] = (255, 0, 0, 255)
    pixels[:, 4:] = (255, 0, 0, 20)  # red, but nearly transparent
    Image.fromarray(pixels).save(tmp_path / "painting.png")
    assert regions_of_colours(tmp_path / "painting.png", ["red"])[0, 0].tolist() == [1] * 4 + [0] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert regions_of_colours(tmp_path / "painting.png", ["red"], ground="black")[0, 0].tolist() == [1] * 4 + [0] * 4


def test_strokes_have_phrases_and_occurrences():
    first, second = strokes_of_painting(flat("red", "blue", "white"), {"blue": " a car:2 ", "red": "ratio 3:x"})
    assert (first.phrase, first.occurrence, second.phrase, second.occurrence) == ("a car", 2, "ratio 3:x", 1)
    assert first.region[0].tolist() == [0] * 8 + [1] * 8 + [0] * 8 and first.strength == 1


@pytest.mark.parametrize("phrases, options, words", [
    ({}, {}, "colours"), ({"green": "car"}, {"tolerance": 100}, "no pixel is green"), ({"red": "a", "#ff0000": "b"}, {}, "different"), ({"white": "car"}, {}, "ground"),
    ({"red": "car"}, {"tolerance": -1}, "tolerance"), ({"red": "car"}, {"tolerance": 500}, "tolerance"), ({"red": "car"}, {"ground": "snow"}, "colour")])
@pytest.mark.filterwarnings("ignore:painting")
def test_wrong_paintings_are_refused(phrases, options, words):
    with pytest.raises(ValueError, match=words): strokes_of_painting(flat("red", "white"), phrases, **options)


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="painting"): strokes_of_painting(tmp_path / "none.png", {"red": "car"})
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="painting"): strokes_of_painting(tmp_path / "text.png", {"red": "car"})
    with pytest.raises(ValueError, match="painting"): strokes_of_painting(torch.zeros(1, 4, 4), {"red": "car"})


# ---- phrases and maps

def test_regions_are_reduced_by_means():
    region = torch.zeros(1, 2, 16, 16); region[0, 1, :5, :5] = 1
    small = at_map_size(region, (8, 8))
    assert small.shape == (1, 1, 64, 2) and small[0, 0, :, 1].reshape(8, 8)[2, 2] == pytest.approx(0.25) and small[..., 1].mean() == region[0, 1].mean()
    assert at_map_size(region, (3, 5)).shape == (1, 1, 15, 2)


def test_phrases_are_painted_in_both_encoders(encoders):
    text = "a red car, and a blue car"
    prompt = encode_prompts(encoders, [text] * 2)
    region = torch.zeros(64, 64); region[:, :32] = 1
    places = token_places(prompt)
    painted = painted_regions(prompt, text, [Stroke("car", region, occurrence=2), Stroke("red car", region, 0.5)], encoders, (32, 32))
    assert painted.shape[0] == 2 and painted.shape[2:] == (32, 32)
    words = painted[0, places["text"]].amax((1, 2)).tolist()
    assert words == [0, 0.5, 0.5, 0, 0, 0, 1.0]
    assert painted[0, places["clip"]].amax((1, 2)).gt(0).sum() == 3 and not painted[0, 0].any()
    assert painted[0, places["text"]][6, :, :16].min() == 1 and painted[0, places["text"]][6, :, 16:].max() == 0
    both = painted_regions(prompt, text, [Stroke("red", region), Stroke("red", 1 - region, 0.25)], encoders, (32, 32))[0, places["text"]][1]
    assert both[:, :16].unique().tolist() == [1.0] and both[:, 16:].unique().tolist() == [0.25]  # what was painted before stays
    with pytest.raises(ValueError, match="bus"): painted_regions(prompt, text, [Stroke("bus", region)], encoders, (32, 32))
    with pytest.raises(ValueError, match="proportions"): painted_regions(prompt, text, [Stroke("car", region[:32])], encoders, (32, 32))


@pytest.mark.parametrize("options, words", [(dict(region=torch.full((4, 4), 1.5)), "region"), (dict(region=torch.full((4, 4), math.nan)), "region"), (dict(region=torch.zeros(4)), "region"),
                                            (dict(region=[[1]]), "region"), (dict(strength=-1.0), "strength"), (dict(occurrence=0), "occurrence")])
def test_wrong_strokes_are_refused(options, words):
    with pytest.raises(ValueError, match=words): Stroke(**(dict(phrase="car", region=torch.zeros(4, 4)) | options))


# ---- the canvas

def parts_of(box):
    "Every widget inside a box."
    yield box
    for child in getattr(box, "children", ()): yield from parts_of(child)


def test_a_canvas_draws_a_region_for_each_phrase_and_paints():
    widgets = pytest.importorskip("ipywidgets")
    asked = []
    def paint(prompt, strokes, amount, callback):
        for step in range(5): callback(step, None)
        asked.append((prompt, {stroke.phrase: stroke.region for stroke in strokes}, amount))
        return torch.zeros(2, 3, 8, 8)
    parts = list(parts_of(painted_words.canvas(paint, {"a car and a tree": ["car", "tree"], "an owl": ["owl"]}, steps=5, side=4)))
    prompt, phrase = (part for part in parts if isinstance(part, widgets.Combobox))
    squares = [part for part in parts if isinstance(part, widgets.ToggleButton)]
    buttons = {part.description: part for part in parts if isinstance(part, widgets.Button)}
    [bar] = [part for part in parts if isinstance(part, widgets.IntProgress)]
    squares[5].value = True
    phrase.value = "tree"
    assert not any(square.value for square in squares)
    buttons["right"].click()
    assert [square.value for square in squares] == [False, False, True, True] * 4
    phrase.value = "car"
    assert [square.value for square in squares].index(True) == 5
    buttons["paint"].click()
    text, regions, amount = asked[0]
    assert text == "a car and a tree" and amount == 1.0 and bar.value == 5 and not buttons["paint"].disabled
    assert regions["car"].sum() == 1 and regions["car"][1, 1] == 1 and torch.equal(regions["tree"], painted_words.half_of("right", 4))
    prompt.value = "an owl"
    buttons["paint"].click()
    assert phrase.value == "owl" and asked[1][:2] == ("an owl", {}) and not any(square.value for square in squares)
    buttons["upper"].click(); buttons["clear"].click(); buttons["paint"].click()
    assert asked[2][1] == {}


def test_a_canvas_says_what_was_wrong(capsys):
    widgets = pytest.importorskip("ipywidgets")
    def paint(*_): raise ValueError("phrase: not there")
    parts = list(parts_of(painted_words.canvas(paint, {"a car": ["car"]})))
    [button] = [part for part in parts if getattr(part, "description", "") == "paint"]
    button.click()
    assert "phrase: not there" in capsys.readouterr().out + "".join(str(part.outputs) for part in parts if isinstance(part, widgets.Output)) and not button.disabled


@pytest.mark.parametrize("name, corner", [("left", (0, 0)), ("right", (0, 3)), ("upper", (0, 3)), ("lower", (3, 0))])
def test_halves(name, corner):
    half = painted_words.half_of(name, 4)
    assert half.sum() == 8 and half[corner] == 1 and half.tolist() in (half.flip(0).tolist(), half.flip(1).tolist())
