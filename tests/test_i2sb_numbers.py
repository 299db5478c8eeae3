"""I2SB in numbers: schedule, bridge, losses, the way back, and what is measured, against closed forms and plain loops."""
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from extras import need

need("train", "data")

from torch import nn

from diffusion_papers import i2sb
from diffusion_papers.core.data import TensorSet, digits
from diffusion_papers.core.metrics import Moments, digit_judge
from diffusion_papers.core.networks import authors_keys
from diffusion_papers.core.training import Draws
from diffusion_papers.topics.corruptions import TASKS

DIGITS = i2sb.CONFIGS["cpu"]
COLOUR = DIGITS.override(task="jpeg+inpaint", data="photographs", **{"film.channels": 3, "film.width": 8, "film.dilations": (1,)})
TINY = i2sb.CONFIGS["imagenet256"].override(**{"unet.image_size": 16, "unet.width": 32, "unet.multipliers": (1, 2), "unet.blocks": 1,
                                               "unet.attention": (8,), "unet.head_width": 32})
ones = lambda x: torch.ones_like(x)


def seeded(number=0): return torch.Generator().manual_seed(number)


class Spy(nn.Module):
    "A network that answers by a function of its input, and keeps what it was asked."
    def __init__(self, answer=torch.zeros_like):
        super().__init__()
        self.weight, self.answer, self.asked = nn.Parameter(torch.zeros(())), answer, []

    def forward(self, x, label, condition=None):
        self.asked.append((x, label, condition))
        return self.answer(x)


def spied(config, answer=torch.zeros_like):
    model = i2sb.I2sb(Spy(answer), config)
    return model, model.network.asked


def alpha_and_sigma(t):
    "Of the linear variance-preserving process, by its integral."
    alpha = torch.exp(-0.5 * (0.1 * t + 19.9 * t**2 / 2))
    return alpha, torch.sqrt(1 - alpha**2)


# ---- schedule and bridge


@pytest.mark.parametrize("steps, beta_max", [(4, 0.3), (10, 1.0), (1000, 0.3), (100, 0.03)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_variances_are_those_of_a_plain_loop(steps, beta_max, symmetric):
    first, last = math.sqrt(1e-4), math.sqrt(beta_max / steps)
    ramp = [(first + (last - first) * number / (steps - 1)) ** 2 for number in range(steps)]
    betas = [ramp[min(number, steps - 1 - number)] for number in range(steps)] if symmetric else ramp
    schedule = i2sb.bridge_schedule(steps, beta_max, symmetric)
    for found, expected in ((schedule.betas, betas), (schedule.forward**2, [sum(betas[:n + 1]) for n in range(steps)]),
                            (schedule.backward**2, [sum(betas[n:]) for n in range(steps)]),
                            (schedule.labels, [1e-4 * steps + (steps - 1e-4 * steps) * n / (steps - 1) for n in range(steps)])):
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-14)
    assert len(schedule) == steps


def test_a_schedule_that_cannot_be_mirrored_or_would_fall_is_refused():
    with pytest.raises(ValueError, match="steps: expected an even number"): i2sb.bridge_schedule(11)
    with pytest.raises(ValueError, match="beta_max: expected at least 0.1, below which a ramp of 1000 steps falls"):
        i2sb.bridge_schedule(1000, 0.0999)
    assert i2sb.bridge_schedule(1000, 0.1001).betas[:500].diff().min() > 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_state_is_where_two_gaussians_meet(symmetric):
    "From the clean end x ~ N(x0, forward^2), from the degraded end x ~ N(x1, backward^2): precisions add."
    schedule, index = i2sb.bridge_schedule(20, 0.3, symmetric), torch.arange(20)
    f, b = schedule.forward**2, schedule.backward**2
    x0, x1 = torch.full((20, 1), 0.7, dtype=torch.float64), torch.full((20, 1), -0.4, dtype=torch.float64)
    variance = 1 / (1 / f + 1 / b)
    mean = variance * (0.7 / f - 0.4 / b)
    torch.testing.assert_close(i2sb.bridge_state(schedule, x0, x1, index)[:, 0], mean)
    torch.testing.assert_close(i2sb.bridge_state(schedule, x0, x1, index, torch.full_like(x0, -3.0))[:, 0], mean - 3 * variance.sqrt())


def test_a_label_is_the_noise_that_the_clean_end_sees_and_its_inverse():
    schedule, index = i2sb.bridge_schedule(20, 0.3), torch.tensor([0, 7, 19])
    x0, x = torch.randn(2, 3, 5, generator=seeded(), dtype=torch.float64)
    x = x.requires_grad_()
    forward = schedule.forward[index][:, None]
    score, = torch.autograd.grad(torch.distributions.Normal(x0, forward).log_prob(x).sum(), x)
    label = i2sb.bridge_label(schedule, x.detach(), x0, index)
    torch.testing.assert_close(label, -forward * score)
    torch.testing.assert_close(i2sb.clean_estimate(schedule, x.detach(), label, index), x0)


def test_a_posterior_is_that_of_bayes():
    "Prior N(clean, forward[m]^2), and the state is that plus the variance in between."
    schedule = i2sb.bridge_schedule(20, 1.0)
    for now, then in ((19, 0), (12, 3), (1, 0), (10, 9)):
        prior, between = schedule.forward[then].item() ** 2, schedule.forward[now].item() ** 2 - schedule.forward[then].item() ** 2
        variance = 1 / (1 / prior + 1 / between)
        assert i2sb.posterior(schedule, now, then) == pytest.approx((variance / prior, variance / between, variance), rel=1e-9)


def test_times_are_equally_spaced_from_the_first_to_the_last():
    assert i2sb.time_indices(10, 3) == [0, 3, 6, 9] and i2sb.time_indices(12, 4) == [0, 3, 6, 8, 11]
    assert i2sb.time_indices(1000, 1) == [0, 999] and i2sb.time_indices(6, 5) == list(range(6))


# ---- the way back


def by_hand(schedule, estimate, x1, times, noise, mask):
    "Algorithm 2 in numbers, with one constant in place of every draw; times fall."
    f = [value**2 for value in schedule.forward.tolist()]
    spread = [math.sqrt(a * a * b * b / (a * a + b * b)) for a, b in zip(schedule.forward.tolist(), schedule.backward.tolist())]
    x, states = x1, []
    for now, then in zip(times, times[1:]):
        states.append((now, x))
        x = f[then] / f[now] * x + (1 - f[then] / f[now]) * estimate
        known = x1
        if noise and then > 0:
            x = x + noise * math.sqrt(f[then] * (f[now] - f[then]) / f[now])
            known = x1 + noise * spread[then]
        if mask == 0: x = known
    return x, states


@pytest.mark.parametrize("noise", [0.0, 0.8])
@pytest.mark.parametrize("mask", [None, 0, 1])
def test_every_step_back_is_the_one_by_hand(noise, mask):
    schedule, seen = i2sb.bridge_schedule(20, 1.0), []
    x1 = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64)
    found = i2sb.follow_bridge(lambda x, index: torch.full_like(x, -0.3), x1, schedule, 4, noise=(lambda x: noise * ones(x)) if noise else None,
                               mask=None if mask is None else torch.full((1, 1, 1, 1), float(mask)),
                               callback=lambda step, x, x0: seen.append((step, x[0].item(), x0[1].item())))
    end, states = by_hand(schedule, -0.3, 0.5, [19, 14, 10, 5, 0], noise, mask)
    assert found.flatten().tolist() == pytest.approx([end, end], rel=1e-9)
    assert [step for step, *_ in seen] == [0, 1, 2, 3] and all(x0 == pytest.approx(-0.3) for *_, x0 in seen)
    assert [x for _, x, _ in seen] == pytest.approx([x for _, x in states], rel=1e-9)


def test_the_estimator_is_told_the_time_of_the_state():
    asked = []
    i2sb.follow_bridge(lambda x, index: asked.append(index.tolist()) or x, torch.zeros(3, 1, 2, 2), i2sb.bridge_schedule(10, 0.3), 3)
    assert asked == [[9] * 3, [6] * 3, [3] * 3]


def test_clipped_estimates_are_what_is_stepped_to_and_told():
    schedule, told = i2sb.bridge_schedule(10, 0.3), []
    for clip, sign, estimate in ((True, 1, 1.0), (True, -1, -1.0), (False, 1, 5.0)):
        found = i2sb.follow_bridge(lambda x, index: 5 * sign * ones(x), torch.zeros(1, 1, 1, 1, dtype=torch.float64), schedule, 3, clip=clip,
                                   callback=lambda step, x, x0: told.append(x0.item()))
        assert found.item() == pytest.approx(by_hand(schedule, estimate, 0.0, [9, 6, 3, 0], 0, None)[0])
    assert told == [1.0] * 3 + [-1.0] * 3 + [5.0] * 3


def test_with_the_exact_estimator_gaussian_pictures_come_back_with_their_spread():
    "x0 ~ N(0, 1) and x1 = x0 + noise of variance 1: the estimate is linear in the state, so all variances are known."
    schedule, generator = i2sb.bridge_schedule(100, 1.0), seeded()
    x0 = torch.randn(40_000, 1, generator=generator, dtype=torch.float64)
    x1 = x0 + torch.randn(40_000, 1, generator=generator, dtype=torch.float64)
    def estimate(x, index):  # E[x0 | x], for x = x0 + w (x1 - x0) + std noise
        w, std = schedule.weight_x1[index][:, None], schedule.std[index][:, None]
        return x / (1 + w**2 + std**2)
    found = i2sb.follow_bridge(estimate, x1, schedule, 99, noise=lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype))
    assert found.std().item() == pytest.approx(1, abs=0.03)


# ---- configuration and model


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_the_papers_bridge(task):
    quiet = task.startswith(("inpaint", "blur-"))
    config = replace(COLOUR, task=task, symmetric=False)
    assert config.stochastic is not quiet and config.schedule.betas[-1].item() == pytest.approx((1.0 if quiet else 0.3) / 1000)
    assert replace(config, beta_max=0.7, interval=10).schedule.betas[-1].item() == pytest.approx(0.07)
    betas = replace(config, symmetric=True).schedule.betas
    assert torch.equal(betas, betas.flip(0))
    assert [replace(config, path=path).stochastic for path in ("stochastic", "deterministic")] == [True, False]


def test_shipped_models_are_those_of_the_presets():
    for task, preset in (("jpeg", "photographs"), ("sr4x", "photographs"), ("inpaint", "holes")):
        assert i2sb.shipped(task).config == replace(i2sb.CONFIGS[preset], task=task)
    assert i2sb.load_pretrained().config == DIGITS


@pytest.mark.parametrize("conditional", [False, True])
def test_a_network_is_asked_by_label_and_its_answer_is_a_distance(conditional):
    model, asked = spied(replace(DIGITS, conditional=conditional, interval=10), lambda x: 2 * ones(x))
    x, condition, index = torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8), torch.tensor([0, 4, 9])
    found = model.estimate(x, index, condition)
    (seen, label, beside), = asked
    assert torch.equal(seen, x) and (beside is condition if conditional else beside is None)
    assert label.tolist() == pytest.approx([0.001, 0.001 + 9.999 * 4 / 9, 10], rel=1e-6)
    torch.testing.assert_close(found, x - 2 * model.schedule.forward[index].float()[:, None, None, None])


def test_diffusion_from_noise_tells_the_network_a_thousand_times_its_time():
    config = replace(DIGITS, interval=500)
    assert i2sb.build(replace(config, method="diffusion")).network.config.time_scale == 500
    assert i2sb.build(config).network.config.time_scale == 1
    for changes, beside in (({}, 0), ({"conditional": True}, 1), ({"method": "diffusion"}, 1)):
        assert i2sb.build(replace(config, **changes)).network.config.conditioning == beside
    assert i2sb.build(replace(TINY, conditional=True)).network.input.weight.shape[1] == 6


def test_a_network_for_another_size_keeps_its_weights_and_its_depth_of_attention():
    model = i2sb.build(TINY)
    moved = i2sb._at_size(model, 48)
    assert moved.config.unet.image_size == 48 and moved.config.unet.attention == (24,)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(moved.parameters(), model.parameters()))
    assert i2sb._at_size(model, 16) is model


# ---- losses


def pictures(count, size=8): return torch.rand(count, 1, size, size, generator=seeded(5)) * 2 - 1


def loss_and_what_was_asked(config, x0, answer=torch.zeros_like):
    model, asked = spied(config, answer)
    loss = (i2sb.noise_loss if config.method == "diffusion" else i2sb.bridge_loss)(model, {"x0": x0}, Draws(seeded()))
    return loss, *asked[0]


@pytest.mark.parametrize("task", ["sr2x-pool", "inpaint-center"])
@pytest.mark.parametrize("path", ["deterministic", "stochastic"])
@pytest.mark.parametrize("noisy_start", [False, True])
def test_the_bridges_loss_is_the_distance_to_the_clean_end_over_its_spread(task, path, noisy_start):
    "Of all pixels, holes alone where there are holes; times are uniform, and states scatter as the bridge does."
    config = DIGITS.override(task=task, path=path, noisy_start=noisy_start, conditional=True, interval=4, beta_max=1.0)
    x0, schedule = pictures(2000), config.schedule
    loss, x, label, x1 = loss_and_what_was_asked(config, x0, lambda x: 0.5 * ones(x))
    index = (label[:, None] - schedule.labels.float()).abs().argmin(1)
    assert torch.bincount(index, minlength=4).tolist() == pytest.approx([500] * 4, abs=80)
    forward, backward = schedule.forward[index][:, None, None, None].float(), schedule.backward[index][:, None, None, None].float()
    mask = torch.zeros(1, 1, 8, 8)
    if task == "inpaint-center": mask[..., 2:6, 2:6] = 1
    else: mask += 1
    torch.testing.assert_close(loss, (mask * (0.5 - (x - x0) / forward)).square().sum((1, 2, 3)) / 64)
    assert torch.equal(x1 == x0, (mask == 0).expand_as(x0) if task == "inpaint-center" else x1 == x0)
    share = forward**2 / (forward**2 + backward**2)
    spread = (share**2 * noisy_start + (path == "stochastic") * forward**2 * backward**2 / (forward**2 + backward**2)).sqrt()
    rest = x - (1 - share) * x0 - share * x1
    if spread.max() == 0: assert rest.abs().max() < 1e-5
    else: assert all((rest / spread)[index == n].std().item() == pytest.approx(1, abs=0.03) for n in range(4))


@pytest.mark.parametrize("noisy_start", [False, True])
def test_regression_learns_the_last_time_alone(noisy_start):
    config = DIGITS.override(task="sr2x-pool", method="regression", conditional=True, interval=10, noisy_start=noisy_start)
    x0 = pictures(100)
    loss, x, label, x1 = loss_and_what_was_asked(config, x0)
    assert (label == 10).all()
    assert (x - x1).std().item() == pytest.approx(1, abs=0.05) if noisy_start else torch.equal(x, x1)
    torch.testing.assert_close(loss, ((x - x0) / config.schedule.forward[-1].float()).square().mean((1, 2, 3)))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("task", ["sr2x-pool", "inpaint-center"])
def test_the_loss_from_noise_is_that_of_the_prediction(prediction, task):
    config = DIGITS.override(task=task, method="diffusion", prediction=prediction)
    x0 = pictures(2000)
    loss, x, t, x1 = loss_and_what_was_asked(config, x0, lambda x: 0.25 * ones(x))
    assert 1e-3 <= t.min() < 3e-3 and t.max() > 0.998
    assert t.mean().item() == pytest.approx(0.5, abs=0.02) and t.std().item() == pytest.approx(12**-0.5, abs=0.01)
    alpha, sigma = (value.float()[:, None, None, None] for value in alpha_and_sigma(t.double()))
    noise = (x - alpha * x0) / sigma
    late = t > 0.1  # where division by sigma loses no digits
    assert noise[late].std().item() == pytest.approx(1, abs=0.01) and abs(noise[late].mean().item()) < 0.01
    target = noise if prediction == "eps" else alpha * noise - sigma * x0
    mask = torch.zeros(1, 1, 8, 8)
    if task == "inpaint-center": mask[..., 2:6, 2:6] = 1
    else: mask += 1
    torch.testing.assert_close(loss[late], (mask * (0.25 - target)).square().mean((1, 2, 3))[late], rtol=1e-3, atol=1e-3)
    assert torch.equal((x1 == x0)[:, :, :2], (mask == 0).expand_as(x0)[:, :, :2]) or task == "sr2x-pool"


# ---- data


def test_data_to_measure_on_are_not_those_of_training(monkeypatch):
    both = lambda **changes: [function(replace(DIGITS, **changes))[3]["x0"] for function in (i2sb.load_data, i2sb.test_data)]
    for split, found in zip(("train", "test"), both()): assert torch.equal(found, digits(split)[3]["x0"])
    seen, unseen = both(data="shapes", film=replace(COLOUR.film, size=16))
    assert seen.shape == unseen.shape == (3, 16, 16) and not torch.equal(seen, unseen)
    monkeypatch.setattr(i2sb, "photographs", lambda split: {"all of one colour": torch.full((3, 40, 50), -1.0 if split == "train" else 0.5)})
    assert [found.unique().tolist() for found in both(data="photographs", film=replace(COLOUR.film, size=16))] == [[-1.0], [0.5]]


def test_other_light_swaps_channels_and_dims_towards_black():
    x0 = torch.rand(50, 3, 4, 4, generator=seeded()) * 2 - 1
    gains, orders = [], set()
    for before, after in zip(x0, (sample["x0"] for sample in map(i2sb._OtherLight(TensorSet(x0)).__getitem__, range(50)))):
        ratio = (after[:, None] + 1) / (before[None] + 1)  # of each channel to each: constant for the one that it was
        order = ratio.flatten(2).std(-1).argmin(1)
        orders.add(tuple(order.tolist()))
        gains += ratio[range(3), order].flatten(1).mean(1).tolist()
        assert ratio[range(3), order].flatten(1).std(1).max() < 1e-4
    assert len(orders) == 6 and all(sorted(order) == [0, 1, 2] for order in orders)
    assert 0.5 < min(gains) < 0.53 and 0.97 < max(gains) < 1 and np.mean(gains) == pytest.approx(0.75, abs=0.04)


# ---- restoring


@pytest.mark.parametrize("masked", [False, True])
def test_diffusion_from_noise_asks_at_equal_times_and_ends_at_its_last_estimate(masked):
    config, x1, told = DIGITS.override(method="diffusion"), pictures(2), []
    model, asked = spied(config)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    found = i2sb.restore_images(model, x1, mask if masked else None, calls=5, callback=lambda step, x, x0: told.append((x, x0)))
    assert [label[0].item() for _, label, _ in asked] == pytest.approx([1, 0.8002, 0.6004, 0.4006, 0.2008], rel=1e-5)
    assert all(torch.equal(condition, x1) for *_, condition in asked)
    torch.testing.assert_close(found, told[-1][1])
    alpha, sigma = alpha_and_sigma(torch.tensor([1, 0.8002, 0.6004, 0.4006, 0.2008], dtype=torch.float64))
    for (x, x0), (seen, *_), data in zip(told, asked, alpha.tolist()):
        torch.testing.assert_close(seen, data * x, rtol=1e-4, atol=1e-5)
        expected = torch.where(mask > 0, x, x1) if masked else x  # a network that sees no noise: the estimate is the state
        torch.testing.assert_close(x0, expected)
    first = told[0][0] * (alpha[0] / sigma[0]).float()
    assert first.std().item() == pytest.approx(1, abs=0.2) and abs(first.mean().item()) < 0.3


def test_noise_at_the_start_is_standard_and_on_the_way_where_the_bridge_has_it():
    x1, base = torch.zeros(40, 1, 8, 8), DIGITS.override(task="sr2x-pool", interval=10)
    def states(**changes):
        told = []
        i2sb.restore_images(spied(replace(base, **changes))[0], x1, calls=2, callback=lambda step, x, x0: told.append(x))
        return told
    start, later = states(path="stochastic")
    of_noise = i2sb.posterior(base.schedule, 9, 4)[2] ** 0.5
    assert start.abs().max() == 0 and later.std().item() == pytest.approx(of_noise, rel=0.05)
    assert all(state.abs().max() == 0 for state in states(path="deterministic"))
    assert states(path="deterministic", noisy_start=True)[0].std().item() == pytest.approx(1, rel=0.05)
    assert len(states(method="regression")) == 1 and states(method="regression")[0].abs().max() == 0


def test_what_is_known_is_noised_as_the_bridge_at_the_time_that_is_reached():
    model, told = spied(DIGITS.override(path="stochastic", interval=20))[0], []
    x1, mask = torch.zeros(200, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    found = i2sb.restore_images(model, x1, mask, calls=3, callback=lambda step, x, x0: told.append(x.std().item()))
    f, b = model.schedule.forward.tolist(), model.schedule.backward.tolist()
    assert told == pytest.approx([0, *(f[n] * b[n] / math.hypot(f[n], b[n]) for n in (13, 6))], rel=0.05) and found.abs().max() == 0


def test_an_evaluation_says_what_was_restored():
    truth, labels = digits("test").tensors["x0"][:60], digits("test").tensors["class_label"][:60]
    asked = []
    def restored(model, x1, mask, *, calls, seed):
        asked.append((calls, seed, x1, mask))
        return {1: 0.8 * truth, 2: truth * 3}[calls]
    before, one, two = i2sb.evaluate(i2sb.build(DIGITS), 60, calls=(1, 2), seed=7, restore=restored)
    decibels = lambda images: (10 * np.log10(4 / ((images.clamp(-1, 1) - truth) ** 2).flatten(1).mean(1).numpy())).mean()
    judge = digit_judge()
    def distance(images):
        a, b = (judge.features(part).double().numpy() for part in (images.clamp(-1, 1), truth))
        (m, c), (n, d) = ((part.mean(0), np.cov(part.T)) for part in (a, b))
        return ((m - n) ** 2).sum() + np.trace(c + d) - 2 * np.sqrt(np.linalg.eigvals(c @ d).real.clip(0)).sum()
    weight, bias = judge.layers[-1]
    right = lambda images: np.mean((judge.features(images) @ weight + bias).argmax(1).numpy() == labels.numpy())
    assert [row["calls"] for row in (before, one, two)] == [0, 1, 2] and [(calls, seed) for calls, seed, *_ in asked] == [(1, 7), (2, 7)]
    x1, mask = asked[0][2:]
    assert torch.equal((x1 != truth), mask.expand_as(truth) > 0) and mask[0, 0, 2:6, 2:6].sum() == mask[0].sum() == 16
    for row, images in ((before, x1), (one, 0.8 * truth), (two, 3 * truth)):
        assert row["psnr"] == pytest.approx(decibels(images), rel=1e-5) and row["accuracy"] == pytest.approx(right(images.clamp(-1, 1)))
        assert row["frechet"] == pytest.approx(distance(images), rel=1e-3)
    assert one["accuracy"] > before["accuracy"]


def test_a_sample_is_damaged_restored_and_clean(monkeypatch):
    monkeypatch.setattr(i2sb, "restore_images", lambda model, x1, mask, **options:
                        torch.full_like(x1, 1.5 if options == {"calls": 2, "seed": 3} else 0))
    found = i2sb.sample(i2sb.build(DIGITS), 4, calls=2, seed=3)
    clean = digits("test").tensors["x0"][:4]
    assert torch.equal(found[8:], clean) and (found[4:8] == 1).all()
    assert torch.equal(found[:4, :, :2], clean[:, :, :2]) and not torch.equal(found[:4], clean)


# ---- pictures of any size


@pytest.mark.parametrize("conditional", [False, True])
def test_a_picture_of_one_square_is_restored_like_a_batch_of_one(conditional):
    "The network sees the state first and the degraded picture beside it."
    model, picture = i2sb.build(replace(COLOUR, conditional=conditional, path="deterministic")), torch.rand(3, 64, 64, generator=seeded()) * 2 - 1
    torch.testing.assert_close(i2sb.restore(picture, "jpeg", model=model, calls=3, progress=False),
                               i2sb.restore_images(model, picture[None], calls=3)[0].clamp(-1, 1), rtol=0, atol=1e-5)


def test_a_hole_begins_as_noise_and_the_rest_as_the_picture():
    model, asked = spied(replace(COLOUR, conditional=True, path="deterministic"))
    picture, mask = torch.full((3, 64, 64), 0.5), torch.zeros(64, 64)
    mask[16:48, 8:56] = 1
    i2sb.restore(picture, "inpaint", mask, model=model, calls=2, progress=False)
    hole = mask.bool()
    for x, _, condition in asked:
        assert (condition[0, :, ~hole] == 0.5).all() and condition[0, :, hole].std().item() == pytest.approx(1, abs=0.03)
        assert abs(condition[0, :, hole].mean().item()) < 0.03
    torch.testing.assert_close(asked[0][0], asked[0][2])


def test_a_noisy_start_of_a_picture_has_unit_noise_and_the_network_sees_it_clean_beside():
    model, asked = spied(replace(COLOUR, conditional=True, noisy_start=True, path="deterministic"))
    i2sb.restore(torch.full((3, 64, 64), 0.5), "jpeg", model=model, calls=1, progress=False)
    assert (asked[0][2] == 0.5).all() and (asked[0][0] - 0.5).std().item() == pytest.approx(1, abs=0.03)


def test_a_seed_is_of_the_noise_along_the_way():
    model, picture = spied(replace(COLOUR, path="stochastic"))[0], torch.zeros(3, 64, 64)
    one, again, other = (i2sb.restore(picture, "jpeg", model=model, calls=2, seed=seed, progress=False) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_small_picture_is_enlarged_before_it_is_restored():
    model, asked = spied(replace(COLOUR, task="sr4x", conditional=True, path="deterministic"))
    picture = torch.rand(3, 16, 16, generator=seeded()) * 2 - 1
    found = i2sb.restore(picture, "sr4x", model=model, calls=1, progress=False)
    assert found.shape == (3, 64, 64) and torch.equal(asked[0][2][0], picture.repeat_interleave(4, 1).repeat_interleave(4, 2))


def test_the_bar_counts_every_batch_of_every_step(monkeypatch):
    counted = SimpleNamespace(total=None, done=0)
    class Bar:
        def __init__(self, total, **_): counted.total = total
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def update(self): counted.done += 1
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    i2sb.restore(torch.zeros(3, 100, 130), "jpeg", model=spied(replace(COLOUR, path="deterministic"))[0], calls=3, tile=32, batch_size=4, piece=80)
    assert counted.total == counted.done > 30


# ---- the authors' files


def test_the_average_of_a_released_file_is_what_is_loaded(tmp_path):
    network = i2sb.build(TINY).network
    theirs = {f"diffusion_model.{name}": network.state_dict()[ours] for ours, name in authors_keys(network, "adm")}
    torch.save({"net": theirs, "ema": {"shadow_params": [value + 1 for value in theirs.values()]}}, tmp_path / "latest.pt")
    model = i2sb.load_authors_checkpoint(tmp_path / "latest.pt", "jpeg-5", TINY)
    assert model.config.task == "jpeg-5"
    assert all(torch.equal(model.network.state_dict()[name], value + 1) for name, value in network.state_dict().items())


def test_a_file_with_learned_variances_is_not_taken_for_a_bridge(tmp_path):
    network = i2sb.build(TINY).network
    theirs = {f"diffusion_model.{name}": network.state_dict()[ours] for ours, name in authors_keys(network, "adm")}
    torch.save({"net": theirs | {"diffusion_model.out.2.weight": torch.zeros(6, 32, 3, 3)}, "ema": {}}, tmp_path / "latest.pt")
    with pytest.raises(i2sb.CheckpointError, match="out.2.weight has 6 rows"): i2sb.load_authors_checkpoint(tmp_path / "latest.pt", "jpeg-5", TINY)


@pytest.mark.parametrize("conditional", [False, True])
def test_adm_gives_its_means_and_new_channels_begin_as_they_are_built(tmp_path, conditional):
    network, config = i2sb.build(TINY).network, replace(TINY, conditional=conditional)
    adm = {name: torch.randn(network.state_dict()[ours].shape, generator=seeded(1)) for ours, name in authors_keys(network, "adm")}
    mean, variance = torch.randn(2, 3, 32, 3, 3, generator=seeded(2))
    torch.save(adm | {"out.2.weight": torch.cat([mean, variance]), "out.2.bias": torch.arange(6.0)}, tmp_path / "adm.pt")
    model = i2sb.from_adm(tmp_path / "adm.pt", config)
    assert torch.equal(model.network.output.weight, mean) and model.network.output.bias.tolist() == [0, 1, 2]
    first = dict(zip([name for name, _ in authors_keys(network, "adm")], adm.values()))["input.weight"]
    assert torch.equal(model.network.input.weight[:, :3], first)
    assert torch.equal(model.network.input.weight[:, 3:], i2sb.build(config).network.input.weight[:, 3:])


# ---- many pictures


def test_restored_data_keep_their_order_their_masks_and_their_labels(tmp_path, monkeypatch):
    data = TensorSet(pictures(5), class_label=torch.tensor([4, 3, 2, 1, 0]))
    masks = torch.zeros(5, 1, 8, 8)
    for number in range(5): masks[number, 0, number] = 1
    seen = []
    def restored(model, x1, mask, *, calls, seed):
        seen.append((x1, mask, calls, seed))
        return torch.where(mask > 0, -1.0, x1)
    monkeypatch.setattr(i2sb, "restore_images", restored)
    found = i2sb.generate_data(i2sb.build(DIGITS), tmp_path, data=data, masks=masks, calls=7, size=2, device="cpu").__getitems__(list(range(5)))
    expected = torch.where(masks > 0, -1.0, data.tensors["x0"])
    assert torch.equal(found["images"], ((expected / 2 + 0.5) * 255).to(torch.uint8)) and found["class_label"].tolist() == [4, 3, 2, 1, 0]
    assert [calls for *_, calls, _ in seen] == [7] * 3 and len({seed for *_, seed in seen}) == 3
    holes = torch.cat([x1[mask > 0] for x1, mask, *_ in seen])
    assert len(holes.unique()) == 40 and holes.std().item() == pytest.approx(1, abs=0.35)


def test_damage_is_drawn_where_no_masks_are_given(tmp_path):
    found = i2sb.generate_data(spied(DIGITS)[0], tmp_path, data=TensorSet(pictures(3)), calls=1, size=2, device="cpu").__getitems__([0, 1, 2])
    assert set(found) == {"images"}
    clean = ((pictures(3) / 2 + 0.5) * 255).to(torch.uint8)
    assert torch.equal(found["images"][..., :2, :], clean[..., :2, :]) and not torch.equal(found["images"], clean)


def test_a_list_names_pictures_in_its_own_order(tmp_path):
    class Letters(list): paths = [tmp_path / "a" / name for name in ("one.png", "two.png", "three.png")]
    (tmp_path / "list.txt").write_text("x/three.png 5\n\none.png 1\n")
    assert list(i2sb.listed(Letters("abc"), tmp_path / "list.txt")) == ["c", "a"]
