"""What the studies of the bridge and of private diffusion compute, on numbers that are known beforehand."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from extras import need

need("train", "data")

from torch import nn

from diffusion_papers import dpdm
from diffusion_papers.core.training import step_seed
from diffusion_papers.evidence import dpdm as private, i2sb as bridge
from diffusion_papers.topics.corruptions import Degraded
from diffusion_papers.topics.privacy import Ledger, Mechanism, public_generator



def seeded(number=0): return torch.Generator().manual_seed(number)


# ---- the bridge


def test_patches_are_every_fourth_along_directions():
    images, directions = torch.randn(2, 3, 16, 20, generator=seeded()), torch.randn(147, 5, generator=seeded(1))
    found = bridge.patch_projections(images, directions)
    places = [(row, column) for row in range(0, 10, 4) for column in range(0, 14, 4)]
    assert found.shape == (2, len(places), 5)
    for number, (row, column) in enumerate(places):
        torch.testing.assert_close(found[:, number], images[:, :, row:row + 7, column:column + 7].flatten(1) @ directions, rtol=1e-4, atol=1e-4)


def test_the_sliced_distance_is_between_sorted_projections():
    a, b = torch.randn(2, 2, 4, 3, generator=seeded())
    squares = [(np.sort(a[..., d].flatten()) - np.sort(b[..., d].flatten())) ** 2 for d in range(3)]
    assert bridge.sliced_distance(a, b).item() == pytest.approx(math.sqrt(np.mean(squares)), rel=1e-5)


def test_measures_of_a_photograph_are_those_of_known_errors(monkeypatch):
    "Crop n is 0.01 (n + 1) too bright for one method, and right for the other."
    truth, errors = torch.rand(4, 3, 24, 24, generator=seeded()) - 0.5, 0.01 * torch.arange(1.0, 5)
    monkeypatch.setattr(bridge, "photographs", lambda split: {"it": torch.full((3, 64, 64), 0.5 if split == "test" else 0)})
    monkeypatch.setattr(bridge, "random_crops", lambda images, size, count, generator: truth[:count])
    monkeypatch.setattr(bridge, "degrade", lambda x0, task, draws: Degraded(x0 + errors[:, None, None, None], torch.zeros(4, 1, 1, 1)))
    found = bridge.photograph_measures("it", "jpeg", {"bright": lambda x1, mask: x1, "right": lambda x1, mask: truth + mask}, 30, 4)
    decibels = lambda error: 10 * math.log10(4 / error)
    assert found.shape == (31, 2, 3)
    assert found[0, 0, 0].item() == pytest.approx(decibels((errors**2).mean().item()), rel=1e-4)
    assert found[0, 0, 2].item() == pytest.approx(np.mean([decibels(error**2) for error in errors.tolist()]), rel=1e-4)
    assert found[0, 1, 1] == 0 and found[0, 1, 2] == 54 and (found[:, 1, 2] == 54).all()  # no crop counts more
    assert found[1:, 0, 0].std() > 0.5 and found[1:, 0, 0].mean().item() == pytest.approx(found[0, 0, 0].item(), abs=1)
    directions = torch.nn.functional.normalize(torch.randn(147, 64, generator=seeded()), dim=0)
    seen, right = (bridge.patch_projections(images, directions) for images in (truth + errors[:, None, None, None], truth))
    assert found[0, 0, 1].item() == pytest.approx(bridge.sliced_distance(seen, right).item(), rel=1e-5)


def test_gains_are_positive_where_the_model_is_better(monkeypatch):
    "Two photographs whose measures are numbers: degraded, library, one call, ten calls; PSNR, distance, PSNR of crops."
    numbers = torch.tensor([[20.0, 0.5, 21], [24, 0.4, 25], [27, 0.3, 28], [26, 0.1, 29]])
    spread = torch.linspace(-1, 1, 201)[:, None, None]
    measures = {"a": numbers + spread, "b": numbers + 2 + spread}
    monkeypatch.setattr(bridge, "photographs", lambda split: measures)
    monkeypatch.setattr(bridge, "tuned", lambda task: 0.02); monkeypatch.setattr(bridge, "shipped", lambda task: None)
    seen = []
    monkeypatch.setattr(bridge, "photograph_measures", lambda name, task, restorers, count: (
        seen.append((list(restorers), count)) or torch.cat([measures[name][100:101], measures[name][1:]])))
    found = bridge.study_photographs({"task": "jpeg", "count": 5})
    assert seen[0] == (["degraded", "library", "bridge, 1 call", "bridge, 10 calls"], 5)
    assert found["settings"] == 0.02 and found["methods"] == seen[0][0]
    np.testing.assert_allclose(found["values"], numbers + 1, rtol=1e-5)
    np.testing.assert_allclose(found["gains"], [[7, 0.4, 7], [3, 0.3, 3], [0, 0.2, 0], [1, 0, -1]], atol=1e-5)
    np.testing.assert_allclose(found["photographs"], torch.stack([numbers, numbers + 2]), rtol=1e-5)
    low, high = np.array(found["intervals"])[..., 0], np.array(found["intervals"])[..., 1]
    assert np.array(found["intervals"]).shape == (4, 3, 2) and (low < numbers.numpy()).all() and (high > numbers.numpy() + 2).all()
    np.testing.assert_allclose(np.array(found["gain intervals"])[..., 0], found["gains"], atol=1e-4)  # the same shift for all leaves gains alone


def test_a_study_of_noise_tells_both_measures_at_both_budgets(monkeypatch):
    measures, trained = torch.arange(6.0).reshape(1, 2, 3), []
    monkeypatch.setattr(bridge, "photographs", lambda split: {"a": 0, "b": 1})
    monkeypatch.setattr(bridge, "train", lambda config, device: trained.append(config))
    monkeypatch.setattr(bridge, "photograph_measures", lambda name, task, restorers, resamples, count: (
        measures + (name == "b") if (task, list(restorers), resamples) == ("sr4x", [1, 10], 0) else None))
    assert bridge.study_noise({"way": "the paper's noise", "seed": 4, "steps": 3}) == {"psnr": [0.5, 3.5], "distance": [1.5, 4.5]}
    assert (trained[0].interval, trained[0].beta_max, trained[0].seed, trained[0].training.steps, trained[0].stochastic) == (1000, 0.3, 4, 3, True)


def test_a_library_works_in_zero_to_one_with_the_hole(monkeypatch):
    x1, mask = torch.rand(2, 3, 8, 8, generator=seeded()) * 3 - 1.5, torch.zeros(2, 1, 8, 8)
    mask[0, :, 2:4] = 1
    def half(image, hole, settings):
        assert image.shape == (8, 8, 3) and hole.shape == (8, 8) and hole.dtype == bool and settings == 0.5
        return np.where(hole[..., None], 0.0, settings * image)
    monkeypatch.setitem(bridge.LIBRARY, "jpeg", (half, ()))
    expected = torch.where(mask > 0, -1.0, 0.5 * (x1.clamp(-1, 1) + 1) - 1)
    torch.testing.assert_close(bridge.library_restored("jpeg", x1, mask, 0.5), expected)


def test_settings_are_tuned_to_the_least_error(monkeypatch):
    monkeypatch.setattr(bridge, "photographs", lambda split: {"it": torch.rand(3, 70, 70, generator=seeded()) * 2 - 1} if split == "train" else None)
    monkeypatch.setattr(bridge, "degrade", lambda x0, task, draws: Degraded(x0, torch.zeros_like(x0[:, :1])))
    monkeypatch.setitem(bridge.LIBRARY, "jpeg", (lambda image, hole, factor: factor * image, (0.5, 0.9, 1.3)))
    assert bridge.tuned("jpeg") == 0.9


def test_a_wiener_filter_has_the_gaussians_kernel_and_reflected_edges():
    ndimage, restoration = pytest.importorskip("scipy.ndimage"), pytest.importorskip("skimage.restoration")
    image, point = np.random.default_rng(0).random((20, 24, 3)), np.zeros((13, 13))
    point[6, 6] = 1
    kernel = ndimage.gaussian_filter(point, 1.5, radius=6, mode="constant")
    kernel /= kernel.sum()
    found = bridge._wiener(image, None, (1.5, 0.01))
    for channel in range(3):
        expected = restoration.wiener(np.pad(image[..., channel], 12, "reflect"), kernel, 0.01, clip=False)[12:-12, 12:-12]
        np.testing.assert_allclose(found[..., channel], expected, atol=1e-6)


def test_a_library_enlarges_the_first_pixel_of_each_square_and_continues_a_slope_into_a_hole():
    squares = np.zeros((16, 24, 3))
    squares[::4, ::4] = [0.25, 0.5, 1]
    np.testing.assert_allclose(bridge._bicubic(squares, None, None), np.broadcast_to([0.25, 0.5, 1], (16, 24, 3)), atol=1e-9)
    row, column = np.meshgrid(np.linspace(0, 1, 16), np.linspace(0, 1, 20), indexing="ij")
    slope, hole = np.stack([row, column, (row + column) / 2], axis=-1), np.zeros((16, 20), bool)
    hole[5:9, 6:12] = True
    np.testing.assert_allclose(bridge._biharmonic(np.where(hole[..., None], 0, slope), hole, None), slope, atol=1e-6)


# ---- private diffusion


def test_a_bound_of_epsilon_is_that_of_exact_limits():
    "At a threshold that parts the scores, by SciPy's exact binomial test; both sides count."
    stats = pytest.importorskip("scipy.stats")
    limits = lambda hits, runs: stats.binomtest(hits, runs).proportion_ci(0.95, method="exact")
    # above and below, without and with the person
    cases = [((0, 400), (300, 100)), ((20, 380), (390, 10)), ((1, 399), (1, 399)), ((100, 300), (400, 0))]
    for (alarms, quiet), (hits, missed) in cases:
        scores = lambda above, below: torch.tensor([value for value, count in ((1.0, above), (0.0, below)) for _ in range(2 * count)])
        ratios = [(limits(hits, 400).low - 1e-3) / limits(alarms, 400).high, (limits(quiet, 400).low - 1e-3) / limits(missed, 400).high]
        found = private.epsilon_bound(scores(alarms, quiet), scores(hits, missed), 1e-3)
        assert found == pytest.approx(math.log(max(1, *ratios)), rel=1e-6)


@pytest.mark.parametrize("sabotage, mean, spread", [("none", 3, 1), ("no noise", 3, 0), ("noise over K", 3, 1 / 8), ("each draw is clipped", 24, 1)])
def test_scores_of_an_attack_are_what_the_step_adds_up_to(sabotage, mean, spread):
    "Three steps: a direction of length 1 a step, 8 for a person of eight clipped draws; noise of 1/2 in each."
    plan, generator = Mechanism(1, 1.0, 0.5, 1e-3, 3, randomness="public"), public_generator(0)
    absent, present = (np.array([private.attack_score(plan, sabotage, there, generator) for _ in range(40 if spread else 3)])
                       for there in (False, True))
    deviation = spread * 0.5 * math.sqrt(3)
    assert absent.mean() == pytest.approx(0, abs=0.6 * deviation + 1e-6) and present.mean() == pytest.approx(mean, abs=0.6 * deviation + 0.01)
    for scores in (absent, present): assert scores.std() == pytest.approx(deviation, rel=0.4, abs=0.01)


def test_the_loss_of_a_picture_is_its_expectation_over_levels_and_noise():
    "A network that answers 0: E (x0 sigma - s^2 n)^2 / ((sigma^2 + s^2) s^2), by quadrature over ln sigma."
    model = dpdm.PrivateDenoiser(nn.Linear(1, 1), dpdm.DIGITS)
    model.network.forward = lambda x, label, class_label: seen.append(class_label) or torch.zeros_like(x)
    seen, power = [], torch.tensor([0.0, 0.5, 1.0])
    batch = {"x0": power.repeat(90).reshape(-1, 1, 1, 1).expand(270, 1, 8, 8), "class_label": torch.arange(270) % 10}
    found = private.picture_losses(model, batch, draws=64)
    levels = np.exp(-1.2 + 1.2 * np.linspace(-6, 6, 4001))
    weights = np.exp(-0.5 * np.linspace(-6, 6, 4001) ** 2)
    expected = [np.average((x0**2 * levels**2 + 1 / 9) / ((levels**2 + 1 / 3) / 3), weights=weights) for x0 in power.tolist()]
    assert found.reshape(90, 3).mean(0).tolist() == pytest.approx(expected, rel=0.02)
    assert torch.cat(seen)[::64].tolist() == [n % 10 for n in range(270)]


def test_membership_is_the_chance_that_a_seen_picture_has_the_smaller_loss(monkeypatch):
    losses = iter([torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 0.5])])
    trained = []
    monkeypatch.setattr(private, "train", lambda config, device, data: trained.append((config, data)))
    monkeypatch.setattr(private, "picture_losses", lambda model, batch, seed=0: next(losses))
    found = private.study_membership({"epsilon": 10, "people": 200, "steps": 7, "seed": 3})
    assert found == {"seen": pytest.approx(7 / 3), "unseen": 1.75, "auc": pytest.approx(2 / 6)}
    (config, data), = trained
    assert len(data) == 200 and (config.training.batch_size, config.training.steps, config.training.seed, config.epsilon) == (100, 7, 3, 10)


def test_noise_of_a_step_grows_with_the_root_of_the_parameters(monkeypatch):
    monkeypatch.setattr(private, "train", lambda config, device: SimpleNamespace(
        parameters=lambda: [torch.zeros(30, 10), torch.zeros(100)], guarantee={"mechanism": {"examples": 1438}}))
    monkeypatch.setattr(private, "_measured", lambda model, seed: {})
    found = private.study_width({"width": 24, "seed": 0, "smaller": {"noise_multiplier": 7.0}})
    assert found == {"parameters": 400, "noise_norm": pytest.approx(7 * 20 / 719)}


def test_a_private_classifier_without_noise_and_clipping_is_plain_training(tmp_path):
    x0, labels = torch.rand(30, 1, 2, 2, generator=seeded()) * 2 - 1, torch.arange(30) % 3
    with Ledger.open(tmp_path / "ledger.json", Mechanism(60, 1.0, 0.0, 1e-3, 4)) as ledger:
        found = private.fit_private_classifier("linear", {"x0": x0, "class_label": labels}, 3, ledger, clip=1e6, lr=0.1, seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(step_seed(5, 2))
        network = private.classifier("linear", (1, 2, 2), 3)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (torch.nn.functional.cross_entropy(network(x0), labels, reduction="sum") / 60).backward()
        optimizer.step()
    for ours, plain in zip(found.parameters(), network.parameters()): torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
