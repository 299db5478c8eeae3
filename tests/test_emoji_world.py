"""Scenes whose things, colours, captions, masks and answers are known."""
import math

from extras import need

need("train", "data")

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffusion_papers.topics.emoji_world import (
    BACKGROUNDS, CELLS, COLOURS, COUNTS, MOST, PLAIN, RELATIONS, TEXTURES, VENDORS, EmojiConfig, EmojiWorld, Judge, JudgedEmoji, Reading, Scenes, alignment,
    background_colours, caption, cell_answers, draw_emoji, emoji_scenes, emoji_table, ground_phrase, groups, held_out_pairs, hues, judge_loss, main_hue,
    mean_place, noun_number, noun_split, nouns, palette, palette_rows, phrase, plural, recoloured_rows, resizing_weights, sprites, textures, turned, with_article)
from diffusion_papers.core.training import Draws


def scene(**changes):
    "One apple in its own colour in the middle of a white picture, or what is said."
    plain = dict(count=1, noun=[noun_number("apple")] * MOST, colour=[-1] * MOST, relation=-1, same=False, background=0, said=True,
                 size=[0.5] * MOST, place=[[0.5, 0.5]] * MOST, shift=[0.0, 0.0]) | changes
    return Scenes(**{name: torch.tensor(value)[None] for name, value in plain.items()})


def test_table_and_splits_are_by_name():
    table = emoji_table()
    assert len(nouns()) == 558 and len(table["unmasked"]) == 144 and len(table["forty"]) == 40 and len(table["recoloured"]) == 60
    assert {noun["number"] for noun in table["nouns"]} == {"singular", "plural", "mass"}
    assert set(noun_split("masked")) | set(noun_split("unmasked")) == set(noun_split("all")) and len(noun_split("masked")) == 414
    by_group = [sum(noun["group"] == group for noun in table["nouns"] if noun["name"] in table["unmasked"]) for group in {noun["group"] for noun in table["nouns"]}]
    assert min(by_group) > 20  # each group is represented
    assert held_out_pairs().sum() == 60 and (held_out_pairs().sum(1) == (recoloured_rows() >= 0)).all()
    with pytest.raises(ValueError, match="name"): noun_number("apples")


@pytest.mark.parametrize("vendor", VENDORS)
def test_pictures_are_premultiplied_and_fill_their_square(vendor):
    pictures = sprites(vendor)
    assert pictures.shape == (558, 4, VENDORS[vendor], VENDORS[vendor]) and (pictures[:, :3] <= pictures[:, 3:] + 1e-6).all()
    wide, high = (pictures[:, 3].amax(axis) > 0.03 for axis in (1, 2))
    assert ((wide.sum(1) >= VENDORS[vendor] - 3) | (high.sum(1) >= VENDORS[vendor] - 3)).all()
    assert pictures[:, 3].mean((1, 2)).min() > 0.05


def test_both_vendors_draw_the_same_things():
    small = [F.adaptive_avg_pool2d(sprites(vendor), 8).flatten(1) for vendor in VENDORS]
    small = [F.normalize(part - part.mean(0), dim=1) for part in small]
    rank = (small[0] @ small[1].T).argsort(1, descending=True)
    top = (rank[:, :20] == torch.arange(558)[:, None]).any(1).float().mean()
    assert top > 0.5  # of 558: by chance 0.04


def test_turning_colours_keeps_value_and_chroma():
    colour = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0))
    new = turned(colour, 100.0)
    assert torch.allclose(new.amax(0), colour.amax(0)) and torch.allclose(new.amin(0), colour.amin(0), atol=1e-6)
    assert torch.allclose((hues(new) - hues(colour)) % 360, torch.tensor(100.0), atol=1e-2) and torch.allclose(turned(new, -100.0), colour, atol=1e-5)
    import colorsys
    for red, green, blue in ((0.9, 0.2, 0.1), (0.1, 0.8, 0.3), (0.3, 0.2, 0.7), (0.7, 0.1, 0.6)):
        assert hues(torch.tensor([red, green, blue])[:, None, None]).item() == pytest.approx(360 * colorsys.rgb_to_hsv(red, green, blue)[0], abs=1e-3)


def test_palette_has_the_colours_that_were_asked_for():
    rows = palette_rows(torch.tensor(noun_number("car")), torch.arange(7))
    found = [main_hue(palette()[row]).item() for row in rows]
    assert all(abs((hue - wanted + 180) % 360 - 180) < 8 for hue, wanted in zip(found, COLOURS.values()))
    assert palette_rows(torch.tensor(noun_number("panda")), torch.tensor(3)) == noun_number("panda") and len(palette()) == 558 + 420
    assert torch.equal(palette()[rows][:, 3], palette()[noun_number("car")][3].expand(7, -1, -1))  # the outline stays


def test_a_scene_does_not_depend_on_its_neighbours():
    alone, many = emoji_scenes([123], EmojiConfig(seed=4)), emoji_scenes(range(200), EmojiConfig(seed=4))
    for name, value in vars(alone).items(): assert torch.equal(value[0], getattr(many, name)[123])
    assert torch.equal(draw_emoji(alone, 32)[0][0], draw_emoji(many, 32)[0][123])
    assert not torch.equal(emoji_scenes(range(200)).noun, many.noun)


def test_contents_repeat_and_arrangements_do_not():
    few = emoji_scenes([3, 13, 23], EmojiConfig(contents=10))
    assert (few.noun == few.noun[:1]).all() and (few.colour == few.colour[:1]).all() and (few.background == few.background[:1]).all()
    assert len(few.place.unique(dim=0)) == 3


@pytest.mark.parametrize("most", [1, 2, 3])
def test_counts_relations_and_kinds(most):
    found = emoji_scenes(range(6000), EmojiConfig(most=most))
    assert torch.bincount(found.count, minlength=most + 1)[1:].tolist() == pytest.approx([6000 / most] * most, rel=0.08)
    told = found.relation >= 0
    assert not (told & ((found.count != 2) | found.same)).any() and (most == 1) == (not told.any())
    if most > 1:
        assert torch.bincount(found.relation[told]).tolist() == pytest.approx([told.sum().item() / 4] * 4, rel=0.2)
        assert told[(found.count == 2) & ~found.same].float().mean() == pytest.approx(0.7, abs=0.05)
        several = found.count > 1
        assert found.same[several].float().mean() == pytest.approx(0.3 * 505 / 558, abs=0.03)  # what can be counted


def test_relations_are_drawn_as_they_are_said():
    found = emoji_scenes(range(4000), EmojiConfig(most=2))
    first, second = found.place[:, 0], found.place[:, 1]
    for relation, holds in enumerate((first[:, 0] < second[:, 0], first[:, 0] > second[:, 0], first[:, 1] < second[:, 1], first[:, 1] > second[:, 1])):
        mine = found.relation == relation
        assert mine.sum() > 100 and holds[mine].all(), RELATIONS[relation]


def test_colours_come_from_their_split_alone():
    for pairs, expected in (("seen", False), ("held_out", True)):
        found = emoji_scenes(range(4000), EmojiConfig(pairs=pairs))
        named = found.colour >= 0
        assert (held_out_pairs()[found.noun, found.colour.clamp(min=0)][named] == expected).all()
        recolourable = recoloured_rows()[found.noun] >= 0
        assert named[recolourable].float().mean() == pytest.approx(0.75, abs=0.03) and not named[~recolourable].any()
    even = emoji_scenes(range(30_000), EmojiConfig(most=1, nouns="forty"))
    cars = even.colour[:, 0][(even.noun[:, 0] == noun_number("car")) & (even.colour[:, 0] >= 0)]
    allowed = [number for number in range(7) if not held_out_pairs()[noun_number("car"), number]]
    assert torch.bincount(cars, minlength=7)[allowed].tolist() == pytest.approx([len(cars) / 6] * 6, rel=0.35)


def test_the_background_is_the_better_of_two():
    found = emoji_scenes(range(3000), EmojiConfig(most=1))
    from diffusion_papers.topics.emoji_world import thing_colours
    gap = (background_colours()[found.background] - thing_colours()[palette_rows(found.noun, found.colour)][:, 0]).norm(dim=1)
    chance = (background_colours()[torch.randint(9, (3000,), generator=torch.Generator().manual_seed(0))] - thing_colours()[palette_rows(found.noun, found.colour)][:, 0]).norm(dim=1)
    assert gap.mean() > chance.mean() + 0.05 and torch.bincount(found.background, minlength=9).min() > 30
    assert emoji_scenes(range(500), EmojiConfig(backgrounds="plain")).background.max() < len(PLAIN)


def test_things_stay_inside_and_masks_say_where_they_are():
    found = emoji_scenes(range(64))
    reach = found.size[..., None] / 2
    assert (found.place - reach > -1e-6).all() and (found.place + reach < 1 + 1e-6).all()
    pictures, masks = draw_emoji(found, 64)
    assert pictures.abs().max() <= 1 + 1e-5 and masks.sum(1).max() < 1 + 1e-5
    for number in range(64):
        assert (masks[number, found.count[number]:] == 0).all()
        rows, columns = (masks[number, 0] > 0.5).nonzero().T
        middle = torch.stack([columns.double().mean(), rows.double().mean()]) / 64
        assert (middle - found.place[number, 0]).abs().max() < 0.2 * found.size[number, 0] + 0.02


def test_a_thing_at_its_own_size_is_its_picture():
    whole = scene(size=[1.0] * MOST)
    picture, masks = draw_emoji(whole, 64)
    apple = sprites()[noun_number("apple")]
    expected = 2 * (apple[:3] + (1 - apple[3:]) * torch.tensor(PLAIN["white"])[:, None, None]) - 1
    assert torch.allclose(picture[0], expected, atol=1e-5) and torch.allclose(masks[0, 0], apple[3], atol=1e-6)


def test_the_first_thing_is_in_front():
    pair = scene(count=2, noun=[noun_number("apple"), noun_number("brick"), 0], size=[0.5, 0.8, 0.1])
    picture, masks = draw_emoji(pair, 64)
    assert masks[0, 0, 32, 32] > 0.9 and masks[0, 1, 32, 32] < 0.1 and masks[0, 1].sum() > 100
    alone = draw_emoji(scene(), 64)[0]
    assert torch.allclose(picture[0, :, 32, 32], alone[0, :, 32, 32], atol=1e-3)


def test_resizing_is_a_mean_inside_and_nothing_outside():
    for side, size in ((0.5, 64), (0.3, 32), (1.0, 128), (0.77, 64)):
        weights = resizing_weights(torch.tensor([0.5]), torch.tensor([side]), size, 64)[0]
        inside = ((torch.arange(size) + 0.5) / size - 0.5).abs() < side / 2 - 1.5 / size - side / 64
        assert torch.allclose(weights[inside].sum(1), torch.ones(int(inside.sum())), atol=1e-5) and weights.sum(1).max() < 1 + 1e-5
        outside = ((torch.arange(size) + 0.5) / size - 0.5).abs() > side / 2 + 1.5 / size + side / 64
        assert (weights[outside] == 0).all()
        middle = weights @ ((torch.arange(64) + 0.5) / 64)  # the place inside the thing that each pixel shows
        assert torch.allclose(middle[inside], (((torch.arange(size) + 0.5) / size - 0.5) / side + 0.5)[inside], atol=0.02)


def test_textures_are_cut_where_they_are_said_to_be():
    rough = scene(background=BACKGROUNDS.index("gravel"), shift=[0.25, 0.75], size=[0.1] * MOST, place=[[0.95, 0.95]] * MOST)
    picture = draw_emoji(rough, 96)[0][0]
    top, left = int(0.75 * (512 - 96)), int(0.25 * (512 - 96))
    assert torch.allclose(picture[:, :60, :60], 2 * textures()[2, :, top:top + 60, left:left + 60] - 1, atol=1e-5)
    assert len(TEXTURES) == 3 and background_colours().shape == (9, 3)


@pytest.mark.parametrize("name, several", [("key", "keys"), ("strawberry", "strawberries"), ("cactus", "cacti"), ("fox", "foxes"), ("fish", "fish"), ("bus", "buses"),
                                           ("mouse", "mice"), ("cup of coffee", "cups of coffee"), ("fried shrimp", "fried shrimp"), ("avocado", "avocados"), ("brush", "brushes")])
def test_plurals(name, several): assert plural(name) == several


@pytest.mark.parametrize("words", ["an apple", "a unicorn", "an hourglass", "a one-eyed cat", "an x-ray", "an umbrella", "a red apple", "an orange car", "a house"])
def test_articles(words): assert with_article(words.split(" ", 1)[1]) == words


def test_captions_say_what_is_there():
    apple, pear, grapes, car = (noun_number(name) for name in ("apple", "pear", "grapes", "car"))
    of = lambda **changes: caption(scene(**changes), 0)
    assert of() == "an apple on a white background" and of(said=False) == "an apple"
    assert of(background=BACKGROUNDS.index("grass")) == "an apple on grass"
    assert of(count=2, noun=[apple, pear, 0], colour=[0, -1, -1], relation=0, said=False) == "a red apple left of a pear"
    assert of(count=2, noun=[apple, pear, 0], relation=3, said=False) == "an apple below a pear"
    assert of(count=2, noun=[grapes, car, 0], colour=[-1, 4, -1], said=False) == "grapes and a blue car"
    assert of(count=3, noun=[apple, grapes, car], said=False) == "an apple, grapes and a car"
    assert of(count=3, same=True, colour=[0] * 3, said=False) == "three red apples" and phrase(pear, -1, 2) == "two pears"
    assert ground_phrase(BACKGROUNDS.index("bricks")) == "on bricks" and len(COUNTS) == MOST


def test_data_set_gives_the_scenes():
    world = EmojiWorld(EmojiConfig(seed=3), 32, "noto", 50)
    expected = draw_emoji(emoji_scenes([5, 7], EmojiConfig(seed=3)), 32, "noto")[0]
    assert len(world) == 50 and torch.equal(world.__getitems__([5, 7])["x0"], expected) and torch.equal(world[7]["x0"], expected[1])
    with pytest.raises(IndexError, match="index"): world[50]


@pytest.mark.parametrize("options, words", [
    (dict(nouns="most"), "nouns"), (dict(most=4), "most"), (dict(most=0), "most"), (dict(backgrounds="some"), "backgrounds"), (dict(coloured=1.5), "coloured"),
    (dict(pairs="new"), "pairs"), (dict(contents=-1), "contents"), (dict(seed=-1), "seed")])
def test_wrong_worlds_are_refused(options, words):
    with pytest.raises(ValueError, match=words): EmojiConfig(**options)


def test_wrong_drawings_are_refused():
    for action, words in ((lambda: draw_emoji(scene(), 4), "size"), (lambda: draw_emoji(scene(), 32, "apple"), "vendor"), (lambda: sprites("apple"), "vendor"),
                          (lambda: EmojiWorld(count=0), "count"), (lambda: draw_emoji(scene().select(slice(0, 0))), "scenes"), (lambda: noun_split("some"), "name")):
        with pytest.raises(ValueError, match=words): action()


# ---- the judge

def test_cells_belong_to_what_covers_most_of_them():
    pair = scene(count=2, noun=[noun_number("apple"), noun_number("pear"), 0], colour=[0, -1, -1], place=[[0.25, 0.25], [0.75, 0.75], [0.5, 0.5]], size=[0.5, 0.5, 0.1])
    answers = cell_answers(pair, draw_emoji(pair, 32)[1])
    assert answers["noun"].shape == (1, CELLS, CELLS)
    assert answers["noun"][0, 4, 4] == noun_number("apple") and answers["noun"][0, 12, 12] == noun_number("pear") and answers["noun"][0, 4, 12] == 558
    assert answers["colour"][0, 4, 4] == 0 and answers["colour"][0, 12, 12] == -100 and answers["colour"][0, 4, 12] == -100
    half = torch.zeros(1, MOST, 32, 32); half[0, 0, :, :] = 0.5
    assert (cell_answers(pair, half)["noun"] == 558).all()  # more than half is asked for


def test_judged_scenes_have_both_vendors():
    batch = JudgedEmoji(EmojiConfig(seed=1)).__getitems__(np.arange(6))
    for vendor, rows, numbers in (("fluent", slice(0, 3), [0, 2, 4]), ("noto", slice(3, 6), [1, 3, 5])):
        assert torch.equal(batch["x0"][rows], draw_emoji(emoji_scenes(numbers, EmojiConfig(seed=1)), 32, vendor)[0])


def test_judges_loss_is_the_weighted_cross_entropy():
    class Silent(torch.nn.Module):
        def forward(self, images): return {"noun": torch.zeros(len(images), 559, CELLS, CELLS), "colour": torch.zeros(len(images), 7, CELLS, CELLS)}
    batch = JudgedEmoji(EmojiConfig(seed=1)).__getitems__(np.arange(40))
    loss = judge_loss(Silent(), batch, Draws(torch.Generator().manual_seed(0)))
    coloured = (batch["colour"] >= 0).flatten(1).any(1)
    assert 0 < coloured.sum() < 40
    expected = math.log(559) + 0.5 * math.log(7) * coloured.double()
    assert loss.tolist() == pytest.approx(expected.tolist(), rel=1e-5)

    class Sure(torch.nn.Module):  # right about things, wrong about empty cells, or the other way round
        def __init__(self, right_about): super().__init__(); self.right = right_about
        def forward(self, images):
            nothing = batch["noun"] == 558
            wanted = torch.where(nothing == (self.right == "nothing"), batch["noun"], (batch["noun"] + 1) % 559)
            return {"noun": 20.0 * F.one_hot(wanted, 559).permute(0, 3, 1, 2).float(), "colour": torch.zeros(len(images), 7, CELLS, CELLS)}
    draws = lambda: Draws(torch.Generator().manual_seed(0))
    share = lambda right: ((judge_loss(Sure(right), batch, draws()) - 0.5 * math.log(7) * coloured) / 20).double()
    filled, empty = ((batch["noun"] != 558).flatten(1).sum(1).double(), 0.3 * (batch["noun"] == 558).flatten(1).sum(1).double())
    assert share("things").tolist() == pytest.approx((empty / (empty + filled)).tolist(), abs=2e-3)
    assert share("nothing").tolist() == pytest.approx((filled / (empty + filled)).tolist(), abs=2e-3)


def reading_of(scenes, masks):
    "What a perfect judge reads."
    answers = cell_answers(scenes, masks)
    return Reading(answers["noun"], answers["colour"].clamp(min=0))


def test_true_scenes_are_right_in_every_question():
    found = emoji_scenes(range(400), EmojiConfig(seed=2))
    shares = {name: value.nanmean().item() for name, value in alignment(reading_of(found, draw_emoji(found, 32)[1]), found).items()}
    assert shares["noun"] > 0.99 and shares["colour"] == 1 and shares["relation"] == 1 and shares["count"] > 0.9


def test_wrong_scenes_are_wrong_where_they_differ():
    apple, pear = noun_number("apple"), noun_number("pear")
    said = scene(count=2, noun=[apple, pear, 0], colour=[0, -1, -1], relation=0, place=[[0.25, 0.5], [0.75, 0.5], [0.5, 0.5]], size=[0.4, 0.4, 0.1])
    shown = lambda **changes: reading_of(*[(other, draw_emoji(other, 32)[1]) for other in [scene(**(dict(
        count=2, noun=[apple, pear, 0], colour=[0, -1, -1], place=[[0.25, 0.5], [0.75, 0.5], [0.5, 0.5]], size=[0.4, 0.4, 0.1]) | changes))]][0])
    of = lambda **changes: {name: value.item() for name, value in alignment(shown(**changes), said).items()}
    assert of() == {"noun": 1, "colour": 1, "count": 1, "relation": 1}
    assert of(place=[[0.75, 0.5], [0.25, 0.5], [0.5, 0.5]])["relation"] == 0  # mirrored
    assert of(colour=[4, -1, -1])["colour"] == 0
    missing = of(count=1)
    assert missing["noun"] == 0.5 and math.isnan(missing["count"]) and math.isnan(missing["relation"]) and missing["colour"] == 1
    twice = of(count=3, noun=[apple, pear, pear], place=[[0.2, 0.5], [0.75, 0.2], [0.75, 0.8]], size=[0.4] * MOST)
    assert twice["count"] == 0 and twice["noun"] == 1
    assert math.isnan(alignment(shown(), scene(count=2, noun=[pear, apple, 0], place=[[0.25, 0.5], [0.75, 0.5], [0.5, 0.5]]))["relation"].item())  # nothing was said


def test_groups_touch_at_edges_and_have_three_cells():
    cells = torch.zeros(CELLS, CELLS, dtype=torch.bool)
    cells[0, :3] = True; cells[5:8, 5] = True; cells[10, 10:12] = True; cells[3, 3] = True
    assert groups(cells) == 2
    cells[1, 3] = True; assert groups(cells) == 2  # a corner joins nothing
    place = mean_place(cells & (torch.arange(CELLS) == 5))
    assert place.tolist() == pytest.approx([5.5 / 16, 6.5 / 16])


def test_main_thing_fills_most_cells():
    noun = torch.full((3, CELLS, CELLS), 558)
    noun[0, 0, :5] = 7; noun[0, 1, :4] = 9; noun[1, 0, :2] = 7
    assert Reading(noun, noun).main().tolist() == [7, 558, 558]


def test_judge_reads_larger_pictures_and_refuses_others():
    judge = Judge(8).eval()
    small = torch.rand(2, 3, 32, 32) * 2 - 1
    large = F.interpolate(small, scale_factor=2, mode="nearest")
    with torch.no_grad(): assert torch.allclose(judge(small)["noun"], judge(large)["noun"], atol=1e-4)
    for wrong in (small[:, :1], small[..., :16], torch.zeros(1, 3, 48, 48)):
        with pytest.raises(ValueError, match="images"): judge(wrong)
