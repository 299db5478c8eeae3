"""Scenes whose areas, places, colours and answers are known."""
import math
from dataclasses import fields

from extras import need

need("train")

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffusion_papers.topics.shapes_world import (ATTRIBUTES, COLOURS, MOST, SHAPES, TEXTURES, Factors, Judge, ShapesWorld, attributes, caption,
                                                  draw_scenes, hashed_uniform, judge_loss, judged, scene_factors)


def scene(**changes):
    "One circle in the middle of a dark picture, or what is said; the shade is 0."
    plain = dict(count=1, shape=0, colour=7, texture=0, size=1, radius=0.4, place=(0.0, 0.0), angle=0.0, background=0, shade=0.0) | changes
    whole, number = ("count", "background", "shade"), lambda name: torch.float64 if name in ("radius", "place", "angle", "shade") else torch.int64
    def of(name):
        value = torch.tensor(plain[name], dtype=number(name))
        if name in whole: return value[None]
        each = value.ndim > (name == "place")  # one for each object
        return (value if each else value.expand(MOST, *value.shape))[None]
    return Factors(*(of(field.name) for field in fields(Factors)))


def mixed(seed, index, place):
    "The finaliser of SplitMix64, in whole numbers."
    most = 2**64
    state = (index * 0x9E3779B97F4A7C15 + place * 0xD1B54A32D192ED03 + seed * 0x8CB92BA72F3D8DD7 + 0x2545F4914F6CDD1D) % most
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % most
    state = (state ^ state >> 27) * 0x94D049BB133111EB % most
    return ((state ^ state >> 31) >> 11) / 2**53


def test_random_numbers_are_a_function_of_seed_scene_and_place():
    found = hashed_uniform(5, np.array([3, 10**9]), 4)
    assert found.tolist() == [[mixed(5, index, place) for place in range(4)] for index in (3, 10**9)]
    many = hashed_uniform(0, np.arange(20_000), 2)
    assert np.histogram(many, 10, (0, 1))[0] == pytest.approx(4000, rel=0.1) and abs(np.corrcoef(many.T)[0, 1]) < 0.03


def test_factors_are_uniform_and_no_object_leaves_the_picture():
    factors = scene_factors(range(12_000))
    for name, options in (("shape", 6), ("colour", 8), ("texture", 3)):
        assert torch.bincount(getattr(factors, name).flatten()).tolist() == pytest.approx([36_000 / options] * options, rel=0.06)
    assert torch.bincount(factors.count).tolist()[1:] == pytest.approx([4000] * 3, rel=0.06)
    assert torch.bincount(factors.background).tolist() == pytest.approx([3000] * 4, rel=0.06)
    assert (factors.size[:, 1:] == 0).all() and torch.bincount(factors.size[:, 0]).tolist()[1:] == pytest.approx([6000] * 2, rel=0.06)
    for size, low, high in ((0, 0.2, 0.26), (1, 0.34, 0.42), (2, 0.42, 0.52)):
        radius = factors.radius[factors.size == size]
        assert (radius.min().item(), radius.max().item()) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))
    reach = factors.place.abs() + factors.radius[..., None]
    assert 0.94 < reach.max() <= 0.95
    assert (factors.angle.min().item(), factors.angle.max().item()) == (pytest.approx(-0.4, abs=1e-3), pytest.approx(0.4, abs=1e-3))
    assert not torch.equal(scene_factors(range(9), seed=1).place, factors.place[:9])


AREAS = {"circle": math.pi, "square": 1.7**2, "triangle": 1.65 * 0.825 / 0.866, "cross": 2 * 2 * 0.64 - 0.64**2, "ring": math.pi * (1 - 0.5**2),
         "star": 5 * 0.4**2 * (math.tan(math.pi / 5 - 0.94) + math.tan(0.94))}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_its_area_where_it_is(shape):
    place = torch.tensor([0.3, -0.2])
    mask = draw_scenes(scene(shape=SHAPES.index(shape), place=place.tolist(), angle=0.3), 200)[1][0, 0].double()
    assert mask.sum().item() * 0.01**2 == pytest.approx(AREAS[shape] * 0.4**2, rel=0.01)
    grid = (torch.arange(200) + 0.5) / 100 - 1
    centre = torch.stack([(mask.sum(0) * grid).sum(), (mask.sum(1) * grid).sum()]) / mask.sum()
    assert (centre - place).abs().max() < 0.01


def test_a_triangle_points_up_and_turns_to_the_right():
    "Its tip is 1.1 radii above the centre; an angle turns it clockwise, as y goes down."
    for angle in (0.0, 0.4):
        mask = draw_scenes(scene(shape=2, angle=angle), 400)[1][0, 0]
        tip = (mask > 0.5).nonzero()[0]
        assert ((tip + 0.5) / 200 - 1).tolist() == pytest.approx([-0.44 * math.cos(angle), 0.44 * math.sin(angle)], abs=0.02)


def test_the_first_object_is_in_front():
    picture, masks = draw_scenes(scene(count=3, colour=[0, 1, 2], radius=[0.2, 0.4, 0.6]), 100)
    ring = lambda low, high: ((torch.arange(100) + 0.5) / 50 - 1).expand(100, 100)
    distance = torch.hypot(ring(0, 0), ring(0, 0).T)
    for slot, (low, high) in enumerate(((0, 0.2), (0.2, 0.4), (0.4, 0.6))):
        inside = (distance > low + 0.03) & (distance < high - 0.03)
        assert (masks[0, slot][inside] == 1).all() and (masks[0, slot][(distance < low - 0.03) | (distance > high + 0.03)] == 0).all()
        assert picture[0][:, inside].mean(1) == pytest.approx(2 * torch.tensor(list(COLOURS.values())[slot]) - 1, abs=1e-5)
    assert masks.sum(1).max() <= 1 + 1e-5
    assert (draw_scenes(scene(count=2, radius=[0.2, 0.4, 0.6]), 50)[1][0, 2] == 0).all()


def test_textures_are_stripes_and_checks_in_units_of_the_radius():
    for row, column in ((20, 32), (20, 40), (37, 29)):
        u, v = (((number + 0.5) / 32 - 1) / 0.8 for number in (column, row))
        for texture, pattern in enumerate((None, math.sin(6 * u), math.sin(5 * u) * math.sin(5 * v))):
            bright = 1 if pattern is None else 0.725 + 0.275 * max(-1, min(1, 4 * pattern))
            pixel = draw_scenes(scene(texture=texture, colour=6, shape=1, radius=0.8), 64)[0][0, :, row, column]
            assert pixel.tolist() == pytest.approx([2 * channel * bright - 1 for channel in COLOURS["orange"]], abs=1e-5), TEXTURES[texture]


@pytest.mark.parametrize("background, level", [(0, lambda x, y: 0.05 + 0.2 * 0.7), (1, lambda x, y: 0.6 + 0.2 * 0.7),
                                               (2, lambda x, y: 0.15 + 0.1 * 0.7 + 0.3 * (y + 1)),
                                               (3, lambda x, y: 0.25 + 0.1 * 0.7 + 0.12 * math.copysign(1, math.sin(7 * x) * math.sin(7 * y)))])
def test_backgrounds_are_their_formulas(background, level):
    picture = draw_scenes(scene(background=background, shade=0.7, radius=0.05), 16)[0][0]
    for row, column in ((1, 2), (13, 4), (3, 14)):
        grey = level((column + 0.5) / 8 - 1, (row + 0.5) / 8 - 1)
        assert picture[:, row, column].tolist() == pytest.approx([2 * grey * tint - 1 for tint in (0.95, 1, 1.05)], abs=1e-5)


def test_a_world_is_its_scenes_in_their_range():
    world = ShapesWorld(count=50, seed=2)
    batch, factors = world.__getitems__([3, 7]), scene_factors([3, 7], 2)
    assert torch.equal(batch["x0"], draw_scenes(factors)[0]) and torch.equal(batch["class_label"], factors.shape[:, 0])
    assert torch.equal(world[7]["x0"], batch["x0"][1])
    pictures = world.__getitems__(list(range(50)))["x0"]
    assert pictures.min() >= -1 and pictures.max() <= 1 and pictures.max() > 0.8 and pictures.min() < -0.8


def test_captions_and_answers_say_what_is_there():
    factors = scene(count=2, shape=[3, 5, 0], colour=[0, 2, 1], texture=[1, 0, 2], size=[2, 0, 0], background=3)
    assert caption(factors, 0) == "a large red striped cross before a small blue star, on a tiled background"
    assert {name: value.tolist() for name, value in attributes(factors).items()} == {
        "shape": [3], "colour": [0], "texture": [1], "size": [1], "background": [3], "count": [1]}


def test_a_judge_is_trained_with_a_little_noise_and_all_its_answers():
    class Draws:
        def uniform(self, like, low, high): return torch.full((len(like),), low + 0.5 * (high - low))
        def normal(self, like): return torch.ones_like(like)
    seen, logits = [], {name: torch.randn(2, options, generator=torch.Generator().manual_seed(options)) for name, options in ATTRIBUTES.items()}
    batch = {"x0": torch.tensor([0.2, 0.99]).reshape(2, 1, 1, 1)} | {name: torch.tensor([0, 1]) for name in ATTRIBUTES}
    found = judge_loss(lambda images: seen.append(images) or logits, batch, Draws())
    assert seen[0].flatten().tolist() == pytest.approx([0.25, 1.0])
    wanted = sum(logits[name].logsumexp(1) - logits[name][[0, 1], [0, 1]] for name in ATTRIBUTES)
    torch.testing.assert_close(found, wanted)


def test_a_judge_sees_larger_pictures_reduced_and_answers_with_its_largest_logit():
    torch.manual_seed(0)
    judge, large = Judge(8, 12).eval(), torch.rand(2, 3, 64, 64) * 2 - 1
    small = (large[..., ::2, ::2] + large[..., 1::2, ::2] + large[..., ::2, 1::2] + large[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(judge.features(large), judge.body(small))
    logits = judge.heads["colour"](F.silu(judge.features(large)))
    assert judged(judge, large)["colour"].tolist() == logits.argmax(1).tolist()
