"""The daily run: what it names is there, and what it keeps has every value once."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import selection

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted(selection.SLOW))
def test_slow_tests_exist(name):
    file, _, test = name.partition("::")
    assert f"def {test}" in (ROOT / file).read_text()


class Item:
    def __init__(self, **params):
        self.callspec, self.nodeid = SimpleNamespace(params=params), "tests/test_x.py::test_x[x]"
        self.slow = False

    def add_marker(self, name):
        self.slow = name == "slow"


def test_each_value_is_kept_once():
    backends, dtypes = ["a", "b", "c"], [1, 2]
    items = [Item(backend=b, dtype=d) for b in backends for d in dtypes]
    selection.mark_slow(items)
    kept = [item.callspec.params for item in items if not item.slow]
    assert len(kept) == 3
    assert {p["backend"] for p in kept} == set(backends)
    assert {p["dtype"] for p in kept} == set(dtypes)
