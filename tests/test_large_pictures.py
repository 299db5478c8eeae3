"""Large pictures in numbers: squares, blending windows, stretches, noise of a place, and pieces that add up."""
import numpy as np
import pytest
import torch

from diffusion_papers.core.pictures import Picture
from diffusion_papers.topics.large_pictures import Piece, blended, noise_of_place, opacity_for, pieces, room, squares, stretches, whole_answer

CUTS = [(1, 64, 16), (64, 64, 16), (65, 64, 16), (100, 32, 0), (129, 32, 16), (1000, 128, 112)]  # side, tile, overlap


@pytest.mark.parametrize("side, tile, overlap", CUTS)
def test_room_is_the_smallest_that_squares_fill(side, tile, overlap):
    assert room(side, tile, overlap) == next(tile + count * (tile - overlap) for count in range(10_000) if tile + count * (tile - overlap) >= side)


def test_squares_lie_at_every_stride_row_by_row():
    assert squares(64, 96, 32, 0) == [(0, 0), (0, 32), (0, 64), (32, 0), (32, 32), (32, 64)]
    assert squares(48, 64, 32, 16) == [(0, 0), (0, 16), (0, 32), (16, 0), (16, 16), (16, 32)]


def test_answers_are_blended_by_hann_windows():
    "Each square answers with its number: a pixel is the weighted mean of those that cover it."
    numbers, called, told = iter(range(100)), [], []
    def function(parts, times):
        told.append((len(parts), times.tolist()))
        return torch.stack([torch.full((2, 32, 32), float(next(numbers))) for _ in parts])
    picture = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    found = blended(function, 32, 16, 4, lambda: called.append(1))(picture, torch.tensor([7]))
    window = np.outer(*[np.hanning(34)[1:-1]] * 2)
    total, weight = np.zeros((48, 64)), np.zeros((48, 64))
    for number, (row, column) in enumerate([(i, j) for i in (0, 16) for j in (0, 16, 32)]):
        total[row:row + 32, column:column + 32] += number * window
        weight[row:row + 32, column:column + 32] += window
    assert found.shape == (1, 2, 48, 64) and told == [(4, [7] * 4), (2, [7] * 2)] and len(called) == 2
    np.testing.assert_allclose(found[0, 1], total / weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(blended(lambda parts: 2 * parts, 32, 16, 5)(picture), 2 * picture)


def test_stretches_meet_in_the_middle_of_what_they_share():
    (start, stop, first), (begin, end, second) = stretches(7 * 16 + 16, 32, 16, 5 * 16 + 16)  # seven squares, five at most
    assert (start, stop, begin, end) == (0, 96, 32, 128)  # five squares each would be 80 + 16; they share three
    middle, place = (stop + begin) / 2, torch.arange(128)
    behind = ((place - middle) / 16 + 0.5).clamp(0, 1)
    torch.testing.assert_close(first, 1 - behind[:96]); torch.testing.assert_close(second, behind[32:])
    (_, stop, hard), (begin, _, _) = stretches(7 * 32, 32, 0, 5 * 32)
    assert set(hard.unique().tolist()) <= {0.0, 0.5, 1.0} and hard.sum().item() == pytest.approx((stop + begin) / 2, abs=1)


@pytest.mark.parametrize("side, tile, overlap", CUTS)
@pytest.mark.parametrize("longest", [1, 200, 1024])
def test_stretches_are_as_few_as_can_be_and_none_is_too_long(side, tile, overlap, longest):
    side, stride = room(side, tile, overlap), tile - overlap
    longest = max(longest, 3 * stride + overlap)
    found, total = stretches(side, tile, overlap, longest), torch.zeros(side)
    for start, stop, weight in found: total[start:stop] += weight
    torch.testing.assert_close(total, torch.ones(side))
    assert found[0][0] == 0 and found[-1][1] == side and all(stop - start <= longest for start, stop, _ in found)
    most = (longest - overlap) // stride  # squares of the longest one, of which neighbours share two
    assert len(found) == next(count for count in range(1, 10_000) if 2 + count * (most - 2) >= (side - overlap) // stride)


def test_noise_belongs_to_a_place_and_to_a_call():
    like = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
    whole, part = noise_of_place(5, range(96), slice(0, 80), 80, 16), noise_of_place(5, range(32, 80), slice(16, 70), 80, 16)
    draws = [(whole(like), part(like)) for _ in range(3)]
    for everywhere, here in draws:
        assert here.shape == (1, 3, 48, 54) and here.dtype == torch.float64 and torch.equal(everywhere[:, :, 32:80, 16:70], here)
    assert not torch.equal(draws[0][0], draws[1][0]) and not torch.equal(draws[0][0][:, :, :16], draws[0][0][:, :, 16:32])
    assert not torch.equal(draws[0][0], noise_of_place(6, range(96), slice(0, 80), 80, 16)(like))
    values = torch.cat([everywhere.flatten() for everywhere, _ in draws])
    assert values.std().item() == pytest.approx(1, abs=0.02) and values.mean().item() == pytest.approx(0, abs=0.02)
    assert noise_of_place(5, range(16, 30), slice(3, 9), 80, 16)(like).shape == (1, 3, 14, 6)


def test_a_piece_is_cut_with_repeated_edges_and_added_with_its_weights():
    piece = Piece(2, 6, 3, 8, torch.tensor([1.0, 0.5, 0.25, 0.0]), torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), 8, 4, 2)
    image = torch.arange(30.0).reshape(1, 1, 5, 6)
    rows, columns = [2, 3, 4, 4], [3, 4, 5, 5, 5]
    assert torch.equal(piece.cut(image)[0, 0], image[0, 0][rows][:, columns])
    whole = torch.ones(1, 1, 5, 6)
    piece.add(whole, torch.full((1, 1, 4, 5), 10.0))
    expected = torch.ones(5, 6)
    expected[2:, 3:] += 10 * torch.tensor([[0, 1, 2], [0, 0.5, 1], [0, 0.25, 0.5]])
    torch.testing.assert_close(whole[0, 0], expected)
    assert [Piece(0, 48, 0, 64, None, None, 64, 32, 16).batches(size) for size in (1, 4, 6, 7)] == [6, 2, 1, 1]


def test_a_pieces_noise_is_that_of_its_place_in_the_grown_picture():
    parts = pieces(90, 200, 32, 16, 80)
    like, width = torch.zeros(1, 3, 1, 1), room(200, 32, 16)
    whole = noise_of_place(4, range(room(90, 32, 16)), slice(0, width), width, 16)(like)
    assert len(parts) > 4
    for part in parts: assert torch.equal(part.noise(4)(like), whole[:, :, part.top:part.bottom, part.left:part.right])


@pytest.mark.parametrize("height, width", [(20, 150), (150, 20), (97, 130)])
def test_pieces_add_up_to_the_answer_of_each_pixel(height, width):
    picture, sizes = torch.rand(3, height, width, generator=torch.Generator().manual_seed(1)), []
    def function(parts):
        sizes.append(parts.shape)
        return parts[:, :2] ** 2
    found = whole_answer(function, picture, tile=32, overlap=16, batch_size=3, piece=80)
    torch.testing.assert_close(found, picture[:2] ** 2)
    assert all(shape[0] <= 3 and shape[1:] == (3, 32, 32) for shape in sizes)


def test_an_enlarged_opacity_is_interpolated():
    alpha = torch.rand(1, 5, 7, generator=torch.Generator().manual_seed(2))
    colour = torch.zeros(3, 5, 7)
    assert opacity_for(Picture(colour), 4) is None and opacity_for(Picture(colour, alpha), 1) is alpha
    found = opacity_for(Picture(colour, alpha), 2)
    assert found.shape == (1, 10, 14) and found[0, 3, 5].item() == pytest.approx(  # between four: at (1.25, 2.25)
        (0.75 * (0.75 * alpha[0, 1, 2] + 0.25 * alpha[0, 1, 3]) + 0.25 * (0.75 * alpha[0, 2, 2] + 0.25 * alpha[0, 2, 3])).item())
