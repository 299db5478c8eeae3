"""Scenes of two shapes that are read back exactly, the best denoiser of a finite set, captions that come and go, and experts on spiral arms."""
import math

import pytest
import torch

from diffusion_papers.core.analytic import mixture_denoiser
from diffusion_papers.core.samplers import heun, karras_grid
from diffusion_papers.topics import two_shapes
from diffusion_papers.topics.two_shapes import (
    ARMS, CAPTIONS, COLOURS, EXPERTS, PLACEMENTS, SHAPES, SpiralNet, caption_weights, caption_worth, colour_masks, colours_present, draw_two_shapes,
    expert_experiment, finite_denoiser, levels_between, numbered_scenes, parameters_of, quantile_levels, read_places, read_shapes, said, same_parameters,
    sampling_levels, shape_templates, shows_caption, spiral_arms, spiral_curve, spiral_denoiser, spiral_loss, spiral_model, switched, train_spiral,
    two_shape_caption, two_shape_scenes)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world():
    "Scenes, pictures and captions: 20 placements of each caption."
    scenes = two_shape_scenes(20, seeded())
    return scenes, draw_two_shapes(scenes), [two_shape_caption(scenes, index) for index in range(len(scenes))]


# scenes

def test_captions_are_all_pairs_of_objects_in_different_colours():
    assert len(CAPTIONS) == len(set(CAPTIONS)) == 6 * 9 and PLACEMENTS == 12 * 81
    objects = {tuple(part.removeprefix("a ") for part in caption.split(" and ")) for caption in CAPTIONS}
    expected = {(f"{a} {s}", f"{b} {t}") for i, a in enumerate(COLOURS) for b in list(COLOURS)[i + 1:] for s in SHAPES for t in SHAPES}
    assert objects == expected


def test_every_scene_is_another_one_and_its_objects_stay_in_their_own_quadrants():
    scenes = numbered_scenes(torch.arange(len(CAPTIONS) * PLACEMENTS))
    factors = torch.cat([scenes.colour, scenes.shape, scenes.corner.flatten(1)], 1)
    assert len(factors.unique(dim=0)) == len(scenes) == 52_488
    assert (scenes.corner % 8 <= 2).all() and ((scenes.corner // 8)[:, 0] != (scenes.corner // 8)[:, 1]).any(1).all()
    assert set(scenes.corner.flatten().tolist()) == {0, 1, 2, 8, 9, 10}
    for index in (0, 12_345, 52_487):
        (first, second), (one, two) = said(two_shape_caption(scenes, index))
        assert [first, second] == scenes.colour[index].tolist() and [one, two] == scenes.shape[index].tolist()


def test_a_scene_is_its_two_templates_in_their_colours_on_black():
    scenes = numbered_scenes(torch.tensor([17_000, 40_321]))
    for picture, colours, shapes, corners in zip(draw_two_shapes(scenes), scenes.colour, scenes.shape, scenes.corner.tolist()):
        expected = torch.full((3, 16, 16), -1.0)
        for colour, shape, (row, column) in zip(colours, shapes, corners):
            paint = torch.tensor(list(COLOURS.values())[colour])[:, None, None] * 2 - 1
            inside = shape_templates()[shape].bool()
            expected[:, row:row + 6, column:column + 6] = torch.where(inside, paint, expected[:, row:row + 6, column:column + 6])
        assert torch.equal(picture, expected)


def test_shapes_have_their_symmetries_and_areas():
    templates = shape_templates()
    assert templates.sum((1, 2)).tolist() == [36, 20, 20]
    for turn in range(4): assert torch.equal(templates.rot90(turn, (1, 2)), templates)
    assert templates[2, 2:4, 2:4].sum() == 0 and templates[1, 2:4, 2:4].sum() == 4  # a ring has a hole


def test_a_set_of_scenes_is_balanced_without_repetition_and_of_its_seed(world):
    scenes, images, captions = world
    assert torch.bincount(scenes.caption).tolist() == [20] * 54 and len(images.flatten(1).unique(dim=0)) == 1080
    assert torch.equal(draw_two_shapes(two_shape_scenes(20, seeded())), images) and not torch.equal(draw_two_shapes(two_shape_scenes(20, seeded(1))), images)
    assert captions[0] == CAPTIONS[0] and captions[-1] == CAPTIONS[-1]


# readers

def test_readers_are_never_wrong_on_scenes(world):
    scenes, images, captions = world
    there = torch.zeros(len(images), 4, dtype=torch.bool).scatter(1, scenes.colour, True)
    shape, fit = read_shapes(images)
    assert torch.equal(colours_present(images), there) and torch.equal(shape.gather(1, scenes.colour), scenes.shape)
    assert (fit.gather(1, scenes.colour) == 1).all() and shows_caption(images, captions).all()
    places = read_places(images)
    centre = (scenes.corner.flip(-1) + 3) / 8 - 1
    torch.testing.assert_close(places.gather(1, scenes.colour[..., None].expand(-1, -1, 2)), centre)
    assert places[~there].isnan().all()


def test_readers_bear_some_noise_and_other_precisions(world):
    _, images, captions = world
    noisy = images + 0.25 * torch.randn(images.shape, generator=seeded())
    assert shows_caption(noisy, captions).float().mean() > 0.95 and shows_caption(images.double(), captions).all()


def test_a_picture_fails_for_a_wrong_shape_a_third_colour_a_missing_one_or_a_mixed_up_pair(world):
    _, images, captions = world
    index = captions.index("a red square and a blue ring")
    picture, caption = images[index:index + 1], ["a red square and a blue ring"]
    assert shows_caption(picture, caption).all()
    for other in ("a red square and a blue cross", "a red ring and a blue square", "a red square and a green ring"): assert not shows_caption(picture, [other]).any()
    blue = colour_masks(picture)[:, 2:3]
    assert not shows_caption(torch.where(blue, -1.0, picture), caption).any()
    third = picture.clone()
    empty = (colour_masks(picture).any(1)[0].sum(1) == 0).nonzero()[:2, 0]  # rows without any object
    third[:, :, empty] = torch.tensor([-1.0, 1.0, -1.0])[:, None, None]
    assert len(empty) == 2 and not shows_caption(third, caption).any()
    broken = torch.where(blue & (torch.arange(16) % 2 == 0), -1.0, picture)
    assert not shows_caption(broken, caption).any()


# the denoiser

def test_a_finite_set_is_a_mixture_without_width():
    points, share = torch.randn(7, 3, generator=seeded(), dtype=torch.float64), torch.rand(7, generator=seeded(1), dtype=torch.float64)
    x, sigma = torch.randn(9, 3, generator=seeded(2), dtype=torch.float64), torch.linspace(0.1, 4, 9, dtype=torch.float64)
    torch.testing.assert_close(finite_denoiser(points)(x, sigma), mixture_denoiser(points, 0.0)(x, sigma))
    torch.testing.assert_close(finite_denoiser(points, share)(x, sigma), mixture_denoiser(points, 0.0, share / share.sum())(x, sigma))
    torch.testing.assert_close(finite_denoiser(points, 5 * share.expand(9, 7))(x, sigma), finite_denoiser(points, share)(x, sigma))


def test_weights_of_samples_are_their_own_and_zero_is_never():
    points = torch.randn(6, 1, 2, 2, generator=seeded())
    weights = torch.rand(3, 6, generator=seeded(1)) * (torch.rand(3, 6, generator=seeded(2)) > 0.4)
    x, sigma = torch.randn(3, 1, 2, 2, generator=seeded(3)), torch.tensor([0.3, 1.0, 50.0])
    together = finite_denoiser(points, weights)(x, sigma)
    for row in range(3):
        kept = weights[row] > 0
        torch.testing.assert_close(finite_denoiser(points[kept], weights[row, kept])(x[row:row + 1], sigma[row:row + 1]), together[row:row + 1])


def test_the_denoiser_is_the_best_one_and_keeps_small_and_large_levels_finite(world):
    images = world[1]
    denoise = finite_denoiser(images)
    for sigma in (2e-3, 80.0, 1e4):
        x = images[:4] + sigma * torch.randn(4, 3, 16, 16, generator=seeded())
        assert denoise(x, torch.full((4,), sigma, dtype=torch.float64)).isfinite().all()
    assert torch.equal(denoise(images[:4] + 1e-3, torch.full((4,), 2e-3)), images[:4])
    x0, sigma = images[::10], torch.full((108,), 4.0)
    x = x0 + 4 * torch.randn(x0.shape, generator=seeded())
    best, error = denoise(x, sigma), lambda guess: (guess - x0).square().mean()
    assert error(best) < min(error(best + 0.1 * (x0.mean(0) - best)), error(best + 0.1 * (x - best)), error(0.9 * best))


def test_captions_weigh_what_agrees_and_softly_the_rest():
    weights = caption_weights(["p", "q", "p"], ["q", "p"], 0.01)
    torch.testing.assert_close(weights, torch.tensor([[0.01, 1, 0.01], [1, 0.01, 1]]))
    assert caption_weights(["p", "q"], ["q"]).tolist() == [[0, 1]] and caption_weights(["p", "q"], ["r"], 0.5).tolist() == [[0.5, 0.5]]


# what captions do

def test_a_caption_is_worth_something_in_the_middle_only(world):
    _, images, captions = world
    rows = caption_worth(images, captions, [0.5, 1.0, 3.0, 5.0, 10.0, 20.0, 1e4], seeded(2))
    change = {row["sigma"]: row["change"] for row in rows}
    assert change[0.5] < 0.01 and change[1.0] < 0.01 and all(change[sigma] > 0.1 for sigma in (3.0, 5.0, 10.0, 20.0)) and change[5.0] == max(change.values())
    assert all(row["with"] <= row["without"] + 1e-6 for row in rows)
    means = torch.stack([images[world[0].caption == index].mean(0) for index in range(54)])
    share = (means - images.mean(0)).square().mean() / (images - images.mean(0)).square().mean()
    assert change[1e4] == pytest.approx(share.item(), rel=0.15)  # far away only means are left


def test_levels_of_sampling_are_those_of_karras_and_end_at_zero():
    levels = sampling_levels(20)
    assert len(levels) == 21 and levels[-1] == 0 and torch.equal(levels[:-1], karras_grid(19))
    assert levels[4].item() == pytest.approx(22.8, abs=0.05) and levels[12].item() == pytest.approx(0.7, abs=0.05)


def test_a_switch_goes_by_the_level_of_each_call_and_asks_only_whom_it_must():
    calls = []
    def one(x, sigma): calls.append("one"); return torch.ones_like(x)
    def two(x, sigma): calls.append("two"); return torch.zeros_like(x)
    denoise = switched(one, two, 2.0)
    for levels, answer, asked in (([3.0, 4.0], [1, 1], ["one"]), ([2.0, 0.1], [0, 0], ["two"]), ([2.1, 1.9], [1, 0], ["one", "two"])):
        calls.clear()
        assert denoise(torch.zeros(2, 1), torch.tensor(levels)).flatten().tolist() == answer and calls == asked
    levels = sampling_levels(4)
    calls.clear()
    heun(switched(one, two, levels[2].item()), torch.zeros(1, 1), levels)
    assert calls == ["one", "one", "one", "two", "two", "two", "two"]  # the second call of a step may be on the other side


def test_a_caption_may_go_after_the_window_but_not_before(world):
    _, images, captions = world
    wanted, levels = list(CAPTIONS), sampling_levels(20)
    start = 80 * torch.randn(54, 3, 16, 16, generator=seeded(4))
    told, plain = finite_denoiser(images, caption_weights(captions, wanted)), finite_denoiser(images)
    share = {k: shows_caption(heun(switched(told, plain, levels[k].item()), start, levels), wanted).float().mean().item() for k in (4, 12)}
    assert share[4] <= 0.1 and share[12] >= 0.95


def test_a_late_change_of_caption_does_nothing_unless_the_denoiser_is_infinitely_sure(world):
    _, images, captions = world
    levels, start = sampling_levels(20), 80 * torch.randn(16, 3, 16, 16, generator=seeded(5))
    a, b = "a red square and a blue ring", "a green cross and a yellow square"
    def run(soft, k):
        one, two = (finite_denoiser(images, caption_weights(captions, [caption] * 16, soft)) for caption in (a, b))
        return heun(switched(one, two, levels[k].item()), start, levels)
    only_a, only_b = run(0.01, 20), run(0.01, 0)
    same = lambda made, other: ((made - other).square().flatten(1).mean(1) < 1e-3).float().mean().item()
    assert same(run(0.01, 12), only_a) == 1 and same(run(0.01, 4), only_b) > 0.75 and same(only_a, only_b) < 0.3
    assert shows_caption(run(0.0, 19), [b] * 16).all()


# experts

def test_arms_are_turned_copies_of_one_another_with_their_thickness():
    along = torch.linspace(0, 1, 50)
    first, second = (spiral_curve(along, torch.tensor(arm)) for arm in (0, 1))
    torch.testing.assert_close(second, torch.stack([-first[:, 1], first[:, 0]], 1))  # a quarter of a turn
    assert first[0].norm().item() == pytest.approx(0.2) and first[-1].norm().item() == pytest.approx(1.1)
    points, arm = spiral_arms(8000, seeded())
    assert torch.bincount(arm).tolist() == pytest.approx([2000] * ARMS, rel=0.1) and points.std().item() == pytest.approx(0.5, abs=0.05)
    fine = torch.linspace(0, 1, 2000)
    away = torch.cat([torch.cdist(points[arm == number], spiral_curve(fine, torch.tensor(number))).amin(1) for number in range(ARMS)])
    assert away.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.15)


def test_levels_of_intervals_are_inside_finite_and_lognormal():
    assert quantile_levels(torch.tensor([1 / 8, 511 / 512], dtype=torch.float64)).tolist() == pytest.approx([0.0757422, 9.609593], rel=1e-6)
    uniform = torch.rand(20_000, generator=seeded(), dtype=torch.float64)
    low, high = (levels_between(uniform, *EXPERTS[name]) for name in ("low", "high"))
    assert low.max() < 0.0757422 and high.min() > 9.60959 and high.isfinite().all() and levels_between(torch.tensor([0.0, 1.0]), 0, 1).isfinite().all()
    normal = (levels_between(uniform, 0, 1).log() + 1.2) / 1.2
    assert normal.mean().item() == pytest.approx(0, abs=0.03) and normal.std().item() == pytest.approx(1, abs=0.03)
    each = levels_between(torch.full((2,), 0.5), torch.tensor([0.0, 0.5]), torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(each, quantile_levels(torch.tensor([0.25, 0.75])))
    assert [ends[0] for ends in EXPERTS.values()][1:] == [ends[1] for ends in EXPERTS.values()][:-1]  # no gaps


def test_a_loss_is_one_for_zeros_and_least_for_the_exact_denoiser():
    zeros = lambda x, sigma, arm: x * (0.25 / (sigma**2 + 0.25))[:, None].float()
    model = spiral_model(16, 0)
    for ends in EXPERTS.values():
        floor = spiral_loss(spiral_denoiser(), ends, 4000)
        assert spiral_loss(zeros, ends, 4000) == pytest.approx(1, abs=0.1) and floor < 0.7 and floor < spiral_loss(model, ends, 4000)
        assert spiral_loss(spiral_denoiser(200), ends, 4000) == pytest.approx(floor, abs=1e-3)


def test_training_uses_the_levels_of_its_intervals_in_equal_parts():
    model, seen = spiral_model(8, 0), []
    coefficients = model.coefficients
    model.coefficients = lambda x, sigma: seen.append(sigma) or coefficients(x, sigma)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert train_spiral(model, [EXPERTS["low"], EXPERTS["high"]], 3, seeded(), batch=10) is model
    assert all((sigma < 0.0758).sum() == 5 and (sigma > 9.6).sum() == 5 for sigma in seen) and len(seen) == 3
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters()))


def test_training_lowers_the_loss_where_it_trains_and_repeats_itself():
    losses = [spiral_loss(train_spiral(spiral_model(16, 3), [EXPERTS["high"]], 80, seeded(1), 64, decay=decay), EXPERTS["high"], 2000) for decay in (True, True, False)]
    assert losses[0] == losses[1] != losses[2] and losses[0] < 0.8 * spiral_loss(spiral_model(16, 3), EXPERTS["high"], 2000)


def test_the_wider_rival_has_at_least_as_many_parameters():
    width = same_parameters(48, 3)
    assert parameters_of(spiral_model(width - 1, 0)) < 3 * parameters_of(spiral_model(48, 0)) <= parameters_of(spiral_model(width, 0))
    assert parameters_of(SpiralNet(48)) == 7 * 48 + 48 + 2 * (48 * 48 + 48) + 48 * 2 + 2


def test_an_expert_of_high_noise_beats_the_baseline_there_even_in_a_short_training():
    losses = expert_experiment(0, width=16, steps=150, batch=64)
    assert set(losses) == {*EXPERTS, "all"} and all(set(row) == {"base", "continued", "rebalanced", "wider", "experts", "floor"} for row in losses.values())
    assert losses["high"]["experts"] < losses["high"]["continued"] and all(min(row.values()) == row["floor"] for row in losses.values())
    mean = sum((last - first) * losses[name]["experts"] for name, (first, last) in EXPERTS.items())
    assert losses["all"]["experts"] == pytest.approx(mean) and all(math.isfinite(value) for row in losses.values() for value in row.values())


@pytest.mark.slow
def test_experts_against_the_continued_base_over_five_seeds():
    runs = [expert_experiment(seed) for seed in range(5)]
    mean = {name: {model: sum(run[name][model] for run in runs) / 5 for model in runs[0][name]} for name in runs[0]}
    assert mean["high"]["experts"] < 0.99 * mean["high"]["continued"] and mean["high"]["experts"] < 0.99 * mean["high"]["wider"]
    assert mean["low"]["experts"] < 1.01 * mean["low"]["continued"] and mean["all"]["experts"] > mean["all"]["continued"]
    assert mean["high"]["rebalanced"] < 1.01 * mean["high"]["experts"]  # to see the levels is most of it


# bad input

PICTURE = torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize("call, told", [
    (lambda: two_shape_scenes(0, seeded()), r"placements: expected a value in \[1, 972\], got 0"), (lambda: two_shape_scenes(973, seeded()), "placements"),
    (lambda: numbered_scenes(torch.tensor([60_000])), r"numbers: expected a value in \[0, 52487\], got 60000"), (lambda: numbered_scenes(torch.tensor([-1])), "numbers: .* got -1"),
    (lambda: numbered_scenes(torch.rand(2)), "numbers: expected a list of whole numbers, got torch.float32"), (lambda: numbered_scenes(torch.tensor(3)), "numbers"),
    (lambda: colour_masks(torch.zeros(2, 3, 32, 32)), r"images: expected shape \(B, 3, 16, 16\), got \(2, 3, 32, 32\)"), (lambda: read_shapes(torch.zeros(2, 1, 16, 16)), "images"),
    (lambda: read_places(PICTURE * math.nan), "images: expected finite"), (lambda: shows_caption(PICTURE, []), "captions: expected one for each of 1 images, got 0"),
    (lambda: shows_caption(PICTURE, ["a red dog"]), "caption: expected one like .* got 'a red dog'"), (lambda: said(3), "caption"),
    (lambda: finite_denoiser(PICTURE[:0]), "images: expected at least one"), (lambda: finite_denoiser(PICTURE, torch.ones(2)), r"weights: expected shape \(1,\) or \(B, 1\)"),
    (lambda: finite_denoiser(PICTURE, torch.zeros(1)), "weights: expected values of at least 0"), (lambda: finite_denoiser(PICTURE, -torch.ones(1)), "weights"),
    (lambda: finite_denoiser(PICTURE, torch.tensor([[1.0], [0.0]])), "weights"),
    (lambda: finite_denoiser(PICTURE)(torch.zeros(1, 3, 8, 8), torch.ones(1)), r"x: expected shape \(B, 3, 16, 16\), got"),
    (lambda: finite_denoiser(PICTURE, torch.ones(3, 1))(torch.zeros(2, 3, 16, 16), torch.ones(2)), r"x: expected shape \(3, 3, 16, 16\), got"),
    (lambda: caption_weights(["p"], ["q"]), "wanted: expected captions of some picture, or soft above 0, got 'q'"), (lambda: caption_weights(["p"], []), "wanted"),
    (lambda: caption_weights(["p"], ["p"], 1.5), "soft"), (lambda: caption_worth(PICTURE, ["p"], [1.0], seeded(), 2), "queries"),
    (lambda: caption_worth(PICTURE, ["p"], [0.0], seeded(), 1), "sigmas"), (lambda: caption_worth(PICTURE, ["p"], [], seeded(), 1), "sigmas"),
    (lambda: caption_worth(PICTURE, ["p", "q"], [1.0], seeded(), 1), "captions: expected one for each of 1 images, got 2"),
    (lambda: switched(None, None, -1.0), "sigma"), (lambda: sampling_levels(1), "steps"), (lambda: levels_between(torch.rand(2), 0.5, 0.5), "first, last: .* got 0.5 and 0.5"),
    (lambda: levels_between(torch.rand(2), 0.5, 1.1), "first, last"), (lambda: spiral_arms(-1, seeded()), "count"), (lambda: spiral_model(0, 0), "width"), (lambda: spiral_model(8, -1), "seed"),
    (lambda: train_spiral(spiral_model(8, 0), [], 1, seeded()), "intervals"), (lambda: train_spiral(spiral_model(8, 0), [(0, 1)] * 3, 1, seeded(), 2), "batch"),
    (lambda: spiral_denoiser(0), "centres"), (lambda: expert_experiment(0, steps=2), "steps")])
def test_bad_input_is_named(call, told):
    with pytest.raises(ValueError, match=told): call()


def test_rivals_see_as_many_samples_as_the_ensemble_and_numbers_of_their_own(monkeypatch):
    trained, held_out, real = [], [], two_shapes.spiral_loss
    def noted(model, intervals, steps, generator, batch, lr, decay):
        before = getattr(model, "seen", [])
        model.seen = before + [(tuple(intervals), steps)]
        trained.append((model.seen, parameters_of(model), batch, generator.initial_seed()))
        return model
    monkeypatch.setattr(two_shapes, "train_spiral", noted)
    monkeypatch.setattr(two_shapes, "spiral_loss", lambda *given: 0.0)
    expert_experiment(0, width=8, steps=30, batch=16)
    everywhere, owned = ((0.0, 1.0),), tuple(EXPERTS.values())
    small, large = parameters_of(spiral_model(8, 0)), parameters_of(spiral_model(same_parameters(8, 3), 0))
    expected = [([(everywhere, 30)], small), *(([(everywhere, 30), ((ends,), 10)], small) for ends in owned), ([(everywhere, 30)], large),
                ([(everywhere, 30)] * 2, small), ([(everywhere, 30), (owned, 30)], small), ([(everywhere, 30)] * 2, large)]
    assert sorted((seen, size) for seen, size, _, _ in trained) == sorted(expected) and {batch for *_, batch, _ in trained} == {16}
    seeds = [seed for *_, seed in trained]
    assert len(set(seeds)) == len(seeds)


def test_points_that_are_held_out_are_drawn_by_a_seed_of_their_own(monkeypatch):
    trained, asked, real = set(), set(), two_shapes.spiral_arms
    monkeypatch.setattr(two_shapes, "train_spiral", lambda model, intervals, steps, generator, *rest: trained.add(generator.initial_seed()) or model)
    monkeypatch.setattr(two_shapes, "spiral_arms", lambda count, generator: asked.add(generator.initial_seed()) or real(count, generator))
    for seed in range(5): expert_experiment(seed, width=8, steps=30, batch=16)
    assert asked and not asked & trained


@pytest.mark.parametrize("decay, shares", [(True, [1, 0.75, 0.5, 0.25]), (False, [1, 1, 1, 1])])
def test_the_learning_rate_falls_to_nothing_or_stays(monkeypatch, decay, shares):
    rates = []
    class Noted(torch.optim.Adam):
        def step(self, *given): rates.append(self.param_groups[0]["lr"]); return super().step(*given)
    monkeypatch.setattr(torch.optim, "Adam", Noted)
    train_spiral(spiral_model(8, 0), [(0.0, 1.0)], 4, seeded(), 8, 0.02, decay)
    assert rates == pytest.approx([0.02 * share for share in shares])
