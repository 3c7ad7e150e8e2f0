"""tools/findings.py: its thresholds and its local search."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcache.planning.search import threshold_refreshes

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def findings() -> Any:
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module("findings")
    finally:
        sys.path.remove(str(TOOLS))


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=60), st.data())
def test_a_threshold_is_found_for_a_number_of_refreshes(
    findings: Any, changes: list[float], data: st.DataObject
) -> None:
    refreshes = data.draw(st.integers(1, len(changes)))
    count = len(threshold_refreshes(changes, findings.threshold_for(changes, refreshes)))
    assert count >= refreshes
    if len(set(changes)) == 1 and refreshes in (1, len(changes)):
        assert count == refreshes


def test_local_search_improves_and_keeps_the_number(findings: Any) -> None:
    wanted = (0, 4, 5, 17)

    def score(steps: tuple[int, ...]) -> float:
        return float(sum(abs(a - b) for a, b in zip(steps, wanted, strict=True)))

    assert findings.local_search((0, 10, 12, 14), 20, score, moves=400) == wanted
    assert findings.local_search((0,), 20, lambda _: 0.0, moves=5) == (0,)
    assert findings.local_search((0, 1, 2), 3, lambda _: 0.0, moves=5) == (0, 1, 2)
