"""Samples in pieces: every number once, noise by number, and moments of all."""
import math

from extras import need

need("train", "data")

import pytest
import torch

from diffusion_papers.core.generation import Generated, generate, noise_for, pieces, slerp
from diffusion_papers.core.training import step_seed


def test_pieces_share_all_numbers_in_turns():
    assert pieces(10, 4) == [range(0, 4), range(4, 8), range(8, 10)]
    assert [pieces(10, 3, rank, 2) for rank in (0, 1)] == [[range(0, 3), range(6, 9)], [range(3, 6), range(9, 10)]]


def test_starting_noise_is_a_function_of_the_seed_and_the_first_number():
    noise = noise_for(range(40, 60), (2, 3), seed=7)
    assert torch.equal(noise, torch.randn(20, 2, 3, generator=torch.Generator().manual_seed(step_seed(7, 40))))
    assert not torch.equal(noise, noise_for(range(60, 80), (2, 3), seed=7)) and not torch.equal(noise, noise_for(range(40, 60), (2, 3)))


def test_spherical_interpolation_turns_at_a_constant_speed():
    a, b = torch.tensor([[[2.0, 0.0]], [[1.0, 0.0]]]), torch.tensor([[[0.0, 5.0]], [[math.cos(1.2), math.sin(1.2)]]])
    for share in (0.0, 0.25, 0.7, 1.0):
        first, second = share * math.pi / 2, share * 1.2
        wanted = torch.tensor([[[2 * math.cos(first), 5 * math.sin(first)]], [[math.cos(second), math.sin(second)]]])
        torch.testing.assert_close(slerp(a, b, share), wanted, rtol=1e-4, atol=1e-5)
        weights = [math.sin((1 - share) * 1.2) / math.sin(1.2), math.sin(share * 1.2) / math.sin(1.2)]
        torch.testing.assert_close(slerp(a, 3 * b, share)[1], weights[0] * a[1] + 3 * weights[1] * b[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slerp(a, a, 0.3), a)


@pytest.mark.parametrize("count, size", [(7, 3), (6, 3), (2, 5)])
def test_generated_samples_come_back_by_their_numbers(count, size, tmp_path):
    asked = []
    draw = lambda piece: asked.append(piece) or {"x0": torch.tensor(list(piece))[:, None] * 1.5, "class_label": torch.tensor(list(piece)) % 3}
    data = generate(draw, count, tmp_path, size=size, device="cpu")
    assert asked == pieces(count, size) and len(data) == count
    order = [*range(count)][::-1]
    found = data.__getitems__(order)
    assert found["x0"].flatten().tolist() == [1.5 * number for number in order] and found["class_label"].tolist() == [number % 3 for number in order]
    assert data[1]["x0"].tolist() == [1.5]
    for wrong in ([count], [-1], [0, count]):
        with pytest.raises(IndexError, match=f"expected 0 to {count - 1}"): data.__getitems__(wrong)


def test_only_what_is_missing_is_drawn_again(tmp_path):
    draw = lambda piece: asked.append(piece.start) or {"x0": torch.zeros(len(piece), 1)}
    asked = []
    generate(draw, 7, tmp_path, size=3, device="cpu")
    (tmp_path / "000000003.safetensors").unlink()
    with pytest.raises(ValueError, match="1 pieces are missing, the first from sample 3 on"): Generated(tmp_path)
    generate(draw, 7, tmp_path, size=3, device="cpu")
    assert asked == [0, 3, 6, 3]




def test_a_start_that_made_nothing_does_not_bind_the_next(tmp_path):
    "A first piece that fails leaves only a description; whoever corrects his mistake must be able to begin."
    def fails(piece): raise FloatingPointError("no number")
    with pytest.raises(FloatingPointError): generate(fails, 4, tmp_path, size=2, about={"seed": 1}, device="cpu")
    made = generate(lambda piece: {"x": torch.ones(len(piece), 1)}, 4, tmp_path, size=2, about={"seed": 2}, device="cpu")
    assert made.about == {"seed": 2}
    with pytest.raises(ValueError, match="holds other samples: about.seed"): generate(fails, 4, tmp_path, size=2, about={"seed": 3}, device="cpu")
