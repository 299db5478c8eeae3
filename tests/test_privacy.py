"""Privacy: what must hold for any run, any model and any batch, and what a ledger must survive."""
import functools
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from extras import need

need("train", "data", "dev")

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusion_papers.topics import privacy
from diffusion_papers.core.networks import MLPConfig, ResidualMLP, UNet, unet_config

MANY = settings(max_examples=40, deadline=None, derandomize=True)
FEW = settings(max_examples=15, deadline=None, derandomize=True)
RATE, NOISE, DELTA = st.floats(1e-4, 1), st.floats(0.3, 200), st.sampled_from([1e-3, 1e-5, 1e-9])
REFERENCE = json.loads((Path(__file__).parent / "golden" / "dpdm" / "accountant.json").read_text())
U_NET = unet_config("ddpmpp", time_scale=1.0, image_size=8, in_channels=1, out_channels=1, width=8, multipliers=(1, 2),
                    blocks=1, attention=(4,))


# ---- accounting


@MANY
@given(RATE, NOISE, st.integers(1, 5000), DELTA, st.floats(1.01, 3))
def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise(q, noise, steps, delta, factor):
    price = privacy.epsilon_spent
    now = price(q, noise, steps, delta)
    assert 0 <= now < math.inf
    assert price(q, noise, math.ceil(steps * factor), delta) >= now
    assert price(min(1.0, q * factor), noise, steps, delta) >= now * (1 - 1e-9)
    assert price(q, noise * factor, steps, delta) <= now * (1 + 1e-9)
    assert price(q, noise, steps, delta / factor) >= now
    assert price(q, noise, steps, delta, "rdp_wide") <= now
    assert price(q, noise, 0, delta) == price(0.0, noise, steps, delta) == 0
    # Everyone in every batch is the worst that can happen, and there the exact price is known.
    assert privacy.gaussian_epsilon(noise, steps, delta) <= price(1.0, noise, steps, delta) * (1 + 1e-9)


@MANY
@given(RATE, NOISE)
def test_divergence_grows_with_the_order_and_stays_below_that_of_everyone(q, noise):
    rdp = privacy.subsampled_gaussian_rdp(q, noise, privacy.WIDE_ORDERS)
    assert (rdp > 0).all() and (rdp.diff() > 0).all()
    assert (rdp <= privacy.subsampled_gaussian_rdp(1.0, noise, privacy.WIDE_ORDERS) * (1 + 1e-9)).all()


@MANY
@given(st.floats(0.2, 100), st.integers(1, 10_000), DELTA)
def test_exact_price_satisfies_its_equation(noise, steps, delta):
    mu, epsilon = math.sqrt(steps) / noise, privacy.gaussian_epsilon(noise, steps, delta)
    normal = lambda x: torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)).item()
    if epsilon > 0:
        first, second = normal(mu / 2 - epsilon / mu), epsilon + normal(-mu / 2 - epsilon / mu)
        assert math.exp(first) - math.exp(second) == pytest.approx(delta, rel=1e-4)
    else: assert 2 * math.exp(normal(mu / 2)) - 1 <= delta * (1 + 1e-9)


@FEW
@given(st.floats(0.3, 30), st.floats(0.005, 1), st.integers(1, 2000), st.sampled_from(["rdp", "rdp_wide"]))
def test_noise_for_a_budget_keeps_to_it_and_wastes_little(target, q, steps, accountant):
    noise = privacy.noise_multiplier_for(target, q, steps, 1e-5, accountant)
    assert target - 0.01 <= privacy.epsilon_spent(q, noise, steps, 1e-5, accountant) <= target


def test_hardly_any_noise_and_hardly_any_signal():
    for accountant in privacy.ACCOUNTANTS:  # also where a numerical composition would need terabytes
        assert 1e3 < privacy.epsilon_spent(0.5, 0.2, 500, 1e-5, accountant) < 1e4
        assert privacy.epsilon_spent(0.5, 1e-9, 5, 1e-5, accountant) > 1e15
        assert privacy.epsilon_spent(0.5, 0.0, 5, 1e-5, accountant) == math.inf
        assert privacy.epsilon_spent(1e-6, 1e6, 5, 1e-5, accountant) < 0.11
    assert privacy.gaussian_epsilon(1e-200, 5, 1e-5) == math.inf and privacy.gaussian_epsilon(1e12, 5, 1e-5) == 0


def test_reference_values():
    for row in REFERENCE["rdp_per_step"]:
        found = privacy.subsampled_gaussian_rdp(row["q"], row["sigma"], [row["alpha"]]).item()
        for name in row:
            if name.startswith("rdp_"): assert found == pytest.approx(row[name], rel=1e-6), name
    for row in REFERENCE["epsilon"]:
        q, sigma, steps, delta = row["q"], row["sigma"], row["steps"], row["delta"]
        rdp = steps * privacy.subsampled_gaussian_rdp(q, sigma, privacy.ORDERS)
        epsilon, order = privacy.epsilon_from_rdp(rdp, privacy.ORDERS, delta)
        assert epsilon == privacy.epsilon_spent(q, sigma, steps, delta) == pytest.approx(row["eps_rdp"], rel=1e-4)
        assert order == pytest.approx(row["rdp_order"])
        if "eps_exact_gaussian" in row:
            assert privacy.gaussian_epsilon(sigma, steps, delta) == pytest.approx(row["eps_exact_gaussian"], rel=1e-8)
        if "eps_prv" in row:
            prv = privacy.epsilon_spent(q, sigma, steps, delta, "prv")
            assert prv == pytest.approx(row["eps_prv"], abs=0.012) and row["eps_pld"] - 1e-3 < prv < epsilon


@pytest.mark.parametrize("q, steps, delta, target, published", [
    (1 / 15, 4500, 1e-5, 0.2, 85.0), (1 / 15, 4500, 1e-5, 1.0, 18.28), (1 / 15, 4500, 1e-5, 10.0, 2.488)])
def test_tighter_accountant_is_below_on_published_settings(q, steps, delta, target, published):
    noise = privacy.noise_multiplier_for(target, q, steps, delta)
    assert noise == pytest.approx(published, rel=1e-3)
    assert privacy.epsilon_spent(q, noise, steps, delta, "prv") < privacy.epsilon_spent(q, noise, steps, delta) <= target


# ---- ledger


SMALL = privacy.Mechanism(steps=30)


@MANY
@given(payments=st.lists(st.one_of(st.integers(1, 12), st.none()), max_size=12))
def test_no_sequence_of_payments_and_resumptions_exceeds_the_plan(tmp_path_factory, payments):
    "None is a kill: the ledger is opened again."
    path, paid = tmp_path_factory.mktemp("ledger") / "ledger.json", 0
    ledger = privacy.Ledger.open(path, SMALL)
    for steps in payments:
        if steps is None: ledger.close(); ledger = privacy.Ledger.open(path, SMALL, at_least=paid)
        elif paid + steps <= SMALL.steps: ledger.record(steps); paid += steps
        else:
            before = path.read_bytes()
            with pytest.raises(privacy.PrivacyBudgetExceeded): ledger.record(steps)
            assert path.read_bytes() == before
        assert ledger.taken == paid == privacy.Ledger.read(path).taken
        assert path.stat().st_mode & 0o777 == 0o600
    assert ledger.spent() <= SMALL.epsilon()


def test_another_mechanism_is_refused_by_name(tmp_path):
    with privacy.Ledger.open(tmp_path / "ledger.json", SMALL) as ledger: ledger.record()
    others = {"examples": 1400, "q": 0.4, "noise_multiplier": 6.0, "delta": 1e-5, "steps": 31, "accountant": "prv",
              "randomness": "public", "large_delta": True}
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"mechanism: the ledger .* {name} was"):
            privacy.Ledger.open(tmp_path / "ledger.json", SMALL.override(**{name: value}))


def test_every_truncation_and_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "ledger.json"
    ledger = privacy.Ledger.open(path, SMALL)
    ledger.record(3)
    ledger.close()
    whole = path.read_bytes()
    for length in (0, 1, 50, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"): privacy.Ledger.open(path, SMALL)
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        try: assert privacy.Ledger.read(path).taken == 3  # white space means nothing
        except ValueError: pass
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="damaged"): privacy.Ledger.open(path, SMALL)
    path.write_bytes(whole)
    ledger = privacy.Ledger.open(path, SMALL)
    path.unlink()
    with pytest.raises(ValueError, match="disappeared"): ledger.record()
    assert not path.exists() and ledger.taken == 3


def test_a_failed_write_pays_nothing_and_leaves_the_file(tmp_path, monkeypatch):
    ledger = privacy.Ledger.open(tmp_path / "ledger.json", SMALL)
    ledger.record()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): ledger.record()
    monkeypatch.undo()
    assert ledger.taken == privacy.Ledger.read(tmp_path / "ledger.json").taken == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ledger.json", "ledger.json.lock"]


def test_killed_runs_have_never_taken_more_than_they_paid(tmp_path):
    "A process that pays and then takes a step, killed with SIGKILL: its trace never has more lines than the ledger has steps."
    program = ("import sys\nfrom diffusion_papers.topics.privacy import Ledger, Mechanism\n"
               "trace = open(sys.argv[2], 'a', buffering=1)\n"
               "ledger = Ledger.open(sys.argv[1], Mechanism(steps=100_000))\n"
               "while True: ledger.record(); print('step', file=trace)")
    path, trace = tmp_path / "ledger.json", tmp_path / "trace"
    for _ in range(2):
        seen = trace.stat().st_size if trace.exists() else 0
        victim = subprocess.Popen([sys.executable, "-c", program, str(path), str(trace)])
        while victim.poll() is None and (trace.stat().st_size if trace.exists() else 0) < seen + 50: time.sleep(0.01)
        assert victim.poll() is None
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        taken, paid = len(trace.read_text().splitlines()), privacy.Ledger.read(path).taken
        assert 10 <= taken <= paid <= taken + 2  # one unfinished step for each kill


# ---- batches and randomness


@FEW
@given(st.integers(1, 300), st.floats(0.01, 1), st.integers(0, 2**31))
def test_batches_are_sets_of_indices(count, q, seed):
    batch = privacy.poisson_batch(count, q, privacy.public_generator(seed))
    assert batch.dtype == torch.int64 and len(batch.unique()) == len(batch) and (q < 1 or len(batch) == count)
    assert not len(batch) or (batch.min() >= 0 and batch.max() < count)
    assert torch.equal(batch, privacy.poisson_batch(count, q, privacy.public_generator(seed)))


def test_secret_numbers_are_never_repeated(monkeypatch):
    monkeypatch.setattr("secrets.randbits", lambda bits, draw=privacy.secrets.randbits: 7 if bits == 64 else draw(bits))
    streams = [torch.randn(8, generator=privacy.secret_generator()).tolist() for _ in range(20)]
    assert len({tuple(stream) for stream in streams}) == 20


# ---- gradients


def convolutional(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1)).double()


def linear(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(-3), nn.Linear(16, 8), nn.SiLU(inplace=True), nn.Linear(8, 16, bias=False), nn.Unflatten(-1, (1, 4, 4))).double()


def denoising_loss(model, batch):
    "K draws an example, in one dimension with the examples."
    clean = batch["x0"][:, None].expand_as(batch["noise"])
    noisy = (clean + batch["sigma"][..., None, None, None] * batch["noise"]).flatten(0, 1)
    return (model(noisy) - clean.flatten(0, 1)).square().flatten(1).mean(1).reshape(batch["sigma"].shape).mean(1)


def drawn(count, draws, seed, size=4):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    return {"x0": normal(count, 1, size, size), "sigma": normal(count, draws).exp(), "noise": normal(count, draws, 1, size, size)}


def norm(values): return sum(value.square().sum() for value in values.values()).sqrt().item()


layered = functools.partial(privacy.clipped_sum, gradients=privacy.gradients_by_layer)


@pytest.mark.parametrize("build, clipped", [(convolutional, privacy.clipped_sum), (linear, privacy.clipped_sum),
                                            (convolutional, layered), (linear, privacy.ghost_clipped_sum)])
@FEW
@given(count=st.integers(1, 6), draws=st.sampled_from([1, 4, 32]), clip=st.floats(1e-3, 10), seed=st.integers(0, 10**6),
       scale=st.sampled_from([0.0, 1.0, 1e4, math.inf]))
def test_one_example_moves_the_sum_by_no_more_than_the_clipping_norm(build, clipped, count, draws, clip, seed, scale):
    model, batch = build(seed), drawn(count, draws, seed)
    batch["x0"][0] *= scale
    every, norms = clipped(model, denoising_loss, batch, clip)
    assert norms.shape == (count,) and all(value.isfinite().all() for value in every.values())
    for index in range(count):
        others = {name: torch.cat([value[:index], value[index + 1:]]) for name, value in batch.items()}
        without = clipped(model, denoising_loss, others, clip)[0]
        assert norm({name: every[name] - without[name] for name in every}) <= clip * (1 + 1e-6)


@FEW
@given(st.integers(0, 7), st.sampled_from([1, 8]), st.integers(1, 8), st.integers(0, 10**6))
def test_ghosts_are_the_explicit_sums(count, draws, chunk, seed):
    model, batch = linear(seed), drawn(count, draws, seed)
    (explicit, norms), (ghost, ghost_norms) = (way(model, denoising_loss, batch, 0.3, chunk)
                                               for way in (privacy.clipped_sum, privacy.ghost_clipped_sum))
    assert torch.allclose(norms, ghost_norms, rtol=1e-10, atol=0) and explicit.keys() == ghost.keys()
    assert all(torch.allclose(explicit[name], ghost[name], rtol=0, atol=1e-10) for name in explicit)
    assert all(layer._forward_hooks == {} for layer in model.modules())


@FEW
@given(st.integers(0, 7), st.sampled_from([1, 8]), st.integers(1, 8), st.integers(0, 10**6))
def test_sums_by_layer_are_the_mapped_sums(count, draws, chunk, seed):
    model, batch = convolutional(seed), drawn(count, draws, seed)
    (explicit, norms), (found, found_norms) = (way(model, denoising_loss, batch, 0.3, chunk)
                                               for way in (privacy.clipped_sum, layered))
    assert torch.allclose(norms, found_norms, rtol=1e-10, atol=0) and explicit.keys() == found.keys()
    assert all(torch.allclose(explicit[name], found[name], rtol=0, atol=1e-10) for name in explicit)
    assert all(layer._forward_hooks == {} for layer in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ghosts_in_single_precision():
    model, batch = linear(0).float(), {name: value.float() for name, value in drawn(20, 8, 0).items()}
    explicit, norms = privacy.clipped_sum(model, denoising_loss, batch, 0.3)
    ghost, ghost_norms = privacy.ghost_clipped_sum(model, denoising_loss, batch, 0.3)
    assert torch.allclose(norms, ghost_norms, rtol=1e-5)
    assert all(torch.allclose(explicit[name], ghost[name], atol=1e-5) for name in explicit)


def u_net_loss(model, batch):
    return (model(batch["x0"] + batch["noise"][:, 0], batch["sigma"][:, 0]) - batch["x0"]).square().mean((1, 2, 3))


@pytest.mark.parametrize("network", [UNet(U_NET), ResidualMLP(MLPConfig(width=16, blocks=1, fourier=8))],
                         ids=["U-Net", "perceptron"])
def test_mapped_gradients_are_those_of_a_loop(network):
    model, batch = network.double(), drawn(5, 1, 0, size=8)
    for parameter in model.parameters(): nn.init.normal_(parameter, std=0.2)  # no gradient is 0 by the initial weights
    privacy.check_private(model)
    gradients = privacy.per_example_gradients(model, u_net_loss, batch)
    for index in range(5):
        one = {name: value[index:index + 1] for name, value in batch.items()}
        expected = torch.autograd.grad(u_net_loss(model, one)[0], list(model.parameters()))
        for (name, _), value in zip(model.named_parameters(), expected):
            assert torch.allclose(gradients[name][index], value, rtol=1e-6, atol=1e-12), name
    whole, norms = privacy.clipped_sum(model, u_net_loss, batch, 0.5)
    for chunk in (1, 2, 7):
        assert torch.allclose(privacy.clipped_sum(model, u_net_loss, batch, 0.5, chunk)[1], norms, rtol=1e-9)
        parts = privacy.clipped_sum(model, u_net_loss, batch, 0.5, chunk)[0]
        assert all(torch.allclose(parts[name], whole[name], rtol=0, atol=1e-10) for name in whole)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_that_is_a_number_is_found():
    with pytest.raises(ValueError, match="has dropout 0.1"):
        privacy.check_private(UNet(unet_config("ddpmpp", image_size=8, width=8, multipliers=(1,), blocks=1, dropout=0.1)))


def test_random_numbers_inside_of_the_loss_are_refused():
    with pytest.raises(RuntimeError, match="random"):
        privacy.per_example_gradients(linear(0), lambda model, batch: model(torch.randn_like(batch["x0"])).flatten(1).sum(1), drawn(2, 1, 0))
