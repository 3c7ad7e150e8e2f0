"""The plans' dynamic programming against all plans there are, and the threshold rule."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcache.planning.search import (
    Intervals,
    descend,
    interval_moves,
    least_price,
    moved,
    optimal_intervals,
    optimal_refreshes,
    refresh_moves,
    threshold_for,
    threshold_refreshes,
)


def drawn_costs(seed: int, ways: int, num_steps: int) -> np.ndarray:
    """Costs that keep to no order: a longer interval may be the cheaper one, as in no model that was measured."""
    return np.random.default_rng(seed).exponential(size=(ways, num_steps, num_steps + 1))


def drawn_samples(seed: int, samples: int, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors, nan where no plan can have one, and couplings, which are products of vectors."""
    rng = np.random.default_rng(seed)
    errors = rng.exponential(size=(samples, num_steps, num_steps))
    errors[:, *np.triu_indices(num_steps, 1)] = np.nan
    vectors = rng.normal(size=(samples, num_steps, 5))
    return errors, vectors @ vectors.transpose(0, 2, 1)


def total(costs: np.ndarray, refreshes: tuple[int, ...]) -> float:
    return sum(costs[s, r] for s, r in pairwise((*refreshes, len(costs))))


@settings(max_examples=60)
@given(st.integers(1, 14), st.data())
def test_optimal_refreshes_are_the_best_of_all(num_steps: int, data: st.DataObject) -> None:
    refreshes = data.draw(st.integers(1, num_steps))
    costs = drawn_costs(data.draw(st.integers(0, 2**32)), 1, num_steps)[0]
    best = min(total(costs, (0, *rest)) for rest in combinations(range(1, num_steps), refreshes - 1))
    found = optimal_refreshes(costs, refreshes)
    assert len(found) == refreshes
    assert found[0] == 0
    assert total(costs, found) == pytest.approx(best)


def price_and_cost(intervals: Intervals, costs: np.ndarray, prices: np.ndarray) -> tuple[int, float]:
    ends = [*(start for start, _ in intervals[1:]), costs.shape[1]]
    price = sum(int(prices[way, end - start]) for (start, way), end in zip(intervals, ends, strict=True))
    return price, sum(costs[way, start, end] for (start, way), end in zip(intervals, ends, strict=True))


def all_intervals(num_steps: int, ways: int) -> Iterator[Intervals]:
    for count in range(num_steps):
        for rest in combinations(range(1, num_steps), count):
            for chosen in product(range(ways), repeat=count + 1):
                yield tuple(zip((0, *rest), chosen, strict=True))


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 3), st.data())
def test_optimal_intervals_are_the_best_within_the_budget(num_steps: int, ways: int, data: st.DataObject) -> None:
    costs = drawn_costs(data.draw(st.integers(0, 2**32)), ways, num_steps)
    each = st.lists(st.integers(0, 6), min_size=num_steps, max_size=num_steps)
    prices = np.array([[0, *np.cumsum(data.draw(each))] for _ in range(ways)])
    budget = data.draw(st.integers(0, 30))
    known = [price_and_cost(plan, costs, prices) for plan in all_intervals(num_steps, ways)]
    assert least_price(prices) == min(price for price, _ in known)
    allowed = [cost for price, cost in known if price <= budget]
    if not allowed:
        with pytest.raises(ValueError, match="expected a budget of at least"):
            optimal_intervals(costs, prices, budget)
        return
    price, cost = price_and_cost(optimal_intervals(costs, prices, budget), costs, prices)
    assert price <= budget
    assert cost == pytest.approx(min(allowed))


def test_intervals_may_take_another_way_or_move() -> None:
    moves = interval_moves(((0, 0), (2, 1)), 4, 2)
    assert set(moves) == {((0, 1), (2, 1)), ((0, 0), (2, 0)), ((0, 0), (1, 1)), ((0, 0), (3, 1))}


def test_moved_adds_vectors() -> None:
    errors = np.array([[[0, 0, 0, 0], [2.0, 0, 0, 0], [9, 3, 0, 0], [9, 9, 4, 0]]])
    vectors = np.array([[0, 0], [1, 0], [1.0, 0], [0, 1]])
    assert moved(errors, (vectors @ vectors.T)[None], (0, 2)) == pytest.approx(2**2 + 4**2)
    assert moved(errors, (vectors @ vectors.T)[None], (0, 1)) == pytest.approx(3**2 + 9**2)
    assert moved(errors, (vectors @ vectors.T)[None], (0,)) == pytest.approx((2 + 9) ** 2 + 9**2)
    assert moved(errors, (vectors @ vectors.T)[None], (0, 1, 2, 3)) == 0


@given(st.integers(2, 10), st.data())
def test_descending_ends_where_no_move_helps(num_steps: int, data: st.DataObject) -> None:
    errors, couplings = drawn_samples(data.draw(st.integers(0, 2**32)), 2, num_steps)

    def score(steps: tuple[int, ...]) -> float:
        return float(moved(errors, couplings, steps).sum())

    count = data.draw(st.integers(1, num_steps))
    start = optimal_refreshes(drawn_costs(data.draw(st.integers(0, 2**32)), 1, num_steps)[0], count)
    found = descend(start, lambda steps: refresh_moves(steps, num_steps), score)
    assert len(found) == len(start)
    assert found[0] == 0
    assert score(found) <= score(start)
    neighbours = [{*found, step} - {gone} for gone in found[1:] for step in range(1, num_steps) if step not in found]
    assert all(score(tuple(sorted(steps))) >= score(found) for steps in neighbours)


def test_threshold_adds_up_changes_since_the_last_refresh() -> None:
    assert threshold_refreshes([9, 1, 1, 1, 1, 4, 1], 2.5) == (0, 3, 5)
    assert threshold_refreshes([9, 1, 1, 1], 0.5) == (0, 1, 2, 3)
    assert threshold_refreshes([9, 1, 1, 1], 3) == (0,)


@pytest.mark.parametrize("refreshes", [0, 6])
def test_a_number_of_refreshes_that_no_plan_has(refreshes: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to 5 refreshes of 5 steps, got {refreshes}"):
        optimal_refreshes(drawn_costs(0, 1, 5)[0], refreshes)


def test_a_threshold_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold above 0"):
        threshold_refreshes([1, 1], 0)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=60), st.data())
def test_a_threshold_is_found_for_a_number_of_refreshes(changes: list[float], data: st.DataObject) -> None:
    refreshes = data.draw(st.integers(1, len(changes)))
    count = len(threshold_refreshes(changes, threshold_for(changes, refreshes)))
    assert count >= refreshes
    if len(set(changes)) == 1 and refreshes in (1, len(changes)):
        assert count == refreshes
