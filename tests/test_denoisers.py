"""Conventions about what a network predicts, the loss and the guidance, against their definitions in plain numbers."""
import math

import pytest
import torch
from torch import nn

from diffusion_papers.core.denoisers import (PREDICTIONS, Denoiser, denoising_loss, from_x0, guided, in_precision_of, per_sample, preconditioning,
                                             to_x0)
from diffusion_papers.core.processes import EDM, LinearVP, VarianceExploding

PROCESS = LinearVP()
X0, EPS = torch.randn(2, 4, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TIMES = torch.tensor([0.02, 0.2, 0.5, 0.9], dtype=torch.float64)
ALPHA, SIGMA = (part(TIMES)[:, None, None] for part in (PROCESS.alpha, PROCESS.sigma))  # of x_t = ALPHA X0 + SIGMA EPS
LEVELS = PROCESS.noise_to_signal(TIMES)
DATA_STD = 0.3


def right_answers(prediction):
    "What a network should say of X0 and EPS (Salimans and Ho 2022, section 4; Karras et al. 2022, equation 8)."
    level = LEVELS[:, None, None]
    return {"eps": EPS, "x0": X0, "v": ALPHA * EPS - SIGMA * X0,
            "edm": (level**2 * X0 - DATA_STD**2 * level * EPS) / (DATA_STD * level * (DATA_STD**2 + level**2).sqrt())}[prediction]


class Told(nn.Module):
    "A network that answers what it was given, and remembers what it was told."
    def __init__(self, answer=None): super().__init__(); self.answer, self.weight = answer, nn.Parameter(torch.zeros(1, dtype=torch.float64))
    def forward(self, x, label, **cond):
        self.x, self.label, self.cond = x, label, cond
        return torch.sin(x) + label[:, None, None] if self.answer is None else self.answer
    def with_features(self, x, label, **cond): return self(x, label, **cond), x + 1, label + 2


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_is_right_gives_the_clean_image_and_no_loss(prediction):
    denoiser = Denoiser(Told(right_answers(prediction)), PROCESS, prediction, data_std=DATA_STD)
    assert denoiser(X0 + LEVELS[:, None, None] * EPS, LEVELS) == pytest.approx(X0, abs=1e-10)
    assert denoising_loss(denoiser, X0, LEVELS, EPS) == pytest.approx(torch.zeros(4), abs=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_is_wrong_by_a_number_loses_the_mean_of_its_square(prediction):
    error = torch.tensor([[[1.0, 2.0, 6.0]], [[0.0, 0.0, 3.0]], [[0.0, 0.0, 0.0]], [[-3.0, 3.0, -3.0]]], dtype=torch.float64)
    denoiser = Denoiser(Told(right_answers(prediction) + error), PROCESS, prediction, data_std=DATA_STD)
    assert denoising_loss(denoiser, X0, LEVELS, EPS) == pytest.approx(torch.tensor([41 / 3, 3, 0, 9], dtype=torch.float64))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_a_network_sees_has_the_variance_of_its_process(prediction):
    "x_t for the processes; for EDM's convention unit variance, where the data have theirs."
    denoiser = Denoiser(Told(), PROCESS, prediction, data_std=DATA_STD)
    x = X0 + LEVELS[:, None, None] * EPS
    wanted = x / (DATA_STD**2 + LEVELS[:, None, None] ** 2).sqrt() if prediction == "edm" else ALPHA * X0 + SIGMA * EPS
    denoiser(x, LEVELS, class_label="a class")
    assert denoiser.network.x == pytest.approx(wanted) and denoiser.network.cond == {"class_label": "a class"}
    denoising_loss(denoiser, X0, LEVELS, EPS, class_label="another")
    assert denoiser.network.x == pytest.approx(wanted) and denoiser.network.cond == {"class_label": "another"}


def test_coefficients_of_edm_are_those_of_the_table():
    "Karras et al. 2022, table 1, whose data have the standard deviation 0.5."
    c_skip, c_out, c_in = preconditioning("edm", torch.ones(1), torch.tensor([2.0], dtype=torch.float64))
    assert (c_skip.item(), c_out.item(), c_in.item()) == pytest.approx((0.25 / 4.25, 2 * 0.5 / math.sqrt(4.25), 1 / math.sqrt(4.25)))
    skip = Denoiser(Told(), EDM(), "edm").coefficients(torch.zeros(1, 1, dtype=torch.float64), torch.tensor([2.0]))[0]
    assert skip.item() == pytest.approx(0.25 / 4.25)


@pytest.mark.parametrize("label, wanted", [("time", TIMES), ("log_sigma", LEVELS.log() / 4),
                                           ("angle", (SIGMA / ALPHA).atan().flatten() / (math.pi / 2))])
def test_a_network_is_told_the_noise_level_in_its_way(label, wanted):
    denoiser = Denoiser(Told(), PROCESS, "v", label)
    denoiser(X0, LEVELS)
    assert denoiser.network.label == pytest.approx(wanted)
    denoising_loss(denoiser, X0, LEVELS, EPS)
    assert denoiser.network.label == pytest.approx(wanted)


def test_noise_and_time_are_what_a_denoiser_speaks_of_unasked():
    denoiser = Denoiser(Told(EPS), PROCESS)
    assert denoiser(X0 + LEVELS[:, None, None] * EPS, LEVELS) == pytest.approx(X0, abs=1e-10) and denoiser.network.label == pytest.approx(TIMES)


def test_features_come_with_the_same_estimate():
    denoiser = Denoiser(Told(), VarianceExploding(), "edm")
    estimate, features, embedding = denoiser.with_features(X0, LEVELS)
    assert torch.equal(estimate, denoiser(X0, LEVELS))
    assert torch.equal(features, denoiser.network.x + 1) and torch.equal(embedding, denoiser.network.label + 2)


@pytest.mark.parametrize("kind, value", [("x0", X0), ("eps", EPS), ("v", ALPHA * EPS - SIGMA * X0), ("score", -EPS / SIGMA)])
def test_predictions_change_into_each_other(kind, value):
    x_t = ALPHA * X0 + SIGMA * EPS
    assert to_x0(value, kind, x_t, ALPHA, SIGMA) == pytest.approx(X0, abs=1e-10)
    assert from_x0(X0, kind, x_t, ALPHA, SIGMA) == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("kind, wanted", [("eps", EPS), ("score", -EPS / 0.7)])
def test_noise_and_score_need_no_unit_variance(kind, wanted):
    x_t = 1.3 * X0 + 0.7 * EPS
    assert from_x0(X0, kind, x_t, 1.3, 0.7) == pytest.approx(wanted, abs=1e-10) and to_x0(wanted, kind, x_t, 1.3, 0.7) == pytest.approx(X0, abs=1e-10)


def test_guidance_goes_beyond_the_conditional_estimate_away_from_the_unconditional():
    estimates = (lambda x, sigma: x + 3 * sigma), (lambda x, sigma: x + sigma)
    assert guided(*estimates, 0.5)(torch.tensor(10.0), torch.tensor(2.0)) == 10 + 3 * 2 + 0.5 * (3 - 1) * 2
    assert guided(*estimates, 0.0) is estimates[0]


def test_values_of_samples_broadcast_over_their_batch():
    values = per_sample(torch.tensor([1.0, 2.0], dtype=torch.float64), torch.zeros(2, 3, 4, 5))
    assert values.shape == (2, 1, 1, 1) and values.dtype == torch.float32


def test_a_network_is_asked_in_no_more_than_its_own_precision():
    narrow, wide = nn.Linear(1, 1).bfloat16(), nn.Linear(1, 1).double()
    assert [part.dtype for part in in_precision_of(narrow, torch.zeros(1), torch.zeros(1).half(), torch.zeros(1).double())] == [
        torch.bfloat16, torch.float16, torch.bfloat16]
    assert in_precision_of(wide, torch.zeros(1))[0].dtype == in_precision_of(nn.Identity(), torch.zeros(1))[0].dtype == torch.float32
