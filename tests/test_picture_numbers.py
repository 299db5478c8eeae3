"""Levels, colours and opacities of pictures, number by number."""
import math

from extras import need

need("data")

import numpy as np
import pytest
import torch

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion_papers.core.pictures import Picture, fill_hidden, read_picture, to_square, write_picture

levels = lambda colour: (colour.double() + 1) * 127.5


def described(path, values, gamma=None, points=None):
    "Write a PNG that says in numbers what its colours are."
    about = PngInfo()
    whole = lambda number: round(100_000 * number).to_bytes(4, "big")
    if gamma: about.add(b"gAMA", whole(1 / gamma))
    if points: about.add(b"cHRM", b"".join(map(whole, points)))
    Image.fromarray(values).save(path, pnginfo=about)


@pytest.mark.parametrize("gamma", [1.0, 1.8])
def test_light_is_the_level_to_the_power_that_a_file_says(gamma, tmp_path):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, -1)
    described(tmp_path / "a.png", values, gamma)
    light = (values / 255) ** gamma
    wanted = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(levels(read_picture(tmp_path / "a.png").colour).permute(1, 2, 0).numpy() - wanted).max() < 0.51


def test_greys_stay_what_they_are_whatever_the_primary_colours(tmp_path):
    "White is white in both spaces, and the curve goes there and back, in the dark as well."
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, -1)
    for points in ((0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06), (0.34567, 0.3585, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)):
        described(tmp_path / "a.png", values, points=points)
        assert np.abs(levels(read_picture(tmp_path / "a.png").colour).permute(1, 2, 0).numpy() - values).max() < 0.51


def test_a_primary_of_adobe_rgb_is_that_share_of_the_light_of_srgb(tmp_path):
    "Their whites, reds and blues are alike, so a green is sum of what the plane of red, green and blue of sRGB makes of it."
    values = np.array([[[100, 180, 60]]], dtype=np.uint8)
    described(tmp_path / "a.png", values, 1.0, (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06))
    xyz = lambda x, y: np.array([x / y, 1, (1 - x - y) / y])
    white = xyz(0.3127, 0.329)
    def to_xyz(*primaries):
        columns = np.stack([xyz(*primary) for primary in primaries], axis=1)
        return columns @ np.diag(np.linalg.inv(columns) @ white)
    light = np.linalg.inv(to_xyz((0.64, 0.33), (0.3, 0.6), (0.15, 0.06))) @ to_xyz((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)) @ (values[0, 0] / 255)
    wanted = 255 * (1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(levels(read_picture(tmp_path / "a.png").colour)[:, 0, 0].numpy() - wanted).max() < 0.51


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_a_square_is_the_middle_of_a_picture(tall, deep):
    values = np.random.default_rng(0).integers(0, 256, (4, 8)).astype(np.uint8)
    stored = values.astype(np.uint16) * 257 if deep else values
    square = to_square(Image.fromarray(stored.T.copy() if tall else stored), 4)
    wanted = values[:, 2:6].T if tall else values[:, 2:6]
    assert square.shape == (3, 4, 4) and np.abs(levels(square) - wanted).max() < 0.01


def test_a_small_square_has_the_mean_of_the_large_one():
    values = np.random.default_rng(0).integers(60, 200, (16, 16, 3)).astype(np.uint8)
    small = levels(to_square(Image.fromarray(values), 4))
    assert small.mean((1, 2)).numpy() == pytest.approx(values.mean((0, 1)), abs=2.5) and small.std() < 0.6 * values.std()


def test_what_is_transparent_shows_the_background_by_its_share():
    colour, opacity = np.full((2, 2, 3), (200, 100, 0), np.uint8), np.array([[255, 0], [51, 102]], np.uint8)
    found = levels(to_square(Image.fromarray(np.dstack([colour, opacity])), 2, (0, 50, 250)))
    share = torch.tensor([[1.0, 0.0], [0.2, 0.4]])
    assert np.abs(found - torch.stack([200 * share, 50 + 50 * share, 250 - 250 * share])).max() < 0.01
    white = levels(to_square(Image.fromarray(np.dstack([colour, opacity])), 2))
    assert np.abs(white[2] - (255 - 255 * share)).max() < 0.01


def test_a_hidden_pixel_takes_the_mean_of_the_visible_ones_by_their_opacity():
    colour = torch.tensor([[0.1, 0.5], [-0.7, 99.0]]).expand(3, 2, 2)
    alpha = torch.tensor([[[1.0, 0.5], [0.25, 0.0]]])
    filled = fill_hidden(colour, alpha)
    wanted = (1 * 0.1 + 0.5 * 0.5 - 0.25 * 0.7) / 1.75
    assert filled[:, 1, 1].tolist() == pytest.approx([wanted] * 3, abs=1e-6) and torch.equal(filled[:, 0], colour[:, 0])


def test_values_are_written_as_the_nearest_byte(tmp_path):
    values = torch.tensor([0.0, 0.4, 0.6, 100.4, 100.6, 254.6, 255.0, 127.5]).reshape(1, 2, 4).expand(3, -1, -1) / 127.5 - 1
    write_picture(tmp_path / "a.png", Picture(values, torch.tensor([[[0.0, 1, 0.31, 0.34], [0.2, 0.4, 0.6, 0.8]]]), (300, 150)))
    with Image.open(tmp_path / "a.png") as image: pixels, dpi = np.asarray(image), image.info["dpi"]
    assert pixels[..., 0].flatten().tolist()[:7] == [0, 0, 1, 100, 101, 255, 255]
    assert dpi == (pytest.approx(300, abs=0.1), pytest.approx(150, abs=0.1))
    assert pixels[..., 3].flatten().tolist() == [math.floor(255 * share + 0.5) for share in (0, 1, 0.31, 0.34, 0.2, 0.4, 0.6, 0.8)]


def test_a_camera_held_sideways_changes_rows_columns_and_resolution(tmp_path):
    values, exif = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, Image.Exif()
    for orientation, wanted in ((6, np.rot90(values, -1)), (8, np.rot90(values, 1)), (3, values[::-1, ::-1])):
        exif[0x0112] = orientation
        Image.fromarray(values).save(tmp_path / "a.png", exif=exif, dpi=(300, 150))
        found = read_picture(tmp_path / "a.png")
        assert np.abs(levels(found.colour)[0].numpy() - wanted).max() < 0.01
        assert found.dpi == (pytest.approx((300, 150) if orientation == 3 else (150, 300), abs=0.1))
