"""The commands that the pages print: every published preset has them, what the rehearsal changes is listed, and one chain a paper runs here."""
import importlib.util
import sys
from pathlib import Path

import pytest

from extras import need, whole_papers

need("train", "data", "flax")

from diffusion_papers.__main__ import parser
from diffusion_papers.workbench.registry import evidence, hooks, paper, papers

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("rehearse", ROOT / "tools" / "rehearse.py")
rehearse = sys.modules["rehearse"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rehearse)
QUICK = {"genie": "cifar10", "dfno": "cifar10", "i2sb": "imagenet256 sr4x-pool", "dpdm": "mnist", "ddo": "volcano_white", "ldeq": "wflw", "ediffi": "base64", "odise": "label"}
CHANGED = {"width", "head_width", "text_width", "clip_width", "image_width", "context_width", "embedding_width", "device", "modes", "steps", "solver_steps", "kept", "trajectories", "batch_size", "accumulate", "checkpoint_every", "evaluated",
           "count", "calls", "size", "epochs", "channels", "groups", "norm_groups", "heads", "hidden", "pixel_hidden", "layers", "pixel_layers", "queries", "points", "longest", "tile", "seen"}  # widths, steps, batches, numbers of samples
CHAINS = [(slug, values, commands) for slug in papers() for values, commands in rehearse.chains(rehearse.page(slug))]
NAMES = [f"{slug} {rehearse.title(values)}" for slug, values, _ in CHAINS]


def test_a_page_is_read_block_by_block_with_the_table_below():
    text = ("before\n```\npreset=a data=x\npython one $preset\npython two $data\n```\n\n| preset | data |\n|---|---|\n| b | y |\n| c | z |\n\nmore\n"
            "```\npreset=d\npython three\n```\nno table\n\n```python\npreset = 1\n```\n| preset | data |\n|---|---|\n| e | y |\n")
    assert rehearse.chains(text) == [({"preset": "b", "data": "y"}, ["python one $preset", "python two $data"]),
                                     ({"preset": "c", "data": "z"}, ["python one $preset", "python two $data"]), ({"preset": "d"}, ["python three"])]


@pytest.mark.parametrize("slug", whole_papers())
def test_every_published_preset_has_its_commands(slug):
    named = {values["preset"] for found, values, _ in CHAINS if found == slug}
    assert named == {preset for preset in paper(slug).CONFIGS if rehearse.paper_scale(slug, preset)} and named


@pytest.mark.parametrize("slug, values, commands", CHAINS, ids=NAMES)
def test_a_chain_goes_from_the_data_to_the_number(slug, values, commands):
    words = [line.partition("diffusion_papers ")[2].split() for line in commands]
    kinds = [each[0] for each in words]
    assert kinds[:3] == ["train", "train", "sample"] and "evaluate" in kinds[3:] and set(kinds[3:]) <= {"evaluate", *hooks()} and len(set(NAMES)) == len(NAMES)
    assert "--resume" in words[1] and words[1][:-1] == words[0], "a training is resumed by the same command"
    assert {each[each.index("--metric") + 1] for each in words[3:] if each[0] == "evaluate"} <= set(evidence(slug).METRICS)
    for line in commands:
        changed = rehearse.rehearsed(line, values)
        parser(changed[changed.index("diffusion_papers") + 1:]).parse_args(changed[changed.index("diffusion_papers") + 1:])
        assert "$" not in " ".join(changed)


def listed(table):
    for name, value in table.items():
        if isinstance(value, dict): yield from listed(value)
        else: yield name


def test_what_is_changed_is_a_width_a_number_of_steps_or_of_samples():
    assert set(rehearse.LIST["launch"]) == {"processes", "device", "folder"}
    names = {name.split(".")[-1] for slug in papers() for name in listed(rehearse.LIST.get(slug, {}))}
    assert names <= CHANGED, names - CHANGED


def test_nothing_but_the_list_is_changed():
    slug, values, commands = CHAINS[NAMES.index("genie cats128")]
    changed = rehearse.rehearsed(commands[0], values)
    printed = rehearse.string.Template(commands[0]).substitute(values).partition("diffusion_papers ")[2].replace("/data/", "data/").split()
    assert changed[:6] == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert changed[8:8 + len(printed)] == printed and changed[8 + len(printed):11 + len(printed)] == ["--device", "cpu", "--set"]
    expected = rehearse.LIST["genie"]["train"] | rehearse.LIST["genie"]["train"]["cats128"]
    assert changed[11 + len(printed):] == [f"{name}={value}" for name, value in expected.items() if not isinstance(value, dict)]


@pytest.mark.parametrize("slug", whole_papers())
def test_one_chain_runs(slug, tmp_path):
    values, commands = next((values, commands) for found, values, commands in CHAINS if found == slug and rehearse.title(values) == QUICK[slug])
    row = rehearse.rehearse(slug, values, commands, tmp_path)
    assert row["ran"].startswith("killed, resumed, sample, ")


def test_a_failing_command_says_what_it_said(tmp_path):
    with pytest.raises(RuntimeError, match=r"exit code 3\n.*broken"): rehearse.run([sys.executable, "-c", "print('broken'); raise SystemExit(3)"], tmp_path)
    with pytest.raises(RuntimeError, match="ended before it could be killed"): rehearse.run_until_checkpoint([sys.executable, "-c", ""], tmp_path, "nowhere")
