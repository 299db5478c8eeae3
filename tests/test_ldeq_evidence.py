"""How LDEQ is compared: filters of heatmaps, limits and choices, controls, fixed points, intervals, measures of WFLW."""
import pytest
import torch
from extras import need

need("train", "data")
from diffusion_papers.core.data import TensorSet
from diffusion_papers.evidence import ldeq as room
from diffusion_papers.evidence.ldeq import Clips, by_mesh, choices, chosen, comparison, filtered_maps, fixed_points, groups, interval, limits, measure_landmarks, measured, numbers_of, standing, with_foreign_past
from diffusion_papers.ldeq import LdeqConfig, Memory, build, read_out, track
from diffusion_papers.topics.equilibrium import FixedPoint, Stop, solve
from diffusion_papers.topics.landmarks import Exponential, SavitzkyGolay, area_under_curve, failure_rate, in_common, nme, nmf, smooth

SMALL = LdeqConfig(size=32, landmarks=71, features=8, width=8, increment=4, depth=2, pool=8)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def tame():
    model = build(SMALL)
    with torch.no_grad(): model.cells[0].tail.conv.weight[:, :71] *= 0.005
    return model


def clips(batch=3, frames=8, seed=0):
    matrix = torch.tensor([[1.0, 0, -3], [0, 1, 5]], dtype=torch.float64).expand(batch, frames, 2, 3)
    return Clips(torch.rand(batch, frames, 3, 32, 32, generator=seeded(seed)) * 2 - 1, matrix, 20 * torch.rand(batch, frames, 71, 2, generator=seeded(seed + 1), dtype=torch.float64), 25.0)


def test_heatmaps_are_filtered_before_they_are_read_out():
    model, video = tame(), clips()
    with torch.no_grad():
        maps = []
        track(model, video.frames, Memory("none"), callback=lambda frame, z: maps.append(z))
        state, expected = maps[0], [read_out(maps[0])[0]]
        for z in maps[1:]:
            state = (z + 3.0 * state) / 4.0
            expected.append(read_out(state)[0])
        found = filtered_maps(model, video.frames, (0.3, 3.0))
    assert torch.allclose(found[3.0], torch.stack(expected, 1), atol=1e-6) and not torch.allclose(found[0.3], found[3.0])


def test_points_are_placed_in_the_frames_and_measured_clip_by_clip():
    video = clips()
    points = video.placed(torch.full((3, 8, 71, 2), 0.5))
    assert torch.allclose(points, torch.tensor([19.0, 11.0], dtype=torch.float64).expand_as(points))
    noisy = video.truth + torch.randn(video.truth.shape, generator=seeded(3))
    errors, flickers = measured(noisy, video, Exponential(0.5))
    calm = [smooth(p, Exponential(0.5)) for p in noisy]
    assert errors == pytest.approx([nme(p, t).mean().item() for p, t in zip(calm, video.truth)]) and flickers == pytest.approx([nmf(p, t) for p, t in zip(calm, video.truth)])
    row = numbers_of(noisy, video, Exponential(0.5), each=True)
    assert row["nme"] == pytest.approx(sum(errors) / 3) and row["nmf_each"] == pytest.approx(flickers, abs=0.01) and {"nad_1", "nad_4", "lag"} <= row.keys() and "nad_8" not in row


TRIED = [{"side": side, "title": title, "family": family, "filter": None, "nme": error, "nmf": flicker} for side, title, family, error, flicker in (
    ("frame by frame", "8 evaluations", "none", 8.0, 100.0), ("frame by frame", "8 evaluations", "OneEuro", 7.0, 50.0), ("frame by frame", "8 evaluations", "exponential", 7.9, 20.0),
    ("heatmaps filtered", "strength 1", "none", 7.2, 40.0), ("heatmaps filtered", "strength 1", "Savitzky-Golay", 5.0, 30.0), ("memory", "early", "none", 6.0, 45.0), ("memory", "early", "OneEuro", 9.0, 5.0))]


def test_the_limits_are_the_rivals():
    assert limits(TRIED) == {"unfiltered": 8.0, "exact": 7.0}


def test_the_calmest_choice_that_keeps_the_limit_is_taken():
    rivals = [choice for choice in TRIED if choice["side"] == "frame by frame"]
    assert chosen(rivals, 8.0)["nmf"] == 20.0 and chosen(rivals, 7.0)["nmf"] == 50.0
    assert chosen(rivals, 5.0)["nme"] == 7.0, "where none keeps it: the least error"
    assert chosen([choice for choice in TRIED if choice["side"] == "memory"], 7.0)["nmf"] == 45.0


def test_every_side_has_its_groups_and_the_rivals_one_together():
    found = {(side, limit, family): group for side, limit, family, group in groups(TRIED)}
    assert len(found["without memory", "exact", "online"]) == 4 and all(choice["family"] != "Savitzky-Golay" for choice in found["without memory", "exact", "online"])
    assert ("frame by frame", "exact", "online") not in found and ("memory", "exact", "online") in found and ("heatmaps filtered", "unfiltered", "online") in found


def test_rows_say_what_was_chosen_elsewhere(monkeypatch):
    monkeypatch.setattr(room, "FILTERS", {"none": lambda rate: [room.Unfiltered()], "exponential": lambda rate: [Exponential(0.5)], "Savitzky-Golay": lambda rate: [SavitzkyGolay(5, 1)]})
    tuning, testing = clips(seed=1), clips(seed=5)
    steady = lambda video, size, seed: video.truth + size * torch.randn(video.truth.shape, generator=seeded(seed))
    paths = {name: {("frame by frame", "8 evaluations"): steady(video, 2.0, 1), ("heatmaps filtered", "s"): steady(video, 1.5, 2), ("memory", "early"): steady(video, 1.0, 3)} for name, video in (("tuning", tuning), ("hard", testing))}
    rows = comparison({"hard": paths["hard"]}, {"hard": testing}, choices(paths["tuning"], tuning))
    row = next(row for row in rows if (row["side"], row["limit"], row["family"]) == ("memory", "unfiltered", "online"))
    expected = measured(paths["hard"]["memory", "early"], testing, room.Unfiltered() if row["filter"].startswith("Unf") else Exponential(0.5))
    assert row["nmf"] == pytest.approx(sum(expected[1]) / 3) and row["path"] == "early" and "nmf_each" in row
    assert {row["path"] for row in rows if row["side"] == "without memory"} <= {"8 evaluations", "s"}
    assert [row["side"] for row in rows if row["family"] == "alone"] == ["frame by frame", "heatmaps filtered", "memory"]


def test_a_foreign_past_is_the_neighbours():
    model, video = tame(), clips(3, 3)
    with torch.no_grad():
        steps = [model.step(model.inject(video.frames[:, frame])) for frame in range(3)]
        first = solve(steps[0], model.origin(model.inject(video.frames[:, 0])), FixedPoint(), Stop(8, 0)).z
        second = steps[1](first.roll(1, 0))
        third = steps[2](second.roll(1, 0))
    assert torch.allclose(with_foreign_past(model, video.frames, Memory("early", 1))[:, 2], read_out(third)[0], atol=1e-6)


def test_a_face_that_stands_still_differs_in_its_noise_alone():
    from diffusion_papers.topics.faces import drawn_clip
    found = standing([drawn_clip(number, 10, hard=False) for number in range(2)], 3)
    assert torch.equal(found.truth, found.truth[:, :1].expand_as(found.truth)) and not torch.equal(found.frames[:, 0], found.frames[:, 1])


class Bistable(torch.nn.Module):
    "Stands for a detector: the square root of what was believed, or, if little was believed, its square."
    config = LdeqConfig(size=32, landmarks=1, features=4, width=4, depth=1)
    def inject(self, images): return images.mean((1, 2, 3))[:, None, None, None]
    def origin(self, features): return torch.zeros(len(features), 1, 8, 8)
    def readable(self, z): return z
    def step(self, features):
        ramp = torch.linspace(0.1, 1, 64).reshape(8, 8)
        def f(z):
            high = z.amax((-2, -1), keepdim=True) > 0.9
            answer = torch.where(high, ramp, ramp.flip(0) * 0.5) + 0 * z
            return torch.where(features > 0, answer, ramp.expand_as(z) + 0 * z)
        return f


def test_several_fixed_points_are_found_where_there_are_some():
    images = torch.cat([torch.full((3, 3, 32, 32), 0.5), torch.full((3, 3, 32, 32), -0.5)])
    found = fixed_points(Bistable(), images, 5)
    assert found["several"] == 0.5 and found["arrived"] == 1 and found["apart"] > 1 and found["radius"] == 0
    class Restless(Bistable):
        def step(self, features): return lambda z: 1 - z
    assert fixed_points(Restless(), images, 5)["several"] == 0 == fixed_points(Restless(), images, 5)["arrived"]


def test_intervals_are_over_clips_and_pair_them():
    base = 10 * torch.rand(24, generator=seeded()).double() + 1
    low, high = interval([(0.8 * base).tolist()] * 3, [base.tolist()] * 3)
    assert low == pytest.approx(0.8) and high == pytest.approx(0.8)
    other = base * (0.8 + 0.1 * torch.randn(24, generator=seeded(1)).double())
    low, high = interval([other.tolist()], [base.tolist()])
    ratio = (other.mean() / base.mean()).item()
    assert low < ratio < high and 0.04 < high - low < 0.2


def test_small_crops_for_the_large_network_keep_their_places():
    class Spot:
        side = 192
        def __call__(self, crops):
            found = []
            for crop in crops:
                weights = (crop.mean(0) + 1).double().clamp(min=0)
                place = torch.arange(192).double()
                found.append((torch.stack([(weights * place).sum(), (weights * place[:, None]).sum()]) / weights.sum() / 192).expand(468, 2))
            return torch.stack(found)
    frames = torch.full((1, 2, 3, 64, 64), -1.0)
    frames[0, 0, :, 20, 30], frames[0, 1, :, 40, 9] = 1, 1
    found = by_mesh(Spot(), frames)
    assert found.shape == (1, 2, 10, 2) and (found[0, :, 0] * 64 - torch.tensor([[30.0, 20.0], [9.0, 40.0]])).abs().max() < 0.05


def test_errors_of_wflw_come_whole_and_by_subset(monkeypatch):
    truth = torch.rand(20, 98, 2, generator=seeded())
    points = truth + 0.05 * torch.rand(20, 1, 1, generator=seeded(1))
    made, errors = TensorSet(points, points=points, truth=truth), nme(points, truth)
    class Made(list):
        def __getitems__(self, indices): return {"points": points[list(indices)], "truth": truth[list(indices)]}
    attributes = torch.zeros(30, 6, dtype=torch.bool); attributes[:5, 0], attributes[3:12, 5] = True, True
    monkeypatch.setattr(room, "WFLW", lambda path, split: type("Read", (), {"attributes": attributes})())
    found = measure_landmarks(Made(range(20)), None, None, data_path="somewhere")
    assert found["nme"] == pytest.approx(errors.mean().item()) and found["fails_at_8"] == failure_rate(errors, 8) and found["area"] == area_under_curve(errors)
    assert found["pose: nme"] == pytest.approx(errors[:5].mean().item()) and found["blur: fails_at_10"] == failure_rate(errors[3:12]) and "make-up: nme" not in found
    assert measure_landmarks(Made(range(20)), None, None, normaliser="box")["nme"] != found["nme"]


# ---- the detector that ships

@pytest.fixture(scope="module")
def shipped(): return room.load_pretrained()


@pytest.fixture(scope="module")
def hard(): return room.together(room.drawn_clips(True, 12, 40, 51))


def test_more_evaluations_than_in_training_do_no_harm(shipped):
    stills = room.drawn_test(128)
    rows = {row["evaluations"]: row["nme"] for row in room.evaluate(shipped, evaluations=(3, 12), data=stills)}
    assert rows[12] < 5.5 and rows[12] <= rows[3] + 0.05
    with torch.no_grad(): features = shipped.inject(stills.tensors["x0"][:64])
    f = shipped.step(features)
    found = solve(f, shipped.origin(features), FixedPoint(), Stop(30, 0))
    assert found.history[5].mean() <= 2e-2 and found.history[-1].median() < 1e-5  # the longer it was trained, the more slowly it settles
    assert (room.spectral_radius(f, found.z, generator=seeded()) < 1).double().mean() >= 0.95


def test_the_one_step_gradient_points_where_the_exact_one_does(shipped):
    model, stills = room.load_pretrained().train(), room.drawn_test(128)
    model.stem.eval()
    slopes = []
    for gradient in ("one_step", "implicit"):
        model.config = shipped.config.override(gradient=gradient, evaluations=20)
        model.zero_grad()
        (model(stills.tensors["x0"][:8]).points - stills.tensors["points"][:8]).norm(dim=-1).mean().backward()
        slopes.append(torch.cat([p.grad.flatten() for p in model.cells.parameters()]))
    assert torch.nn.functional.cosine_similarity(*slopes, dim=0) >= 0.9


def test_memory_against_frame_by_frame_on_clips_that_nothing_was_tuned_on(shipped, hard):
    with torch.no_grad(): paths = {name: hard.placed(track(shipped, hard.frames, memory).points) for name, memory in (("none", Memory("none")), ("one", Memory("early", 1)), ("two", Memory("early", 2)))}
    mean = lambda name, *filter: [sum(numbers) / 12 for numbers in measured(paths[name], hard, *filter)]
    plain, one, two = mean("none"), mean("one"), mean("two")
    assert one[1] <= 0.9 * plain[1] and one[0] <= plain[0] and two[1] <= 0.96 * plain[1]
    plain, one = mean("none", Exponential(0.6)), mean("one", Exponential(0.6))
    assert one[1] <= 0.95 * plain[1] and one[0] <= plain[0], "the same filter behind both"
    with torch.no_grad(): foreign = measured(hard.placed(with_foreign_past(shipped, hard.frames, Memory("early", 1))), hard)
    assert sum(foreign[0]) / 12 > mean("none")[0], "another clip's past is worse than none"


def test_easy_clips_lose_nothing(shipped):
    easy = room.together(room.drawn_clips(False, 6, 40, 51))
    with torch.no_grad(): errors = [sum(measured(easy.placed(track(shipped, easy.frames, memory).points), easy)[0]) for memory in (Memory("none"), Memory("early", 1))]
    assert abs(errors[1] / errors[0] - 1) < 0.01
