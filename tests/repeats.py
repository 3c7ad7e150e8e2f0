"""Cases of a test that repeat what a few of them show: those few run always, the others where slow tests do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], quick: Callable[[Any], bool]) -> list[Any]:
    """A parametrised test's cases, those that are not quick marked slow; a tuple is the values of several names."""

    def marked(case: Any) -> Any:
        values = case if isinstance(case, tuple) else (case,)
        return case if quick(case) else pytest.param(*values, marks=pytest.mark.slow)

    return [marked(case) for case in cases]
