"""tools/findings.py: its local search."""

from __future__ import annotations

import findings


def test_local_search_improves_and_keeps_the_number() -> None:
    wanted = (0, 4, 5, 17)

    def score(steps: tuple[int, ...]) -> float:
        return float(sum(abs(a - b) for a, b in zip(steps, wanted, strict=True)))

    assert findings.local_search((0, 10, 12, 14), 20, score, moves=400) == wanted
    assert findings.local_search((0,), 20, lambda _: 0.0, moves=5) == (0,)
    assert findings.local_search((0, 1, 2), 3, lambda _: 0.0, moves=5) == (0, 1, 2)
