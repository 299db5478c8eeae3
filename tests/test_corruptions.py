"""Corruptions against other libraries and literal definitions: JPEG, reductions, blurs, holes, and what a task does to each image."""
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from extras import need

need("data")

from PIL import Image

from diffusion_papers.core.training import Draws
from diffusion_papers.topics import corruptions
from diffusion_papers.topics.corruptions import (CHROMA, LUMA, TASKS, blur, centre_mask, degrade, fill_holes, freeform_masks, gaussian_blur,
                                                 hole_pool, jpeg, jpeg_file, quantisation_table, read_masks, reduced_and_repeated, task_names)


def seeded(number=0): return torch.Generator().manual_seed(number)


def images(count=2, height=16, width=16, seed=0):
    return torch.rand(count, 3, height, width, generator=seeded(seed), dtype=torch.float64) * 2 - 1


# ---- JPEG


def test_tables_are_those_of_pillow():
    "Where its whole-numbered scale, 5000 // quality, is the exact one."
    for quality in (1, 2, 4, 5, 8, 10, 20, 25, 40, *range(50, 101)):
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "jpeg", quality=quality)
        theirs = Image.open(file).quantization
        for number, table in ((0, LUMA), (1, CHROMA)):
            assert quantisation_table(table, quality).flatten().tolist() == list(theirs[number]), quality


@pytest.mark.parametrize("quality", [5, 40, 90])
def test_jpeg_is_its_definition_with_scipys_transform(quality):
    fft, pictures = pytest.importorskip("scipy.fft"), images(1, 16, 32)
    red, green, blue = (pictures[0].numpy() + 1) * 127.5
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    parts = [luma - 128] + [part[::2, ::2] for part in (-0.1687 * red - 0.3313 * green + 0.5 * blue, 0.5 * red - 0.4187 * green - 0.0813 * blue)]
    for part, table in zip(parts, (LUMA, CHROMA, CHROMA)):
        step = quantisation_table(table, quality).numpy()
        for row in range(0, part.shape[0], 8):
            for column in range(0, part.shape[1], 8):
                block = part[row:row + 8, column:column + 8]
                block[:] = fft.idctn(np.round(fft.dctn(block, norm="ortho") / step) * step, norm="ortho")
    luma, (b, r) = parts[0] + 128, (np.kron(part, np.ones((2, 2))) for part in parts[1:])
    matrix = np.linalg.inv([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    expected = np.einsum("dc,chw->dhw", matrix, np.stack([luma, b, r])) / 127.5 - 1
    np.testing.assert_allclose(jpeg(pictures, quality)[0].numpy(), expected, atol=2e-3)


def test_a_file_keeps_a_smooth_picture_in_its_place_and_range():
    row, column = torch.meshgrid(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 40), indexing="ij")
    smooth = torch.stack([row, column, -column])[None]
    assert (jpeg_file(smooth, 100) - smooth).abs().max() < 0.06
    errors = [(jpeg_file(smooth, quality) - smooth).square().mean().item() for quality in (5, 20, 95)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert jpeg_file(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 3, 8, 8), 90).flatten(1).mean(1).tolist() == [-1, 1]


def test_a_file_holds_the_nearest_of_256_levels():
    grey = (torch.tensor([100.9, 101.4, 3.6]) / 127.5 - 1).reshape(3, 1, 1, 1).expand(3, 3, 8, 8)
    assert ((jpeg_file(grey, 100) + 1) * 127.5).mean((1, 2, 3)).tolist() == pytest.approx([101, 101, 4], abs=1e-3)


# ---- lost resolution and blur


@pytest.mark.parametrize("factor", [2, 4])
def test_a_pool_is_the_mean_of_squares(factor):
    pictures = images(2, 8, 16)
    small = pictures.numpy().reshape(2, 3, 8 // factor, factor, 16 // factor, factor).mean((3, 5))
    np.testing.assert_allclose(reduced_and_repeated(pictures, "pool", factor), np.kron(small, np.ones((factor, factor))), atol=1e-12)


@pytest.mark.parametrize("factor", [2, 4])
def test_the_cubic_filter_is_that_of_pytorch_on_a_mirrored_picture(factor):
    pictures = images(1, 16, 24)
    padded = torch.from_numpy(np.pad(pictures.numpy(), ((0, 0), (0, 0), (16, 16), (16, 16)), mode="symmetric"))
    small = torch.nn.functional.interpolate(padded, scale_factor=1 / factor, mode="bicubic", antialias=True)
    edge = 16 // factor
    expected = small[..., edge:-edge, edge:-edge].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    torch.testing.assert_close(reduced_and_repeated(pictures, "bicubic", factor), expected, rtol=0, atol=1e-6)


def taps(kind):
    if kind == "uniform": return [1 / 9] * 9
    weights = [math.exp(-0.5 * (place / 10) ** 2) for place in range(-2, 3)]
    return [weight / sum(weights) for weight in weights]


def blurring(kind, size):
    "The matrix of one axis, whose rows lack the last tap."
    kernel, matrix = taps(kind), np.zeros((size, size))
    for row in range(size):
        for place, tap in enumerate(kernel[:-1]):
            if 0 <= row + place - len(kernel) // 2 < size: matrix[row, row + place - len(kernel) // 2] = tap
    return matrix


@pytest.mark.parametrize("kind", ["uniform", "gauss"])
def test_blurs_are_their_matrices_in_black_surroundings(kind):
    pictures = images(2, 16, 20)
    x = (pictures.numpy() + 1) / 2
    def cut(matrix):
        left, values, right = np.linalg.svd(matrix)
        return left @ np.diag(np.where(values < 0.03, 0, values)) @ right
    for mode, change in (("matrix_only", lambda matrix: matrix), ("operator", cut)):
        expected = 2 * change(blurring(kind, 16)) @ x @ change(blurring(kind, 20)).T - 1
        np.testing.assert_allclose(blur(pictures, kind, mode), expected, atol=1e-10)


def test_the_released_blur_reads_its_gains_as_if_the_channels_of_a_pixel_were_side_by_side():
    pictures, size = images(1, 16, 16), 16
    left, values, right = (part.numpy() for part in corruptions._blur_factors("uniform", size))  # signs and order of equal values are free
    np.testing.assert_allclose(left * values @ right, corruptions._cut_matrix("uniform", size), atol=1e-12)
    gains = np.outer(values, values).flatten()
    order = np.argsort(-gains, kind="stable")
    repeated = np.tile(gains[order], 3)  # channel after channel
    expected = np.empty((3, size, size))
    coefficients = np.stack([right @ channel @ right.T for channel in (pictures[0].numpy() + 1) / 2])
    changed = np.empty((3, size * size))
    for number, place in enumerate(order):
        for channel in range(3): changed[channel, place] = repeated[3 * number + channel] * coefficients[channel].flatten()[place]
    for channel in range(3): expected[channel] = 2 * left @ changed[channel].reshape(size, size) @ left.T - 1
    np.testing.assert_allclose(blur(pictures, "uniform", "released")[0], expected, atol=1e-10)


def test_gaussian_blurs_are_scipys_each_image_with_its_own_width():
    ndimage, pictures, widths = pytest.importorskip("scipy.ndimage"), images(4, 20, 28), [0.5, 1.0, 1.5, 2.0]
    expected = [ndimage.gaussian_filter(picture, (0, width, width), mode="nearest") for picture, width in zip(pictures.numpy(), widths)]
    np.testing.assert_allclose(gaussian_blur(pictures, torch.tensor(widths)), np.stack(expected), atol=1e-6)


# ---- holes


def test_a_centre_hole_has_half_of_each_side():
    mask = centre_mask(8, 12)
    assert mask.shape == (1, 1, 8, 12) and mask.sum() == 4 * 6 and mask[0, 0, 2:6, 3:9].sum() == 24
    assert centre_mask(7, 5)[0, 0].nonzero().aminmax(dim=0).max.tolist() == [3, 2] and centre_mask(7, 5).sum() == 6


def distance(row, column, start, end):
    "From a pixel's centre to a segment, plainly."
    (y, x), (a, b), (c, d) = (row + 0.5, column + 0.5), start, end
    along = ((y - a) * (c - a) + (x - b) * (d - b)) / ((c - a) ** 2 + (d - b) ** 2)
    along = min(1, max(0, along))
    return math.hypot(y - a - along * (c - a), x - b - along * (d - b))


def test_a_pixel_is_near_a_segment_as_its_distance_says():
    starts, ends, radii = torch.tensor([[2.0, 3.0], [9.0, 1.0]]), torch.tensor([[8.0, 10.0], [1.0, 6.5]]), torch.tensor([1.3, 2.2])
    found = corruptions._near_segment(starts, ends, radii, 12)
    for number in range(2):
        start, end, radius = starts[number].tolist(), ends[number].tolist(), radii[number].item()
        expected = [[distance(row, column, start, end) < radius for column in range(12)] for row in range(12)]
        assert found[number].tolist() == expected


def test_strokes_are_broken_lines_in_proportion_to_the_picture():
    "The same draws, walked by hand: 3 to 11 segments, turns up to 90 degrees, lengths of 0.05 to 0.25 sides, radii of 4 to 20 in 256."
    count, size, generator = 6, 32, seeded(3)
    draw = lambda *shape: torch.rand(*shape, generator=generator)
    segments = torch.randint(3, 12, (count,), generator=generator).tolist()
    radii, turns, begins, lengths, places = draw(count), draw(count, 11), draw(count, 1), draw(count, 11), draw(count, 1, 2)
    found = corruptions._strokes(count, size, seeded(3))
    for number in range(count):
        here, angle = [size * value for value in places[number, 0].tolist()], 2 * math.pi * begins[number].item()
        expected = np.zeros((size, size), bool)
        radius = (4 + 16 * radii[number].item()) / 256 * size
        for segment in range(segments[number]):
            angle += math.pi * (turns[number, segment].item() - 0.5)
            length = size * (0.05 + 0.2 * lengths[number, segment].item())
            there = [here[0] + math.sin(angle) * length, here[1] + math.cos(angle) * length]
            expected |= np.array([[distance(row, column, here, there) < radius for column in range(size)] for row in range(size)])
            here = there
        assert (found[number].numpy() != expected).sum() <= 1  # at the rim by rounding


def test_free_forms_cover_a_share_between_the_bounds():
    for low, high in ((0.1, 0.2), (0.2, 0.3), (0.4, 0.45)):
        shares = freeform_masks(60, 32, low, high, seeded()).mean((1, 2, 3))
        assert low <= shares.min() and shares.max() <= high and shares.std() > 0.1 * (high - low)
    assert len(freeform_masks(5, 16, 0.1, 0.3, seeded()).unique(dim=0)) == 5 and len(hole_pool(16, 0.1, 0.3, 250)) == 250


def test_bounds_of_a_share_are_a_hundredth_and_a_pixel_apart():
    for size, low, high, apart in ((32, 0.1, 0.109, "0.01"), (8, 0.1, 0.115, "0.016")):
        with pytest.raises(ValueError, match=f"expected shares at least {apart} apart"): freeform_masks(1, size, low, high, seeded())
    for size, low, high in ((32, 0.1, 0.11), (8, 0.1, 0.116)): assert low <= freeform_masks(1, size, low, high, seeded()).mean() <= high


def test_masks_of_a_file_are_its_bits_row_by_row(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, (3, 16, 16))
    packed = [sum(int(bit) << (7 - place) for place, bit in enumerate(eight)) for eight in bits.reshape(-1, 8)]
    np.savez(tmp_path / "masks.npz", **{"10-20% freeform": np.array(packed, np.uint8)})
    assert torch.equal(read_masks(tmp_path / "masks.npz", "10-20% freeform", 16), torch.from_numpy(bits)[:, None].float())


def test_holes_are_filled_with_standard_noise():
    pictures, mask = images(40), centre_mask(16, 16)
    filled = fill_holes(pictures, mask, seeded())
    inside = mask.expand_as(pictures) > 0
    assert torch.equal(filled[~inside], pictures[~inside])
    assert filled[inside].std().item() == pytest.approx(1, abs=0.02) and filled[inside].mean().item() == pytest.approx(0, abs=0.02)


# ---- tasks


def test_tasks_are_what_their_names_say():
    pictures, half = images(3), torch.full((3,), 0.5, dtype=torch.float64)
    expected = {"jpeg-5": jpeg(pictures, 5), "jpeg-10": jpeg(pictures, 10), "sr4x-pool": reduced_and_repeated(pictures, "pool", 4),
                "sr4x-bicubic": reduced_and_repeated(pictures, "bicubic", 4), "sr2x-pool": reduced_and_repeated(pictures, "pool", 2),
                "blur-uni": blur(pictures, "uniform", "operator"), "blur-gauss": blur(pictures, "gauss", "operator"),
                "blur-uni-released": blur(pictures, "uniform", "released"), "blur-gauss-released": blur(pictures, "gauss", "released")}
    for name, damaged in expected.items(): assert torch.equal(TASKS[name].corrupt(pictures, half), damaged), name
    assert {name: task.holes for name, task in TASKS.items() if task.corrupt is None} == {
        "inpaint-center": (), "inpaint-freeform1020": (0.1, 0.2), "inpaint-freeform2030": (0.2, 0.3), "inpaint": (0.1, 0.3)}
    assert {name: task.enlarge for name, task in TASKS.items() if task.enlarge > 1} == {"sr4x-pool": 4, "sr4x-bicubic": 4, "sr2x-pool": 2, "sr4x": 4}
    assert task_names("mixture") == ["jpeg-5", "jpeg-10", "sr4x-pool", "sr4x-bicubic", "blur-uni", "blur-gauss", "inpaint-center",
                                     "inpaint-freeform1020", "inpaint-freeform2030"]
    assert task_names("jpeg+blur") == ["jpeg", "blur"]


def in_levels(pictures): return np.round((np.clip(pictures.numpy(), -1, 1) + 1) / 2 * 255) / 127.5 - 1


def test_a_readers_pictures_are_saved_in_256_levels():
    pictures, chance = images(2), torch.tensor([0.1, 0.7], dtype=torch.float64)
    np.testing.assert_allclose(TASKS["sr4x"].corrupt(pictures, chance), in_levels(reduced_and_repeated(pictures, "bicubic", 4)), atol=1e-12)
    np.testing.assert_allclose(TASKS["blur"].corrupt(pictures, chance), in_levels(gaussian_blur(pictures, torch.tensor([1.1, 1.7]))), atol=1e-6)


def test_compression_is_of_four_qualities_half_by_definition_and_half_by_a_codec(monkeypatch):
    way = lambda name: lambda pictures, quality: asked.append((name, quality, len(pictures))) or pictures
    monkeypatch.setattr(corruptions, "jpeg", way("definition")); monkeypatch.setattr(corruptions, "jpeg_file", way("file"))
    asked, pictures = [], images(16)
    found = corruptions._compressed(pictures, (torch.arange(16) + 0.5) / 16)
    assert sorted(asked) == [(name, quality, 2) for name in ("definition", "file") for quality in (5, 10, 20, 40)]
    np.testing.assert_allclose(found, in_levels(pictures), atol=1e-12)
    asked.clear(); corruptions._compressed(pictures[:3], torch.tensor([0.05, 0.3, 0.95]))
    assert asked == [("definition", 5, 1), ("definition", 10, 1), ("file", 40, 1)]


def test_each_image_meets_one_of_the_tasks_by_chance():
    pictures = torch.rand(3000, 1, 8, 8, generator=seeded(1)) * 2 - 1
    x1, mask = degrade(pictures, "sr2x-pool+inpaint-center+inpaint", Draws(seeded()))
    everywhere, centre = mask.flatten(1).all(1), (mask == centre_mask(8, 8)).flatten(1).all(1)
    free = ~everywhere & ~centre
    assert [part.sum().item() for part in (everywhere, centre, free)] == pytest.approx([1000] * 3, abs=110)
    torch.testing.assert_close(x1[everywhere], reduced_and_repeated(pictures[everywhere], "pool", 2))
    for part in (centre, free):
        inside = mask[part] > 0
        assert torch.equal(x1[part][~inside], pictures[part][~inside]) and x1[part][inside].std().item() == pytest.approx(1, abs=0.02)
        assert abs(torch.corrcoef(torch.stack([x1[part][inside], pictures[part][inside]]))[0, 1]) < 0.03
    shares = mask[free].mean((1, 2, 3))
    assert shares.min() >= 0.1 and shares.max() <= 0.3 and len(mask[free].unique(dim=0)) > 400
    assert torch.equal(pictures, torch.rand(3000, 1, 8, 8, generator=seeded(1)) * 2 - 1)  # as they were


def test_chance_picks_from_the_whole_pool(monkeypatch):
    pool = torch.zeros(4, 1, 4, 4, dtype=torch.bool)
    for number in range(4): pool[number, 0, number] = True
    monkeypatch.setattr(corruptions, "hole_pool", lambda size, low, high: pool)
    chances = iter([torch.zeros(4), torch.tensor([0.0, 0.3, 0.6, 0.99])])
    draws = SimpleNamespace(uniform=lambda like: next(chances), normal=torch.zeros_like)
    assert torch.equal(degrade(torch.ones(4, 1, 4, 4), "inpaint", draws).mask > 0, pool)
