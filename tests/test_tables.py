"""Numbers of several seeds as means, spreads, verdicts and tables."""
import pytest

from diffusion_papers.workbench.tables import Table, compared, records, spread, tabulate, values

RUNS = [{"seed": 0, "minutes": 3, "rows": [{"solver": "ddim", "calls": 5, "error": 0.4}, {"solver": "heun", "calls": 5, "error": 0.1},
                                           {"solver": "heun", "calls": 9, "error": 0.7}]},
        {"seed": 1, "minutes": 5, "rows": [{"solver": "ddim", "calls": 5, "error": 0.2}, {"solver": "heun", "calls": 5, "error": 0.3},
                                           {"calls": 9, "solver": "heun"}]}]


def test_a_spread_is_the_mean_and_half_of_the_range():
    assert spread([1.0, 2.0, 6.0], 1) == "3.0 ±2.5" and spread([0.25]) == "0.25 ±0.00"
    assert spread([0.123, 0.141], 1, 100.0, " %") == "13.2 ±0.9 %" and spread([-2.0, -6.0], 0) == "-4 ±2"


@pytest.mark.parametrize("mine, theirs, smaller, larger", [
    ([1.0, 2.0], [3.0, 4.0], "better", "worse"), ([3.0, 4.0], [1.0, 2.0], "worse", "better"), ([1.0, 3.0], [2.0, 4.0], *["no clear difference"] * 2),
    ([1.0, 2.0], [2.0, 3.0], *["no clear difference"] * 2), ([2.0], [2.0], *["no clear difference"] * 2)], ids=str)
def test_a_verdict_needs_all_seeds(mine, theirs, smaller, larger):
    assert compared(mine, theirs) == smaller and compared(mine, theirs, larger_is_better=True) == larger


def test_rows_know_what_their_run_has_once():
    assert records(RUNS)[1][0] == {"seed": 1, "minutes": 5, "solver": "ddim", "calls": 5, "error": 0.2}
    assert records([{"seed": 2}]) == [[{"seed": 2}]]


def test_values_are_one_a_seed_of_the_rows_that_fit():
    assert values(RUNS, "error", solver="heun", calls=5) == [0.1, 0.3] and values(RUNS, "error", calls=9) == [0.7]
    assert values(RUNS, "minutes", solver="ddim") == [3, 5] and values(RUNS, "error", seed=1, solver="ddim") == [0.2]
    with pytest.raises(ValueError, match="error: one run has it 2 times"): values(RUNS, "error", solver="heun")
    with pytest.raises(ValueError, match="error: no run has it"): values(RUNS, "error", solver="euler")


def test_a_table_has_a_method_in_each_row():
    table = tabulate(RUNS, {"DDIM": {"solver": "ddim"}, "Heun": {"solver": "heun"}, "none": {"solver": "euler"}},
                     {"error": {"quantity": "error", "digits": 1, "calls": 5},
                      "percent": {"quantity": "error", "calls": 5, "scale": 100, "unit": " %", "digits": 0}})
    assert table.rows == [{"": "DDIM", "error": "0.3 ±0.1", "percent": "30 ±10 %"}, {"": "Heun", "error": "0.2 ±0.1", "percent": "20 ±10 %"},
                          {"": "none", "error": "–", "percent": "–"}]
    assert tabulate(RUNS, {"DDIM": {}}, {"error": {"quantity": "error"}}, solver="ddim", seed=0).rows == [{"": "DDIM", "error": "0.40 ±0.00"}]


def test_columns_are_aligned():
    table = Table([{"": "a|b", "error": 0.5}, {"": "c", "error": 10}])
    assert str(table) == "     error\na|b    0.5\nc       10"
    assert table._repr_markdown_() == "|  | error |\n| --- | ---: |\n| a\\|b | 0.5 |\n| c | 10 |"
