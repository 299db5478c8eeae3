"""What careless use must not break: models that remember, second names, numbers of other libraries, outputs over inputs, a key pressed too early."""
import json
import math
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from torch import nn

from extras import need

need("train", "data")

from PIL import Image

from diffusion_papers import dpdm, genie
from diffusion_papers.__main__ import main
from diffusion_papers.workbench.checks import check_range
from diffusion_papers.workbench.results import load_results, run_experiments, write_json
from diffusion_papers.workbench.files import check_output, read_json, whole_file
from diffusion_papers.topics.privacy import Ledger, Mechanism, check_private, epsilon_spent, gaussian_epsilon
from diffusion_papers.core.training import TrainingConfig, claim_folder, free_fields

# ---- modules that remember what they saw


class Remembers(nn.Module):
    "Subtracts something that depends on earlier or other examples; subclasses say what."
    def __init__(self):
        super().__init__()
        self.layer, self.mean, self.seen, self.notes = nn.Linear(3, 1), torch.zeros(3), [], {}
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("buffer", torch.zeros(3))


class InAttribute(Remembers):
    def forward(self, x): self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0); return self.layer(x - self.mean)


class InList(Remembers):
    def forward(self, x): self.seen.append(x.detach()); return self.layer(x - torch.cat(self.seen).mean(0))


class InDictionary(Remembers):
    def forward(self, x): self.notes["mean"] = x.detach().mean(0); return self.layer(x - self.notes["mean"])


class InFrozen(Remembers):
    def forward(self, x): self.frozen.data.lerp_(x.detach().mean(0), 0.1); return self.layer(x - self.frozen)


class ByAnotherName(Remembers):
    def forward(self, x): kept = self.buffer; kept.lerp_(x.detach().mean(0), 0.1); return self.layer(x - kept)


class WithoutSelf(Remembers):
    def forward(this, x): this.buffer.lerp_(x.detach().mean(0), 0.1); return this.layer(x - this.buffer)


class HiddenInAttribute(Remembers):
    def forward(self, x): vars(self)["mean"].lerp_(x.detach().mean(0), 0.1); return self.layer(x - self.mean)


class HiddenInList(Remembers):
    def forward(self, x): list.append(self.seen, float(x.detach().mean())); return self.layer(x)


class InClosure(Remembers):
    def __init__(self):
        super().__init__()
        mean = torch.zeros(3)
        def centred(x): mean.lerp_(x.detach().mean(0), 0.1); return x - mean
        self.centred = centred

    def forward(self, x): return self.layer(self.centred(x))


class Mixes(Remembers):
    def forward(self, x): return self.layer(x - x.mean(0))


class ReadsAlone(Remembers):
    "What looks like writing, and is none."
    def forward(self, x):
        kept = self.buffer.clone(); kept.add_(1); x = x + kept + self.mean.add(1); x.mul_(2); self.notes.get("mean")
        local = []; local.append(x)
        return self.layer(local[0])


def squares(model, batch): return model(batch["x0"])[:, 0].square()


NOBODY = {"x0": torch.linspace(-1, 2, 9).reshape(3, 3).sin()}


@pytest.mark.parametrize("kind, field", [(InAttribute, "mean"), (InList, "seen"), (InDictionary, "notes"), (InFrozen, "frozen"),
                                         (ByAnotherName, "buffer"), (WithoutSelf, "buffer")])
def test_whatever_a_forward_writes_is_found_in_its_source(kind, field):
    with pytest.raises(ValueError, match=rf"1 \({kind.__name__}\) changes {field}"): check_private(nn.Sequential(nn.Linear(3, 3), kind()))


@pytest.mark.parametrize("kind, told", [(HiddenInAttribute, "changes 0.mean"), (HiddenInList, "changes 0.seen.0"),
                                        (InClosure, "depends on what else"), (Mixes, "depends on what else")])
def test_a_pass_shows_what_is_kept_anywhere(kind, told):
    model = nn.Sequential(kind())
    assert check_private(model) is model  # its source does not tell
    with pytest.raises(ValueError, match=told): check_private(model, squares, NOBODY)


def test_reading_is_no_writing():
    for model in (ReadsAlone(), nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 1))):
        assert check_private(model, squares, NOBODY) is model


# ---- one ledger has one name, and plain numbers


def test_a_ledger_with_a_second_name_is_refused_and_nothing_is_paid(tmp_path):
    path, plan = tmp_path / "ledger.json", Mechanism(steps=9)
    with Ledger.open(path, plan) as ledger:
        ledger.record(2)
        os.link(path, tmp_path / "second.json")
        for name in ("ledger.json", "second.json"):
            with pytest.raises((ValueError, RuntimeError), match="hard link|in use"): Ledger.open(tmp_path / name, plan)
        ledger.record()  # the run itself goes on
    assert Ledger.read(path).taken == 3
    os.remove(tmp_path / "second.json")
    with Ledger.open(path, plan) as ledger: assert ledger.taken == 3


def test_a_ledger_stays_where_it_is_when_the_process_moves(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Ledger.open("ledger.json", Mechanism(steps=9)) as ledger:
        monkeypatch.chdir(tmp_path / "elsewhere")
        ledger.record(4)
    assert Ledger.read(tmp_path).taken == 4 and not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("field, value", [("examples", np.int64(1437)), ("examples", torch.tensor(1437)), ("q", np.float32(0.5)), ("q", torch.tensor(0.5)),
                                          ("noise_multiplier", np.float32(5.5)), ("steps", np.int64(500)), ("steps", 500.0)])
def test_numbers_of_other_libraries_are_written_as_plain_ones(field, value, tmp_path):
    for time in range(2):
        with Ledger.open(tmp_path / "ledger.json", Mechanism(**{field: value})) as ledger: ledger.record()
    assert Ledger.read(tmp_path).mechanism == Mechanism() and Ledger.read(tmp_path).taken == 2
    assert json.loads(json.dumps(TrainingConfig(steps=np.int64(5)).to_dict()))["steps"] == 5


@pytest.mark.parametrize("field, value", [("examples", 10.5), ("examples", True), ("large_delta", 1)])
def test_what_could_not_be_read_again_is_never_written(field, value, tmp_path):
    with pytest.raises(ValueError, match=field): Ledger.open(tmp_path / "ledger.json", Mechanism(**{field: value}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor])
def test_prices_are_computed_in_double_precision(number):
    found = gaussian_epsilon(number(2.0), 10, number(0.25)), epsilon_spent(number(0.5), number(2.0), 10, number(0.25))
    assert [type(value) for value in found] == [float, float]
    assert found == (gaussian_epsilon(2.0, 10, 0.25), epsilon_spent(0.5, 2.0, 10, 0.25))


def test_what_is_no_number_is_named():
    for value in ("5", None, 1j, [1, 2], torch.ones(2), np.ones(2)):
        with pytest.raises(TypeError, match="noise: expected a number"): check_range(value, "noise", 0)
    with pytest.raises(ValueError): check_range(math.nan, "noise", 0)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device")
def test_an_endless_file_is_no_ledger(capsys):
    assert main(["spent", "/dev/zero"]) == 1 and "there is no ledger" in capsys.readouterr().err


# ---- what is written replaces nothing that is needed


@pytest.mark.parametrize("name", ["a" * 246 + ".json", "ä" * 125 + ".json", "字" * 80 + ".json"])
def test_the_longest_names_are_written(name, tmp_path):
    write_json(check_output(tmp_path / name), {"a": 1})
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_what_cannot_take_a_file_is_refused_by_trying_and_left_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    os.symlink(tmp_path / "pipe.json", tmp_path / "link.json")
    os.symlink("loop.json", tmp_path / "loop.json")
    for name in ("pipe.json", "link.json", "loop.json", "a" * 300 + ".json", "a\0.json"):
        with pytest.raises(ValueError, match="^place: "): check_output(tmp_path / name, "place")
    with pytest.raises(OSError, match="no plain file"):
        with whole_file(tmp_path / "link.json") as unfinished: unfinished.write_text("x")
    assert (tmp_path / "pipe.json").is_fifo() and len(list(tmp_path.iterdir())) == 3
    if os.path.isdir("/proc/self"):
        with pytest.raises(ValueError, match="place: /proc/x.json cannot be written"): check_output("/proc/x.json", "place")


@pytest.mark.parametrize("words, kept", [
    ("train genie --folder . --output ledger.safetensors", "ledger.json"), ("train genie --folder . --output config.safetensors", "config.json"),
    ("train genie --folder new --output run.safetensors", "run.safetensors"), ("evaluate genie --output ledger.json", "ledger.json"),
    ("evaluate genie --model mine.safetensors --output mine.json", "mine.json"), ("restore i2sb in.png --task blur --output in.png", "in.png"),
    ("restore i2sb in.png --task blur --output link.png", "in.png"), ("restore i2sb in.png --task inpaint --mask mask.png --output mask.png", "mask.png")])
def test_an_output_spares_what_a_run_keeps_and_what_is_read(words, kept, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("in.png", "mask.png"): Image.new("L", (16, 16), 9).save(name)
    for name in ("ledger.json", "config.json", "run.safetensors", "mine.json"): (tmp_path / name).write_text("needed")
    os.symlink("in.png", "link.png")
    before = (tmp_path / kept).read_bytes()
    assert main(words.split()) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: --output: ") and told.count("\n") == 1 and (tmp_path / kept).read_bytes() == before


def test_an_output_spares_what_is_read_from_python_too(tmp_path):
    from diffusion_papers import i2sb
    Image.new("RGB", (16, 16)).save(tmp_path / "in.png")
    with pytest.raises(ValueError, match="output: .* is what it is made from"): i2sb.restore(tmp_path / "in.png", "blur", output=tmp_path / "in.png")


def test_a_grid_without_points_is_named():
    from diffusion_papers.topics import spectral
    for function in (spectral.cosine_transform, spectral.energy_spectrum, spectral.autocovariance, lambda u: spectral.resample(u, (4, 4))):
        with pytest.raises(ValueError, match="u: expected a grid with at least one point"): function(torch.zeros(2, 0, 8))


# ---- runs and results


def test_what_a_killed_private_run_left_half_written_is_cleared_away(tmp_path):
    config = dpdm.DIGITS.override(**{"training.steps": 2, "draws": 1, "perceptron.width": 16, "noise_multiplier": 8.0})
    (tmp_path / "run.safetensors.1.tmp").write_text("half"); (tmp_path / "ledger.json.1.tmp").write_text("half")
    dpdm.train(config, tmp_path, device="cpu")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_removed_first_stage_cannot_become_another_under_a_later_one(tmp_path):
    config = genie.CONFIGS["cpu"]
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "run.safetensors").write_text("a head for the network that was there")
    assert "diffusion" not in free_fields(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ValueError, match="another configuration: diffusion.mlp.width"):
        with claim_folder(tmp_path, config.override(**{"diffusion.mlp.width": 8}), resume=True): pass


@pytest.mark.parametrize("content", ["", "[]", "[" * 100000, "{}", '{"experiments": 3}', '{"experiments": [3]}', '{"experiments": [{}]}'])
def test_damaged_results_are_named_and_kept(content, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(content)
    for read in (lambda: load_results("genie", path), lambda: run_experiments("genie", [], {}, path)):
        with pytest.raises(ValueError, match=r"results.json is damaged"): read()
    assert path.read_text() == content
    if content[:1] == "[":
        with pytest.raises(ValueError, match="is damaged"): read_json(path)


def test_a_paper_that_ends_the_program_is_unfinished_and_a_demonstration_that_does_has_failed(tmp_path, monkeypatch):
    from diffusion_papers.workbench import page, registry
    module = types.ModuleType("diffusion_papers.odd")
    monkeypatch.setattr(registry, "papers", lambda *_: {"odd": "An odd paper."})
    def leave(*_): sys.exit("bye")
    made = types.ModuleType("diffusion_papers.evidence.odd")
    monkeypatch.setitem(sys.modules, "diffusion_papers.odd", module)
    monkeypatch.setitem(sys.modules, "diffusion_papers.evidence.odd", made)
    with monkeypatch.context() as patch:
        patch.setattr(registry.importlib, "import_module", leave)
        with pytest.raises(registry.UnfinishedPaper, match="odd cannot be imported .SystemExit: bye"): registry.paper("odd")
    module.CONFIGS, made.demonstrate = None, leave
    with pytest.raises(registry.UnfinishedPaper, match="CONFIGS is no dictionary"): registry.paper("odd")
    module.CONFIGS = {}
    assert not page.write_demonstrations(tmp_path / "page.html", lambda line: None, ["odd"])
    assert "The program broke" in (tmp_path / "page.html").read_text()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_key_pressed_while_the_program_is_imported_prints_no_page():
    process = subprocess.Popen([sys.executable, "-m", "diffusion_papers", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore the key
    maps, waited = f"/proc/{process.pid}/maps", time.time() + 10
    while time.time() < waited and os.path.exists(maps) and "torch" not in open(maps).read(): time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130) and told.count("\n") <= 1 and "Traceback" not in told
