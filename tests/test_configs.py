"""Values of configurations: what comes from JSON or from the command line has the type of the default, at every depth."""
import json
from dataclasses import dataclass

from extras import need

need("train", "data", "dev")

import pytest
from hypothesis import given, settings, strategies as st

from diffusion_papers import ddo, dfno, dpdm, ediffi, genie, i2sb, ldeq, odise
from diffusion_papers.workbench.configs import Config


@dataclass(frozen=True)
class Nested(Config):
    pairs: tuple = ((1, 2), (3, 4))              # of whole numbers
    shares: tuple = (0.5, 1.0)                   # of numbers
    mixed: tuple = ((1, 0.5), ())                # of numbers, some of them whole
    names: tuple = (("a",), ("b", "c"))          # of texts
    flags: tuple = (True, False)                 # of truth values
    free: tuple = ()                             # of anything
    unlike: tuple = (1, "a")                     # of several kinds
    limit: int = None                            # None says nothing of its kind


numbers = st.integers(-10**6, 10**6)
floats = st.floats(allow_nan=False)
nested = st.builds(
    Nested, pairs=st.lists(st.lists(numbers).map(tuple)).map(tuple), shares=st.lists(floats).map(tuple),
    mixed=st.lists(st.lists(floats).map(tuple)).map(tuple), names=st.lists(st.lists(st.text()).map(tuple)).map(tuple),
    flags=st.lists(st.booleans()).map(tuple),
    free=st.recursive(numbers | st.text(), lambda inner: st.lists(inner).map(tuple)).map(lambda value: (value,)))


def kinds(value): return tuple(map(kinds, value)) if isinstance(value, tuple) else type(value)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(config=nested)
def test_configurations_survive_json(config):
    back = Nested.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config and hash(back) == hash(config)
    assert [kinds(value) for value in vars(back).values()] == [kinds(value) for value in vars(config).values()]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(config=nested)
def test_configurations_survive_the_command_line(config):
    finite = {name: repr(value) for name, value in config.to_dict().items() if name != "limit" and "inf" not in repr(value)}
    back = Nested().override(**finite)
    assert all(getattr(back, name) == getattr(config, name) for name in finite) and isinstance(hash(back), int)


def test_lists_become_tuples_whoever_wrote_them():
    for value in ([[1, 2], [3]], ([1, 2], [3]), "[[1, 2], [3]]", "((1, 2), [3])", [(1.0, 2e0), [3]]):
        found = Nested().override(pairs=value).pairs
        assert found == ((1, 2), (3,)) and kinds(found) == ((int, int), (int,))
    assert Nested().override(shares="(1, 2)").shares == (1.0, 2.0) and kinds(Nested(shares=(0.5,)).override(shares=[1]).shares) == (float,)
    assert kinds(Nested().override(mixed=[[1]]).mixed) == ((float,),)
    assert Nested().override(limit=[1, [2]]).limit == (1, (2,))


@pytest.mark.parametrize("name, value", [
    ("pairs", [[1, "x"]]), ("pairs", [[1, 2.5]]), ("pairs", [[1, True]]), ("pairs", [1, 2]), ("pairs", [[1, None]]), ("pairs", [[[1]]]),
    ("pairs", "((1, 'x'),)"), ("pairs", "5"), ("pairs", "((1, 2"), ("pairs", 5), ("pairs", [[float("nan")]]), ("pairs", [[float("inf")]]),
    ("shares", ["1"]), ("shares", [True]), ("shares", [[1.0]]), ("shares", [10**400]), ("shares", {"a": 1}),
    ("names", [["a", 1]]), ("names", ["a"]), ("flags", [1]), ("flags", ["true"]), ("free", 3), ("free", "a")])
def test_a_wrong_element_is_refused_by_the_name_of_its_field(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected tuple"): Nested().override(**{name: value})


@pytest.mark.parametrize("paper", [ddo, dfno, dpdm, ediffi, genie, i2sb, ldeq, odise], ids=lambda paper: paper.__name__.split(".")[-1])
def test_all_presets_survive_json(paper):
    for config in paper.CONFIGS.values():
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
