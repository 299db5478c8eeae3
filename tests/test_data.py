"""Data sets in the range that is promised, with every sample in its place."""
import gzip

from extras import need

need("data")

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from diffusion_papers.core import data as data_module
from diffusion_papers.core.data import (PHOTOGRAPHS, Mirrored, NoiseImages, PhotographCrops, RowsOfImages, TensorSet, check_labels, cifar_images,
                                        digits, idx_images, photographs, random_crops, read_idx)

seeded = lambda seed=0: torch.Generator().manual_seed(seed)


def test_digits_are_scikit_learns_between_minus_one_and_one():
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    everything, train, test = (digits(split).tensors for split in ("all", "train", "test"))
    assert (everything["x0"].min(), everything["x0"].max()) == (-1, 1) and everything["x0"].shape == (1797, 1, 8, 8)
    assert np.array_equal((everything["x0"][:, 0].numpy() + 1) * 8, bunch.images) and np.array_equal(everything["class_label"], bunch.target)
    assert torch.equal(test["x0"], everything["x0"][4::5]) and torch.equal(test["class_label"], everything["class_label"][4::5])
    kept = [index for index in range(1797) if index % 5 != 4]
    assert torch.equal(train["x0"], everything["x0"][kept]) and torch.equal(train["class_label"], everything["class_label"][kept])


def test_noise_fills_the_range_and_takes_its_classes_in_turns():
    data = NoiseImages((3, 20, 20), classes=3, count=7)
    values = torch.stack([data[index]["x0"] for index in range(7)])
    assert values.min() == pytest.approx(-1, abs=0.01) and values.max() == pytest.approx(1, abs=0.01) and values.mean() == pytest.approx(0, abs=0.03)
    assert [data[index]["class_label"].item() for index in range(5)] == [0, 1, 2, 0, 1] and len(data) == 7
    assert torch.equal(data[2]["x0"], data[2]["x0"]) and not torch.equal(data[2]["x0"], data[3]["x0"]) and set(NoiseImages((1,))[0]) == {"x0"}


def test_photographs_are_their_bytes_between_minus_one_and_one(monkeypatch):
    colour, grey = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 11, np.full((2, 4), 255, np.uint8)
    monkeypatch.setitem(PHOTOGRAPHS, "test", ("colour", "grey", "stereo", "china.jpg"))
    module = type("Of", (), {"colour": lambda: colour, "grey": lambda: grey, "stereo": lambda: (grey // 5, colour, None),
                             "load_sample_image": lambda name: colour})
    monkeypatch.setattr(data_module, "require", lambda name, extra: module)
    found = photographs("test")
    assert list(found) == ["colour", "grey", "stereo", "china"]
    assert torch.equal(found["colour"], torch.from_numpy(colour).permute(2, 0, 1) / 127.5 - 1) and found["colour"].min() == -1
    assert torch.equal(found["grey"], torch.ones(3, 2, 4)) and torch.equal(found["stereo"], torch.full((3, 2, 4), 51 / 127.5 - 1))


PICTURES = {"wide": torch.arange(48.0).reshape(2, 4, 6), "small": 100 + torch.arange(18.0).reshape(2, 3, 3)}


def test_crops_are_of_every_place_alike_and_half_of_them_mirrored():
    "A picture with more places is drawn from more often."
    size, counts = 3, {}
    for crop in random_crops(PICTURES, size, 9000, seeded()):
        mirrored = bool(crop[0, 0, 0] > crop[0, 0, 1])
        plain = crop.flip(2) if mirrored else crop
        name = "small" if plain[0, 0, 0] >= 100 else "wide"
        corner = plain[0, 0, 0].item() - (100 if name == "small" else 0)
        width = PICTURES[name].shape[2]
        top, left = int(corner) // width, int(corner) % width
        assert torch.equal(plain, PICTURES[name][:, top:top + size, left:left + size])
        counts[name, top, left, mirrored] = counts.get((name, top, left, mirrored), 0) + 1
    assert len(counts) == 2 * (2 * 4 + 1) and all(abs(count - 500) < 100 for count in counts.values())


def test_photographs_are_cropped_at_full_and_half_size():
    pictures = {"": torch.arange(6 * 8, dtype=torch.float32).reshape(1, 6, 8)}
    crops, steps = PhotographCrops(pictures, 3, count=400), set()
    for index in range(400):
        crop = crops[index]["x0"]
        steps.add((crop[0, 0, 1] - crop[0, 0, 0]).abs().item())
        if crop[0, 1, 0] - crop[0, 0, 0] == 16: assert (crop[0, 0] - 4.5).remainder(2).eq(0).all()  # the mean of 0, 1, 8 and 9 is 4.5
    assert steps == {1, 2} and len(crops) == 400 and len(PhotographCrops(pictures, 3)) == 1_000_000
    assert torch.equal(crops[5]["x0"], PhotographCrops(pictures, 3)[5]["x0"])
    assert any(not torch.equal(crops[index]["x0"], PhotographCrops(pictures, 3, seed=1)[index]["x0"]) for index in range(5))
    shares = [(crops[index]["x0"][0, 1, 0] - crops[index]["x0"][0, 0, 0]).item() == 16 for index in range(400)]
    assert 0.4 < sum(shares) / 400 < 0.6
    with pytest.raises(ValueError, match=r"^size: expected a value in \[1, 3\]"): PhotographCrops(pictures, 4)


def test_mirrored_data_are_there_twice():
    data = Mirrored(TensorSet(torch.arange(12.0).reshape(2, 1, 2, 3), class_label=torch.tensor([4, 5])))
    assert len(data) == 4 and torch.equal(data[1]["x0"], torch.arange(6.0, 12.0).reshape(1, 2, 3))
    assert torch.equal(data[3]["x0"], torch.tensor([[[8.0, 7, 6], [11, 10, 9]]])) and data[2]["class_label"] == 4
    for wrong in (4, -1):
        with pytest.raises(IndexError, match="expected 0 to 3"): data[wrong]


def idx(array): return bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape) + array.tobytes()


def test_idx_files_are_pictures_between_minus_one_and_one(tmp_path):
    pixels = np.arange(2 * 3 * 300, dtype=np.uint64).astype(np.uint8).reshape(2, 3, 300)
    (tmp_path / "images").write_bytes(gzip.compress(idx(pixels)))
    (tmp_path / "labels").write_bytes(idx(np.array([7, 250], np.uint8)))
    assert np.array_equal(read_idx(tmp_path / "images"), pixels)
    found = idx_images(tmp_path / "images", tmp_path / "labels").tensors
    assert found["x0"].shape == (2, 1, 3, 300) and torch.equal(found["x0"][:, 0], torch.from_numpy(pixels) / 127.5 - 1)
    assert (found["x0"].min(), found["x0"].max()) == (-1, 1) and found["class_label"].tolist() == [7, 250]


@pytest.mark.parametrize("classes, ahead", [(10, [3]), (100, [19, 93])])
def test_records_of_cifar_are_a_label_and_three_planes(classes, ahead, tmp_path):
    "Of two labels the second is the fine one."
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
    pixels[0, :2] = 0, 255
    labels = np.array([ahead, [label - 1 for label in ahead]], np.uint8)
    for number in (0, 1): np.concatenate([labels[number], pixels[number]]).tofile(tmp_path / f"{number}.bin")
    found = cifar_images([tmp_path / "0.bin", tmp_path / "1.bin"], classes).tensors
    assert found["class_label"].tolist() == [ahead[-1], ahead[-1] - 1] and (found["x0"].min(), found["x0"].max()) == (-1, 1)
    place = (1, 2, 5, 9)
    assert found["x0"][place].item() == pytest.approx(pixels[1, 2 * 1024 + 5 * 32 + 9] / 127.5 - 1)


def test_rows_become_pictures_and_whole_labels():
    image = pytest.importorskip("PIL.Image")
    rows = [{"image": image.fromarray(np.full((4, 4, 3), level, np.uint8)), "kind": np.int8(level % 7)} for level in (0, 255, 51)]
    data = RowsOfImages(rows, 2, label="kind")
    assert [data[index]["x0"].unique().item() for index in range(3)] == pytest.approx([-1, 1, -0.6]) and data[1]["class_label"] == 255 % 7
    assert data.class_labels == [0, 3, 2] and len(data) == 3 and data[0]["x0"].shape == (3, 2, 2)


def test_labels_end_before_the_number_of_classes():
    check_labels(torch.tensor([0, 9]), 10)
    for wrong, place in (([0, 10], 1), ([-1, 3], 0)):
        with pytest.raises(ValueError, match=rf"expected 0 to 9, got {wrong[place]} at place {place}"): check_labels(torch.tensor(wrong), 10)
    with pytest.raises(ValueError, match="count from 1"): check_labels(torch.tensor([1, 10]), 10)
    data = Subset(TensorSet(torch.zeros(4, 1), class_label=torch.tensor([0, 1, 2, 12])), [2, 3])
    with pytest.raises(ValueError, match="got 12 at place 1"): data_module.check_data_labels(data, 10)
