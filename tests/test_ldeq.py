"""LDEQ: heatmaps and their read-out, the detector's parts, losses, augmentation, memory on video, released weights."""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from extras import need

need("train", "data")
from diffusion_papers import ldeq
from diffusion_papers.core.data import TensorSet
from diffusion_papers.core.training import Draws, TrainingConfig
from diffusion_papers.ldeq import (
    CONFIGS, Ldeq, LdeqConfig, Memory, Tracker, authors_names, build, detect, detection_loss, evaluate, generate_data, load_authors_checkpoint, measure_videos,
    multiplier, normalised, read_out, rewarped, track, track_file, train)
from diffusion_papers.topics.equilibrium import FixedPoint, Stop, jacobian_penalty, solve
from diffusion_papers.topics.landmarks import crop_matrix, nme, nmf
from diffusion_papers.workbench.checkpoints import CheckpointError

SMALL = LdeqConfig(size=32, landmarks=5, features=8, width=8, increment=4, depth=2, pool=8)


def seeded(seed=0): return torch.Generator().manual_seed(seed)
def pictures(count=3, size=32, seed=0): return torch.rand(count, 3, size, size, generator=seeded(seed)) * 2 - 1


def tame(**changes):
    "A detector whose map contracts: the old heatmaps count little."
    model = build(SMALL.override(**changes))
    with torch.no_grad(): model.cells[0].tail.conv.weight[:, :5] *= 0.005
    return model


# ---- heatmaps

def test_heatmaps_are_a_softmax_with_its_peak_at_one():
    logits = torch.randn(2, 3, 6, 6, generator=seeded(), dtype=torch.float64)
    for sharpness in (0.3, 1.0, 4.0):
        maps = normalised(logits, sharpness=sharpness)
        assert (maps.amax((-2, -1)) == 1).all() and torch.allclose(maps / maps.sum((-2, -1), keepdim=True), (sharpness * logits).flatten(2).softmax(-1).reshape_as(logits))
    line = normalised(logits, "linear")
    assert line.amin() == 0 and torch.allclose(line.amax((-2, -1)), torch.ones(2, 3, dtype=torch.float64), atol=1e-4)
    assert torch.equal(normalised(logits, "none"), logits)


def test_the_read_out_is_the_mean_place_and_the_spread_around_it():
    weights = torch.rand(1, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    p = (weights / weights.sum())[0, 0]
    v, u = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    mean = torch.stack([(p * u).sum(), (p * v).sum()])
    variance = (p * ((u - mean[0])**2 + (v - mean[1])**2)).sum() / 2
    points, spread = read_out(1e6 * weights)
    assert torch.allclose(points[0, 0] * 8, mean, atol=1e-6) and torch.allclose(spread[0, 0] * 8, variance.sqrt(), atol=1e-6)
    theirs = (p * ((u - mean[0] / 8)**2 + (v - mean[1] / 8)**2)).sum() / 2
    assert torch.allclose(read_out(1e6 * weights, released=True)[1][0, 0] * 8, theirs.sqrt(), atol=1e-6)
    one = torch.zeros(1, 1, 8, 8); one[0, 0, 2, 5] = 1
    assert torch.allclose(read_out(one)[0][0, 0], torch.tensor([5.0, 2.0]) / 8 / (1 + 1e-4))


# ---- the detector

def test_a_block_is_convolution_rectifier_norm():
    block = ldeq.Block(3, 4, 3, torch.nn.BatchNorm2d).eval()
    block.norm.running_mean.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    x = torch.randn(2, 3, 5, 5, generator=seeded())
    plain = torch.nn.functional.leaky_relu(torch.nn.functional.conv2d(x, block.conv.weight, block.conv.bias, padding=1), 0.01)
    assert torch.allclose(block(x), (plain - block.norm.running_mean[:, None, None]) / math.sqrt(1 + 1e-5), atol=1e-5)


def test_published_sizes_and_names():
    manifest = json.loads((Path(__file__).parent / "manifests" / "ldeq-wflw.json").read_text())
    with torch.device("meta"): model = Ldeq(CONFIGS["wflw"])
    state = model.state_dict()
    assert {theirs: list(state[ours].shape) for ours, theirs in authors_names(model)} == manifest
    assert sum(p.numel() for p in model.parameters()) == 16_531_346
    parts = {"stem": 291_648, "cells.0.tail": 72_800, "cells.0.hourglass": 16_144_848, "cells.0.head": 22_050}
    for name, count in parts.items(): assert sum(p.numel() for p in model.get_submodule(name).parameters()) == count


@pytest.mark.parametrize("packed", ["state alone", "with settings", "data parallel"])
def test_released_weights_are_read_by_their_names(tmp_path, packed):
    model = build(SMALL.override(groups=1))
    state = {theirs: model.state_dict()[ours] for ours, theirs in authors_names(model)}
    if packed == "data parallel": state = {f"module.{name}": value for name, value in state.items()}
    content = state if packed == "state alone" else {"state_dict": state, "args": argparse.Namespace(solver="anderson", lam=1e-4)}
    torch.save(content, tmp_path / "final.pth.tar")
    found = load_authors_checkpoint(tmp_path / "final.pth.tar")
    assert (found.config.features, found.config.width, found.config.increment, found.config.landmarks, found.config.depth) == (8, 8, 4, 5, 2)
    stop = Stop(5, 0)
    assert torch.equal(found(pictures(), stop=stop).maps, build_like(model, found)(pictures(), stop=stop).maps)
    torch.save({"state_dict": state, "args": argparse.Namespace(cell_gn_groups=2, cell_softargmax_beta=3.0)}, tmp_path / "told.pt")
    told = load_authors_checkpoint(tmp_path / "told.pt")
    assert (told.config.groups, told.config.sharpness) == (2, 3.0) and load_authors_checkpoint(tmp_path / "told.pt", groups=4, sharpness=1.5).config.groups == 4
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of LDEQ, it lacks tail.3.conv.weight"): load_authors_checkpoint(tmp_path / "other.pt")
    state.popitem()
    torch.save({"state_dict": state}, tmp_path / "cut.pt")
    with pytest.raises(CheckpointError): load_authors_checkpoint(tmp_path / "cut.pt")


def build_like(model, other):
    same = build(other.config)
    same.load_state_dict(model.state_dict())
    return same


def test_pictures_are_standardised_as_imagenet_is():
    model, seen = build(SMALL), []
    model.stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.full((1, 3, 32, 32), 0.2))
    expected = [(0.6 - mean) / std for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    assert seen[0].mean((0, 2, 3)).tolist() == pytest.approx(expected, rel=1e-4)


def test_all_ways_to_the_same_depth_agree_and_a_stack_has_its_own_weights():
    model = tame()
    images, f = pictures(), None
    f = model.step(model.inject(images))
    z = model.origin(model.inject(images))
    for _ in range(4): z = f(z)
    with torch.no_grad():
        assert torch.equal(model(images, stop=Stop(3, 0)).maps, z)  # three evaluations and the last one
        loop = build(SMALL.override(method="unrolled", evaluations=4)); loop.load_state_dict(model.state_dict())
        assert torch.equal(loop(images).maps, z)
        stack = build(SMALL.override(method="stacked", evaluations=4))
        assert len(stack.cells) == 4 and sum(p.numel() for p in stack.cells.parameters()) == 4 * sum(p.numel() for p in model.cells.parameters())
        other = stack.origin(stack.inject(images))
        for cell in stack.cells: other = cell(other, stack.inject(images))
        assert torch.equal(stack(images).maps, other)
        start = torch.rand(3, 5, 8, 8, generator=seeded())
        assert torch.equal(model(images, start, Stop(1, 0)).maps, f(f(start)))
        raw = build(SMALL.override(normalisation="none", sharpness=2.0))
        maps = raw(images).maps
        assert torch.equal(raw(images).points, read_out(normalised(maps, sharpness=2.0))[0])


# ---- losses and training

def test_the_loss_is_the_distance_on_the_heatmap():
    model, batch = tame(), {"x0": pictures(), "points": torch.rand(3, 5, 2, generator=seeded())}
    draws = lambda: Draws(seeded())
    plain = detection_loss(model, batch, draws())
    expected = (model(batch["x0"]).points - batch["points"]).norm(dim=-1).mean(1) * 8
    assert torch.allclose(plain, expected, atol=1e-5) and plain.shape == (3,)
    heavy = tame(jacobian=2.0)
    torch.manual_seed(0); found = detection_loss(heavy, batch, draws())
    torch.manual_seed(0); penalty = jacobian_penalty(heavy.step(heavy.inject(batch["x0"])), heavy(batch["x0"]).maps.detach())
    assert torch.allclose(found, plain + 2 * penalty, rtol=1e-3) and penalty > 0
    stops = []
    random = tame(random_evaluations=True, evaluations=6)
    random.register_forward_pre_hook(lambda module, args, kwargs: stops.append(kwargs["stop"].evaluations), with_kwargs=True)
    for seed in range(60): detection_loss(random, batch, Draws(seeded(seed)))
    assert set(stops) == {1, 2, 3, 4, 5, 6}


def test_training_lowers_the_error_and_goes_on_where_it_stopped(tmp_path):
    data = TensorSet(pictures(16, seed=4), points=torch.rand(16, 5, 2, generator=seeded(1)))
    config = SMALL.override(**{"training.steps": 30, "training.batch_size": 8, "training.lr": 5e-3})
    losses = []
    whole = train(config, data=data, device="cpu", callback=lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.9 * losses[0]
    class Stopped(Exception): pass
    def stop(step, loss):
        if step >= 12: raise Stopped
    brief = config.override(**{"training.checkpoint_every": 10})
    with pytest.raises(Stopped): train(brief, tmp_path / "run", data=data, device="cpu", callback=stop)
    again = train(brief, tmp_path / "run", data=data, device="cpu", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_what_is_measured_on_stills(monkeypatch):
    data = TensorSet(pictures(6), points=torch.rand(6, 71, 2, generator=seeded()))
    model, asked = build(SMALL.override(landmarks=71)), []
    def found(model, images, *, stop): asked.append(stop.evaluations); return data.tensors["points"] + 0.01 * stop.evaluations
    monkeypatch.setattr(ldeq, "detect", found)
    rows = evaluate(model, evaluations=(1, 3), data=data)
    truth = data.tensors["points"]
    assert asked == [1, 3] and [row["nme"] for row in rows] == pytest.approx([nme(truth + 0.01 * n, truth).mean().item() for n in (1, 3)])
    assert [row["fails_at_8"] for row in rows] == pytest.approx([(nme(truth + 0.01 * n, truth) > 8).double().mean().item() for n in (1, 3)])


def test_landmarks_of_many_pictures(tmp_path):
    model, data = tame(), TensorSet(pictures(7), points=torch.rand(7, 5, 2, generator=seeded()))
    whole = detect(model, data.tensors["x0"])
    assert torch.allclose(detect(model, data.tensors["x0"], size=2), whole, atol=1e-5)
    made = generate_data(model, tmp_path / "made", data=data, size=3, device="cpu").__getitems__(range(7))
    assert torch.allclose(made["points"], whole, atol=1e-5) and torch.equal(made["truth"], data.tensors["points"])
    assert ldeq.sample(model, 4, data=data).shape == (4, 3, 32, 32)


# ---- video

def clips(batch=2, frames=5, seed=2): return torch.rand(batch, frames, 3, 32, 32, generator=seeded(seed)) * 2 - 1


def test_memory_is_what_its_formula_says():
    model, video, full = tame(), clips(), Stop(6, 0)
    steps = [model.step(model.inject(video[:, frame])) for frame in range(5)]
    first = solve(steps[0], model.origin(model.inject(video[:, 0])), FixedPoint(), full).z
    with torch.no_grad():
        for memory in (Memory("early", 1), Memory("early", 3), Memory("penalty", 2, 0.7), Memory("none")):
            z, expected = first, [read_out(first)[0]]
            for f in steps[1:]:
                before = z
                if memory.way == "none": z = solve(f, torch.zeros_like(z), FixedPoint(), full).z
                for _ in range(memory.evaluations if memory.way != "none" else 0):
                    z = f(z) if memory.way == "early" else (f(z) + 0.7 * before) / 1.7
                expected.append(read_out(z)[0])
            found = track(model, video, memory, full=full)
            assert torch.allclose(found.points, torch.stack(expected, 1), atol=1e-5) and torch.allclose(found.maps, z, atol=1e-5), memory
            assert found.evaluations.tolist() == [6] + [6 if memory.way == "none" else memory.evaluations] * 4


def test_the_residual_of_the_old_heatmaps_is_told_and_a_cut_starts_anew():
    model, video, full = tame(), clips(), Stop(6, 0)
    found = track(model, video, full=full)
    f = model.step(model.inject(video[:, 1]))
    with torch.no_grad(): z = track(model, video[:, :1], full=full).maps; answer = f(z)
    expected = (answer - z).flatten(1).norm(dim=1) / answer.flatten(1).norm(dim=1)
    assert torch.allclose(found.residual[:, 1], expected, rtol=1e-3) and found.residual[:, 0].isnan().all() and found.cuts.sum(0).tolist() == [2, 0, 0, 0, 0]
    level = float(expected.mean())
    new = track(model, video[:, :2], Memory("early", 1, cut=level), full=full)
    alone = track(model, video[:, :2], Memory("none"), full=full)
    for clip in range(2):
        assert new.cuts[clip, 1] == (expected[clip] > level)
        assert torch.allclose(new.points[clip, 1], (alone if new.cuts[clip, 1] else found).points[clip, 1], atol=1e-5)


def test_the_constraint_ends_at_the_fixed_point_whose_multiplier_balances_the_past():
    model, video = tame(), clips()
    alone = track(model, video, Memory("none"), full=Stop(40, 0))
    held = track(model, video, Memory("constraint", 30), full=Stop(40, 0))
    assert torch.allclose(held.points, alone.points, atol=1e-4) and held.evaluations.tolist() == [40, 30, 30, 30, 30]
    past = track(model, video[:, :1], full=Stop(40, 0)).maps
    f = model.step(model.inject(video[:, 1]))
    z = track(model, video[:, 1:2], Memory("constraint", 40), maps=past).maps
    mu = multiplier(f, z, past)
    slope = torch.autograd.functional.jvp  # the Lagrangian's derivative along random directions is zero
    for seed in range(3):
        direction = torch.randn(z.shape, generator=seeded(seed))
        along = slope(f, z, direction)[1] - direction
        assert ((z - past) * direction).sum() + (mu * along).sum() == pytest.approx(0, abs=1e-2 * ((z - past) * direction).sum().abs().item() + 1e-3)


def test_a_clip_goes_on_from_given_heatmaps():
    model, video = tame(), clips()
    whole, half = track(model, video), track(model, video[:, :3])
    rest = track(model, video[:, 3:], maps=half.maps)
    assert torch.allclose(rest.points, whole.points[:, 3:], atol=1e-6)
    seen = []
    track(model, video, callback=lambda frame, maps: seen.append((frame, maps.shape)))
    assert seen == [(frame, (2, 5, 8, 8)) for frame in range(5)]


def test_heatmaps_are_carried_along_when_the_crop_moves():
    maps = torch.zeros(1, 1, 8, 8); maps[0, 0, 3, 2] = 1
    before = torch.tensor([[[0.5, 0, 4], [0, 0.5, 8]]])
    now = torch.tensor([[[0.5, 0, 12], [0, 0.5, 4]]])  # 8 pixels of 32 to the right, 4 up: 2 and 1 of the map
    assert rewarped(maps, before, now, 32)[0, 0, 2, 4] == pytest.approx(1) and rewarped(maps, before, before, 32)[0, 0, 3, 2] == pytest.approx(1)
    model, video = tame(), clips(1, 3)
    matrices = torch.cat([before, before, now])[None]
    moved_maps = track(model, video[:, :2], matrices=matrices[:, :2]).maps
    last = model.step(model.inject(video[:, 2]))
    with torch.no_grad(): expected = last(rewarped(moved_maps, before, now, 32))
    assert torch.allclose(track(model, video, matrices=matrices).maps, expected, atol=1e-5)


def test_landmarks_of_a_video_have_a_gradient_for_its_pictures():
    model, video = tame().double(), 0.9 * clips(1, 3).double()
    for memory in (Memory("early", 2), Memory("penalty", 1, 0.5), Memory("none"), Memory("constraint", 20)):
        leaf = video.clone().requires_grad_()
        track(model, leaf, memory, full=Stop(30, 0)).points[0, -1, 0, 0].backward()
        slope = leaf.grad
        assert torch.isfinite(slope).all() and slope[:, -1].abs().max() > 0
        assert (slope[:, 0].abs().max() > 0) == (memory.way in ("early", "penalty"))  # fixed points have forgotten where they began
        way, step = torch.randn(video.shape, generator=seeded(5), dtype=torch.float64), 1e-5
        with torch.no_grad(): ends = [track(model, video + sign * step * way, memory, full=Stop(30, 0)).points[0, -1, 0, 0].item() for sign in (1, -1)]
        assert (slope * way).sum().item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-6), memory
    assert not track(model, video).points.requires_grad


def test_a_tracker_follows_the_face_and_carries_its_heatmaps(monkeypatch):
    model, seen = tame(), []
    def found(model, crop, memory, *, full, maps):
        bright = (crop[0, 0].mean(0) > 0).nonzero().double()
        low, high = bright.amin(0).flip(0), bright.amax(0).flip(0)
        corners = torch.stack([low, high, torch.stack([low[0], high[1]]), torch.stack([high[0], low[1]]), (low + high) / 2]) / 32
        seen.append(maps)
        return ldeq.Track(corners[None, None], None, None, None, torch.zeros(1, 5, 8, 8) if maps is None else maps + 1)
    monkeypatch.setattr(ldeq, "track", found)
    frames = torch.full((5, 3, 80, 100), -1.0)
    for number, frame in enumerate(frames): frame[:, 30:50, 40 + 3 * number:60 + 3 * number] = 1
    tracker = Tracker(model)
    points = torch.stack([tracker(frame) for frame in frames])
    expected = torch.tensor([[40.0, 30.0], [59.0, 49.0], [40.0, 49.0], [59.0, 30.0], [49.5, 39.5]]).double() + torch.arange(5)[:, None, None] * torch.tensor([3.0, 0.0])
    assert (points - expected).abs().max() < 1.5
    assert seen[:5] == [None] * 5 and all(maps is not None for maps in seen[5:]), "the search does not remember, the video does"
    box = torch.tensor([38.0, 28.0, 62.0, 52.0])
    assert (Tracker(model, enlarged=1.5)(frames[0], box) - expected[0]).abs().max() < 1.5
    with pytest.raises(ValueError, match="frame"): tracker(torch.full((3, 80, 100), 4.0))
    moves = []
    monkeypatch.setattr(ldeq, "rewarped", lambda maps, before, now, size: moves.append((before[0], now[0], size)) or maps)
    boxes = [torch.tensor([38.0, 28.0, 62.0, 52.0]) + shift for shift in (0, 3)]
    for carried in (False, True):
        follower = Tracker(model, enlarged=1.5, carried=carried)
        for frame, where in zip(frames, boxes): follower(frame, where)
        assert len(moves) == int(carried)
    before, now, size = moves[0]
    assert torch.allclose(before, crop_matrix(boxes[0], 32, 1.5).float()) and torch.allclose(now, crop_matrix(boxes[1], 32, 1.5).float()) and size == 32


def test_a_video_of_files_becomes_lines_of_numbers(tmp_path):
    from PIL import Image
    model = build(SMALL)
    (tmp_path / "frames").mkdir()
    for number in range(6): Image.fromarray((torch.rand(40, 48, 3, generator=seeded(number)) * 255).byte().numpy()).save(tmp_path / "frames" / f"{number}.png")
    np.save(tmp_path / "boxes.npy", np.tile([5.0, 5.0, 35.0, 35.0], (6, 1)))
    told = []
    points = track_file(tmp_path / "frames", boxes=str(tmp_path / "boxes.npy"), smoothing="exponential", drawn=str(tmp_path / "d.gif"), model=model, progress=False, output=tmp_path / "p.csv", say=told.append)
    raw = track_file(tmp_path / "frames", boxes=str(tmp_path / "boxes.npy"), model=model, progress=False)
    assert torch.allclose(points[1], (points[0] + raw[1]) / 2, atol=1e-6) and torch.equal(points[0], raw[0])
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines[0].startswith("frame,seconds,x0,y0,x1") and len(lines) == 7 and lines[3].split(",")[:2] == ["2", "0.08"]
    assert float(lines[3].split(",")[2]) == pytest.approx(points[2, 0, 0].item(), abs=1e-3) and "late by" in told[0]
    with Image.open(tmp_path / "d.gif") as film: assert film.n_frames == 6 and film.size == (48, 40)
    for options, message in (({"smoothing": "median"}, "smoothing: expected one of"), ({"boxes": "none.npy"}, "boxes: there is no"), ({"output": tmp_path / "p.txt"}, "output"), ({"drawn": "d.png"}, "drawn"),
                             ({"way": "late"}, "way")):
        with pytest.raises((ValueError, FileNotFoundError), match=message): track_file(tmp_path / "frames", model=model, progress=False, **options)
    np.save(tmp_path / "few.npy", np.zeros((2, 4)) + [5, 5, 35, 35])
    assert len(track_file(tmp_path / "frames", boxes=str(tmp_path / "few.npy"), model=model, progress=False)) == 2
    np.save(tmp_path / "few.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match="boxes: expected x1, y1, x2, y2"): track_file(tmp_path / "frames", boxes=str(tmp_path / "few.npy"), model=model, progress=False)


def test_videos_with_truth_are_measured(tmp_path):
    from PIL import Image
    model = build(SMALL.override(landmarks=98))
    truth = {name: (torch.rand(5, 98, 2, generator=seeded(number), dtype=torch.float64) * 20 + 12).numpy() for number, name in enumerate("ab")}
    for folder in ("bboxes", "landmarks"): (tmp_path / folder).mkdir()
    for name in "ab":
        (tmp_path / "videos" / name).mkdir(parents=True)
        for number in range(5): Image.fromarray((torch.rand(40, 48, 3, generator=seeded(number)) * 255).byte().numpy()).save(tmp_path / "videos" / name / f"{number}.png")
        np.save(tmp_path / "bboxes" / f"{name}.npy", np.tile([8.0, 6.0, 36.0, 34.0], (5, 1))); np.save(tmp_path / "landmarks" / f"{name}.npy", truth[name])
    (tmp_path / "hard.txt").write_text("b\n")
    told = []
    rows = measure_videos(tmp_path, hard=str(tmp_path / "hard.txt"), model=model, progress=False, output=tmp_path / "rows.csv", say=told.append)
    tracker = Tracker(model, Memory("early", 2), enlarged=1.2, carried=False)
    from diffusion_papers.topics.landmarks import read_clip
    clip = read_clip(tmp_path, "a")
    points = torch.stack([tracker(frame, box) for frame, box in zip(clip.frames, clip.boxes)])
    assert rows[0]["nme"] == pytest.approx(nme(points, clip.points).mean().item()) and rows[0]["nmf"] == pytest.approx(nmf(points, clip.points)) and rows[0]["frames"] == 5
    assert [line.split(",")[0] for line in told] == ["all", "hard", "easy"] and f"NME {(rows[0]['nme'] + rows[1]['nme']) / 2:.3f}" in told[0] and f"NME {rows[1]['nme']:.3f}" in told[1]
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="model: it has 5 landmarks"): measure_videos(tmp_path, model=build(SMALL), progress=False)


@pytest.mark.parametrize("call, message", [
    (lambda: LdeqConfig(size=70), "size: expected a multiple of 64"), (lambda: LdeqConfig(features=30), "features: expected a multiple of 4"), (lambda: LdeqConfig(groups=5), "groups: expected a divisor"),
    (lambda: LdeqConfig(solver="newton"), "solver: expected one of fixed_point, anderson, broyden"), (lambda: LdeqConfig(loss="l1"), "loss: expected one of"),
    (lambda: LdeqConfig(tolerance=2.0), "tolerance"), (lambda: build(SMALL)(torch.zeros(1, 3, 30, 30)), "images: expected"), (lambda: build(SMALL)(torch.zeros(1, 3, 32, 64)), "images: expected"),
    (lambda: build(SMALL)(pictures(1), torch.zeros(1, 4, 8, 8)), "z0: expected heatmaps of shape"), (lambda: Memory("fast"), "way: expected one of"), (lambda: Memory(strength=-1.0), "strength"),
    (lambda: track(build(SMALL), torch.zeros(2, 3, 32, 32)), "clips: expected"), (lambda: track(build(SMALL), torch.full((1, 2, 3, 32, 32), 9.0)), "clips: expected values in"),
    (lambda: track(build(SMALL.override(method="stacked")), clips()), "a stack of cells has no fixed point"), (lambda: track(build(SMALL), clips(), matrices=torch.zeros(2, 4, 2, 3)), "matrices: expected shape"),
    (lambda: read_out(torch.zeros(1, 1, 3, 4)), "maps: expected square"), (lambda: normalised(torch.zeros(1, 2, 2), "soft"), "how: expected one of"),
    (lambda: ldeq.load_data(CONFIGS["wflw"]), "data_path: WFLW is yours to bring"), (lambda: ldeq.load_data(SMALL, "validation"), "split"), (lambda: ldeq.sample(build(SMALL), 0), "count"),
])
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message): call()
