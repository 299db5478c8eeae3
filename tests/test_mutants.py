"The table of faults, which `make mutants` plants: every one can still be planted, and every paper has its share."
import ast
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from diffusion_papers.workbench.registry import in_the_making, paper, papers

ROOT = Path(__file__).resolve().parents[1]
TABLE = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())
SOURCES = {module: ROOT.joinpath("diffusion_papers", *module.split(".")).with_suffix(".py").read_text() for module in TABLE["tests"]}


@pytest.mark.parametrize("fault", TABLE["mutants"], ids=lambda fault: f"{fault['module']}: {fault['why']}")
def test_a_fault_can_be_planted(fault):
    assert fault.keys() - {"survives"} == {"module", "text", "replacement", "why"}
    source = SOURCES[fault["module"]]
    assert source.count(fault["text"]) == 1 and fault["text"] != fault["replacement"]
    planted = ast.parse(source.replace(fault["text"], fault["replacement"]))
    assert ast.dump(planted) != ast.dump(ast.parse(source)), "the program is the same"


def test_every_paper_and_the_core_have_their_share():
    found = Counter(fault["module"] for fault in TABLE["mutants"])
    assert len({(fault["module"], fault["text"], fault["replacement"]) for fault in TABLE["mutants"]}) == len(TABLE["mutants"])
    assert {slug: found[slug] for slug in papers() if found[slug] < 12 and not in_the_making(paper(slug))} == {}
    assert sum(count for module, count in found.items() if module.startswith("core.")) >= 20


@pytest.mark.parametrize("module", TABLE["tests"])
def test_the_tests_that_answer_for_a_module_are_there(module):
    assert all((ROOT / test.split()[0]).is_file() for test in TABLE["tests"][module])
