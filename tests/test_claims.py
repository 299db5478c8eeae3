"Every paper against the strongest rival that was stored: found again from the file itself, quoted on the front page, and missed there when it is stronger."
import copy
import inspect
from pathlib import Path

import numpy as np
import pytest

from extras import need, whole_papers

need("train", "data", "plots")

from diffusion_papers.workbench.registry import evidence, in_the_making, paper, papers
from diffusion_papers.workbench.results import load_results, select
from diffusion_papers.workbench.tables import Claim, against, rivals

CLAIMS = [(slug, title) for slug in sorted(papers()) if not in_the_making(paper(slug)) for title in evidence(slug).CLAIMS]


def stored_rows(results):
    "Every number of the file with all that is said about it."
    for experiment in results["experiments"]:
        result = experiment["result"] if isinstance(experiment["result"], dict) else {}
        for row in result.get("rows", [{}]): yield experiment["setting"] | {name: result[name] for name in result if name != "rows"} | row


def has(row, where):
    return all(name in row and (row[name] in value if type(value) in (tuple, range) else row[name] == value) for name, value in where.items())


@pytest.mark.parametrize("slug, title", CLAIMS)
def test_no_stored_row_is_stronger_than_the_one_that_is_quoted(slug, title):
    claim, results = evidence(slug).CLAIMS[title], load_results(slug)
    stand, found = against(claim, select(results)), {}
    for row in stored_rows(results):
        if claim.quantity not in row or not has(row, claim.price): continue
        if has(row, claim.ours) or any(has(row, where) for where in claim.aside.values()): continue
        found.setdefault(tuple((name, row[name]) for name in claim.apart if name in row), []).append(row[claim.quantity])
    best = (max if claim.larger_is_better else min)(np.mean(numbers) for numbers in found.values())
    assert np.mean(stand.theirs) == pytest.approx(best, rel=1e-12) and len(found) == len(rivals(claim, select(results)))
    assert len(stand.ours) == len(stand.theirs) >= 3, "three seeds at least"


@pytest.mark.parametrize("slug", whole_papers())
def test_every_rival_says_what_was_tuned_for_it(slug):
    room = evidence(slug)
    met = {"{} {}".format(*next(iter(rival.items()))) for claim in room.CLAIMS.values() for rival, _ in rivals(claim, select(load_results(slug)))}
    assert room.CLAIMS and met <= room.BASELINES.keys()


@pytest.mark.parametrize("slug", whole_papers())
def test_the_front_page_quotes_the_first_claim(slug):
    room = evidence(slug)
    ratio = against(next(iter(room.CLAIMS.values())), select(load_results(slug))).ratio
    told = room.headline()
    assert f"{ratio:.2f}" in told or f"{ratio:.2g}" in told
    assert told in (Path(__file__).resolve().parents[1] / "README.md").read_text()


@pytest.mark.parametrize("slug", whole_papers())
def test_a_stronger_rival_changes_the_front_page(slug, monkeypatch):
    room, results = evidence(slug), copy.deepcopy(load_results(slug))
    claim = next(iter(room.CLAIMS.values()))
    rival = against(claim, select(results)).rival
    for experiment in results["experiments"]:
        result = experiment["result"]
        for row in result.get("rows", [result]) if isinstance(result, dict) else []:
            if has(experiment["setting"] | result | row, claim.price | rival) and claim.quantity in row: row[claim.quantity] *= 2 if claim.larger_is_better else 0.5
    before = room.headline()
    monkeypatch.setattr(room, "load_results", lambda slug: results)
    assert room.headline() != before


@pytest.mark.parametrize("slug", whole_papers())
def test_the_demonstration_looks_up_whom_it_compares_with(slug):
    "So that `holds` cannot be about a weaker rival than the stored one."
    assert "against(CLAIMS[" in inspect.getsource(evidence(slug).demonstrate)


def test_rows_that_are_set_aside_are_no_rivals_and_what_costs_more_is_none():
    runs = [{"seed": seed, "rows": [{"way": way, "calls": calls, "error": error} for way, calls, error in
                                    (("ours", 2, 1.0), ("a", 1, 3.0), ("a", 2, 2.0), ("b", 2, 0.5), ("a", 3, 0.1))]} for seed in range(3)]
    claim = Claim("error", {"way": "ours", "calls": 2}, {"calls": range(1, 3)}, ("way", "calls"), {"a reason": {"way": "b"}})
    assert against(claim, runs).rival == {"way": "a", "calls": 2} and against(claim, runs).ratio == 0.5
    assert [numbers for _, numbers in rivals(claim, runs)] == [[2.0] * 3, [3.0] * 3]
