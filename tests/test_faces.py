"""Drawn faces: their space of shapes, where things are drawn, what makes them hard, and how they move."""
import importlib.util
import math

import numpy as np
import pytest
import torch
from extras import need

need("train", "data")
from diffusion_papers.topics import faces
from diffusion_papers.topics.faces import (
    LOOKS, DrawnFaces, augmented, covered, degraded, draw_faces, drawn_clip, face_factors, face_points, outline_distance, placed, shape_space, to_unit)
from diffusion_papers.topics.landmarks import NUMBERINGS, crop_matrix, moved, nme, nmf
from diffusion_papers.core.training import step_seed
from diffusion_papers.workbench.checkpoints import data_folder

MIRROR = NUMBERINGS["drawn71"].mirror


def mirrored(points): return points[..., MIRROR, :] * torch.tensor([-1.0, 1.0])


def test_the_space_of_shapes_has_no_pose_in_it_and_a_symmetric_middle():
    mean, modes = shape_space()
    assert torch.allclose(mirrored(mean), mean, atol=1e-6) and (mean[14, 0] - mean[0, 0]).item() == pytest.approx(1.24, abs=1e-5)
    turned = torch.stack([-mean[:, 1], mean[:, 0]], -1)
    for rigid in (mean, turned, torch.tensor([1.0, 0.0]).expand(71, 2), torch.tensor([0.0, 1.0]).expand(71, 2)):
        assert torch.einsum("knc,nc->k", modes, rigid).abs().max() < 1e-4
    size = modes.flatten(1).norm(dim=1)
    assert (size[:4].diff() < 0).all() and size[0] > 1.5 * size[1]
    coefficients = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(face_points(coefficients), mean + sum(coefficients[:, k, None, None] * modes[k] for k in range(20)), atol=1e-5)


def test_the_archive_gives_the_shipped_shapes():
    spec = importlib.util.spec_from_file_location("face_shapes_tool", data_folder().parent / "tools" / "face_shapes.py")
    if not (data_folder().parent / "tools" / "face_shapes.py").is_file(): pytest.skip("the tools come with the repository alone")
    tool = importlib.util.module_from_spec(spec); spec.loader.exec_module(tool)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(71, 2, generator=generator).mul(10)
    mean[14, 0], mean[0, 0] = 40, -40
    vectors = torch.randn(142, 20, generator=generator)
    script = 'var a = {"patchModel": {"x": [1, {"y": 2}]}, "shapeModel": {"meanShape": %s, "eigenVectors": %s, "eigenValues": %s,}, hints: {}};' % (
        mean.tolist(), vectors.tolist(), list(range(1, 21)))
    model = tool.shape_model(script)
    found, modes = tool.prepared(model)
    assert torch.allclose(mirrored(found), found, atol=1e-5)
    scale = (found[14, 0] - found[0, 0]) / ((mean + mirrored(mean))[14, 0] - (mean + mirrored(mean))[0, 0]) * 2
    flat = vectors.T * torch.arange(1, 21).sqrt()[:, None] * scale
    left_out = flat.reshape(20, 71, 2) - modes
    rigid = torch.stack([found, torch.stack([-found[:, 1], found[:, 0]], -1), torch.tensor([1.0, 0]).expand(71, 2), torch.tensor([0.0, 1]).expand(71, 2)]).flatten(1)
    assert torch.linalg.matrix_rank(torch.cat([rigid, left_out.flatten(1)]), tol=1e-3) == 4  # what was taken out is moving, turning, scaling
    assert (data_folder() / "samples" / "face_shapes.txt").read_text().count("MIT License") == 1


def test_distances_to_outlines():
    generator = torch.Generator().manual_seed(0)
    place = torch.rand(400, 2, generator=generator) * 3 - 1.5
    triangle = torch.tensor([[[-1.0, -0.5], [1.2, -0.4], [0.1, 1.0]]])
    found = outline_distance(place, triangle)[0]
    corners, sides = triangle[0], triangle[0].roll(-1, 0) - triangle[0]
    inside = torch.stack([side[0] * (place[:, 1] - corner[1]) - side[1] * (place[:, 0] - corner[0]) > 0 for corner, side in zip(corners, sides)]).all(0)
    fine = torch.cat([corner + side * torch.linspace(0, 1, 4001)[:, None] for corner, side in zip(corners, sides)])
    near = torch.cdist(place, fine).amin(1)
    assert torch.equal(found < 0, inside) and torch.allclose(found.abs(), near, atol=1e-3)
    line = outline_distance(place, triangle, closed=False)[0]
    assert (line >= 0).all() and torch.allclose(line, torch.cdist(place, fine[:8002]).amin(1), atol=1e-3)


def test_points_are_turned_scaled_then_moved():
    points = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    found = placed(points, torch.tensor([[math.pi / 2, 3.0, 0.5, -0.25]]))
    assert torch.allclose(found, torch.tensor([[[0.5, 2.75], [-5.5, -0.25]]]), atol=1e-5)


@pytest.mark.parametrize("size", [64, 96])
def test_pictures_are_drawn_where_their_points_are(size):
    look, points = face_factors([3])[2], placed(face_points(face_factors([3])[0]), torch.tensor([[0.2, 0.6, 0.0, 0.0]]))
    look[:, 30], look[:, 0:6] = 0.5, 0.5  # no light from a side, a plain background
    step = torch.tensor([2 * 4 / size, -2 * 2 / size])
    here, there = (draw_faces(points + shift, look, size)[..., 8:-8, 8:-8] for shift in (0, step))
    assert torch.allclose(there, draw_faces(points, look, size).roll((-2, 4), (2, 3))[..., 8:-8, 8:-8], atol=1e-3) and not torch.allclose(here, there, atol=0.1)
    dark = draw_faces(points, look, size)[0].mean(0)
    pupils = [dark[tuple((to_unit(points[0, number]) * size).round().long().flip(0))].item() for number in (27, 32)]
    assert max(pupils) < dark.mean() - 0.1


def test_a_face_is_a_function_of_its_number():
    shape, pose, look = face_factors(range(2000))
    assert torch.equal(look[7:8], face_factors([7])[2]) and not torch.equal(look, face_factors(range(2000), seed=1)[2])
    assert shape.mean(0).abs().max() < 0.1 and (shape.std(0) - 0.98).abs().max() < 0.06 and shape.abs().max() <= 2.2
    assert torch.corrcoef(torch.cat([shape, pose, look], 1).T).fill_diagonal_(0).abs().max() < 0.11
    for column, (low, high) in enumerate(((-0.5, 0.5), (0.75, 1.0), (-0.12, 0.12), (-0.12, 0.12))):
        assert pose[:, column].min() == pytest.approx(low, abs=0.01) and pose[:, column].max() == pytest.approx(high, abs=0.01)
    data = DrawnFaces(32)
    alone, among = data[5], data.batch(range(8))
    assert torch.allclose(alone["x0"], among["x0"][5], atol=1e-4) and torch.allclose(alone["points"], among["points"][5])
    assert torch.equal(data.__getitems__([5, 6])[0]["points"], data.batch([5, 6])["points"][0])
    inside = data.batch(range(200))["points"]
    assert ((inside > 0) & (inside < 1)).float().mean() > 0.999
    with pytest.raises(IndexError): DrawnFaces(32, length=4)[4]
    with pytest.raises(ValueError, match="size"): DrawnFaces(4)


def test_hard_pictures_are_blurred_covered_and_noisy():
    clean = DrawnFaces(64, hard=False).batch(range(8))["x0"]
    none = torch.zeros_like(clean)
    def with_(**changes):
        numbers = torch.full((8, 9), 0.9); numbers[:, 8] = 0
        for place, value in changes.values(): numbers[:, place] = value
        return degraded(clean, numbers, none)
    assert torch.allclose(with_(), clean, atol=1e-4)  # neither blur nor cover
    detail = lambda images: (images[..., 1:] - images[..., :-1]).square().mean()
    assert detail(with_(blur=(0, 0.1))) < 0.5 * detail(clean)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    loud = torch.full((8, 9), 0.9); loud[:, 8] = 0.25
    grey = degraded(0 * clean, loud, noise)
    assert grey.std().item() == pytest.approx(0.1, rel=0.03)
    square = covered(clean, torch.tensor([[0.5, -0.25]]).expand(8, 2), torch.full((8,), 0.25), torch.full((8, 3), -1.0))
    changed = (square != clean).any(1).any(0)
    rows, columns = changed.nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (17, 31, 41, 55)
    assert torch.equal(covered(clean, torch.zeros(8, 2), torch.zeros(8), torch.zeros(8, 3)), clean)


def test_clips_move_slowly_and_hard_ones_are_hard():
    easy, hard = drawn_clip(3, 60, hard=False, size=32), drawn_clip(3, 60, size=32)
    assert torch.equal(easy.points, hard.points) and easy.frames.shape == (60, 3, 32, 32) and easy.rate == 25 and easy.points.shape == (60, 71, 2)
    step = (easy.points[1:] - easy.points[:-1]).norm(dim=-1).mean() / 32
    assert 0.0005 < step < 0.02 and (easy.points - easy.points.mean(0)).norm(dim=-1).mean() / 32 > 0.01
    assert torch.equal(easy.frames, drawn_clip(3, 60, hard=False, size=32).frames) and not torch.equal(easy.points, drawn_clip(4, 60, size=32).points)
    assert (easy.frames[1:] - easy.frames[:-1]).square().mean() < 0.1 * (hard.frames[1:] - hard.frames[:-1]).square().mean()
    seen = moved(easy.points, easy.matrix) / 32
    again = draw_faces(2 * seen - 1, face_factors([3], faces.step_seed(0, 3) % 2**62)[2].expand(60, -1), 32)
    assert (again - easy.frames).square().mean().sqrt().item() == pytest.approx(0.06, rel=0.15)  # the noise alone
    assert torch.allclose(face_motion(easy), face_motion(drawn_clip(3, 60, hard=False, size=64)), atol=1e-3)


def face_motion(clip): return clip.points / clip.frames.shape[-1]


def test_shaken_crops_see_the_same_frame_from_other_boxes():
    calm, shaken = drawn_clip(2, 40, hard=False), drawn_clip(2, 40, hard=False, shaken=0.03)
    assert torch.equal(calm.points, shaken.points) and torch.allclose(shaken.matrix, crop_matrix(shaken.boxes, 64))
    centre = (shaken.boxes[:, :2] + shaken.boxes[:, 2:]) / 2
    assert centre.std(0).mean().item() == pytest.approx(0.03 * 64, rel=0.3)
    seen = moved(shaken.points, shaken.matrix)
    assert nmf(seen, moved(calm.points, calm.matrix)) > 1000 and torch.allclose(moved(calm.points, calm.matrix), calm.points - 32)
    look = face_factors([2], step_seed(0, 3) % 2**62)[2]
    drawn = draw_faces(2 * seen / 64 - 1, look.expand(40, -1))
    assert (shaken.frames - drawn).abs().mean() < 0.055, "pictures are what the crops see"  # 0.048 is the noise; 0.079 without looking through them
    with pytest.raises(ValueError, match="frames"): drawn_clip(0, 0)
    with pytest.raises(ValueError, match="shaken"): drawn_clip(0, shaken=2.0)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def test_changes_move_pictures_and_points_alike():
    numbers = torch.full((6, 12), 0.5)
    numbers[:, 7] = 0.9  # nothing is covered
    points = torch.rand(6, 98, 2, generator=seeded()) * 0.4 + 0.3
    images = -torch.ones(6, 3, 64, 64)
    for number in range(6):
        x, y = (points[number, 60] * 64).round().long().tolist()
        points[number, 60] = torch.tensor([x, y]) / 64
        images[number, :, y - 1:y + 2, x - 1:x + 2] = 1  # a spot at the left eye
    numbers[0, 0], numbers[1, 0], numbers[2, 1], numbers[3, 2], numbers[4, 3], numbers[5, 4] = 0.9, 0.1, 0.9, 0.9, 0.1, 0.2
    moved_images, moved_points = augmented(images, points, numbers)
    place = torch.arange(64.0)
    for number in range(6):
        bright = (moved_images[number].mean(0) + 1).clamp(min=0)
        at = torch.stack([(bright.sum(0) * place).sum(), (bright.sum(1) * place).sum()]) / bright.sum() / 64
        eye = 72 if number == 5 else 60  # the mirrored left eye is the right one
        assert torch.allclose(at, moved_points[number, eye], atol=0.5 / 64), number
    assert torch.allclose(moved_points[5], (torch.tensor([63 / 64, 0.0]) + points[5] * torch.tensor([-1.0, 1.0]))[NUMBERINGS["wflw98"].mirror], atol=1e-5)
    dark, _ = augmented(images, points, torch.cat([numbers[:, :5], torch.zeros(6, 1), numbers[:, 6:]], 1))
    assert dark.amax() == pytest.approx(0.2, abs=0.02)  # 0.6 of the brightness
    hidden = numbers.clone(); hidden[:, 7], hidden[:, 11] = 0.1, 1.0
    assert (augmented(images, points, hidden)[0] == 1).float().mean() > 0.02
