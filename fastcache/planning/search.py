"""What intervals between refreshes do to the picture, and how long they take -> which steps refresh, and what between.

A plan is cut at its refreshes into intervals. What an interval does is known beforehand (`ways.way_costs`), so the best
plan is found exactly by dynamic programming over intervals; what intervals do to each other is not, and `descend` takes
it into account afterwards. Pure Python and numpy: knows nothing about tensors, engines or samplers, and `calibrate.py`
measures the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
Steps = tuple[int, ...]
Intervals = tuple[tuple[int, int], ...]  # of each the step that refreshes, and the index of the way it runs in
Prices = npt.NDArray[np.int64]
State = TypeVar("State")


def optimal_refreshes(costs: Array, refreshes: int) -> Steps:
    """The refresh steps, 0 among them, whose intervals cost least together, of all choices of as many.

    Shapes: `costs` (T, T + 1), as `ways.way_costs` gives them.
    Raises: `ValueError` for more refreshes than steps or fewer than one.
    """
    num_steps = len(costs)
    if not 1 <= refreshes <= num_steps:
        raise ValueError(f"expected 1 to {num_steps} refreshes of {num_steps} steps, got {refreshes}")
    one_each = np.ones((1, num_steps + 1), np.int64)
    return tuple(start for start, _ in _cheapest(costs[None], one_each, refreshes, spend_all=True))


def optimal_intervals(costs: Array, prices: Prices, budget: int) -> Intervals:
    """Where each interval starts and which of several ways it runs in, at least cost within a budget of time.

    Prices and budget are whole numbers of one unit of time: `prices[way, n]` is that of an interval of n steps, its
    refresh among them.
    Shapes: `costs` (ways, T, T + 1), [way, s, r]; `prices` (ways, T + 1).
    Raises: `ValueError` where even the cheapest choice passes the budget.
    """
    if (least := least_price(prices)) > budget:
        raise ValueError(f"expected a budget of at least {least}, the price of the cheapest plan, got {budget}")
    return _cheapest(costs, prices, budget, spend_all=False)


def least_price(prices: Prices) -> int:
    """What the cheapest of all plans takes. Shapes: `prices` (ways, T + 1), as `optimal_intervals` has them."""
    least = [0]
    for r in range(1, prices.shape[1]):
        least.append(min(least[s] + int(prices[:, r - s].min()) for s in range(r)))
    return least[-1]


def _cheapest(costs: Array, prices: Prices, budget: int, *, spend_all: bool) -> Intervals:
    """Dynamic programming: `total[r, q]` is the least cost of all steps before r at price q, where r refreshes next."""
    ways, num_steps, _ = costs.shape
    total = np.full((num_steps + 1, budget + 1), np.inf)
    total[0, 0] = 0
    came_from = np.zeros((num_steps + 1, budget + 1, 2), np.int32)  # where the interval before r starts, and its way
    for r in range(1, num_steps + 1):
        for s, way in product(range(r), range(ways)):
            price = int(prices[way, r - s])
            if price > budget:
                continue
            candidate = total[s, : budget + 1 - price] + costs[way, s, r]
            better = np.flatnonzero(candidate < total[r, price:])
            total[r, price + better], came_from[r, price + better] = candidate[better], (s, way)
    q = budget if spend_all else int(total[num_steps].argmin())
    found: list[tuple[int, int]] = []
    r = num_steps
    while r > 0:
        s, way = map(int, came_from[r, q])
        found.insert(0, (s, way))
        q -= int(prices[way, r - s])
        r = s
    return tuple(found)


def moved(errors: Array, couplings: Array, refreshes: Sequence[int]) -> Array:
    """How far a whole plan moves each sample's picture, mean square, its intervals' effects on each other included.

    Shapes: `errors` (N, T, T), `couplings` (N, T, T); returns (N,).
    """
    num_steps = errors.shape[1]
    source = np.maximum.accumulate([step if step in refreshes else 0 for step in range(num_steps)])
    own = errors[:, np.arange(num_steps), source]
    own[:, list(refreshes)] = 0
    return np.einsum("nj,njk,nk->n", own, couplings, own)


def descend(start: State, moves: Callable[[State], Iterable[State]], score: Callable[[State], float]) -> State:
    """Make the move that lowers the score most, until none lowers it."""
    best, least = start, score(start)
    while True:
        scores = {candidate: score(candidate) for candidate in moves(best)}
        following = min(scores, key=scores.__getitem__, default=best)
        if following == best or scores[following] >= least:
            return best
        best, least = following, scores[following]


def refresh_moves(refreshes: Steps, num_steps: int) -> list[Steps]:
    """One refresh moved to any other step; the first stays at 0."""
    free = [step for step in range(1, num_steps) if step not in refreshes]
    return [tuple(sorted({*refreshes, step} - {gone})) for gone in refreshes[1:] for step in free]


def interval_moves(intervals: Intervals, num_steps: int, ways: int) -> list[Intervals]:
    """One interval in another way, or one refresh moved to any other step, where it takes its way along."""
    starts = {start for start, _ in intervals}
    found = [
        (*intervals[:i], (start, way), *intervals[i + 1 :])
        for i, (start, own) in enumerate(intervals)
        for way in range(ways)
        if way != own
    ]
    for i, (_, own) in enumerate(intervals[1:], 1):
        others = (*intervals[:i], *intervals[i + 1 :])
        found += [tuple(sorted([*others, (step, own)])) for step in range(1, num_steps) if step not in starts]
    return found


def threshold_refreshes(changes: Sequence[float] | Array, threshold: float) -> Steps:
    """A refresh wherever the change since the last one, added up step by step, would pass the threshold.

    `changes[j]` is the relative change of the feature from step j - 1 to step j; `changes[0]` is ignored.
    Raises: `ValueError` for a threshold that is not above 0.
    Source: Block Caching, arXiv 2312.03209, section 3.2.
    """
    if not threshold > 0:
        raise ValueError(f"expected a threshold above 0, got {threshold}")
    refreshes, gathered = [0], 0.0
    for step in range(1, len(changes)):
        gathered += float(changes[step])
        if gathered > threshold:
            refreshes.append(step)
            gathered = 0.0
    return tuple(refreshes)


def threshold_for(changes: Sequence[float] | Array, refreshes: int) -> float:
    """A threshold that gives as many refreshes as asked for, or the nearest number above it that one gives.

    Raises: `ValueError` for fewer than one refresh or more than there are steps.
    """
    if not 1 <= refreshes <= len(changes):
        raise ValueError(f"expected 1 to {len(changes)} refreshes, got {refreshes}")
    low, high = 0.0, float(np.sum(changes[1:])) + 1.0  # the upper end gives one refresh
    for _ in range(60):
        middle = (low + high) / 2
        if len(threshold_refreshes(changes, middle)) > refreshes:
            low = middle
        else:
            high = middle
    # the count falls as the threshold grows, but may pass over some numbers
    return high if len(threshold_refreshes(changes, high)) == refreshes else low
