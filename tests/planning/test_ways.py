"""How intervals may run: their steps, costs and times against plain sums over the plans that they make."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcache.loop.plan import CachePlan
from fastcache.planning.calibration import Calibration, Conditions
from fastcache.planning.planning import latency_plan, optimal_plan
from fastcache.planning.search import moved
from fastcache.planning.ways import StepTimes, Way, expected_moves, plan_of, prices, step_errors, way_costs, ways_of

TIMES = StepTimes(10.0, {0: 1.0, 2: 2.5}, 1, {None: 5.5, 0: 0.6, 2: 1.4})


def drawn_calibration(seed: int, calls: int, branch_ids: tuple[int, ...] = (0, 2)) -> Calibration:
    """Errors that grow with the feature's age and fall with depth, and movements that are vectors."""
    rng, count = np.random.default_rng(seed), 3
    age = np.subtract.outer(np.arange(calls), np.arange(calls)).clip(min=0)
    depth = 1 / (1 + np.arange(len(branch_ids)))
    errors = age * depth[:, None, None] * rng.uniform(0.5, 1.5, (count, len(branch_ids), calls, calls))
    vectors, others = rng.normal(size=(2, count, calls, 4))
    return Calibration(
        errors=errors,
        gains=np.ones((count, calls)),
        noise_rms=np.ones((count, calls)),
        changes=np.ones((count, len(branch_ids), calls)),
        couplings=vectors @ vectors.transpose(0, 2, 1),
        unguided=others @ others.transpose(0, 2, 1),
        conditions=Conditions("drawn", "0" * 64, "ddim", calls, 4.0, 64, 64),
        branch_ids=branch_ids,
        samples=tuple(f"sample {n}" for n in range(count)),
    )


def test_a_way_says_what_each_step_does() -> None:
    assert Way((0,)).steps(3) == [(None, True), (0, True), (0, True)]
    assert Way((0, 2)).steps(4) == [(None, True), (0, True), (2, True), (0, True)]
    assert Way((2,), shallow_guided=False).steps(2) == [(None, True), (2, False)]
    assert [way.cycle for way in ways_of([2, 0])] == [(0,), (2,), (0, 2), (0, 0, 2), (0, 0, 0, 2)]
    guided = {(way.full_guided, way.shallow_guided) for way in ways_of([0], guidance=True)}
    assert guided == {(True, True), (True, False), (False, False)}


def test_a_step_above_a_deeper_one_reuses_what_that_stored() -> None:
    calibration = drawn_calibration(0, 5)
    errors = calibration.errors
    found = step_errors(calibration, (None, 0, 2, 0, 2))
    assert (found[:, 0] == 0).all()
    np.testing.assert_allclose(found[:, 1], errors[:, 0, 1, 0])
    np.testing.assert_allclose(found[:, 2], errors[:, 1, 2, 0])
    np.testing.assert_allclose(found[:, 3], errors[:, 0, 3, 2] + errors[:, 1, 2, 0])
    np.testing.assert_allclose(found[:, 4], errors[:, 1, 4, 0])


@given(st.integers(0, 2**32), st.integers(2, 9), st.data())
def test_costs_and_prices_are_those_of_the_plan(seed: int, calls: int, data: st.DataObject) -> None:
    """A plan in full but for one interval is expected to move pictures as that costs, and to take its time."""
    calibration, ways = drawn_calibration(seed, calls), ways_of([0, 2], guidance=True)
    index = data.draw(st.integers(0, len(ways) - 1))
    s, r = sorted(data.draw(st.lists(st.integers(0, calls), min_size=2, max_size=2, unique=True)))
    intervals = (*((step, 0) for step in range(s)), (s, index), *((step, 0) for step in range(r, calls)))
    plan = plan_of(intervals, ways, calls)
    cost = way_costs(calibration, ways[index])
    assert cost[s, r] == pytest.approx(expected_moves(calibration, plan).mean())
    assert np.isinf(cost[r - 1, s])
    ticks = prices(TIMES, ways, calls, 0.5)
    own = ticks[index, r - s] + (calls - r + s) * ticks[0, 1]
    assert TIMES.loop_ms(plan) / 0.5 <= own + 1e-3
    assert own <= TIMES.loop_ms(plan) / 0.5 + 1


def test_one_depth_costs_what_its_refreshes_do() -> None:
    calibration = drawn_calibration(1, 7)
    errors, costs = calibration.errors[:, 0], way_costs(calibration, Way((0,)))
    for s, r in combinations(range(8), 2):
        refreshes = (*range(s + 1), *range(r, 7))
        assert costs[s, r] == pytest.approx(moved(errors, calibration.couplings, refreshes).mean(), abs=1e-12)
    plan = CachePlan.uniform(7, 3)
    np.testing.assert_allclose(
        expected_moves(calibration, plan), moved(errors, calibration.couplings, plan.refresh_steps)
    )


@given(st.integers(0, 2**32), st.integers(2, 7), st.floats(1.0, 3.0), st.booleans())
def test_a_plan_within_a_time_keeps_to_it(seed: int, calls: int, above: float, guidance: bool) -> None:
    calibration = drawn_calibration(seed, calls)
    least = 5.5 + (calls - 1) * 0.6 if guidance else 10.0 + (calls - 1)
    times = TIMES if guidance else replace(TIMES, unguided_ms={})
    plan = latency_plan(calibration, times, least * above, guidance=guidance)
    assert plan.num_steps == calls
    assert set(plan.branch_ids) <= {0, 2}
    assert guidance or not plan.unguided_steps
    assert times.loop_ms(plan) <= least * above + 1e-4
    assert latency_plan(calibration, times, 10.1 * calls, guidance=guidance).refresh_steps == tuple(range(calls))
    with pytest.raises(ValueError, match=f"max-latency-ms of {least:.1f} or more"):
        latency_plan(calibration, times, least * 0.99, guidance=guidance)


def test_more_to_choose_from_is_expected_to_move_pictures_less() -> None:
    depths, one = replace(TIMES, unguided_ms={}), replace(TIMES, shallow_ms={0: 1.0}, unguided_ms={})
    moves = np.zeros(3)
    for seed in range(6):
        calibration = drawn_calibration(seed, 12)
        plans = [latency_plan(calibration, times, 50.0) for times in (one, depths)]
        plans.append(latency_plan(calibration, TIMES, 50.0, guidance=True))
        moves += [np.log(expected_moves(calibration, plan)).mean() for plan in plans]
    assert moves[2] < moves[1] < moves[0]


def test_guidance_is_chosen_only_where_it_was_measured() -> None:
    calibration = drawn_calibration(0, 5)
    unknown = replace(calibration, unguided=np.full((3, 5, 5), np.nan))
    for made, times in ((unknown, TIMES), (calibration, replace(TIMES, unguided_ms={}))):
        with pytest.raises(ValueError, match="expected a calibration and times of steps without guidance"):
            latency_plan(made, times, 40.0, guidance=True)


def test_an_optimal_plan_moves_pictures_less_than_uniform() -> None:
    calibration = drawn_calibration(0, 24, (0,))

    def expected(plan: CachePlan) -> float:
        return float(np.log(moved(calibration.errors[:, 0], calibration.couplings, plan.refresh_steps)).mean())

    for interval in (2, 3, 6):
        uniform = CachePlan.uniform(24, interval)
        plan = optimal_plan(calibration, 0, len(uniform.refresh_steps))
        assert len(plan.refresh_steps) == len(uniform.refresh_steps)
        assert expected(plan) < expected(uniform)
    unknown = replace(calibration, gains=np.full((3, 24), np.nan))
    with pytest.raises(ValueError, match="expected a calibration with gains"):
        optimal_plan(unknown, 0, 4)
