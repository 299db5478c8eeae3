"""Landmarks: measures, filters and crops against closed forms and other people's programs; the data sets' files."""
import importlib.util
import math

import numpy as np
import pytest
import torch
from extras import need

need("train", "data")
from PIL import Image
from scipy.integrate import simpson

from diffusion_papers.topics import landmarks
from diffusion_papers.topics.landmarks import (
    FILTERS, NORMALISERS, NUMBERINGS, WFLW, WFLW_TO_300W, DoubleExponential, Exponential, MovingAverage, OneEuro, SavitzkyGolay, Unfiltered, allan_deviation,
    Video, area_under_curve, clip_names, crop_matrix, drawn_on, face_sizes, failure_rate, in_common, inverse, lag, landmark_loss, moved, nme, nmf, padded, read_clip, read_video, small_crop, smooth, tuned, warp, write_video)


def faces(count=5, n=98, seed=0): return 100 * torch.rand(count, n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- numbers of points

def test_a_mirrored_face_has_its_points_where_their_partners_were():
    middle = {"wflw98": [16, 51, 52, 53, 54, 57, 79, 85, 90, 94], "300w68": [8, 27, 28, 29, 30, 33, 51, 57, 62, 66], "drawn71": [7, 33, 37, 41, 47, 53, 57, 60, 62], "common10": [4, 5]}
    for name, known in NUMBERINGS.items():
        order = known.mirror
        assert torch.equal(order[order], torch.arange(known.count)) and (order == torch.arange(known.count)).nonzero()[:, 0].tolist() == middle[name]
        assert sorted(int(order[number]) for number in known.pupils[0]) == sorted(known.pupils[1])
    assert len(WFLW_TO_300W.unique()) == 68
    assert WFLW_TO_300W[[8, 30, 36, 39, 42, 45, 48, 54, 33]].tolist() == [16, 54, 60, 64, 68, 72, 76, 82, 57]


# ---- measures

def test_errors_are_over_the_length_that_is_named():
    truth = faces()
    wrong = truth + torch.tensor([3.0, -4.0])
    width, height = (truth.amax(1) - truth.amin(1)).unbind(-1)
    lengths = {"inter-ocular": (truth[:, 60] - truth[:, 72]).norm(dim=1), "inter-pupil": (truth[:, 96] - truth[:, 97]).norm(dim=1),
               "box": (width * height).sqrt(), "diagonal": (width**2 + height**2).sqrt()}
    assert lengths.keys() == NORMALISERS.keys()
    for name, length in lengths.items(): assert torch.allclose(nme(wrong, truth, name), 500 / length)
    assert torch.allclose(nme(wrong, truth), 500 / lengths["inter-ocular"])
    eyes = faces(n=68)
    assert torch.allclose(face_sizes(eyes, "inter-pupil"), (eyes[:, 36:42].mean(1) - eyes[:, 42:48].mean(1)).norm(dim=1))
    assert torch.allclose(face_sizes(eyes), (eyes[:, 36] - eyes[:, 45]).norm(dim=1)) and torch.allclose(face_sizes(faces(n=71)), (faces(n=71)[:, 23] - faces(n=71)[:, 28]).norm(dim=1))
    one = truth.clone(); one[:, 7] += torch.tensor([0.0, 98.0])
    assert torch.allclose(nme(one, truth, "box"), 100 / lengths["box"])


def test_rates_and_areas():
    errors = torch.tensor([2.0, 8.0, 9.0, 10.0, 11.0, 30.0], dtype=torch.float64)
    assert failure_rate(errors) == pytest.approx(2 / 6) and failure_rate(errors, 8) == pytest.approx(4 / 6)
    for threshold in (10, 8):
        grid = np.linspace(0, threshold, 1001)
        share = (errors.numpy()[:, None] <= grid).mean(0)
        assert area_under_curve(errors, threshold) == pytest.approx(simpson(share, x=grid) / threshold, rel=1e-12)


def still(frames=60):
    face = faces(1)
    face = 256 * (face - face.amin(1, keepdim=True)) / (face.amax(1, keepdim=True) - face.amin(1, keepdim=True))
    return face.expand(frames, -1, -1)


def test_flicker_is_what_its_formula_says():
    torch.manual_seed(0)
    truth = still()
    wrong = truth + torch.randn_like(truth)
    errors = truth - wrong
    by_hand = [100 * ((errors[t] - errors[t - 1]).norm(dim=1) / math.sqrt(256 * 256 / 256**2)) for t in range(1, len(truth))]
    assert nmf(wrong, truth) == pytest.approx(math.sqrt(np.mean([float((q**2).mean()) for q in by_hand])), rel=1e-9)
    assert nmf(truth + 5, truth) < 1e-9 and nmf(truth, truth) == 0
    assert nmf(3 * wrong, 3 * truth) == pytest.approx(nmf(wrong, truth))
    order = torch.randperm(98)
    assert nmf(wrong[:, order], truth[:, order]) == pytest.approx(nmf(wrong, truth))
    long = still(4000)
    assert nmf(long + 0.3 * torch.randn_like(long), long) == pytest.approx(100 * 0.3 * 2, rel=0.02)


def test_the_size_of_the_later_frame_counts():
    truth = still(3) * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)[:, None, None]
    wrong = truth + torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)[:, None]
    assert nmf(wrong, truth) == pytest.approx(math.sqrt((50**2 + 0) / 2))


def test_allan_deviations():
    truth, _ = still(64), torch.manual_seed(0)
    wrong = truth + torch.randn_like(truth)
    errors = (wrong - truth) / 256 * 25600
    for m, found in zip((1, 3, 32), allan_deviation(wrong, truth, (1, 3, 32))):
        means = torch.stack([errors[t:t + m].mean(0) for t in range(64 - m + 1)])
        total = sum((means[l + m] - means[l]).square().sum(-1) for l in range(64 - 2 * m + 1)) / (2 * (64 - 2 * m + 1))
        assert found.item() == pytest.approx(total.mean().sqrt().item(), rel=1e-9)
    assert allan_deviation(wrong, truth, (1,)).item() == pytest.approx(nmf(wrong, truth) / 2**0.5)


def test_lag_is_in_frames_and_positive_when_late():
    t = torch.arange(120, dtype=torch.float64)
    path = lambda shift: 30 * torch.sin((t - shift) / 9)[:, None, None] + still(120)
    for shift in (-3.0, 0.0, 1.5, 4.0): assert lag(path(shift), path(0)) == pytest.approx(shift, abs=0.1)
    assert lag(smooth(path(0), Exponential(0.25)), path(0)) == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize("call, error, message", [
    (lambda: nme(faces(), faces(4)), ValueError, "predicted: expected the shape of the truth"),
    (lambda: nme(faces() * float("nan"), faces()), ValueError, "predicted: expected finite coordinates, got NaN or infinite ones in face 0"),
    (lambda: nme(faces(0), faces(0)), ValueError, "truth: expected points"),
    (lambda: nme(faces(n=5), faces(n=5)), ValueError, "points: expected 98, 68, 71, 10 points a face, got 5"),
    (lambda: nme(faces(), faces() * 0), ValueError, "truth: the inter-ocular length of face 0 is 0"),
    (lambda: nme(faces(), faces(), "nose"), ValueError, "normaliser: expected one of inter-ocular"),
    (lambda: nmf(faces(1), faces(1)), ValueError, "at least 2 frames, got 1"), (lambda: nmf(faces(3), faces(3) * 0), ValueError, "box length of face 0 is 0"),
    (lambda: allan_deviation(faces(5), faces(5), (3,)), ValueError, r"blocks: expected a value in \[1, 2\]"),
    (lambda: lag(faces(3), faces(3)), ValueError, "at least 4 frames"), (lambda: lag(still(), still()), ValueError, "does not move"),
    (lambda: failure_rate(torch.tensor([])), ValueError, "errors: expected at least one"), (lambda: failure_rate(torch.ones(2), 0), ValueError, "threshold"),
    (lambda: Exponential(0), ValueError, "alpha"), (lambda: Exponential(1.1), ValueError, "alpha"), (lambda: OneEuro(0), ValueError, "frequency"),
    (lambda: OneEuro(25, 0), ValueError, "min_cutoff"), (lambda: OneEuro(25, beta=-1), ValueError, "beta"), (lambda: MovingAverage(0), ValueError, "window"),
    (lambda: SavitzkyGolay(4), ValueError, "odd"), (lambda: SavitzkyGolay(5, 5), ValueError, "order"), (lambda: smooth(faces(0), Unfiltered()), ValueError, "at least one frame"),
    (lambda: tuned([], []), ValueError, "filters"), (lambda: crop_matrix(torch.tensor([5.0, 5, 5, 9])), ValueError, "box: expected x1 < x2"),
    (lambda: crop_matrix(torch.tensor([[0.0, 0, 5, 9], [0, 0, float("nan"), 9]])), ValueError, "as number 1"), (lambda: crop_matrix(torch.zeros(3)), ValueError, "got shape"),
])
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message): call()


# ---- filters

def signal(frames=50): return torch.randn(frames, 3, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64).cumsum(0)


def test_filters_follow_their_recursions():
    x = signal()
    level, trend, mean = x[0], torch.zeros_like(x[0]), x[0]
    double, single = [level], [mean]
    for frame in x[1:]:
        before, level = level, 0.4 * frame + 0.6 * (level + trend)
        trend = 0.2 * (level - before) + 0.8 * trend
        mean = 0.4 * frame + 0.6 * mean
        double.append(level); single.append(mean)
    assert torch.allclose(smooth(x, DoubleExponential(0.4, 0.2)), torch.stack(double)) and torch.allclose(smooth(x, Exponential(0.4)), torch.stack(single))
    assert torch.allclose(smooth(x, DoubleExponential(0.4, 0.0)), torch.stack(single)) and torch.equal(smooth(x, Unfiltered()), x)
    window = smooth(x, MovingAverage(4))
    assert torch.allclose(window[9], x[6:10].mean(0)) and torch.allclose(window[1], x[:2].mean(0)) and torch.equal(window[0], x[0])
    parabola = torch.arange(30, dtype=torch.float64)[:, None, None]**2 * torch.ones(1, 3, 2, dtype=torch.float64)
    assert torch.allclose(smooth(parabola, SavitzkyGolay(7, 2)), parabola) and smooth(x[:2], SavitzkyGolay(7, 2)).shape == (2, 3, 2)


@pytest.mark.skipif(importlib.util.find_spec("OneEuroFilter") is None, reason="needs OneEuroFilter: pip install 'diffusion_papers[dev]'")
@pytest.mark.parametrize("settings", [(25.0, 1.0, 0.0, 1.0), (30.0, 0.5, 0.3, 2.0), (120.0, 3.0, 0.02, 0.7)])
def test_the_one_euro_filter_is_its_authors(settings):
    from OneEuroFilter import OneEuroFilter
    x, theirs = signal()[:, 0, 0], OneEuroFilter(*settings)
    expected = torch.tensor([theirs(value) for value in x.tolist()], dtype=torch.float64)
    assert torch.allclose(smooth(x[:, None], OneEuro(*settings))[:, 0], expected)


def test_a_filter_on_a_clip_is_the_filter_frame_by_frame():
    x = signal()
    for options in FILTERS.values():
        for filter in options(25):
            if hasattr(filter, "whole"): continue
            first, second = filter.begin(), filter.begin()
            assert torch.equal(torch.stack([first(frame) for frame in x]), smooth(x, filter))
            assert torch.equal(second(x[-1]), x[-1])  # nothing is left of the other clip


def test_the_cheapest_filter_is_chosen():
    truth = still(40)
    noisy = truth + torch.randn(truth.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = [Exponential(alpha) for alpha in (0.9, 0.2, 0.5)]
    assert tuned(options, [(noisy, truth)]) == Exponential(0.2)
    assert tuned(options, [(noisy, truth)], cost=lambda predicted, truth: -nmf(predicted, truth)) == Exponential(0.9)


# ---- crops

def test_the_middle_of_a_box_goes_to_the_middle_and_its_longer_side_to_the_side():
    matrix = crop_matrix(torch.tensor([10.4, 20.0, 60.0, 130.6]), 128, 1.5)  # rounded: 10, 20, 60, 131
    assert torch.allclose(moved(torch.tensor([[10.0 + 25, 20.0 + 56]], dtype=torch.float64), matrix), torch.tensor([[64.0, 64.0]], dtype=torch.float64))
    assert matrix[0, 0].item() == matrix[1, 1].item() == pytest.approx(128 / (1.5 * 111)) and matrix[0, 1] == matrix[1, 0] == 0
    points = faces(1)[0]
    turned = torch.tensor([[0.8, -0.6, 5.0], [0.6, 0.8, -7.0]], dtype=torch.float64)
    assert torch.allclose(moved(moved(points, turned), inverse(turned)), points)
    assert torch.allclose(moved(points, turned), torch.stack([0.8 * points[:, 0] - 0.6 * points[:, 1] + 5, 0.6 * points[:, 0] + 0.8 * points[:, 1] - 7], -1))


def test_pictures_move_with_their_points():
    image = torch.zeros(1, 1, 40, 60, dtype=torch.float64)
    image[0, 0, 12, 33] = 1  # row 12, column 33
    whole = torch.tensor([[[1.0, 0, 7], [0, 1.0, -4]]], dtype=torch.float64)
    out = warp(image, whole, 50)
    assert out[0, 0, 8, 40] == pytest.approx(1) and out.sum() == pytest.approx(1)
    white = warp(image, whole, 50, fill=-1)
    assert white[0, 0, 0, 0] == -1 and white[0, 0, 8, 40] == pytest.approx(1)
    assert torch.autograd.gradcheck(lambda image: warp(image, whole, 9), (torch.rand(1, 1, 6, 7, dtype=torch.float64, requires_grad=True),))


def test_room_is_made_where_points_stand_out():
    points = torch.tensor([[-10.0, 100], [128, 255.2], [200, 300]], dtype=torch.float64) / 256
    image, found = padded(torch.ones(3, 256, 256), points)
    wide, high = 256 + 10 + 8, 256 + 44 + 8
    expected = torch.stack([(points[:, 0] * 256 + 18) / wide, points[:, 1] * 256 / high], -1)
    assert torch.allclose(found, expected) and image.shape == (3, 256, 256)
    assert image[:, :, 0].max() == 0 and image[:, -1].max() == 0 and image[:, 0, -1].min() == 1
    same, inside = padded(torch.ones(3, 256, 256), torch.tensor([[-0.4, 100], [128, 256.4]], dtype=torch.float64) / 256)
    assert same.min() == 1 and inside.min() == 0 and inside.max() == 1


# ---- files

def write_wflw(root, count=4):
    own = root / "WFLW_annotations" / "list_98pt_rect_attr_train_test"
    own.mkdir(parents=True); (root / "WFLW_images" / "0--Parade").mkdir(parents=True)
    points = faces(count) + 40
    lines = []
    for number, face in enumerate(points):
        name = f"0--Parade/{number}.jpg"
        Image.fromarray(np.full((180, 200, 3), 40 * number, np.uint8)).save(root / "WFLW_images" / name)
        flags = [int(number == 0), 0, int(number < 3), 0, 0, 1]
        lines.append(" ".join([*(f"{value:.6f}" for value in face.flatten().tolist()), "40", "40", "140", "140", *map(str, flags), name]))
    (own / "list_98pt_rect_attr_test.txt").write_text("\n".join(lines) + "\n")
    return points, own / "list_98pt_rect_attr_test.txt"


def test_wflw_in_its_own_layout(tmp_path):
    points, file = write_wflw(tmp_path)
    data = WFLW(tmp_path, "test", side=64)
    assert [len(WFLW(tmp_path, "test", subset)) for subset in ("pose", "illumination", "blur")] == [1, 3, 4]
    for number, item in enumerate(data):
        box = torch.cat([points[number].amin(0), points[number].amax(0)])
        assert torch.allclose(item["points"].double(), moved(points[number], crop_matrix(box, 64)) / 64, atol=1e-4)
        assert item["x0"].shape == (3, 64, 64) and item["x0"][:, 32, 32].mean().item() == pytest.approx(40 * number / 127.5 - 1, abs=0.03)
    with pytest.raises(ValueError, match="no faces for test, occlusion"): WFLW(tmp_path, "test", "occlusion")
    with pytest.raises(FileNotFoundError, match="root: expected"): WFLW(tmp_path, "train")
    file.write_text(file.read_text() + "1 2 3\n")
    with pytest.raises(ValueError, match="line 5 of the annotations has 3 entries, expected 207"): WFLW(tmp_path, "test")


def test_wflw_cropped_already(tmp_path):
    (tmp_path / "train").mkdir()
    face = torch.rand(98, 2, generator=torch.Generator().manual_seed(0)).double()
    face[3] = torch.tensor([-0.1, 0.5])
    Image.fromarray(np.full((256, 256, 3), 200, np.uint8)).save(tmp_path / "train" / "a.png")
    (tmp_path / "train" / "train.txt").write_text("a.png " + " ".join(f"{value:.7f}" for value in face.flatten().tolist()))
    item = WFLW(tmp_path, "train")[0]
    assert torch.allclose(item["points"].double(), padded(None, face)[1], atol=1e-6) and item["x0"][0, 100, 0] == -1
    with pytest.raises(ValueError, match="subset: the cropped copy"): WFLW(tmp_path, "train", "pose")
    (tmp_path / "train" / "train.txt").write_text("a.png " + " ".join(["130"] * 196))
    with pytest.raises(ValueError, match=r"expected landmarks in \[0, 1\], got up to 130"): WFLW(tmp_path, "train")


def write_clip(root, frames=5, boxes=5):
    for folder in ("videos/17", "bboxes", "landmarks"): (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(frames): Image.fromarray(np.full((60, 80, 3), 10 * number, np.uint8)).save(root / "videos" / "17" / f"{number:04d}.png")
    np.save(root / "bboxes" / "17.npy", np.tile([10.0, 10, 50, 50, 0.9], (boxes, 1)))
    np.save(root / "landmarks" / "17.npy", faces(boxes).numpy())


def test_clips_of_wflw_v(tmp_path):
    write_clip(tmp_path)
    clip = read_clip(tmp_path, "17")
    assert clip_names(tmp_path) == ["17"] and clip.frames.shape == (5, 3, 60, 80) and clip.boxes.shape == (5, 4) and torch.equal(clip.points, faces(5))
    assert clip.frames[3].mean().item() == pytest.approx(30 / 127.5 - 1)
    write_clip(tmp_path, boxes=4)
    with pytest.raises(ValueError, match="clip 17 has 5 frames, 4 boxes and landmarks for 4"): read_clip(tmp_path, "17")
    for path in (tmp_path / "videos" / "17").iterdir(): path.unlink()
    with pytest.raises(ValueError, match="no pictures"): read_clip(tmp_path, "17")
    (tmp_path / "videos" / "17").rmdir()
    with pytest.raises(FileNotFoundError, match="the video of clip 17 is missing"): read_clip(tmp_path, "17")
    with pytest.raises(FileNotFoundError, match="no video"): read_video(tmp_path / "none.mp4")


@pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="needs PyAV: pip install 'diffusion_papers[video]'")
def test_videos_are_read_in_order_with_their_rate(tmp_path):
    import av
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(6):
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * number, np.uint8), format="rgb24")): container.mux(packet)
        for packet in stream.encode(): container.mux(packet)
    frames, rate = read_video(tmp_path / "v.mp4")
    assert frames.shape == (6, 3, 48, 64) and rate == 12 and (frames.mean((1, 2, 3)).diff() > 0.2).all()
    assert len(read_video(tmp_path / "v.mp4", most=2)[0]) == 2


def test_gifs_and_mp4s_are_written_and_read_again(tmp_path):
    from PIL import Image
    frames = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 21, 30)
    write_video(tmp_path / "v.gif", frames, 20)
    with Image.open(tmp_path / "v.gif") as film: assert film.n_frames == 5 and film.size == (30, 21) and film.info["duration"] == 50
    if importlib.util.find_spec("av"):
        write_video(tmp_path / "v.mp4", frames, 20)
        again, rate = read_video(tmp_path / "v.mp4")
        assert again.shape == (5, 3, 20, 30) and rate == 20 and (again.mean((1, 2, 3)) - frames.mean((1, 2, 3))).abs().max() < 0.1
    with pytest.raises(ValueError, match="path: expected one of"): write_video(tmp_path / "v.avi", frames)
    (tmp_path / "no.mp4").write_bytes(b"nothing")
    if importlib.util.find_spec("av"):
        with pytest.raises(ValueError, match="no video that can be read"): Video(tmp_path / "no.mp4")


def test_frames_of_one_folder_have_one_size(tmp_path):
    from PIL import Image
    for number, size in enumerate(((8, 6), (8, 6), (6, 8))): Image.new("RGB", size, (100 * number,) * 3).save(tmp_path / f"{number}.png")
    frames = iter(Video(tmp_path))
    assert next(frames).mean() == -1 and next(frames).mean() == pytest.approx(100 / 127.5 - 1, abs=1e-6)
    with pytest.raises(ValueError, match="2.png has another"): next(frames)


# ---- what a detector is trained with, and its dots

def test_losses_are_what_they_are_called():
    predicted, truth = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[20.0, 0.0], [0.0, 1.0]]]), torch.zeros(2, 2, 2)
    assert landmark_loss(predicted, truth).tolist() == pytest.approx([2.5, 10.5], abs=1e-5) and landmark_loss(predicted, truth, "squared").tolist() == [12.5, 200.5]
    wing = lambda e: 10 * math.log(1 + e / 2) if e < 10 else e - (10 - 10 * math.log(6))
    assert landmark_loss(predicted, truth, "wing").tolist() == pytest.approx([(wing(0) * 2 + wing(3) + wing(4)) / 4, (wing(20) + 2 * wing(0) + wing(1)) / 4])
    with pytest.raises(ValueError, match="kind"): landmark_loss(truth, truth, "mse")


def test_dots_are_where_the_landmarks_are():
    dotted = drawn_on(torch.zeros(1, 3, 32, 32), torch.tensor([[[0.25, 0.5], [0.99, 0.0]]]))
    assert (dotted[0, 1] == 1).nonzero().tolist() == [[0, 31], [16, 8]]
    wide = drawn_on(torch.zeros(1, 3, 10, 40), torch.tensor([[[0.5, 0.3]]]), (0.5, 0.5, 0.5))
    assert (wide[0, 0] == 0.5).nonzero().tolist() == [[3, 20]]


def test_ten_points_have_the_same_names_in_all_numberings():
    for known in (NUMBERINGS["wflw98"], NUMBERINGS["300w68"], NUMBERINGS["drawn71"]):
        points = torch.arange(known.count).double()[:, None].expand(-1, 2)
        assert torch.equal(in_common(points[known.mirror]), in_common(points)[NUMBERINGS["common10"].mirror])
        assert torch.equal(in_common(points)[list(NUMBERINGS["common10"].eyes), 0], torch.tensor(known.eyes).double())
    assert torch.equal(in_common(torch.arange(98)[:, None]), WFLW_TO_300W[in_common(torch.arange(68)[:, None])[:, 0]][:, None])
    with pytest.raises(ValueError, match="71, 68, 98, 468 points"): in_common(torch.zeros(5, 2))


def test_small_crops_are_means_at_the_right_place():
    plate = torch.full((3, 80, 100), -1.0); plate[:, 20:44, 30:54] = 1
    matrix = crop_matrix(torch.tensor([25.0, 15.0, 65.0, 55.0]), 12)
    weights, place = (small_crop(plate, matrix, 12).mean(0) + 1).double(), torch.arange(12).double()
    middle = torch.stack([(weights * place).sum(), (weights * place[:, None]).sum()]) / weights.sum()
    assert (middle - moved(torch.tensor([[41.5, 31.5]]).double(), matrix)[0]).abs().max() < 0.05
    chess = (torch.arange(96)[:, None] + torch.arange(96)) % 2 * 2.0 - 1
    assert small_crop(chess.expand(3, 96, 96), crop_matrix(torch.tensor([18.0, 18.0, 68.0, 68.0]), 12), 12).abs().max() < 0.5, "one pixel in five would be black or white"
