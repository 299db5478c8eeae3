"""What is written is written whole or not at all, is open to whom it should be, and what others wrote is read where that is safe."""
import ast
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from extras import need

need("train", "data")

from diffusion_papers import ddo, dpdm, genie, i2sb
from diffusion_papers.workbench.checkpoints import CheckpointError, load_checkpoint, load_foreign, load_into, save_checkpoint
from diffusion_papers.core.diffusion import DiffusionConfig, load_denoiser
from diffusion_papers.workbench.files import check_output, former_place, whole_file
from diffusion_papers.core.networks import authors_keys, authors_tensors, unet_config
from diffusion_papers.topics.operator_networks import operator_keys

ROOT = Path(__file__).resolve().parents[1]
SMALL = genie.CONFIGS["cpu"].override(**{
    "diffusion.mlp.width": 8, "diffusion.mlp.blocks": 1, "diffusion.training.steps": 3, "diffusion.training.checkpoint_every": 1,
    "diffusion.training.batch_size": 8, "head.steps": 1, "head.batch_size": 8})


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(folder): return {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


# whole, or not at all

SOURCES = sorted([*ROOT.glob("diffusion_papers/**/*.py"), *ROOT.glob("tools/*.py")])
WRITERS = {"write_text", "write_bytes", "save_file", "savefig", "imsave", "tofile", "memmap", "open_memmap", "to_csv", "savez"}


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "_modidx.py"], ids=lambda path: path.stem)
def test_nothing_is_written_past_whole_file(path):
    "Whatever writes says `unfinished`, the name under which `whole_file` hands out what becomes a file, or writes into a buffer."
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call): continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        told, module = ast.unparse(node), ast.unparse(node.func).split(".")[0]
        opens = name == "open" and any(isinstance(a, ast.Constant) and isinstance(a.value, str) and set(a.value) & set("wax") and set(a.value) <= set("rwabxt+") for a in node.args)
        writes = name in WRITERS or opens or name == "write" and module == "nbformat" or name == "save" and module in ("np", "numpy", "torch")
        assert not writes or "unfinished" in told or "buffer" in told or (path.stem, name) == ("files", "open"), f"{path.name}: {told}"


FULL = """
import resource, sys
from diffusion_papers.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))  # as a disk that is full: no write goes beyond
sys.exit(main(sys.argv[2:]))
"""


def on_a_full_disk(left, *words):
    "A command where no file may be larger than so many bytes."
    return subprocess.run([sys.executable, "-c", FULL, str(left), *map(str, words)], capture_output=True, text=True)


def test_a_full_disk_at_a_checkpoint_is_told_in_a_line_and_the_former_survives(tmp_path):
    genie.train(SMALL, tmp_path, device="cpu")
    run = tmp_path / "network" / "run.safetensors"
    run.unlink(); former_place(run).rename(run)  # two of three steps
    before = run.read_bytes()
    settings = ["--set", *(f"{name}={value}" for name, value in {
        "diffusion.mlp.width": 8, "diffusion.mlp.blocks": 1, "diffusion.training.steps": 3, "diffusion.training.checkpoint_every": 1,
        "diffusion.training.batch_size": 8, "head.steps": 1, "head.batch_size": 8}.items())]
    done = on_a_full_disk(8000, "train", "genie", "--device", "cpu", "--folder", tmp_path, "--resume", *settings)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(f"error: {run} cannot be written"), done.stderr
    assert "Traceback" not in done.stderr and run.read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp*")) and load_checkpoint(run)[1]["step"] == 2


def test_a_full_disk_leaves_pieces_and_pages_as_they_were(tmp_path):
    program = """
import resource, sys, torch
from diffusion_papers.workbench import page
from diffusion_papers.core.generation import generate
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
for write in (lambda: generate(lambda piece: {"x0": torch.zeros(len(piece), 500)}, 4, sys.argv[1] + "/samples", size=2, device="cpu"),
              lambda: page.write_demonstrations(sys.argv[1] + "/page.html", names=["genie"], say=print)):
    try: write()
    except OSError as error: print(error)
"""
    (tmp_path / "page.html").write_text("the page before")
    program = program.replace("for write", 'page.paper = lambda name: (_ for _ in ()).throw(ValueError("long " * 1000))\nfor write')
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert done.stdout.count("cannot be written") == 2, done.stdout + done.stderr
    assert (tmp_path / "page.html").read_text() == "the page before"
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"about.json", "about.lock"}


@pytest.mark.parametrize("links", [True, False])
def test_what_was_there_is_kept_beside_what_is_new(links, tmp_path, monkeypatch):
    if not links: monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("not on this file system")))
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "run.safetensors"
    path.symlink_to(tmp_path / "elsewhere" / "big.safetensors")
    for step in range(4): save_checkpoint(path, {"w": torch.full((2,), float(step))}, {"step": step}, keep=True)
    assert path.is_symlink() and [load_checkpoint(place)[1]["step"] for place in (path, former_place(path))] == [3, 2]
    with pytest.raises(KeyboardInterrupt), whole_file(path, keep=True): raise KeyboardInterrupt
    assert [load_checkpoint(place)[1]["step"] for place in (path, former_place(path))] == [3, 2]
    assert {place.name for place in (tmp_path / "elsewhere").iterdir()} == {"big.safetensors", "big.previous.safetensors"}


def test_a_kill_between_the_two_renames_leaves_both_names_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    for step in range(2): save_checkpoint(path, {"w": torch.ones(2)}, {"step": step}, keep=True)
    rename, done = os.replace, []
    def once(*names):
        if done: raise KeyboardInterrupt
        done.append(rename(*names))
    monkeypatch.setattr("os.replace", once)
    with pytest.raises(KeyboardInterrupt): save_checkpoint(path, {"w": torch.ones(2)}, {"step": 2}, keep=True)
    monkeypatch.undo()
    assert [load_checkpoint(place)[1]["step"] for place in (path, former_place(path))] == [1, 1]
    save_checkpoint(path, {"w": torch.ones(2)}, {"step": 2}, keep=True)
    assert [load_checkpoint(place)[1]["step"] for place in (path, former_place(path))] == [2, 1] and len(list(tmp_path.iterdir())) == 2


# open to whom it should be

def test_private_runs_are_private_and_the_rest_is_by_the_umask(tmp_path, umask):
    short = dpdm.DIGITS.override(**{"training.steps": 4, "training.checkpoint_every": 1, "draws": 1, "perceptron.width": 8})
    dpdm.train(short, tmp_path / "private", device="cpu")
    assert set(modes(tmp_path / "private").values()) == {0o600} and "run.previous.safetensors" in modes(tmp_path / "private")
    public = dpdm.train(short.override(public=True), tmp_path / "public", device="cpu")
    assert {mode for name, mode in modes(tmp_path / "public").items() if "ledger" not in name} == {0o644}
    dpdm.save_model(tmp_path / "model.safetensors", public)
    genie.save_model(tmp_path / "genie.safetensors", genie.train(SMALL, tmp_path / "genie", device="cpu"))
    assert set(modes(tmp_path / "genie").values()) == {0o644}
    assert modes(tmp_path)["model.safetensors"] == modes(tmp_path)["genie.safetensors"] == 0o644


def test_a_private_run_closes_files_that_were_open(tmp_path, umask):
    path = tmp_path / "run.safetensors"
    for step in range(2): save_checkpoint(path, {"w": torch.ones(2)}, {"step": step}, keep=True)
    save_checkpoint(path, {"w": torch.ones(2)}, {"step": 2}, keep=True, private=True)
    assert set(modes(tmp_path).values()) == {0o600}


# what others wrote

ADM = DiffusionConfig(data="images", family="adm", label="time", label_dropout=0.0, unet=unet_config(
    "adm", image_size=8, width=32, multipliers=(1,), blocks=1, attention=(), head_width=16))


def released(config):
    "A network of the authors' form: (network, names and tensors as they have them, their names in order without the frozen ones)."
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = genie.build(genie.GenieConfig(config)).denoiser.network
        for parameter in network.parameters(): nn.init.normal_(parameter)
    state, pairs = network.state_dict(), authors_keys(network, "adm")
    return network, {theirs: state[ours] for ours, theirs in pairs}, [theirs for ours, theirs in pairs if not ours.endswith("frequencies")]


@pytest.mark.parametrize("before", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."])
@pytest.mark.parametrize("form", ["plain", "model and list", "model and names", "model and numbers", "average alone", "average inside"])
def test_released_weights_are_read_in_every_wrapping(before, form, tmp_path):
    network, named, trained = released(ADM)
    wrapped = OrderedDict((before + name, value) for name, value in named.items())
    noise = OrderedDict((name, torch.zeros_like(value)) for name, value in wrapped.items()) | {before + name: named[name] for name in named.keys() - set(trained)}
    content = {"plain": wrapped,
               "model and list": {"model": noise, "ema": {"decay": 0.9999, "shadow_params": [named[name] for name in trained]}},
               "model and names": {"model": noise, "ema": wrapped},
               "average alone": {"ema": wrapped, "step": 7}, "average inside": {"model": noise, "ema": {"decay": 0.999, "shadow": wrapped}},
               "model and numbers": {"model": wrapped, "step": np.int64(5), "loss": np.float32(0.5), "lr": np.float64(1e-4), "done": np.bool_(True)}}[form]
    torch.save(content, tmp_path / "theirs.pth")
    model = genie.load_authors_checkpoint(tmp_path / "theirs.pth", config=genie.GenieConfig(ADM))
    assert all(torch.equal(a, b) for a, b in zip(model.denoiser.network.state_dict().values(), network.state_dict().values()))


def test_an_average_without_names_is_read_where_nothing_else_is_needed(tmp_path):
    network, named, trained = released(ADM)
    torch.save({"decay": 0.9999, "num_updates": 7, "shadow_params": [named[name] for name in trained]}, tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match="lacks time_embed.0.W"):  # frequencies are drawn, and not trained
        genie.load_authors_checkpoint(tmp_path / "theirs.pth", config=genie.GenieConfig(ADM))
    found = authors_tensors({"shadow_params": list(named.values())}, authors_keys(network, "adm"))
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())


def test_weights_in_another_place_of_the_file_get_a_hint(tmp_path):
    _, named, _ = released(ADM)
    torch.save({"state_dict": named, "state_dict_ema": named, "epoch": 3}, tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match="theirs.pth: lacks .*; they are there under state_dict and state_dict_ema"):
        genie.load_authors_checkpoint(tmp_path / "theirs.pth", config=genie.GenieConfig(ADM))
    torch.save({"x": named[next(iter(named))], "module.x": named[next(iter(named))]}, tmp_path / "theirs.pth")
    with pytest.raises(CheckpointError, match="has x twice"): genie.load_authors_checkpoint(tmp_path / "theirs.pth", config=genie.GenieConfig(ADM))


@pytest.mark.parametrize("before", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_every_paper_reads_released_weights_of_wrapped_models(before, tmp_path):
    path = tmp_path / "theirs.pth"
    config = i2sb.I2sbConfig(data="images", family="adm", unet=unet_config("adm", image_size=8, width=32, multipliers=(1,), blocks=1, attention=(), head_width=16,
                                                                           embedding="cosines_first", qkv_order="heads_first"))
    model = i2sb.build(config)
    state, pairs = model.network.state_dict(), authors_keys(model.network, "adm")
    named = {f"{before}diffusion_model.{theirs}": state[ours] for ours, theirs in pairs}
    for average in ({"shadow_params": list(named.values())}, named):
        torch.save({"net": {name: torch.zeros_like(value) for name, value in named.items()}, "ema": average, "optimizer": np.float64(0.5)}, path)
        loaded = i2sb.load_authors_checkpoint(path, config.task, config)
        assert all(torch.equal(a, b) for a, b in zip(loaded.network.state_dict().values(), state.values()))

    config = dpdm.CONFIGS["mnist"]
    model = dpdm.build(config)
    state, pairs = model.network.state_dict(), authors_keys(model.network, "ddpmpp")
    named = {f"{before}model.{theirs}": state[ours] for ours, theirs in pairs}
    torch.save({"model": named, "ema": named, "step": np.int64(3)}, path)
    loaded = dpdm.load_authors_checkpoint(path, config)
    assert all(torch.equal(a, b) for a, b in zip(loaded.network.state_dict().values(), state.values()))

    config = ddo.CONFIGS["volcano60"]
    model = ddo.build(config)
    state = {name: value for name, value in model.network.state_dict().items()}
    named = {before + theirs: torch.view_as_complex(state[ours]) if theirs.endswith(("weights1", "weights2")) else state[ours]
             for ours, theirs in operator_keys(model.network)}
    torch.save({"weights": {name: torch.zeros_like(value) for name, value in named.items()}, "ema_helper": named}, path)
    loaded = ddo.load_authors_checkpoint(path, config)
    assert all(torch.equal(a, b) for a, b in zip(loaded.network.state_dict().values(), state.values()))


class Evil:
    "What would write a file when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), "w")


def crafted(kind, state, content):
    "A pickle in which NumPy's scalar gets a dtype of this kind with this state."
    class Dtype:
        def __reduce__(self): return np.dtype, (kind, False, True), state
    class Scalar:
        def __reduce__(self): return np.float64(1).__reduce__()[0], (Dtype(), content)
    return Scalar()


def test_only_numbers_are_read_beside_tensors_and_what_else_is_there_is_named(tmp_path):
    path = tmp_path / "theirs.pt"
    values = [np.float16(0.5), np.float32(-2.5), np.float64(1e300), np.int8(-3), np.int64(2**62), np.uint16(65535), np.bool_(True), np.complex64(1 + 2j),
              np.array(3.5, ">f8")[()]]
    torch.save({"values": values, "w": torch.ones(2)}, path)
    found = load_foreign(path)["values"]
    assert found == [value.item() for value in values] and {type(value) for value in found} <= {int, float, bool, complex}
    torch.save({"w": torch.ones(2), "note": Evil(tmp_path / "written")}, path)
    with pytest.raises(CheckpointError, match="theirs.pt: refused: it holds io.open"): load_foreign(path)
    assert not (tmp_path / "written").exists()
    torch.save({"w": np.ones(3)}, path)
    with pytest.raises(CheckpointError, match="refused: it holds numpy._core.multiarray._reconstruct"): load_foreign(path)
    plain = (3, "<", None, None, None, -1, -1, 0)
    for kind, state, content in (("O8", (3, "|", None, None, None, -1, -1, 63), b"\x00" * 8), ("V8", (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 16), b"\x01" * 8),
                                 ("f8", plain, b"\x00"), ("f8", plain, 7), ("f8", 3, b"\x00" * 8), ("f8,O", plain, b"\x00" * 16), ("S8", plain, b"12345678")):
        torch.save({"w": crafted(kind, state, content)}, path)
        with pytest.raises(CheckpointError, match="theirs.pt: refused"): load_foreign(path)


def test_models_that_were_saved_or_are_loaded_compiled(tmp_path):
    model = genie.build(SMALL)
    compiled = torch.compile(model)  # nothing is compiled before it is called
    assert next(iter(compiled.state_dict())).startswith("_orig_mod.")
    genie.save_model(tmp_path / "whole.safetensors", compiled)
    model.denoiser.network = torch.compile(model.denoiser.network)
    genie.save_model(tmp_path / "inner.safetensors", model)
    for name in ("whole", "inner"):
        loaded = genie.load_model(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
        assert load_denoiser(tmp_path / f"{name}.safetensors")[1] == SMALL.diffusion
    fresh = torch.compile(genie.build(SMALL.override(seed=4)))
    load_into(fresh, load_checkpoint(tmp_path / "whole.safetensors")[0])
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values()))


def test_whether_a_file_can_be_made_is_tried_and_leaves_nothing_behind(tmp_path):
    assert check_output(tmp_path / "new" / "a.png") == tmp_path / "new" / "a.png" and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="output: .* cannot be written"): check_output(tmp_path / ("a" * 300 + ".png"))
    if os.path.isdir("/proc/self"):  # where nobody can write, whatever the permissions say
        with pytest.raises(ValueError, match="output: /proc/a.png cannot be written: no file can be made in /proc"): check_output("/proc/a.png")
