"""Times side by side, with a clock that is turned by hand."""
from extras import need

need("train")

import pytest

from diffusion_papers.workbench import timing
from diffusion_papers.workbench.timing import paired, peak_memory, seconds, table_path


def test_the_time_of_an_action_is_that_between_before_and_after(monkeypatch):
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert seconds(lambda: None) == 2.5


def test_pairs_are_medians_in_changing_order_without_the_first(monkeypatch):
    "The median of the ratios is not the ratio of the medians."
    order, taken = [], {"ours": iter([99.0, 1, 2, 4, 8, 5]), "peer": iter([0.1, 2.0, 6, 2, 8, 30])}
    def count(action, device):
        order.append(action)
        return next(taken[action])
    monkeypatch.setattr(timing, "seconds", count)
    found = paired("ours", "peer", repeats=5)
    assert found == {"seconds": 4, "peer seconds": 6, "speed": 2}
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer", "peer", "ours", "ours", "peer", "peer", "ours"]


def test_the_most_memory_is_in_mebibytes():
    resource = pytest.importorskip("resource")
    import sys
    if sys.platform != "linux": pytest.skip("kibibytes are Linux's")
    assert peak_memory() == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rel=0.5)


def test_tables_lie_beside_each_other(): assert table_path("genie_cpu").parts[-2:] == ("benchmarks", "genie_cpu.json")
