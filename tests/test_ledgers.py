"""Ledgers: one run at a time, budgets that add up over runs, folders and copies, and what must never be counted as privacy."""
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from dataclasses import replace

from extras import need

need("train", "data", "dev")

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusion_papers import dpdm
from diffusion_papers.__main__ import main
from diffusion_papers.evidence import dpdm as evidence
from diffusion_papers.topics import privacy
from diffusion_papers.core.data import digits
from diffusion_papers.topics.privacy import Ledger, Mechanism

MANY = settings(max_examples=30, deadline=None, derandomize=True)
FEW = settings(max_examples=12, deadline=None, derandomize=True)
PLAN = Mechanism(steps=400, accountant="rdp_wide")
SHORT = dpdm.DIGITS.override(**{"training.steps": 4, "training.checkpoint_every": 2, "draws": 1, "perceptron.width": 16,
                                "noise_multiplier": 8.0})
RELEASES = st.lists(st.tuples(st.sampled_from([0.001, 0.07, 0.5, 1.0]), st.sampled_from([0.8, 2.5, 20.0, 85.0]),
                              st.integers(0, 3000)), min_size=1, max_size=5)  # q, noise multiplier, steps
FORK = multiprocessing.get_context("fork")


class Stop(Exception): pass


def written(path, mechanism, steps):
    "A ledger file with so many steps."
    with Ledger.open(path, mechanism) as ledger:
        if steps: ledger.record(steps)
    return path


def releases_of(folder, releases, **more):
    "A ledger file for each release."
    return [written(folder / f"{number}.json", Mechanism(1000, q, noise, 1e-5, 5000, "rdp_wide", **more), steps)
            for number, (q, noise, steps) in enumerate(releases)]


# ---- one run at a time


def started(action, *words):
    process = FORK.Process(target=action, args=words)
    process.start()
    return process


def wait_for(path):
    while not path.exists(): time.sleep(0.005)


def hold(path, ready):
    with Ledger.open(path, PLAN) as ledger:
        ledger.record(7)
        ready.touch()
        time.sleep(60)


def test_a_second_process_is_refused_and_a_killed_ones_ledger_is_free_at_once(tmp_path):
    path = tmp_path / "ledger.json"
    holder = started(hold, path, tmp_path / "ready")
    wait_for(tmp_path / "ready")
    before = path.read_bytes()
    for _ in range(3):
        with pytest.raises(RuntimeError, match=f"ledger.json is in use by process {holder.pid}"): Ledger.open(path, PLAN)
    assert Ledger.read(path).taken == 7 and Ledger.read(path).spent() == PLAN.epsilon(7) and path.read_bytes() == before
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with Ledger.open(path, PLAN, at_least=7) as ledger: ledger.record()
    assert Ledger.read(path).taken == 8


def take_a_hundred(path, trace):
    while True:
        try: ledger = Ledger.open(path, PLAN)
        except RuntimeError: time.sleep(0.001)
        else: break
    with ledger, open(trace, "a", buffering=1) as file:
        for _ in range(100): ledger.record(); print("step", file=file)


def test_two_hundred_steps_of_two_processes_are_two_hundred(tmp_path):
    path, traces = tmp_path / "ledger.json", [tmp_path / "one", tmp_path / "two"]
    both = [started(take_a_hundred, path, trace) for trace in traces]
    for process in both: process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert [len(trace.read_text().splitlines()) for trace in traces] == [100, 100] and Ledger.read(path).taken == 200


def test_a_forked_copy_cannot_pay(tmp_path):
    ledger = Ledger.open(tmp_path / "ledger.json", PLAN)
    def pay():
        try: ledger.record()
        except RuntimeError as error: os._exit(3 if "belongs to the process that opened it" in str(error) else 4)
        os._exit(0)
    copy = started(pay)
    copy.join()
    ledger.record()
    assert copy.exitcode == 3 and Ledger.read(ledger.path).taken == ledger.taken == 1


def test_threads_pay_one_after_another(tmp_path):
    with Ledger.open(tmp_path / "ledger.json", PLAN) as ledger:
        def pay():
            for _ in range(25): ledger.record()
        threads = [threading.Thread(target=pay) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert Ledger.read(ledger.path).taken == ledger.taken == 100


def test_whoever_removes_the_lock_stops_the_first_run(tmp_path):
    first = Ledger.open(tmp_path / "ledger.json", PLAN)
    first.record()
    (tmp_path / "ledger.json.lock").unlink()
    with pytest.raises(RuntimeError, match="lock of the ledger"): first.record()
    with Ledger.open(tmp_path / "ledger.json", PLAN) as second:
        second.record(5)
        with pytest.raises(RuntimeError, match="lock of the ledger"): first.record()
    assert Ledger.read(tmp_path / "ledger.json").taken == 6


def test_a_ledger_is_free_after_close_drop_and_refusal(tmp_path):
    path = tmp_path / "ledger.json"
    ledger = Ledger.open(path, PLAN)
    ledger.close(); ledger.close()
    with pytest.raises(RuntimeError, match="closed"): ledger.record()
    assert ledger.spent() == 0 and "0 of 400 steps" in ledger.statement()
    with pytest.raises(ValueError, match="noise_multiplier was"): Ledger.open(path, replace(PLAN, noise_multiplier=1.0))
    with pytest.raises(ValueError, match="knows of 0"): Ledger.open(path, PLAN, at_least=1)
    ledger = Ledger.open(path, PLAN)
    del ledger
    with pytest.raises(Stop), Ledger.open(path, PLAN) as ledger: raise Stop
    Ledger.open(path, PLAN).record()
    assert Ledger.read(path).taken == 1


def test_links_lead_to_one_ledger(tmp_path):
    (tmp_path / "real").mkdir()
    path, link = tmp_path / "real" / "ledger.json", tmp_path / "link.json"
    link.symlink_to(path)
    with pytest.raises(ValueError, match="link to a ledger that is not there"): Ledger.open(link, PLAN)
    with Ledger.open(path, PLAN):
        with pytest.raises(RuntimeError, match="in use"): Ledger.open(link, PLAN)
    with Ledger.open(link, PLAN) as ledger: ledger.record(3)
    assert link.is_symlink() and Ledger.read(path).taken == Ledger.read(tmp_path / "real").taken == 3


def test_reading_changes_nothing_and_pays_nothing(tmp_path):
    path = written(tmp_path / "ledger.json", PLAN, 9)
    (tmp_path / "ledger.json.lock").unlink()
    before = path.read_bytes()
    ledger = Ledger.read(path)
    with pytest.raises(RuntimeError, match="opened for reading"): ledger.record()
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["ledger.json"]
    with pytest.raises(ValueError, match="there is no ledger .*nothing"): Ledger.read(tmp_path / "nothing")


@pytest.mark.parametrize("change", [{"taken": -1}, {"taken": 2.5}, {"taken": True}, {"taken": "3"}, {"taken": 401},
                                    {"kind": "training run"}, {"mechanism": {"q": 2.0}}, {"mechanism": {"unknown": 1}},
                                    {"mechanism": {"noise_multiplier": math.nan}}, {"mechanism": 3}])
def test_what_no_run_can_have_written_is_refused_by_name(tmp_path, change):
    path = written(tmp_path / "odd.json", PLAN, 9)
    content = json.loads(path.read_text()) | change
    del content["digest"]
    path.write_text(json.dumps(content | {"digest": privacy.digest({}, content)}))
    with pytest.raises(ValueError, match="odd.json is damaged"): Ledger.read(path)


# ---- budgets add up


@MANY
@given(st.sampled_from([0.001, 0.07, 0.5, 1.0]), st.floats(0.5, 100), st.lists(st.integers(0, 900), min_size=1, max_size=5))
def test_runs_of_one_mechanism_are_one_run_of_all_their_steps(tmp_path_factory, q, noise, steps):
    folder = tmp_path_factory.mktemp("ledgers")
    paths = releases_of(folder, [(q, noise, count) for count in steps])
    assert privacy.total_spent(paths) == privacy.epsilon_spent(q, noise, sum(steps), 1e-5, "rdp_wide")
    copies = [shutil.copy(paths[0], folder / f"copy {number}.json") for number in range(3)]  # cp, and resumed no more
    assert privacy.total_spent(copies) == privacy.epsilon_spent(q, noise, 3 * steps[0], 1e-5, "rdp_wide")


@MANY
@given(st.lists(st.tuples(st.floats(1, 100), st.integers(1, 60)), min_size=1, max_size=6), st.sampled_from([1e-3, 1e-5, 1e-9]))
def test_with_everybody_in_every_batch_the_total_is_above_the_exact_one_and_near(runs, delta):
    ledgers = [Ledger("a run", Mechanism(100, 1.0, noise, delta, 100, "rdp_wide"), steps) for noise, steps in runs]
    exact = privacy.gaussian_epsilon(sum(steps / noise**2 for noise, steps in runs) ** -0.5, 1, delta)
    total = privacy.total_spent(ledgers)
    assert exact <= total <= 1.25 * exact + 0.01


@FEW
@given(RELEASES, st.integers(0, 4), st.sampled_from([None, 1e-4, 1e-7]))
def test_a_total_is_between_the_dearest_and_the_sum_and_grows_with_every_step(releases, which, delta):
    def total(releases):
        return privacy.total_spent([Ledger("a run", Mechanism(1000, q, noise, 1e-5, 5000, "rdp_wide"), steps)
                                    for q, noise, steps in releases], delta)
    price = lambda release, delta: privacy.epsilon_spent(*release, delta, "rdp_wide")
    now, at = total(releases), delta or 1e-5
    assert max(price(release, at) for release in releases) <= now * (1 + 1e-9)
    assert now <= sum(price(release, at / len(releases)) for release in releases) * (1 + 1e-9)
    assert total(releases[::-1]) == pytest.approx(now, rel=1e-9)
    q, noise, steps = releases[which % len(releases)]
    assert total([*releases, (q, noise, 10)]) >= now and total([*releases, (q, noise, 0)]) <= now * (1 + 1e-9)


@FEW
@given(RELEASES)
def test_totals_are_those_of_opacus(releases):
    history = pytest.importorskip("opacus.accountants").RDPAccountant()
    history.history = [(noise, q, steps) for q, noise, steps in releases if steps]
    ledgers = [Ledger("a run", Mechanism(1000, q, noise, 1e-5, 5000, "rdp_wide"), steps) for q, noise, steps in releases]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the best order may be the first or the last
        theirs = history.get_epsilon(1e-5, alphas=list(privacy.WIDE_ORDERS)) if history.history else 0.0
    assert privacy.total_spent(ledgers) <= theirs * (1 + 1e-6)
    if theirs > 0.5: assert privacy.total_spent(ledgers) == pytest.approx(theirs, rel=1e-3)  # at orders near 1 opacus loses digits


def test_a_total_by_the_tighter_accountant():
    pytest.importorskip("opacus")
    ledgers = lambda *accountants: [Ledger("a run", Mechanism(1000, 0.07, noise, 1e-5, 500, accountant), 300)
                                    for noise, accountant in zip((2.5, 2.5, 4.0), accountants)]
    wide, tight = privacy.total_spent(ledgers(*["rdp_wide"] * 3)), privacy.total_spent(ledgers("prv", "rdp", "rdp_wide"))
    assert 0.85 * wide < tight < wide
    pair = ledgers("prv", "prv")
    assert privacy.total_spent(pair) == privacy.epsilon_spent(0.07, 2.5, 600, 1e-5, "prv")


def test_a_total_says_what_it_is_not():
    plans = PLAN, replace(PLAN, examples=1436), replace(PLAN, randomness="public"), replace(PLAN, delta=1e-6)
    ledgers = [Ledger(f"run {number}", plan, 5) for number, plan in enumerate(plans)]
    with pytest.warns(UserWarning, match="of 1436 and of 1437 examples"): privacy.total_spent(ledgers[:2])
    with pytest.warns(UserWarning, match="run 2 is public, so the guarantee is void"): privacy.total_spent([ledgers[0], ledgers[2]])
    with pytest.warns(UserWarning, match="less than 1/N"): privacy.total_spent(ledgers[:1], 0.01)
    assert privacy.total_spent([ledgers[0], ledgers[3]]) == privacy.total_spent([ledgers[0]] * 2, 1e-6)  # the smallest delta
    free = Ledger("no noise", replace(PLAN, noise_multiplier=0.0), 1)
    assert privacy.total_spent([ledgers[0], free]) == math.inf
    for bad in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="delta"): privacy.total_spent(ledgers[:1], bad)
    with pytest.raises(ValueError, match="ledgers: expected at least one"): privacy.total_spent([])


def test_the_command_adds_up_files_and_folders(tmp_path, capsys):
    one, two = (written(tmp_path / name / "ledger.json", PLAN, 50) for name in ("one", "two"))
    assert main(["spent", str(one.parent), str(two)]) == 0
    told = capsys.readouterr().out
    assert f"epsilon {PLAN.epsilon(100):.4f} at delta 0.0001" in told and told.count("50 of 400 steps") == 2 and "void" not in told
    assert main(["spent", str(one), str(one.parent), "--delta", "1e-6"]) == 0  # one file, by two names
    assert f"together: epsilon {privacy.epsilon_spent(0.5, 5.5, 50, 1e-6, 'rdp_wide'):.4f} at delta 1e-06" in capsys.readouterr().out
    public = written(tmp_path / "public.json", replace(PLAN, randomness="public", examples=1400), 50)
    assert main(["spent", str(one), str(public)]) == 0
    told = capsys.readouterr().out
    assert "guarantee is void" in told and "1400 and of 1437 examples" in told
    two.write_text(two.read_text()[:-30])
    for bad, why in ((two, "two/ledger.json is damaged"), (tmp_path, f"no ledger {tmp_path}"),
                     (tmp_path / "nothing", "there is no ledger")):
        assert main(["spent", str(one), str(bad)]) == 1
        found = capsys.readouterr()
        assert why in found.err and "epsilon" not in found.out
    assert main(["spent", str(one), "--delta", "nan"]) == 1 and "delta" in capsys.readouterr().err


# ---- a folder and its ledger


def test_a_run_without_its_ledger_is_refused(tmp_path):
    def stop(step, spent): raise Stop
    with pytest.raises(Stop): dpdm.train(SHORT, tmp_path / "early", device="cpu", callback=stop)  # before a checkpoint
    dpdm.train(SHORT, tmp_path / "late", device="cpu")
    shutil.copytree(tmp_path / "late", tmp_path / "weights")
    (tmp_path / "weights" / "config.json").unlink()
    for name, trace in (("early", "config.json"), ("late", "run.safetensors"), ("weights", "run.safetensors")):
        (tmp_path / name / "ledger.json").unlink()
        before = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"{trace}.* no ledger.json .*begin anew"):
                dpdm.train(replace(SHORT, delta=1e-5), tmp_path / name, resume=resume, device="cpu")
        assert {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} == before


def test_a_second_training_in_the_folder_is_refused_and_changes_nothing(tmp_path):
    told = []
    def again(step, spent):
        before = (tmp_path / "config.json").read_bytes()
        other = SHORT.override(**{"training.lr": 1e-4})
        for config, resume in ((SHORT, True), (other, True), (SHORT, False)):
            with pytest.raises((RuntimeError, ValueError), match="in use|holds a run already") as refused:
                dpdm.train(config, tmp_path, resume=resume, device="cpu")
            told.append(str(refused.value))
        assert (tmp_path / "config.json").read_bytes() == before
        raise Stop
    with pytest.raises(Stop): dpdm.train(SHORT, tmp_path, device="cpu", callback=again)
    assert sum("in use" in text for text in told) == 2
    assert Ledger.read(tmp_path).taken == 1
    assert dpdm.train(SHORT, tmp_path, resume=True, device="cpu").guarantee["steps"] == 4  # free again after the error


def test_fewer_declared_people_than_there_are_is_refused(tmp_path):
    for declared, delta in ((10, 0.05), (1437, 1e-4)):
        with pytest.raises(ValueError, match=f"examples: {declared} are declared, but the data hold 1438"):
            dpdm.train(replace(SHORT, examples=declared, delta=delta), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    assert replace(SHORT, examples=1438).mechanism(1438).examples == 1438
    batch = {name: value[:50] for name, value in digits("train").tensors.items()}
    with Ledger.open(tmp_path / "ledger.json", Mechanism(10, 0.5, 5.0, 0.05, 5)) as ledger:
        with pytest.raises(ValueError, match="examples: 10 are declared, but the data hold 50"):
            evidence.fit_private_classifier("linear", batch, 10, ledger)
        assert ledger.taken == 0
    with Ledger.open(tmp_path / "more.json", Mechanism(60, 0.5, 5.0, 0.01, 5)) as ledger:  # hides the true number
        evidence.fit_private_classifier("linear", batch, 10, ledger)
        assert ledger.taken == 5


# ---- models that store what they see


class Centred(nn.Module):
    "Subtracts a running mean; `how` says how it is kept."
    def __init__(self, how):
        super().__init__()
        self.how, self.layer = how, nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.frozen = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x):
        now = x.detach().reshape(-1, 4).mean(0)
        if self.training:
            if self.how == "hidden":
                for buffer in self.buffers(): buffer.lerp_(now, 0.1)
            if self.how == "replaced": setattr(self, "mean", 0.9 * getattr(self, "mean") + 0.1 * now)
            if self.how == "parameter":
                with torch.no_grad(): self.get_parameter("frozen").copy_(now)
            if self.how == "new": self.register_buffer("seen", now)
        return self.layer(x - self.mean)


class InPlace(nn.Module):
    def __init__(self): super().__init__(); self.layer = nn.Linear(4, 4); self.register_buffer("mean", torch.zeros(4))
    def forward(self, x): self.mean.mul_(0.9).add_(0.1 * x.mean(0)); return self.layer(x)


class Assigned(InPlace):
    def forward(self, x): self.mean = 0.9 * self.mean + 0.1 * x.mean(0); return self.layer(x)


class Counted(InPlace):
    def forward(self, x): self.mean += 1; return self.layer(x)


class InRows(InPlace):
    def forward(self, x): self.mean[0] = x.mean(); return self.layer(x)


class ByOut(InPlace):
    def forward(self, x): torch.mean(x, 0, out=self.mean); return self.layer(x)


class Elsewhere(InPlace):
    def forward(self, x): self.look(x); return self.layer(x)
    def look(self, x):
        with torch.no_grad(): self.mean.copy_(x.mean(0))


class Constant(InPlace):
    "Its buffer is set once, and read."
    def forward(self, x): y = x - self.mean; y.mul_(2); return self.layer(y + self.mean.clone().mul_(2))
    def reset(self): self.mean.zero_()


def loss_of(model, batch): return model(batch["x0"]).square().flatten(1).mean(1)


MADE_UP = {"x0": torch.linspace(-1, 2, 12).reshape(3, 4)}


@pytest.mark.parametrize("kind", [InPlace, Assigned, Counted, InRows, ByOut, Elsewhere])
def test_a_forward_that_writes_a_buffer_is_found_in_its_source(kind):
    model = nn.Sequential(nn.Linear(4, 4), kind())
    with pytest.raises(ValueError, match=rf"model: .* 1 \({kind.__name__}\) changes mean"): privacy.check_private(model)


@pytest.mark.parametrize("build, name", [
    (lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))), "_SpectralNorm"),
    (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4))), "spectral norm"),
    (lambda: nn.BatchNorm1d(4), "BatchNorm1d"), (lambda: nn.SyncBatchNorm(4), "SyncBatchNorm"),
    (lambda: nn.InstanceNorm1d(4, track_running_stats=True), "InstanceNorm1d")])
def test_known_kinds_are_found(build, name):
    with pytest.raises(ValueError, match=f"model: .*{name}"): privacy.check_private(build())


@pytest.mark.parametrize("how, name", [("hidden", "mean"), ("replaced", "mean"), ("parameter", "frozen"), ("new", "seen")])
def test_what_a_source_hides_a_pass_shows_and_the_model_is_as_before(how, name):
    model = nn.Sequential(nn.Linear(4, 4), Centred(how)).eval()
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"model: .* 1 \(Centred\) changes 1.{name}"):
        privacy.check_private(model, loss_of, MADE_UP)
    assert before.keys() == model.state_dict().keys() and not model.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("how", ["hidden", "replaced", "parameter", "new"])
@pytest.mark.parametrize("summed", [privacy.ghost_clipped_sum, dpdm.by_layer_clipped_sum])
def test_no_gradient_is_released_after_a_pass_that_stored_something(how, summed):
    model = nn.Sequential(nn.Linear(4, 4), Centred(how)).train()
    with pytest.raises(ValueError, match="stores nothing, but it changed 1."):
        dpdm.private_gradients(model, loss_of, MADE_UP, 1.0, PLAN, privacy.public_generator(0), summed=summed)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_constant_buffers_are_fine():
    for model in (Constant(), nn.Sequential(Centred("not"), nn.LayerNorm(4)), dpdm.build(replace(dpdm.DIGITS, public=True))):
        assert privacy.check_private(model) is model
    assert privacy.check_private(Constant(), loss_of, MADE_UP)
    sums = [summed(Constant(), loss_of, MADE_UP, 1.0)[0] for summed in (privacy.clipped_sum, privacy.ghost_clipped_sum)]
    assert all(len(found) == 2 for found in sums)


def test_training_refuses_such_a_model_before_anything_is_paid(tmp_path, monkeypatch):
    whole = dpdm.build
    class Listening(nn.Module):
        def __init__(self, inner): super().__init__(); self.inner, self.centre = inner, Centred("hidden")
        def forward(self, x, *more, **words): self.centre(x.flatten(1)[:, :4]); return self.inner(x, *more, **words)
    def listening(config):
        model = whole(config)
        model.network = Listening(model.network)
        return model
    monkeypatch.setattr(dpdm, "build", listening)
    with pytest.raises(ValueError, match="network.centre .*Centred.* changes network.centre.mean"):
        dpdm.train(SHORT, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_classifier_that_stores_pictures_is_refused_before_anything_is_paid(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "classifier", lambda *_, **__: nn.Sequential(nn.Flatten(), nn.Linear(64, 4), Centred("hidden")))
    batch = {name: value[:50] % 4 if name == "class_label" else value[:50] for name, value in digits("train").tensors.items()}
    with Ledger.open(tmp_path / "ledger.json", Mechanism(50, 0.5, 5.0, 1e-3, 5)) as ledger:
        with pytest.raises(ValueError, match="Centred"): evidence.fit_private_classifier("linear", batch, 4, ledger)
        assert ledger.taken == 0


# ---- what is no number is no privacy


@pytest.mark.parametrize("value", [math.nan, -1e-9, -1.0, -math.inf])
def test_what_is_no_divergence_never_becomes_an_epsilon(value):
    rdp = torch.full((5,), math.inf, dtype=torch.float64)
    rdp[3], orders = value, [1.5, 2, 4, 8, 16]
    with pytest.raises(ValueError, match=f"rdp: .* got {value} at order 8"): privacy.epsilon_from_rdp(rdp, orders, 1e-5)
    rdp[3] = 0.1
    assert privacy.epsilon_from_rdp(rdp, orders, 1e-5)[1] == 8  # one finite order is enough
    assert privacy.epsilon_from_rdp(rdp[:3], orders[:3], 1e-5)[0] == math.inf
    for wrong in (0.5, 1.0, math.nan, -3.0):
        with pytest.raises(ValueError, match="orders"): privacy.epsilon_from_rdp(torch.zeros(2), [wrong, 2], 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, 1e200])
def test_no_function_makes_privacy_of_nonsense(bad):
    step = lambda **words: privacy.epsilon_spent(**{"q": 0.5, "noise_multiplier": 2.0, "steps": 5, "delta": 1e-5} | words)
    noise = lambda **words: privacy.noise_multiplier_for(**{"target_epsilon": 1.0, "q": 0.5, "steps": 5, "delta": 1e-5} | words)
    sums = {"weight": torch.zeros(3)}
    for name, call in (("noise_multiplier", lambda: step(noise_multiplier=bad)), ("q", lambda: step(q=bad)),
                       ("delta", lambda: step(delta=bad)), ("noise_multiplier", lambda: privacy.gaussian_epsilon(bad, 5, 1e-5)),
                       ("delta", lambda: privacy.gaussian_epsilon(2.0, 5, bad)), ("delta", lambda: noise(delta=bad)),
                       ("q", lambda: noise(q=bad)), ("noise_multiplier", lambda: Mechanism(noise_multiplier=bad)),
                       ("noise_multiplier", lambda: privacy.subsampled_gaussian_rdp(0.5, bad, [2.0])),
                       ("noise_multiplier", lambda: privacy.noisy_mean(sums, 1.0, bad, 5, privacy.public_generator(0)))):
        with pytest.raises(ValueError, match=f"{name}: expected"): call()
    if bad != 1e200:
        for name, call in (("steps", lambda: step(steps=bad)), ("target_epsilon", lambda: noise(target_epsilon=bad)),
                           ("tolerance", lambda: noise(tolerance=bad)), ("steps", lambda: Mechanism(steps=bad)),
                           ("steps", lambda: privacy.gaussian_epsilon(2.0, bad, 1e-5)),
                           ("clip", lambda: privacy.clip_factors(torch.ones(1), bad)),
                           ("expected_batch", lambda: privacy.noisy_mean(sums, 1.0, 1.0, bad, privacy.public_generator(0)))):
            with pytest.raises(ValueError, match=f"{name}: expected"): call()
    factors = privacy.clip_factors(torch.tensor([bad, 0.5, -0.5]), 1.0)
    assert ((factors >= 0) & (factors <= 1)).all() and factors[1] == 1 and factors[2] == 0


def test_half_a_step_has_no_price(tmp_path):
    for call in (lambda: privacy.epsilon_spent(0.5, 2.0, 2.5, 1e-5), lambda: privacy.gaussian_epsilon(2.0, 2.5, 1e-5),
                 lambda: PLAN.epsilon(2.5), lambda: Ledger.open(tmp_path / "ledger.json", PLAN).record(1.5)):
        with pytest.raises(ValueError, match="steps: expected a whole number, got [12].5"): call()
    assert Ledger.read(tmp_path / "ledger.json").taken == 0


@MANY
@given(st.floats(1e-300, 1), st.floats(1e-3, 1e12), st.integers(0, 10**7), st.floats(1e-300, 0.9))
def test_no_setting_gives_nan(q, noise, steps, delta):
    for accountant in ("rdp", "rdp_wide"): assert privacy.epsilon_spent(q, noise, steps, delta, accountant) >= 0
    assert privacy.gaussian_epsilon(noise, steps, delta) >= 0
    assert (privacy.subsampled_gaussian_rdp(q, noise, [1.001, 2.0, 500.0]) >= 0).all()


def test_the_smaller_of_two_bounds_is_stated(monkeypatch):
    pytest.importorskip("opacus")
    for q, noise, steps in ((0.001, 20.0, 1), (0.001, 500.0, 2000), (0.07, 20.0, 1), (0.07, 500.0, 100),
                            (0.5, 500.0, 100), (1.0, 500.0, 1), (0.07, 2.5, 100)):
        for delta in (1e-5, 1e-9):
            both = [privacy.epsilon_spent(q, noise, steps, delta, name) for name in ("prv", "rdp_wide")]
            assert both[0] <= both[1], (q, noise, steps, delta)
    noise = privacy.noise_multiplier_for(0.006, 0.07, 100, 1e-5, "prv")  # prv alone cannot prove less than 0.01
    assert privacy.epsilon_spent(0.07, noise, 100, 1e-5, "prv") <= 0.006
    for answer in (math.nan, -0.5, math.inf):  # whatever comes back, the other bound holds
        monkeypatch.setattr("opacus.accountants.PRVAccountant.get_epsilon", lambda *_, **__: answer)
        privacy._prv_epsilon.cache_clear()
        assert privacy.epsilon_spent(0.07, 2.5, 100, 1e-5, "prv") == privacy.epsilon_spent(0.07, 2.5, 100, 1e-5, "rdp_wide")
    privacy._prv_epsilon.cache_clear()
