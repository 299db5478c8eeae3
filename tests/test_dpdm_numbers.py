"""DPDM in numbers: preconditioning, noise levels, the loss over many draws, the private step and sampling, against closed forms and plain loops."""
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from extras import need

need("train", "data")

from torch import nn

from diffusion_papers import dpdm
from diffusion_papers.core.data import TensorSet, digits
from diffusion_papers.core.networks import authors_keys, unet_config
from diffusion_papers.core.samplers import SAMPLERS, euler, euler_maruyama
from diffusion_papers.topics.privacy import Mechanism, public_generator
from diffusion_papers.topics.shapes_world import draw_scenes, scene_factors

PUBLIC = replace(dpdm.DIGITS, public=True)
KINDS = ("edm", "v", "ve", "vp")


def beta_integral(t): return 0.1 * t + 19.9 * t**2 / 2


def by_hand(kind, sigma):
    "c_skip, c_out, c_in, c_noise of one level, from the paper's appendix."
    if kind == "edm":
        total = sigma**2 + 1 / 3
        return 1 / 3 / total, sigma / math.sqrt(3 * total), total**-0.5, math.log(sigma) / 4
    shrink = (1 + sigma**2) ** -0.5
    if kind == "v": return shrink**2, sigma * shrink, shrink, math.acos(shrink) / (math.pi / 2)
    if kind == "ve": return 1, sigma, 1, math.log(0.5 * sigma)
    low, high = 0.0, 2.0  # the time at which the process has this level, by bisection
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.expm1(beta_integral(middle)) < sigma**2 else (low, middle)
    return 1, -sigma, (1 + sigma**2) ** -0.5, 999 * low


class Spy(nn.Module):
    "A network whose answer depends on all that it is told, and that keeps it."
    def __init__(self):
        super().__init__()
        self.weight, self.asked = nn.Parameter(torch.zeros((), dtype=torch.float64)), []

    def forward(self, x, label, class_label=None):
        self.asked.append((x, label, class_label))
        return answered(x, label.reshape(-1, 1, 1, 1), 10 if class_label is None else class_label.reshape(-1, 1, 1, 1).double()).to(x)


def answered(x, label, number): return 0.4 * x + 0.1 * label / (1 + abs(label)) - 0.02 * number


def spied(**changes): return dpdm.PrivateDenoiser(Spy(), replace(PUBLIC, **changes))


def seeded(number=0): return torch.Generator().manual_seed(number)


def normal(*shape, seed=0): return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# ---- preconditioning and noise levels


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_is_the_one_by_hand(kind):
    levels, x, label = [0.002, 0.3, 1.0, 7.0, 80.0], normal(5, 1, 8, 8), torch.tensor([0, 3, 10, 9, 5])
    sigma, model = torch.tensor(levels, dtype=torch.float64), spied(kind=kind)
    expected = [by_hand(kind, level) for level in levels]
    for found, values in zip(dpdm.coefficients(kind, sigma), zip(*expected)): assert found.tolist() == pytest.approx(values, rel=1e-8)
    found, hidden = model(x, sigma, label), model(x, sigma)
    for number, (c_skip, c_out, c_in, c_noise) in enumerate(expected):
        for estimate, seen in ((found, label[number].item()), (hidden, 10)):
            torch.testing.assert_close(estimate[number], c_skip * x[number] + c_out * answered(c_in * x[number], c_noise, seen))


def test_levels_of_training_follow_their_distributions():
    chance = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    angle = lambda log_snr: math.atan(math.exp(-log_snr / 2))
    share = lambda u: angle(13) + (angle(-9) - angle(13)) * u
    expected = {"edm": [math.exp(0.5 + 2 * u) for u in chance.tolist()], "v": [math.tan(share(u)) for u in chance.tolist()],
                "ve": [math.exp(math.log(0.02) + u * math.log(5000)) for u in chance.tolist()],
                "vp": [math.sqrt(math.expm1(beta_integral(1e-5 + (1 - 1e-5) * u))) for u in chance.tolist()]}
    for kind in KINDS: assert dpdm.noise_levels(kind, chance, 0.5, 2.0).tolist() == pytest.approx(expected[kind], rel=1e-8)
    assert dpdm.noise_levels("edm", chance).tolist() == pytest.approx([math.exp(-1.2 + 1.2 * u) for u in chance.tolist()])


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_levels_have_the_quantiles_of_their_distribution(kind):
    found = dpdm.draw_levels(kind, (200, 200), seeded(), **({"mean": 0.5, "std": 2.0} if kind == "edm" else {}))
    assert found.shape == (200, 200) and found.dtype == torch.float32
    places = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    chance = torch.distributions.Normal(0, 1).icdf(places) if kind == "edm" else places
    of = dpdm.noise_levels(kind, chance, 0.5, 2.0)
    assert found.log().double().quantile(places).tolist() == pytest.approx(of.log().tolist(), abs=0.08)


# ---- the loss


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_a_mean_over_draws_and_pixels(kind):
    model, x0, sigma, noise = spied(kind=kind), normal(3, 1, 2, 2), normal(3, 4, seed=1).exp(), normal(3, 4, 1, 2, 2, seed=2)
    labels = torch.tensor([4, 10, 0])
    found = dpdm.multiplied_loss(model, {"x0": x0, "sigma": sigma, "noise": noise, "class_label": labels})
    for number in range(3):
        errors = []
        for draw in range(4):
            level = sigma[number, draw].item()
            x = x0[number] + level * noise[number, draw]
            c_skip, c_out, c_in, c_noise = by_hand(kind, level)
            estimate = c_skip * x + c_out * answered(c_in * x, c_noise, labels[number].item())
            errors.append(((estimate - x0[number]) ** 2).mean().item() / c_out**2)
        assert found[number].item() == pytest.approx(sum(errors) / 4, rel=1e-9)


def test_draws_are_each_ones_own_and_a_hidden_class_is_hidden_in_all():
    config, x0 = replace(PUBLIC, draws=3, level_mean=0.4, level_std=0.7, label_dropout=0.3), torch.zeros(4000, 1, 2, 2)
    batch = dpdm.with_draws({"x0": x0, "class_label": torch.arange(4000) % 10}, config, seeded())
    assert batch["sigma"].shape == (4000, 3) and batch["noise"].shape == (4000, 3, 1, 2, 2) and batch["class_label"].shape == (4000,)
    logs, noise = batch["sigma"].log(), batch["noise"].flatten(1)
    assert (logs.mean().item(), logs.std().item()) == pytest.approx((0.4, 0.7), abs=0.02)
    assert (noise.mean().item(), noise.std().item()) == pytest.approx((0, 1), abs=0.02)
    for values in (logs.T, noise.T): assert (torch.corrcoef(values) - torch.eye(len(values))).abs().max() < 0.07
    hidden = batch["class_label"] == 10
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.025)
    assert torch.equal(batch["class_label"][~hidden], (torch.arange(4000) % 10)[~hidden])
    plain = replace(config, family="unet", unet=unet_config("ddpmpp", image_size=8, width=8, in_channels=1, out_channels=1, classes=0))
    assert "class_label" not in dpdm.with_draws({"x0": x0}, plain, seeded())
    other = dpdm.with_draws({"x0": x0, "class_label": torch.zeros(4000)}, replace(config, kind="v"), seeded())
    assert other["sigma"].log().median().item() == pytest.approx(0, abs=0.1)


# ---- the private step


@pytest.mark.parametrize("summed", ["explicit", *dpdm.SUMS])
def test_gradients_are_averaged_over_draws_then_clipped_then_divided_by_the_expected_batch(summed):
    torch.manual_seed(0)
    model, clip, plan = nn.Linear(3, 3).double(), 1.6, Mechanism(20, 0.25, 0.0, 1e-3, 5)
    batch = {"x0": normal(4, 3), "noise": normal(4, 5, 3, seed=1)}
    def loss(model, batch):
        clean = batch["x0"][:, None]
        return (model((clean + batch["noise"]).flatten(0, 1)).reshape(batch["noise"].shape) - clean).square().mean((1, 2))
    total, lengths = 0.0, []
    for x0, noise in zip(batch["x0"], batch["noise"]):
        gradients = []
        for each in noise:  # by the chain rule
            slope = 2 / 3 * (model.weight @ (x0 + each) + model.bias - x0).detach()
            gradients.append(torch.cat([slope[:, None] * (x0 + each), slope[:, None]], dim=1))
        mean = torch.stack(gradients).mean(0)
        lengths.append(mean.norm().item())
        total = total + mean * min(1, clip / lengths[-1])
    dpdm.private_gradients(model, loss, batch, clip, plan, public_generator(0), **({} if summed == "explicit" else {"summed": dpdm.SUMS[summed]}))
    found = torch.cat([model.weight.grad, model.bias.grad[:, None]], dim=1)
    assert min(lengths) < 0.9 * clip and max(lengths) > 1.1 * clip
    torch.testing.assert_close(found, total / 5, rtol=1e-5, atol=1e-8)


def test_the_price_list_is_that_of_the_configuration():
    plan = replace(dpdm.DIGITS, noise_multiplier=30.0, delta=1e-5).mechanism(1438)
    assert (plan.examples, plan.q, plan.noise_multiplier, plan.delta, plan.steps, plan.accountant, plan.randomness) == (
        1438, 0.5, 30.0, 1e-5, 500, "rdp_wide", "secret")
    more = replace(PUBLIC, noise_multiplier=30.0, examples=1500).mechanism(1438)
    assert (more.examples, more.q, more.randomness, more.expected_batch) == (1500, 1 / 3, "public", 500)
    assert replace(PUBLIC, epsilon=0.0).mechanism(1438).noise_multiplier == 0
    assert replace(PUBLIC, epsilon=3.0).mechanism(1438).epsilon() == pytest.approx(3, abs=0.01)
    with pytest.raises(ValueError, match="noise_multiplier: 1.0 costs epsilon .* above the budget of 10"):
        replace(PUBLIC, noise_multiplier=1.0).mechanism(1438)


def test_a_step_takes_each_picture_of_its_share_by_chance(monkeypatch):
    data, mine, taken = digits("train"), torch.arange(1, 1438, 2), []
    monkeypatch.setattr(dpdm, "private_gradients", lambda model, loss, batch, clip, plan, generator, **_: taken.append((batch["x0"], clip)))
    model, plan = dpdm.build(PUBLIC), replace(PUBLIC, noise_multiplier=30.0).mechanism(1438)
    optimizer, ours = torch.optim.SGD(model.parameters(), lr=1.0), SimpleNamespace(device="cpu")
    for seed in range(12):
        for epsilon in (10.0, 0.0):
            config = replace(PUBLIC, epsilon=epsilon, draws=1)
            dpdm._private_step(model, optimizer, data, mine, config, replace(plan, q=0.1), public_generator(seed), ours)
    assert np.mean([len(x0) for x0, _ in taken]) == pytest.approx(71.9, abs=6) and [clip for _, clip in taken[:2]] == [0.3, 1e9]
    assert torch.cdist(taken[0][0].flatten(1), data[mine.tolist()]["x0"].flatten(1)).min(1).values.max() < 1e-3


def test_the_average_begins_short_and_becomes_long():
    "Step n keeps the smaller of the average's rate and (1 + n) / (10 + n)."
    run = lambda steps, ema: nn.utils.parameters_to_vector(dpdm.train(replace(PUBLIC, epsilon=0.0, draws=1).override(
        **{"training.steps": steps, "training.ema": ema, "perceptron.width": 8}), device="cpu").parameters()).double()
    weights = [run(steps, 0.0) for steps in (1, 2, 3)]
    average = nn.utils.parameters_to_vector(dpdm.build(PUBLIC.override(**{"perceptron.width": 8})).parameters()).double()
    for keep, now in zip((2 / 11, 3 / 12, 0.3), weights): average = keep * average + (1 - keep) * now
    torch.testing.assert_close(run(3, 0.3), average, rtol=0, atol=1e-6)


# ---- sampling


def karras(steps, most=80.0, least=0.002, rho=7.0):
    "All levels above 0, by equation 5 of EDM."
    return [(most ** (1 / rho) + n / (steps - 1) * (least ** (1 / rho) - most ** (1 / rho))) ** rho for n in range(steps)]


def test_the_levels_of_sampling_are_those_of_edm():
    model, start = spied(), normal(2, 1, 8, 8)
    for more in ({}, {"sigma_max": 10.0, "sigma_min": 0.1, "rho": 3.0}):
        model.network.asked.clear()
        dpdm.sample_images(model, torch.tensor([1, 2]), start, steps=6, **more)
        levels = karras(6, *more.values())
        assert [4 * label[0].item() for _, label, _ in model.network.asked] == pytest.approx([math.log(level) for level in levels], rel=1e-9)
        torch.testing.assert_close(model.network.asked[0][0], start * levels[0] / math.sqrt(levels[0] ** 2 + 1 / 3))


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_ddim_with_guidance_is_the_one_by_hand(guidance):
    model, start, label = spied(), normal(2, 1, 8, 8), torch.tensor([1, 8])
    x, levels = 80 * start, [*karras(4), 0.0]
    for now, then in zip(levels, levels[1:]):
        c_skip, c_out, c_in, c_noise = by_hand("edm", now)
        with_class, without = (c_skip * x + c_out * answered(c_in * x, c_noise, number) for number in (label.reshape(-1, 1, 1, 1).double(), 10))
        x0 = (1 + guidance) * with_class - guidance * without
        x = x + (then - now) * (x - x0) / now
    torch.testing.assert_close(dpdm.sample_images(model, label, start, steps=4, guidance=guidance), x)


def test_churn_raises_the_level_by_at_most_its_double_and_adds_that_much_noise():
    "Limit 1 and unit noise, between the levels 0.05 and 50."
    asked, states = [], []
    def denoise(x, sigma):
        asked.append(sigma[0].item())
        states.append(x)
        return torch.zeros_like(x)
    levels = [80.0, 20.0, 1.0, 0.04, 0.01]
    x = torch.zeros(1, 1, dtype=torch.float64)
    solver = lambda **more: dpdm.SOLVERS["churn"](denoise, x, torch.tensor(levels, dtype=torch.float64), noise=torch.ones_like, **more)
    solver(s_churn=2.0)
    assert asked[::2] == pytest.approx([80, 30, 1.5, 0.04]) and asked[1::2] == pytest.approx(levels[1:])
    assert states[2].item() == pytest.approx(math.sqrt(30**2 - 20**2), rel=1e-9)
    asked.clear(); solver(s_churn=40.0)
    assert asked[::2] == pytest.approx([80, 40, 2, 0.04])
    asked.clear(); solver()
    assert asked[::2] == pytest.approx(levels[:-1])
    assert dpdm.SOLVERS["ddim"] is euler is SAMPLERS["euler"] and dpdm.SOLVERS["stochastic"] is euler_maruyama


def test_samples_are_of_classes_in_turn_from_piece_to_piece(tmp_path):
    model = spied().float()
    found = dpdm.sample(model, 23, steps=2, size=9)
    first = [label for _, _, label in model.network.asked[::2]]
    assert found.shape == (23, 1, 8, 8) and found.abs().max() <= 1 and torch.cat(first).tolist() == [n % 10 for n in range(23)]
    assert torch.equal(found[:9], dpdm.sample(model, 9, steps=2))
    made = dpdm.generate_data(model, tmp_path, count=23, size=9, solver="ddim", steps=2, device="cpu").__getitems__(list(range(23)))
    assert made["class_label"].tolist() == [n % 10 for n in range(23)] and made["images"].dtype == torch.uint8
    assert made["images"].shape == (23, 1, 8, 8) and len(made["images"].flatten(1).unique(dim=0)) == 23


def test_generated_bytes_are_the_clipped_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(dpdm, "sample_images", lambda model, label, start, **_: start * 2)
    made = dpdm.generate_data(spied().float(), tmp_path, count=100, device="cpu").__getitems__(list(range(100)))["images"]
    for level in (0, 100, 200):
        chance = torch.distributions.Normal(0, 2).cdf(torch.tensor((level + 1) / 127.5 - 1)).item()
        assert (made <= level).float().mean().item() == pytest.approx(chance, abs=0.02)


# ---- measuring


def test_an_evaluation_measures_the_samples_against_unseen_pictures(monkeypatch):
    made, asked = normal(120, 1, 8, 8).float().clamp(-1, 1), []
    monkeypatch.setattr(dpdm, "sample", lambda model, count, **options: asked.append((count, options)) or made)
    monkeypatch.setattr(dpdm, "utility", lambda images, labels, real, **options: asked.append((images, labels, real, options)) or {"linear": 0.5})
    row, = dpdm.evaluate(dpdm.build(PUBLIC), 120, solvers="churn", steps=7, guidance=0.5, s_churn=3.0, seed=4, kinds=("linear",), lr=0.1, epochs=2)
    assert asked[0] == (120, {"solver": "churn", "steps": 7, "guidance": 0.5, "s_churn": 3.0, "seed": 4})
    images, labels, real, options = asked[1]
    unseen = digits("test").tensors
    assert images is made and labels.tolist() == [n % 10 for n in range(120)]
    assert torch.equal(real["x0"], unseen["x0"]) and options == {"kinds": ("linear",), "lr": 0.1, "epochs": 2}
    (m, c), (n, d) = ((part.mean(0), np.cov(part.T)) for part in (made.flatten(1).double().numpy(), unseen["x0"].flatten(1).double().numpy()))
    distance = ((m - n) ** 2).sum() + np.trace(c + d) - 2 * np.sqrt(np.linalg.eigvals(c @ d).real.clip(0)).sum()
    assert row["frechet"] == pytest.approx(distance, rel=1e-4) and row["solver"] == "churn" and row["linear"] == 0.5


def test_real_scenes_are_judged_right_and_others_are_not():
    factors = scene_factors(range(100), seed=2)
    scenes, _ = draw_scenes(factors, 32)
    found, wrong = (dpdm._judged_scenes(scenes, labels, scenes) for labels in (factors.shape[:, 0], (factors.shape[:, 0] + 1) % 3))
    assert found["judged"] > 0.9 and wrong["judged"] < 0.1 and found["frechet"] < 1e-3
    assert dpdm._judged_scenes(scenes * 0.2, factors.shape[:, 0], scenes)["frechet"] > 1


def test_scenes_are_grey_where_one_channel_is_wanted_and_unseen_ones_are_others():
    grey, colour = dpdm._Scenes((1, 16, 16)).__getitems__([3, 5]), dpdm._Scenes((3, 16, 16)).__getitems__([3, 5])
    torch.testing.assert_close(grey["x0"][:, 0], (colour["x0"][:, 0] + colour["x0"][:, 1] + colour["x0"][:, 2]) / 3)
    for data, config in (("digits", PUBLIC), ("glyphs", replace(dpdm.CONFIGS["glyphs"], public=True))):
        private, unseen = dpdm.load_data(config), dpdm.test_data(config)
        assert len(private) == {"digits": 1438, "glyphs": 20_000}[data] and len(unseen) == {"digits": 359, "glyphs": 2000}[data]
        assert not torch.equal(private[:5]["x0"], unseen[:5]["x0"])


def test_a_fetched_batch_is_in_the_order_of_its_indices_and_may_be_empty():
    data = TensorSet(torch.arange(12.0).reshape(12, 1, 1, 1).expand(12, 1, 8, 8) / 12, class_label=torch.arange(12) % 10)
    found = dpdm.fetch(data, torch.tensor([11, 2]), PUBLIC)
    assert found["x0"][:, 0, 0, 0].tolist() == pytest.approx([11 / 12, 2 / 12]) and found["class_label"].tolist() == [1, 2]
    assert dpdm.fetch(data, torch.tensor([], dtype=torch.int64), PUBLIC)["x0"].shape == (0, 1, 8, 8)


# ---- the authors' files


def test_the_average_of_a_released_file_is_what_is_loaded(tmp_path):
    config = replace(dpdm.CONFIGS["mnist"], unet=replace(dpdm.CONFIGS["mnist"].unet, width=8))
    network = dpdm.build(config).network
    theirs = {f"module.model.{name}": network.state_dict()[ours] for ours, name in authors_keys(network, "ddpmpp")}
    torch.save({"model": theirs, "ema": {name: value + 1 for name, value in theirs.items()}}, tmp_path / "model.pth")
    found = dpdm.load_authors_checkpoint(tmp_path / "model.pth", config).network.state_dict()
    assert all(torch.equal(found[name], value + 1) for name, value in network.state_dict().items())
