"""Utility: glyphs against a fine drawing of their forms, and classifiers that are trained on synthetic pictures and tested on real ones."""
import math

import pytest
import torch
from torch import nn

from diffusion_papers.topics import utility


def test_glyphs_are_their_forms_drawn_finely():
    "The same draws, each form by its own inequalities, as the share of 6x6 points in a pixel."
    count, size, fine = 60, 32, 6
    generator = torch.Generator().manual_seed(utility.step_seed(3, size))
    kinds = torch.randint(6, (count,), generator=generator).tolist()
    draw = lambda low, high: (low + (high - low) * torch.rand(count, 1, 1, generator=generator)).flatten().tolist()
    left, top, radius, stroke, turn = draw(-0.2, 0.2), draw(-0.2, 0.2), draw(0.5, 0.8), draw(0.12, 0.2), draw(-0.35, 0.35)
    found, place = utility.glyphs(count, 3, size).tensors, (torch.arange(size * fine) + 0.5) / (size * fine) * 2 - 1
    assert found["class_label"].tolist() == kinds and set(kinds) == set(range(6))
    for number, kind in enumerate(kinds):
        form, r, s = utility.FORMS[kind], radius[number], stroke[number]
        angle = turn[number] + math.pi / 4 * (form == "cross")
        dx, dy = place[None] - left[number], place[:, None] - top[number]
        x, y = math.cos(angle) * dx + math.sin(angle) * dy, math.cos(angle) * dy - math.sin(angle) * dx
        away = (x**2 + y**2).sqrt()
        bars = (x.abs() < s) & (y.abs() < r) | (y.abs() < s) & (x.abs() < r)
        inside = {"disc": away < 0.8 * r, "ring": (away > r - s) & (away < r + s), "square": (x.abs() < 0.8 * r) & (y.abs() < 0.8 * r),
                  "plus": bars, "cross": bars,
                  "triangle": (y < 0.5 * r) & (0.866 * x - 0.5 * y < 0.5 * r) & (-0.866 * x - 0.5 * y < 0.5 * r)}[form]
        share = inside.float().reshape(size, fine, size, fine).mean((1, 3))
        off = found["x0"][number, 0] - (2 * share - 1)
        assert off.abs().mean() < 0.012 and abs(off.mean()) < 0.005, form
    assert found["x0"].min() == -1 and found["x0"].max() == 1


# ---- classifiers


def test_classifiers_have_the_papers_sizes():
    count = lambda *words: sum(parameter.numel() for parameter in utility.classifier(*words).parameters())
    assert count("linear", (1, 28, 28), 10) == 784 * 10 + 10 and count("perceptron", (1, 28, 28), 10) == 784 * 100 + 100 + 100 * 10 + 10
    convolutions = 32 * 9 + 32 + 64 * 32 * 9 + 64
    assert count("convolutional", (1, 28, 28), 10) == convolutions + 128 * 64 * 9 + 128 + 128 * 9 * 128 + 128 + 128 * 10 + 10  # 28, 26, 13, 11, 5, 3
    assert count("convolutional", (1, 8, 8), 10) == convolutions + 64 * 4 * 128 + 128 + 128 * 10 + 10  # 8, 8, 4, 4, 2
    rates = [part.p for part in utility.classifier("convolutional", (1, 8, 8), 10, 0.25) if isinstance(part, nn.Dropout)]
    assert rates == [0.25] * 3
    assert [part.p for part in utility.classifier("convolutional", (1, 8, 8), 10) if isinstance(part, nn.Dropout)] == [0.5] * 3


def test_accuracy_is_the_share_of_right_answers():
    scores = torch.tensor([[3.0, 1, 0], [0, 5, 1], [2, 1, 9], [4, 0, 0]])
    assert utility.accuracy(nn.Identity(), scores, torch.tensor([0, 1, 0, 2])) == 0.5


@pytest.fixture
def synthetic():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    images = torch.nn.functional.one_hot(labels, 4).float().reshape(400, 1, 2, 2) + 0.05 * torch.randn(400, 1, 2, 2, generator=generator)
    return images.clamp(-1, 1), labels


def test_a_classifier_is_that_of_its_best_epoch_on_a_held_out_tenth(monkeypatch, synthetic):
    asked = []
    def pretended(values):
        values = iter(values)
        def accuracy(network, images, labels): asked.append(len(images)); return next(values)
        return accuracy
    def fitted(values):
        monkeypatch.setattr(utility, "accuracy", pretended(values))
        return nn.utils.parameters_to_vector(utility.fit_classifier("linear", *synthetic, 4, epochs=len(values), lr=0.05).parameters())
    first, second = fitted([0.5]), fitted([0.5, 0.6])
    assert torch.equal(fitted([0.5, 0.4, 0.5]), first) and torch.equal(fitted([0.5, 0.6, 0.1]), second) and not torch.equal(first, second)
    assert set(asked) == {40}


def test_a_classifier_is_fitted_by_adam_on_batches_of_128(synthetic):
    images, labels = synthetic
    with torch.random.fork_rng():
        torch.manual_seed(utility.step_seed(3, 1))
        network = utility.classifier("linear", (1, 2, 2), 4)
        optimizer, kept = torch.optim.Adam(network.parameters(), lr=0.02), torch.randperm(400)[40:]
        order = torch.randperm(360)
        for chosen in (order[:128], order[128:256], order[256:]):
            optimizer.zero_grad()
            scores = network(images[kept][chosen]).log_softmax(1)
            (-scores[range(len(chosen)), labels[kept][chosen]].mean()).backward()
            optimizer.step()
    found = utility.fit_classifier("linear", images, labels, 4, epochs=1, lr=0.02, seed=3)
    for ours, plain in zip(found.parameters(), network.parameters()): torch.testing.assert_close(ours, plain)
    assert not found.training


def test_utility_trains_on_the_synthetic_and_tests_on_the_real(synthetic):
    images, labels = synthetic
    real = {"x0": images[:120], "class_label": torch.where(torch.arange(120) < 90, labels[:120], (labels[:120] + 1) % 4)}
    found = utility.utility(images, labels, real, epochs=30, lr=0.05)
    assert found == {"linear": 0.75, "perceptron": 0.75}
