"""Distances and shares against closed forms, other libraries and definitions written out."""
import math

from extras import need

need("train", "data")

import numpy as np
import pytest
import torch

from diffusion_papers.core.metrics import (Moments, digit_judge, frechet, frechet_features, frechet_pixels, gaussian_frechet, inside, moments_of,
                                           precision_recall, psnr, sliced_wasserstein, to_bytes)

seeded = lambda seed=0: torch.Generator().manual_seed(seed)
random = lambda *shape, seed=0: torch.randn(shape, generator=seeded(seed), dtype=torch.float64)
double = lambda values: torch.tensor(values, dtype=torch.float64)


def by_scipy(mean_a, cov_a, mean_b, cov_b):
    "|difference|^2 + trace(A + B - 2 (A B)^(1/2)), by the root of a product that is not symmetric."
    root = pytest.importorskip("scipy.linalg").sqrtm(cov_a @ cov_b)
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real)


def test_the_distance_of_gaussians_is_that_of_another_library():
    roots = random(2, 5, 5), random(2, 5)
    covariances = roots[0] @ roots[0].transpose(1, 2)
    arguments = [part for pair in zip(roots[1], covariances) for part in pair]
    assert gaussian_frechet(*arguments) == pytest.approx(by_scipy(*[part.numpy() for part in arguments]), rel=1e-9)


def test_the_distance_of_gaussians_in_one_and_two_dimensions():
    "(m - m')^2 + (s - s')^2, in every direction that both have in common; 0 for what is the same."
    assert gaussian_frechet(double([1.0]), double([[4.0]]), double([-2.0]), double([[9.0]])) == pytest.approx(9 + 1)
    assert gaussian_frechet(double([1, 0]), double([[4, 0], [0, 0]]), double([0, 0]), double([[1, 0], [0, 25]])) == pytest.approx(1 + 1 + 25)
    assert gaussian_frechet(double([1.0]), double([[4.0]]), double([1.0]), double([[4.0]])) == 0


def test_moments_are_mean_and_unbiased_covariance_however_they_come():
    features = random(40, 3)
    moments = Moments(3).add(features[:7]).add(features[7:25])
    together = moments + Moments(3).add(features[25:])
    assert together.count == 40 and moments.count == 25
    assert together.mean == pytest.approx(features.mean(0)) and together.covariance == pytest.approx(np.cov(features.numpy().T), abs=1e-12)


def test_moments_are_kept_in_a_file(tmp_path):
    moments = Moments(2).add(random(5, 2))
    moments.save(tmp_path / "moments.safetensors")
    again = Moments.load(tmp_path / "moments.safetensors")
    assert torch.equal(again.mean, moments.mean) and torch.equal(again.covariance, moments.covariance) and again.count == 5


def test_sets_are_compared_by_their_moments():
    a, b = random(50, 3), 2 * random(60, 3, seed=1) + 1
    wanted = by_scipy(a.mean(0).numpy(), np.cov(a.numpy().T), b.mean(0).numpy(), np.cov(b.numpy().T))
    assert frechet(a, b) == pytest.approx(wanted, rel=1e-6) and Moments(3).add(a).distance(Moments(3).add(b)) == pytest.approx(wanted, rel=1e-6)
    images = [part.reshape(-1, 3, 1, 1).clamp(-1, 1) for part in (a, b)]
    assert frechet_pixels(*images) == pytest.approx(frechet(*(part.flatten(1) for part in images)))
    extractor = lambda batch: batch.flatten(1)[:, :2] ** 2
    assert frechet_features(extractor, *images, batch_size=7) == pytest.approx(frechet(*(extractor(part) for part in images)))


def test_every_picture_is_clipped_and_counted_once():
    images, seen = 2 * random(11, 1, 2, 2), []
    moments = moments_of(lambda batch: seen.append(len(batch)) or batch.flatten(1), images, batch_size=4)
    assert seen == [4, 4, 3] and moments.count == 11 and moments.mean == pytest.approx(images.clamp(-1, 1).flatten(1).mean(0))


def test_bytes_are_truncated_or_rounded():
    levels = torch.tensor([-1.0, -0.5, 0.0, 1 / 255, 0.999, 1.0, 1.7]).reshape(1, 1, 1, 7)
    assert to_bytes(levels).flatten().tolist() == [0, 63, 127, 128, 254, 255, 255]
    assert to_bytes(levels, nearest=True).flatten().tolist() == [0, 64, 128, 128, 255, 255, 255]
    assert to_bytes(torch.tensor([[[[0.002]]]])).item() == 127 and to_bytes(torch.tensor([[[[0.006]]]])).item() == 128


# transport

@pytest.mark.parametrize("counts", [(30, 30), (20, 60), (60, 20), (15, 22), (5, 7)])
def test_in_one_dimension_it_is_the_distance_of_the_inverse_distributions(counts):
    "At the middles of the larger set's steps; where the numbers divide each other, that is the whole integral."
    a, b = random(counts[0], 1), 3 * random(counts[1], 1, seed=1) + 1
    at = [part.flatten().sort().values for part in (a, b)]
    most, total = max(counts), math.lcm(*counts)
    squares = [(at[0][(2 * i + 1) * counts[0] // (2 * most)] - at[1][(2 * i + 1) * counts[1] // (2 * most)]) ** 2 for i in range(most)]
    steps = [part.repeat_interleave(total // len(part)) for part in at]
    found = sliced_wasserstein(a, b, seeded(), 3)
    assert found == pytest.approx(math.sqrt(sum(squares) / most))
    if most % min(counts) == 0: assert found == pytest.approx((steps[0] - steps[1]).square().mean().sqrt().item())


def test_a_shifted_set_is_as_far_as_the_shift_over_the_root_of_the_dimensions():
    samples = random(50, 2, 5)
    shift = double([1.0, 0, 0, 2, 0, 0, 0, 0, -2, 0]).reshape(2, 5)
    found = sliced_wasserstein(samples, samples + shift, seeded(), 20_000)
    assert found == pytest.approx(3 / math.sqrt(10), rel=0.02)
    assert sliced_wasserstein(samples, samples.flip(0), seeded()) < 1e-12  # a product of matrices may round by its row


def test_directions_are_of_unit_length_and_as_many_as_asked_for():
    a, b = random(40, 3), random(40, 3, seed=1)
    directions = torch.randn(3, 5, generator=seeded(), dtype=torch.float64)
    squares = [((a @ d).sort().values - (b @ d).sort().values).square().mean() / (d @ d) for d in directions.T]
    assert sliced_wasserstein(a, b, seeded(), 5) == pytest.approx(math.sqrt(sum(squares) / 5))


# precision and recall

def test_a_ball_reaches_to_the_kth_neighbour_and_no_further():
    "Around 0, 1, 3, 7 and 15: k = 1 reaches 1, 1, 2, 4 and 8; k = 2 reaches 3, 2, 3, 6 and 12."
    line = double([[0.0], [1], [3], [7], [15]])
    points = double([[-1.0], [-1.01], [5], [11], [11.01], [23], [23.01], [-3], [27], [27.01]])
    assert inside(points, line, 1).tolist() == [True, False, True, True, True, True, False, False, False, False]
    assert inside(points, line, 2, batch_size=3).tolist() == [True, True, True, True, True, True, True, True, True, False]
    assert torch.equal(inside(points, line), inside(points, line, 3))


def test_precision_is_of_the_samples_and_recall_of_the_data():
    data = double([[0.0], [1], [2], [3], [100], [101], [102], [103]])
    samples = double([[0.5], [1.5], [2.5], [1.0], [60], [60.5]])
    assert precision_recall(samples, data, 1) == (pytest.approx(4 / 6), pytest.approx(4 / 8))
    literal = lambda of, like: sum(any(abs(x - y) <= sorted(abs(y - z) for z in like)[3] for y in like) for x in of) / len(of)
    a, b = random(30, 1), 2 * random(25, 1, seed=1)
    plain = a.flatten().tolist(), b.flatten().tolist()
    assert precision_recall(a, b) == (pytest.approx(literal(*plain)), pytest.approx(literal(*plain[::-1])))


# pictures and digits

def test_the_noise_of_a_picture_is_in_decibels_of_its_range():
    "10 log10(2^2 / mean square), one an image; samples are clipped first."
    truth = torch.zeros(3, 1, 2, 2)
    images = torch.stack([torch.full((1, 2, 2), 0.2), torch.tensor([[[0.4, 0.0], [0.0, 0.0]]]), torch.full((1, 2, 2), 5.0)])
    assert psnr(images, truth).tolist() == pytest.approx([20, 20, 10 * math.log10(4)])


def test_the_judge_of_digits_is_scikit_learns_perceptron(monkeypatch):
    neural = pytest.importorskip("sklearn.neural_network")
    fitted = []
    def small(layers, **options):
        fitted.append((layers, neural_classifier(layers, **options | {"max_iter": 8})))
        return fitted[-1][1]
    neural_classifier = neural.MLPClassifier
    monkeypatch.setattr(neural, "MLPClassifier", small)
    with pytest.warns(UserWarning): judge = digit_judge.__wrapped__()
    images = 1.3 * torch.randn(200, 1, 8, 8, generator=seeded())
    flat, perceptron = images.clamp(-1, 1).flatten(1).numpy(), fitted[0][1]
    hidden = flat
    for weight, bias in list(zip(perceptron.coefs_, perceptron.intercepts_))[:-1]: hidden = np.maximum(hidden @ weight + bias, 0)
    assert fitted[0][0] == (128, 64) and judge.features(images) == pytest.approx(hidden, abs=1e-4)
    labels = torch.arange(200) % 10
    assert judge.accuracy(images, labels) == pytest.approx((perceptron.predict(flat) == labels.numpy()).mean(), abs=0.006)
