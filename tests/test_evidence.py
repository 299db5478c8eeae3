"""What a fingerprint of code sees and what it does not; when stored results may be stamped anew (the notebook on evidence tries it on a repository)."""
import json
from pathlib import Path

import pytest

from diffusion_papers.workbench.results import code_fingerprint, lasting, not_entered, programs_of, stale_studies

MODULE = '''"""A module."""
import warnings
from dataclasses import dataclass
from diffusion_papers.workbench.checks import check_range
SIZES = {"small": 1}
@dataclass
class Settings:
    "Of a study."
    steps: int = 3  # of the loop
def helper(count: int) -> int:
    """Add."""
    if count < 0: raise ValueError(f"count: expected 0 or more, got {count}")
    if count > 100: warnings.warn("count: that takes long")
    check_range(count, "count", 0)
    return sum(range(count)) + SIZES["small"]
def study(setting):
    from diffusion_papers.workbench.checks import check_choice
    return {"value": helper(Settings().steps)}
'''


def fingerprint(tmp_path, text, name="toy"):
    "Of the study in a small package's module."
    package = tmp_path / str(len(list(tmp_path.iterdir()))) / "diffusion_papers"
    (package / "workbench").mkdir(parents=True)
    (package / "workbench" / "checks.py").write_text("def check_range(value, name, low): return value\ndef check_choice(value): return value\n")
    package.joinpath(*name.split(".")).with_suffix(".py").write_text(text)
    return code_fingerprint(f"diffusion_papers.{name}.study", package)


@pytest.mark.parametrize("change", [
    ('"""Add."""', '"""Add numbers."""'), ('"Of a study."', '"Of another."'), ("# of the loop", "# iterations"),
    ("expected 0 or more", "expected a number above -1"), ("that takes long", "that takes a while"), ("count: int", "count: float"),
    ("-> int", "-> float"), ("steps: int", "steps: object"), ("from diffusion_papers.workbench.checks import check_range", "from .workbench.checks import check_range"),
    ('"""A module."""', '"""A module.\n\nOf many words."""'), ("def study", "OTHER = 5\n\n\ndef unrelated(): return OTHER\n\n\ndef study")])
def test_what_decides_nothing_is_not_seen(tmp_path, change):
    assert change[0] in MODULE
    assert fingerprint(tmp_path, MODULE) == fingerprint(tmp_path, MODULE.replace(*change))


@pytest.mark.parametrize("change", [
    ("steps: int = 3", "steps: int = 4"), ("count < 0", "count <= 0"), ('{"small": 1}', '{"small": 2}'), ("raise ValueError", "raise TypeError"),
    ("def helper", 'SIZES["small"] = 5\ndef helper'), ("def helper", "SIZES |= {}\ndef helper"), ("sum(range(count))", "sum(range(count), 1)"),
    ("def helper", "if SIZES:\n    SIZES = {}\ndef helper")])
def test_what_decides_a_result_is_seen(tmp_path, change):
    assert change[0] in MODULE
    assert fingerprint(tmp_path, MODULE) != fingerprint(tmp_path, MODULE.replace(*change))


def test_a_definition_may_move_to_another_module(tmp_path):
    assert fingerprint(tmp_path, MODULE) == fingerprint(tmp_path, MODULE, "workbench.toy")


@pytest.mark.parametrize("entry, imported, seen", [("1", True, True), ("2", True, True), ("1", False, False)])
def test_what_another_module_puts_into_a_table_is_seen_where_it_is_imported(tmp_path, entry, imported, seen):
    def found(entry, imported):
        package = tmp_path / f"{entry}{imported}{len(list(tmp_path.iterdir()))}" / "diffusion_papers"
        package.mkdir(parents=True)
        (package / "tables.py").write_text("TABLE = {}\n")
        (package / "scenes.py").write_text(f"from .tables import TABLE\ndef drawn(): return {entry}\nTABLE['scenes'] = drawn\nOTHER = 3\n")
        (package / "toy.py").write_text("from .tables import TABLE\n" + imported * "from .scenes import OTHER\n" + "def study(setting): return TABLE[setting]()\n")
        return code_fingerprint("diffusion_papers.toy.study", package)
    assert (found(entry, imported) != found("0", imported)) == seen


def test_a_loop_variable_is_no_constant_of_that_name(tmp_path):
    other = MODULE.replace("def study", "EXPERIMENTS = [count for count in range(3)]\ndef study")
    assert fingerprint(tmp_path, MODULE) == fingerprint(tmp_path, other)


def test_times_do_not_last():
    assert lasting({"rows": [{"seconds": 1.0, "error": (1, 2)}], 5: "x"}) == {"rows": [{"error": [1, 2]}], "5": "x"}
    assert json.dumps(lasting({"value": float("nan")})) == '{"value": NaN}'


def test_changed_functions_that_a_probe_did_not_enter_are_named():
    after = programs_of("diffusion_papers.workbench.checks.check_seed")
    before = {key: text + "\nchanged" for key, text in after.items()}
    assert not_entered(before, after, set()) == ["check_range", "check_seed", "check_whole"]
    assert not_entered(after, after, set()) == []


def test_a_study_that_is_gone_is_stale():
    assert stale_studies({"experiments": [{"setting": {"study": "gone"}, "code": "x"}]}, {}) == {"gone"}


def test_results_whose_code_was_never_committed_are_named():
    from diffusion_papers.workbench.results import stamped_commit
    path = Path(__file__).resolve().parents[1] / "data" / "results" / "genie.json"
    with pytest.raises(RuntimeError, match="no commit has the code ffffffffffff|not a git repository"):
        stamped_commit({"code": "f" * 64, "function": "diffusion_papers.evidence.genie.study_claim"}, path)
