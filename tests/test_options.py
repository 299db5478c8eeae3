"""Every option of every command, with values that nobody should type: one line that names it, before the work."""
import dataclasses
import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from extras import need

need("train", "data", "plots")

import pytest
import torch

from diffusion_papers import __main__ as program
from diffusion_papers import dfno, genie, i2sb
from diffusion_papers.evidence import genie as genie_evidence
from diffusion_papers.workbench import page, scale, timing
from diffusion_papers.workbench.checks import check_fields, check_seed
from diffusion_papers.workbench.configs import Config
from diffusion_papers.workbench.registry import COMMANDS, Demonstration, Hook, UnfinishedPaper, evidence, in_the_making, paper, papers

PAPERS = tuple(papers())
SMALL = {"genie": {"diffusion.mlp.width": 8, "diffusion.mlp.blocks": 1}, "dfno": {"diffusion.mlp.width": 8}, "i2sb": {"film.width": 8},
         "dpdm": {"perceptron.width": 8, "public": True}, "ddo": {"network.width": 4, "network.modes": 2},
         "ldeq": {"data": "noise", "size": 32, "depth": 2, "width": 4, "increment": 4, "features": 4, "pool": 8},
         "ediffi": {"network.width": 32, "network.head_width": 16, "network.multipliers": (1,), "network.blocks": (1,), "network.attention": (16,)},
         "odise": {"data": "noise", "points": 16, "generator.queries": 4, "generator.layers": 1}}
HUGE = "1" + 20 * "0"
WRONG = {  # kind of an option -> values that none of that kind can have
    int: ("text", "-1", HUGE, "nan", "inf", "0.5", "", "(1, 2.5)", "{}"), float: ("text", "nan", "-inf", "1e999", "", "(1,)", "true"),
    bool: ("text", "2", "", "()"), tuple: ("((1, 2), 3)", "{}", "1j", "(1, None)", HUGE), str: ()}


def run(capsys, *words):
    "Exit code, what was printed, and the lines of the error stream."
    try: code = program.main(list(map(str, words)))
    except SystemExit as stop: code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, words, name):
    "Refused in exactly one line, that names the option."
    code, _, err = run(capsys, *words)
    lines = [line for line in err.splitlines() if "error:" in line]
    assert code in (1, 2) and len(lines) == 1 and name.lower() in lines[0].lower() and "Traceback" not in err, f"{words}\n{err}"


def fields_of(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Config): yield from fields_of(value, f"{prefix}{field.name}.")
        else: yield prefix + field.name, type(value)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    "Files are written to a folder of the test's; the list of papers is read once."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "papers", functools.cache(papers))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "A small model of each paper."
    folder = tmp_path_factory.mktemp("models")
    for slug in PAPERS:
        module = paper(slug)
        module.save_model(folder / f"{slug}.safetensors", module.build(module.CONFIGS["cpu"].override(**SMALL[slug])))
    return folder


@pytest.mark.parametrize("slug", PAPERS)
def test_every_field_of_a_configuration_refuses_what_it_cannot_be(slug, capsys, monkeypatch):
    module = paper(slug)
    monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("the training began"))
    monkeypatch.setattr(program, "papers", lambda offering="CONFIGS": {slug: "one of them"})  # a parser of one paper is made faster
    monkeypatch.delattr(module, "unmeasured", raising=False)
    public = ["--i-know-data-are-public"] if hasattr(module, "PRIVATE") else []
    for number, (name, kind) in enumerate(fields_of(module.CONFIGS["cpu"])):
        values = WRONG[kind]
        for text in {values[number % len(values)], values[(number + 3) % len(values)]} if values and name != "public" else ():
            refused(capsys, ["train", slug, *public, "--set", f"{name}={text}"], name.split(".")[-1])


@pytest.mark.parametrize("action", ["sample", "evaluate"])
@pytest.mark.parametrize("slug", PAPERS)
def test_every_argument_refuses_what_it_cannot_be(slug, action, capsys, models):
    function = getattr(paper(slug), action)
    for name, parameter in program.settable(function).items():
        kinds = program.kinds_of(parameter)
        kind = int if tuple in kinds and int in kinds else next(kind for kind in kinds if kind in WRONG)
        for text in WRONG[kind]: refused(capsys, [action, slug, "--model", models / f"{slug}.safetensors", "--set", f"{name}={text}"], name)


@pytest.mark.parametrize("words, name", [
    ("sample genie --set class_label=text", "class_label"), ("sample genie --set class_label=99", "class_label"),
    ("sample genie --set exponent=1e20", "exponent"), ("sample genie --set solver=rk4", "solver"),
    ("sample dpdm --set size=0", "size"), ("sample dpdm --set solver=walk", "solver"), ("sample ddo --set points=3", "points"),
    ("sample i2sb --set data_path=nowhere", "data_path"), ("sample i2sb --set calls=100000", "calls"), ("sample dfno --set times=3", "times"),
    ("evaluate genie --set repeats=0", "repeats"), ("evaluate genie --set calls=five", "calls"),
    ("evaluate genie --set calls=(5,2.5)", "calls"), ("evaluate genie --set calls=()", "calls"),
    ("evaluate genie --set calls=5 solvers=f_pndm", "calls"), ("evaluate genie --set exponents=x", "exponents"),
    ("evaluate genie --set exponents=0", "exponents"), ("evaluate genie --set solvers=rk4", "solvers"), ("evaluate dfno --set calls=0", "calls"),
    ("evaluate dfno --set data_path=nowhere", "data_path"), ("evaluate i2sb --set calls=(1,-1)", "calls"),
    ("evaluate dpdm --set solvers=walk", "solvers"), ("evaluate dpdm --set kinds=tree", "kinds"), ("evaluate dpdm --set epochs=0", "epochs"),
    ("evaluate ddo --set points=33", "points"), ("evaluate ddo --set points=()", "points"),
    ("train genie --set seed=-1", "seed"), ("train genie --set evaluated=1", "evaluated"), ("train genie --set nothing=1", "nothing"),
    ("train genie --set diffusion.unet.multipliers=()", "multipliers"), ("train genie --set diffusion.mlp.shape=(1,'a')", "shape"),
    ("train dfno --set teacher=nobody", "teacher"), ("train dfno --set kept=()", "kept"), ("train dfno --set solver_steps=3", "solver_steps"),
    ("train i2sb --set film.width=9", "width"), ("train i2sb --set interval=7", "interval"), ("train dpdm --set public=true", "public"),
    ("train ddo --set data_path=nowhere", "data_path"), ("train ddo --set network.width=1048577", "width"),
    ("train genie --workers -1", "--workers"), ("train genie --workers x", "--workers"), (f"train genie --workers {HUGE}", "--workers"),
    ("train genie --preset huge", "--preset"), ("train genie --device tpu", "--device"), ("train genie --folder file", "--folder"),
    ("train genie --output model.pt", "--output"), ("train dpdm --workers 2", "--workers"),
    ("sample genie --output x.jpg", "--output"), ("sample genie --output folder", "--output"), ("sample genie --output file/x.png", "--output"),
    ("evaluate genie --output rows.csv", "--output"), ("evaluate genie --output folder", "--output"),
    ("restore i2sb x.png --task jpeg --output x.jpg", "--output"), ("demo --output page.txt", "--output"), ("demo --output folder", "--output"),
    ("demo gan", "paper"), ("sample genie --model folder", "--model"), ("sample genie --model file", "--model"),
    ("sample genie --model text.safetensors", "--model"), ("evaluate genie --model nowhere.safetensors", "--model"),
    ("sample genie --device tpu", "--device"), ("bench genie --device tpu", "--device"), ("scale genie --device tpu", "--device")])
def test_wrong_values_and_places_are_named(words, name, capsys, tmp_path):
    (tmp_path / "folder").mkdir()
    for file in ("file", "text.safetensors"): (tmp_path / file).write_text("text")
    refused(capsys, words.split(), name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", ["sample genie", "evaluate genie", "train genie", "bench genie", "restore i2sb x.png --task jpeg"])
def test_a_gpu_that_is_not_there_is_missed_by_every_command(words, capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    refused(capsys, [*words.split(), "--device", "cuda"], "device")


@pytest.mark.parametrize("slug", PAPERS)
def test_another_papers_model_is_refused(slug, capsys, models):
    refused(capsys, ["sample", slug, "--model", models / f"{PAPERS[PAPERS.index(slug) - 1]}.safetensors"], "--model")


@pytest.mark.parametrize("options, name", [
    ("tile=0", "tile"), ("tile=1000000000000000000", "tile"), ("tile=40", "tile"), ("overlap=64", "overlap"), ("batch_size=0", "batch_size"),
    ("piece=-1", "piece"), ("calls=0", "calls"), ("calls=100000", "calls"), (f"seed={HUGE}", "seed"), ("seed=-1", "seed"), ("device=cpu", "device")])
def test_restore_refuses_wrong_values(options, name, capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    refused(capsys, ["restore", "i2sb", "x.png", "--task", "jpeg", "--set", options], name)


def test_restore_computes_where_it_is_told(capsys, monkeypatch):
    seen = {}
    def restore(picture, task, mask=None, **options): seen.update(options)
    monkeypatch.setitem(i2sb.HOOKS, "restore", Hook(restore))
    assert run(capsys, "restore", "i2sb", "x.png", "--task", "jpeg", "--device", "cuda")[0] == 0 and seen["device"] == "cuda"


def test_help_offers_only_what_can_be_typed(capsys):
    for slug in PAPERS:
        for action in ("sample", "evaluate"):
            out = run(capsys, action, slug, "--help")[1]
            assert not {"times", "callback", "x_T", "data", "teacher"} & {line.strip().split(":")[0].split("=")[0] for line in out.splitlines()}


def test_whole_trajectories_are_drawn_too(capsys, models):
    pytest.importorskip("PIL.Image")
    code, out, _ = run(capsys, "sample", "dfno", "--model", models / "dfno.safetensors", "--set", "count=2", "whole=true")
    assert code == 0 and "2 samples of shape (4, 1, 8, 8)" in out


def test_seeds_and_fields_are_checked_from_python_too():
    with pytest.raises(ValueError, match="seed"): check_seed(2**63)
    with pytest.raises(ValueError, match="seed: expected a whole number, got 1.5"): check_seed(1.5)
    with pytest.raises(ValueError, match="seed"): genie.sample(genie.build(genie.CONFIGS["cpu"]), seed=-1)
    with pytest.raises(ValueError, match="b: expected"): check_fields(type("C", (), {"a": 1, "b": (1, 5)}), {"a": (0, 1), "b": (0, 4)})


def test_no_space_left_keeps_the_picture_that_was_there(capsys, monkeypatch, models, tmp_path):
    pytest.importorskip("PIL.Image")
    (tmp_path / "samples.png").write_text("a picture")
    def full(self, content): raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    refused(capsys, ["sample", "genie", "--model", models / "genie.safetensors", "--set", "calls=2", "count=1"], "samples.png")
    assert (tmp_path / "samples.png").read_text() == "a picture" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", ["{", "[]", "\x80", ""])
def test_a_damaged_configuration_of_a_run_is_named(content, capsys, tmp_path):
    pytest.importorskip("accelerate")
    (tmp_path / "run" / "network").mkdir(parents=True)
    (tmp_path / "run" / "network" / "run.safetensors").write_text("a run")
    (tmp_path / "run" / "config.json").write_text(content, encoding="latin-1")
    refused(capsys, ["train", "genie", "--folder", "run", "--resume"], "config.json")


# ---- what commands say of errors

@pytest.mark.parametrize("error, code, told", [
    (KeyboardInterrupt(), 130, "interrupted"), (MemoryError(), 1, "smaller count"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "smaller count"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), 1, "smaller count"), (ValueError("two\nlines"), 1, "error: two lines"),
    (OSError(28, "No space left on device"), 1, "No space left")])
def test_what_a_user_can_mend_is_one_line(error, code, told, capsys, monkeypatch):
    def fail(*_, **__): raise error
    monkeypatch.setattr(genie, "load_pretrained", fail)
    found, _, err = run(capsys, "sample", "genie")
    assert found == code and told in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("kind", [AttributeError, KeyError, TypeError, NotImplementedError, AssertionError])
def test_a_fault_of_the_program_is_shown_with_its_trace(kind, capsys, monkeypatch):
    def fail(*_, **__): raise kind("odd")
    monkeypatch.setattr(genie, "load_pretrained", fail)
    code, _, err = run(capsys, "sample", "genie")
    assert code == 1 and "Traceback" in err and "fault of the program" in err.splitlines()[-1]


# ---- unfinished papers

HALF = '''"""Half a paper."""
CONFIGS = {}
def sample(model, count: int=4): pass
'''
PROGRAM = """
import sys
from diffusion_papers.__main__ import main
for words in sys.stdin.read().splitlines():
    try: code = main(words.split())
    except SystemExit as stop: code = stop.code
    print(f"[{words}] {code}", flush=True)
    print(f"[{words}]", file=sys.stderr, flush=True)
"""


def test_unfinished_papers_break_nobody_else(tmp_path):
    shutil.copytree(Path(program.__file__).parent, tmp_path / "diffusion_papers", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "diffusion_papers" / "half.py").write_text(HALF)
    (tmp_path / "diffusion_papers" / "broken.py").write_text('"""A broken paper."""\nCONFIGS = {}\nimport nothing_of_this_name\n')
    words = ["list", "sample half", "train half", "evaluate half --help", "sample broken", "demo half", "scale half", "results half", "bench half",
             "sample genie --set solver=rk4", "train half --help"]
    done = subprocess.run([sys.executable, "-c", PROGRAM], input="\n".join(words), capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "Traceback" not in done.stderr, done.stderr
    codes = dict(line[1:].split("] ") for line in done.stdout.splitlines() if line.startswith("["))
    assert codes["list"] == "0" and done.stdout.count("unfinished: lacks ABOUT, build, train") == 1 and "broken cannot be imported (ModuleNotFound" in done.stdout
    assert "offers no load_model, no load_pretrained yet" in done.stderr and "paper half offers no demonstrate yet" in done.stderr
    assert [codes[each] for each in words[1:]] == ["1", "1", "0", "1", "1", "1", "1", "1", "1", "0"]
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 8


def test_the_contract_is_asked_by_every_command(monkeypatch, capsys):
    for command, needs in COMMANDS.items():
        with monkeypatch.context() as patch:
            patch.delattr(evidence("dfno") if hasattr(evidence("dfno"), needs[-1]) and not hasattr(paper("dfno"), needs[-1]) else paper("dfno"), needs[-1])
            with pytest.raises(UnfinishedPaper, match=f"dfno offers no {needs[-1]} yet"): paper("dfno", command)
            refused(capsys, [command, "dfno"], f"paper dfno offers no {needs[-1]} yet")


def test_a_command_of_a_papers_own_is_asked_for_too(monkeypatch, capsys):
    with pytest.raises(UnfinishedPaper, match="paper dfno has no command restore"): paper("dfno", "restore")
    with monkeypatch.context() as patch:
        patch.setattr(paper("i2sb"), "HOOKS", {})
        refused(capsys, ["restore", "i2sb", "x.png", "--task", "jpeg"], "paper i2sb has no command restore")


def _module(demonstrate): module = ModuleType("one"); module.demonstrate = demonstrate; return module


def _shown(holds): return lambda: Demonstration("A paper", "A claim.", holds, "a verdict", [], {})


def patched(monkeypatch, modules, find):
    "Other papers, whose evidence is their module."
    for name in ("paper", "evidence"): monkeypatch.setattr(page, name, find)
    monkeypatch.setattr(page, "papers", lambda: modules)
    monkeypatch.setattr(page, "lacking", lambda name, command: [] if hasattr(modules[name], "demonstrate") else ["demonstrate"])


def _crash(): raise AttributeError("module has no attribute 'x'")


def test_a_crashed_demonstration_is_no_refuted_claim(monkeypatch, tmp_path, capsys):
    broken = UnfinishedPaper("paper broken cannot be imported (SyntaxError: invalid)")
    modules = {"holds": _module(_shown(True)), "fails": _module(_shown(False)), "crash": _module(_crash), "half": ModuleType("half"),
               "wrong": _module(lambda: None), "broken": None}
    def find(name):
        if modules[name] is None: raise broken
        return modules[name]
    patched(monkeypatch, modules, find)
    code, out, err = run(capsys, "demo", "--output", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert code == 1 and "demonstration failed" in err
    assert text.count('class="failed"') == 3 and text.count("Does not hold") == 1 == text.count('class="fails"') and text.count("<td>failed") == 3
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert "holds " in rows["holds"] and "does not hold" in rows["fails"] and "failed" in rows["crash"] and "AttributeError" in rows["crash"]
    assert "skipped" in rows["half"] and "offers no demonstrate yet" in rows["half"]
    for name in ("crash", "wrong", "broken"): modules.pop(name)
    assert run(capsys, "demo", "--output", tmp_path / "page.html")[0] == 0


def test_a_demonstration_that_is_stopped_leaves_what_was_shown(monkeypatch, tmp_path, capsys):
    def stop(): raise KeyboardInterrupt
    modules = {"first": _module(_shown(True)), "second": _module(stop)}
    patched(monkeypatch, modules, modules.get)
    assert run(capsys, "demo", "--output", tmp_path / "page.html")[0] == 130
    assert "a verdict" in (tmp_path / "page.html").read_text() and "not run yet" in (tmp_path / "page.html").read_text()


# ---- what is asked for before the work

TINY = ["loss=l1", "diffusion.unet.width=32", "diffusion.unet.blocks=1", "diffusion.unet.multipliers=(1,)", "diffusion.unet.attention=()",
        "trajectories=2", "solver_steps=4", "kept=(0,2,4)", "modes=1", "training.steps=1", "training.batch_size=1"]


def test_a_student_without_pictures_to_compare_with_is_trained_and_not_measured(capsys, tmp_path):
    pytest.importorskip("accelerate")
    code, out, err = run(capsys, "train", "dfno", "--preset", "cifar10", "--device", "cpu", "--folder", "run", "--set", *TINY)
    assert code == 0 and (tmp_path / "run" / "model.safetensors").is_file(), err
    assert "will not be measured" in err and "data_path" in err and "was not measured" in out and "evaluate dfno --model" in out
    assert json.loads((tmp_path / "run" / "model.json").read_text())["metrics"] == []
    refused(capsys, ["evaluate", "dfno", "--model", "run/model.safetensors", "--set", "count=2"], "data_path")


def test_wrong_pictures_are_refused_before_the_first_step(capsys, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(dfno, "train", lambda *_, **__: pytest.fail("the training began"))
    for folder in ("empty", "nowhere"):
        code, _, err = run(capsys, "train", "dfno", "--preset", "cifar10", "--set", *TINY, f"diffusion.data_path={folder}")
        assert code == 1 and folder in err


def test_an_error_while_measuring_is_no_failure_of_the_training(capsys, monkeypatch, models):
    def fail(model): raise ValueError("no such data")
    model = genie.load_model(models / "genie.safetensors")
    monkeypatch.setattr(genie, "train", lambda *_, **__: model); monkeypatch.setattr(genie, "evaluate", fail)
    code, out, _ = run(capsys, "train", "genie", "--folder", "run")
    assert code == 0 and "it was not measured: no such data" in out and Path("run/model.safetensors").is_file()


# ---- tables that keep what is done

def test_a_table_goes_on_where_it_was_stopped(monkeypatch, tmp_path, capsys):
    asked, stop = [], [True]
    def part(name):
        asked.append(name)
        if stop[0] and name == "second": raise KeyboardInterrupt
        return [{"what": name, "speed": 1.0}] * (2 if name == "third" else 1)
    parts = {name: functools.partial(part, name) for name in ("first", "second", "third")}
    monkeypatch.setattr(genie_evidence, "benchmark", lambda device: parts)
    monkeypatch.setattr(timing, "table_path", lambda name: tmp_path / f"{name}.json")
    (tmp_path / "genie_cpu.json").write_text("an earlier table")
    bench = lambda: run(capsys, "bench", "genie", "--device", "cpu")
    code, out, _ = bench()
    assert code == 130 and "first" in out and (tmp_path / "genie_cpu.json").read_text() == "an earlier table"
    assert json.loads((tmp_path / "genie_cpu.unfinished.json").read_text())["unfinished"] == ["second", "third"]
    stop[0] = False
    assert bench()[0] == 0 and asked == ["first", "second", "second", "third"]
    stored = json.loads((tmp_path / "genie_cpu.json").read_text())
    assert [row["what"] for row in stored["rows"]] == ["first", "second", "third", "third"] and {"command", "machine"} <= stored.keys()
    assert not (tmp_path / "genie_cpu.unfinished.json").exists()
    asked.clear(); bench()
    assert asked == ["first", "second", "third"]  # a finished table is made anew


def test_a_table_of_other_code_or_another_machine_starts_anew(monkeypatch, tmp_path):
    def stop(): raise KeyboardInterrupt
    asked = []
    first = lambda: (asked.append("first"), {"what": "first"})[1]
    for change in ("", "command", "code", "machine", "damage"):
        with pytest.raises(KeyboardInterrupt): timing.measure(tmp_path / "t.json", {"first": first, "second": stop}, "make")
        kept = tmp_path / "t.unfinished.json"
        if change == "damage": kept.write_text("{")
        elif change: kept.write_text(json.dumps(json.loads(kept.read_text()) | {change: "other"}))
    with pytest.raises(KeyboardInterrupt): timing.measure(tmp_path / "t.json", {"first": first, "second": stop}, "make")
    assert len(asked) == 5  # the first start, and one after each change


def test_a_scale_goes_on_too(monkeypatch, tmp_path, capsys):
    asked, stop = [], [True]
    def attempt(slug, preset, device):
        asked.append(preset)
        if stop[0] and len(asked) == 2: raise KeyboardInterrupt
        return {"preset": preset, "on": device, "parameters": 1}
    monkeypatch.setattr(scale, "try_alone", attempt)
    monkeypatch.setattr(scale, "table_path", lambda name: tmp_path / f"{name}.json")
    assert run(capsys, "scale", "dfno", "--device", "cpu")[0] == 130
    stop[0] = False
    assert run(capsys, "scale", "dfno", "--device", "cpu")[0] == 0
    presets = list(dfno.CONFIGS)
    assert asked == presets[:2] + presets[1:]
    assert [row["preset"] for row in json.loads((tmp_path / "dfno_scale_cpu.json").read_text())["rows"]] == presets


def test_every_benchmark_is_a_dictionary_of_parts(monkeypatch):
    for slug in PAPERS:
        if in_the_making(paper(slug)): continue
        module = paper(slug) if hasattr(paper(slug), "benchmark") else evidence(slug)
        assert inspect.signature(module.benchmark).return_annotation.__origin__ is dict
    monkeypatch.setattr(evidence("dfno"), "paired", lambda ours, peer, **_: {"seconds": 1.0})
    names = evidence("dfno")._bench_blocks("cpu")
    assert [part()["what"] for part in names.values()] == list(names)
