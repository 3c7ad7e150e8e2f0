"""Plans: the published schedules, JSON there and back, and what is refused."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcache.bundle.manifest import PassEntry
from fastcache.cut.names import FULL
from fastcache.loop.features import check_reuse, moves
from fastcache.loop.plan import CachePlan, Forecast

PASSES = {FULL: PassEntry(engines=(FULL,), takes=(), stores=tuple(f"feature_{b}" for b in range(12)))} | {
    f"shallow-{b}": PassEntry(
        engines=(f"shallow-{b}",), takes=(f"feature_{b}",), stores=tuple(f"feature_{other}" for other in range(b))
    )
    for b in range(12)
}
PLANS = st.builds(
    CachePlan.from_branches,
    branches=st.lists(st.none() | st.integers(0, 11), max_size=60).map(lambda rest: (None, *rest)),
    model=st.none() | st.text(),
    sampler=st.none() | st.text(),
    made_by=st.text(),
    forecast=st.none()
    | st.builds(Forecast, st.sampled_from((1, 2)), st.floats(0, 1), st.sampled_from(("step", "sigma"))),
)


def steps_of(plan: CachePlan) -> st.SearchStrategy[tuple[CachePlan, set[int]]]:
    return st.tuples(st.just(plan), st.sets(st.integers(0, plan.num_steps - 1)))


def test_uniform() -> None:
    plan = CachePlan.uniform(num_steps=7, interval=3, branch_id=2)
    assert plan.passes == ("full", "shallow-2", "shallow-2", "full", "shallow-2", "shallow-2", "full")
    assert plan.branches == (None, 2, 2, None, 2, 2, None)
    assert plan.refresh_steps == (0, 3, 6)
    assert plan.num_steps == 7
    assert [plan.is_full(step) for step in range(7)] == [True, False, False, True, False, False, True]
    assert plan.made_by == "uniform(interval=3)"


@given(st.integers(1, 200), st.integers(1, 250))
def test_uniform_refreshes_every_interval(num_steps: int, interval: int) -> None:
    plan = CachePlan.uniform(num_steps, interval)
    assert plan.num_steps == num_steps
    assert plan.refresh_steps == tuple(step for step in range(num_steps) if step % interval == 0)


def test_all_full() -> None:
    assert CachePlan.all_full(3).passes == (FULL, FULL, FULL)
    assert CachePlan.uniform(9, 1).branches == CachePlan.all_full(9).branches


def test_from_refresh_steps_takes_any_order() -> None:
    plan = CachePlan.from_refresh_steps(5, iter([3, 0]), branch_id=1)
    assert plan.branches == (None, 1, 1, None, 1)


@pytest.mark.parametrize(
    ("as_shipped", "expected"),
    [(False, (0, 6, 11, 14, 15, 19, 24, 29, 35, 42)), (True, (0, 5, 9, 13, 17, 21, 26, 31, 37, 43))],
)
def test_nonuniform_of_the_paper(as_shipped: bool, expected: tuple[int, ...]) -> None:
    plan = CachePlan.nonuniform(50, 5, center=15, power=1.4, as_shipped=as_shipped)
    assert plan.refresh_steps == expected
    assert plan.made_by.startswith("nonuniform(interval=5, center=15, power=1.4")
    assert ("as_shipped" in plan.made_by) == as_shipped


def shipped(num_steps: int, count: int, center: int, power: float) -> list[int] | None:
    """What the published code computes, with numpy as there."""
    while power > 1:
        x = np.linspace((-center) ** (1 / power), (num_steps - center) ** (1 / power), count + 1)
        steps = [0, *(int(d) + center for d in np.unique((x**power).real.astype(np.int32))[1:-1])]
        if len(steps) == count:
            return steps
        power -= 0.02
    return None


@pytest.mark.parametrize("num_steps", [20, 50, 100, 250])
@pytest.mark.parametrize("interval", [2, 3, 5, 10, 20])
@pytest.mark.parametrize("power", [1.2, 1.4, 1.5])
def test_nonuniform_as_shipped_is_the_published_code(num_steps: int, interval: int, power: float) -> None:
    for center in range(0, num_steps, 5):
        expected = shipped(num_steps, math.ceil(num_steps / interval), center, power)
        make = lambda: CachePlan.nonuniform(num_steps, interval, center, power, as_shipped=True)  # noqa: B023, E731
        if expected is None:
            with pytest.raises(ValueError, match="distinct refreshes"):
                make()
        else:
            assert list(make().refresh_steps) == expected


@given(st.integers(1, 120), st.integers(1, 30), st.data())
def test_nonuniform_has_as_many_refreshes_as_uniform_or_refuses(
    num_steps: int, interval: int, data: st.DataObject
) -> None:
    center = data.draw(st.integers(0, num_steps - 1) | st.floats(0, num_steps - 1))
    power = data.draw(st.floats(1.02, 3))
    as_shipped = data.draw(st.booleans())
    with contextlib.suppress(ValueError):
        plan = CachePlan.nonuniform(num_steps, interval, center, power, as_shipped=as_shipped)
        assert len(plan.refresh_steps) == len(CachePlan.uniform(num_steps, interval).refresh_steps)
        assert plan.num_steps == num_steps


@given(PLANS)
def test_json_round_trip(plan: CachePlan) -> None:
    text = plan.to_json()
    assert CachePlan.from_json(text) == plan
    assert "\n" not in text


def test_json_names_what_the_design_promises() -> None:
    plan = replace(CachePlan.uniform(3, 2, branch_id=1), model="demo", sampler="ddim")
    assert json.loads(plan.to_json()) == {
        "schema": "fastcache.plan/2",
        "model": "demo",
        "sampler": "ddim",
        "made_by": "uniform(interval=2)",
        "num_steps": 3,
        "passes": ["full", "shallow-1", "full"],
    }


@given(PLANS)
def test_a_file_of_the_first_schema_means_what_it_meant(plan: CachePlan) -> None:
    fields = json.loads(plan.to_json()) | {"schema": "fastcache.plan/1", "branches": plan.branches}
    del fields["passes"]
    assert CachePlan.from_json(json.dumps(fields)) == plan


def test_json_has_further_keys_only_where_they_say_something() -> None:
    plan = replace(CachePlan.uniform(4, 2), forecast=Forecast(2, 0.5), unguided_steps=(0, 1))
    fields = json.loads(plan.to_json())
    assert fields["forecast"] == {"order": 2, "damping": 0.5, "by": "step"}
    assert fields["unguided_steps"] == [0, 1]
    assert CachePlan.from_json(plan.to_json()) == plan
    assert not {"forecast", "unguided_steps"} & json.loads(CachePlan.uniform(4, 2).to_json()).keys()


@given(PLANS.flatmap(steps_of))
def test_a_guided_step_reuses_what_a_guided_step_stored(case: tuple[CachePlan, set[int]]) -> None:
    plan, unguided = replace(case[0], unguided_steps=tuple(sorted(case[1]))), case[1]
    stored_by = [
        max(s for s in range(step) if plan.branches[s] is None or (plan.branches[s] or 0) > branch)
        if branch is not None
        else None
        for step, branch in enumerate(plan.branches)
    ]
    fits = all(s is None or step in unguided or s not in unguided for step, s in enumerate(stored_by))
    if fits:
        check_reuse(plan, PASSES)
    else:
        with pytest.raises(ValueError, match="to reuse a guided step's feature"):
            check_reuse(plan, PASSES)


def test_what_a_plan_needs_of_the_passes() -> None:
    with pytest.raises(ValueError, match=r"of the passes full, shallow-0, which .*, got one with shallow-1; build"):
        check_reuse(CachePlan.uniform(4, 2, 1), {name: PASSES[name] for name in ("full", "shallow-0")})
    nothing = PASSES | {"full": PassEntry(engines=("full",), takes=(), stores=())}
    with pytest.raises(ValueError, match=r"stores feature_0 before step 1 \(shallow-0\), got none"):
        check_reuse(CachePlan.uniform(4, 2), nothing)


def test_guided_within() -> None:
    plan = CachePlan.uniform(7, 3).guided_within(3, 5)
    assert plan.unguided_steps == (0, 1, 2, 5, 6)
    assert [plan.is_guided(step) for step in range(7)] == [False, False, False, True, True, False, False]
    assert CachePlan.uniform(7, 3).guided_within(0, 7) == CachePlan.uniform(7, 3)


def feature_weights(
    plan: CachePlan, step: int, sigmas: list[float] | None = None, feature: str = "feature_0"
) -> dict[int, float]:
    """Out of which steps' stored features a step makes its own, and what each counts."""
    kept, in_place = dict[int, int](), None
    found = moves(plan, PASSES, sigmas)[feature]
    for own in range(step + 1):
        if own in found.makes:
            places, weights = found.makes[own]
            in_place = {kept[place]: weight for place, weight in zip(places, weights, strict=True)}
        if own in found.keeps:
            kept[found.keeps[own]] = own
            in_place = {own: 1.0} if own < step else in_place
    assert in_place is not None
    return in_place


def test_forecast_weights() -> None:
    plan = replace(CachePlan.from_refresh_steps(9, (0, 2, 5)), forecast=Forecast(1))
    assert feature_weights(plan, 1) == {0: 1.0}
    assert feature_weights(plan, 3) == pytest.approx({0: -0.5, 2: 1.5})
    assert feature_weights(plan, 8) == pytest.approx({2: -1.0, 5: 2.0})
    assert feature_weights(replace(plan, forecast=Forecast(1, 0.5)), 8) == pytest.approx({2: -0.5, 5: 1.5})
    assert feature_weights(replace(plan, forecast=Forecast(2)), 8) == pytest.approx({0: 1.8, 2: -4.0, 5: 3.2})
    assert feature_weights(replace(plan, forecast=Forecast(2, 0)), 8) == {5: 1.0}


@given(st.integers(1, 2), st.floats(0, 1), st.sets(st.integers(0, 20), min_size=3, max_size=3), st.integers(21, 40))
def test_a_forecast_of_a_polynomial_is_the_polynomial(order: int, damping: float, stored: set[int], step: int) -> None:
    last = sorted(stored)[-order - 1 :]
    value = lambda at: 3 - 0.5 * at + (0.1 * at**2 if order == 2 else 0)  # noqa: E731
    expected = value(last[-1]) + damping * (value(step) - value(last[-1]))
    weights = Forecast(order, damping).weights(last, step)
    assert sum(weights.values()) == pytest.approx(1)
    assert sum(weight * value(at) for at, weight in weights.items()) == pytest.approx(expected, abs=1e-6)


def test_a_forecast_by_sigma() -> None:
    sigmas = [8.0, 4.0, 2.0, 2.0, 1.0, 0.5]
    plan = replace(CachePlan.from_refresh_steps(6, (0, 2, 3)), forecast=Forecast(1, by="sigma"))
    assert feature_weights(plan, 1, sigmas) == {0: 1.0}
    assert feature_weights(plan, 4, sigmas) == {3: 1.0}  # 2 and 3 lie at the same noise level, and 0 too far back
    squared = replace(plan, forecast=Forecast(2, by="sigma"))
    assert feature_weights(squared, 4, sigmas) == pytest.approx({0: -1 / 6, 3: 7 / 6})
    with pytest.raises(ValueError, match="noise levels with a forecast by sigma, got None; forecast by step"):
        moves(plan, PASSES, None)


FORECAST: dict[str, Any] = {"order": 1, "damping": 1, "by": "step"}


def document(**changes: Any) -> str:
    fields = {**json.loads(CachePlan.uniform(3, 2).to_json()), **changes}
    return json.dumps({key: value for key, value in fields.items() if value != "drop"})


def old(branches: object) -> str:
    """A document of the first schema."""
    return document(schema="fastcache.plan/1", passes="drop", branches=branches)


@pytest.mark.parametrize(
    ("text", "expected", "got"),
    [
        ("", "a plan as JSON", "''"),
        ("{'schema'", "a plan as JSON", "schema"),
        ("[" * 100_000, "a plan as JSON", r"\[\[\["),
        (document()[:-1], "a plan as JSON", "schema"),
        ("9" * 5000, "a plan as JSON", "999"),
        (b"\xff", "a plan as JSON", "xff"),
        (None, "a plan as JSON", "None"),
        ("[]", "a JSON object", r"\[\]"),
        ("{}", 'schema "fastcache.plan/2"', "None"),
        (document(schema="fastcache.plan/3"), 'schema "fastcache.plan/2"', "'fastcache.plan/3'"),
        (document(schema=["fastcache.plan/2"]), 'schema "fastcache.plan/2"', r"\['fastcache.plan/2'\]"),
        (document(schema="fastcache.plan/1"), 'schema "fastcache.plan/2"', "'fastcache.plan/1'"),
        (document(model="drop"), "the keys", "made_by"),
        (document(branch_id=0), "the keys", "branch_id"),
        (document(passes="drop"), "the keys", "made_by"),
        (document(passes=None), "passes to be a list", "None"),
        (document(passes="nnn"), "passes to be a list", "'nnn'"),
        (document(passes=[], num_steps=0), "passes to be a tuple with a name a step", r"\(\)"),
        (document(passes=["shallow-0", "full", "full"]), "first step to be FULL", "'shallow-0'"),
        (document(passes=["full", None, "full"]), r"passes\[1\] to name a pass", "None"),
        (document(passes=["full", "a b", "full"]), r"passes\[1\] to name a pass", "'a b'"),
        (old([None, -1, None]), r"branches\[1\] to be null or an integer >= 0", "-1"),
        (old([None, True, None]), r"branches\[1\] to be null or an integer >= 0", "True"),
        (old([None, 0.0, None]), r"branches\[1\] to be null or an integer >= 0", "0.0"),
        (old([None, None, "0"]), r"branches\[2\] to be null or an integer >= 0", "'0'"),
        (old([False, None, None]), r"branches\[0\] to be null or an integer >= 0", "False"),
        (old("nnn"), 'schema "fastcache.plan/2"', "'fastcache.plan/1'"),
        (document(num_steps=4), "num_steps 3", "4"),
        (document(num_steps=3.0), "num_steps 3", "3.0"),
        (document(num_steps=None), "num_steps 3", "None"),
        (document(model=5), "model to be a string or None", "5"),
        (document(sampler=["ddim"]), "sampler to be a string or None", r"\['ddim'\]"),
        (document(made_by=None), "made_by to be a string", "None"),
        (document(unguided_steps="01"), "unguided_steps to be a list", "'01'"),
        (document(unguided_steps=[0, 3]), r"unguided_steps in 0\.\.2", r"\(0, 3\)"),
        (document(unguided_steps=[True]), r"unguided_steps in 0\.\.2", "True"),
        (document(unguided_steps=[2, 0]), "ascending order, each once", r"\(2, 0\)"),
        (document(forecast=1), "the keys order, damping and by", "1"),
        (document(forecast={"order": 1, "damping": 1}), "the keys order, damping and by", "order"),
        (document(forecast=FORECAST | {"as": 1}), "the keys order, damping and by", "as"),
        (document(forecast=FORECAST | {"order": 3}), "order 1 or 2", "3"),
        (document(forecast=FORECAST | {"order": True}), "order 1 or 2", "True"),
        (document(forecast=FORECAST | {"damping": 1.5}), "damping from 0 to 1", "1.5"),
        (document(forecast=FORECAST | {"damping": "1"}), "damping from 0 to 1", "'1'"),
        (document(forecast=FORECAST | {"by": "timestep"}), "step or sigma", "'timestep'"),
        (document(made_by="x" * 10_000, model=True), "model to be a string or None", "True"),
    ],
)
def test_from_json_refuses(text: Any, expected: str, got: str) -> None:
    with pytest.raises(ValueError, match=rf"expected .*{expected}.*, got .*{got}") as caught:
        CachePlan.from_json(text)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "an error says what to do"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CachePlan(()), r"passes to be a tuple.*got \(\)"),
        (lambda: CachePlan(["full"]), r"passes to be a tuple.*got \['full'\]"),  # pyright: ignore[reportArgumentType]
        (lambda: CachePlan.from_branches((0, None)), r"first step to be FULL.*got 'shallow-0'"),
        (lambda: CachePlan.from_branches((None, True)), "branch_id to be an integer.*got True"),
        (lambda: CachePlan(("full", 0)), r"passes\[1\] to name a pass, got 0"),  # pyright: ignore[reportArgumentType]
        (lambda: CachePlan(("full", "Shallow 0")), r"passes\[1\] to name a pass, got 'Shallow 0'"),
        (lambda: CachePlan(("full", "full"), unguided_steps=[1]), r"unguided_steps to be a tuple.*got \[1\]"),  # pyright: ignore[reportArgumentType]
        (lambda: CachePlan(("full", "full"), unguided_steps=(1, 1)), r"each once, got \(1, 1\)"),
        (lambda: CachePlan.uniform(6, 3).guided_within(3, 7), r"up to 6, got \(3, 7\)"),
        (lambda: CachePlan.uniform(6, 3).guided_within(3, 3), r"up to 6, got \(3, 3\)"),
        (lambda: CachePlan(("full",), forecast=1), "Forecast or None, got 1"),  # pyright: ignore[reportArgumentType]
        (lambda: Forecast(0), "order 1 or 2, got 0"),
        (lambda: Forecast(by="index"), "by step or sigma, got 'index'"),  # pyright: ignore[reportArgumentType]
        (lambda: Forecast(1, math.nan), "damping from 0 to 1, got nan"),
        (lambda: CachePlan.all_full(0), "num_steps to be an integer >= 1, got 0"),
        (lambda: CachePlan.all_full(True), "num_steps to be an integer >= 1, got True"),
        (lambda: CachePlan.uniform(50, 0), "interval to be an integer >= 1, got 0"),
        (lambda: CachePlan.uniform(50, 2.5), "interval to be an integer >= 1, got 2.5"),  # pyright: ignore[reportArgumentType]
        (lambda: CachePlan.uniform(-1, 3), "num_steps to be an integer >= 1, got -1"),
        (lambda: CachePlan.uniform(50, 3, -1), "branch_id to be an integer >= 0, got -1"),
        (lambda: CachePlan.uniform(50, 3, False), "branch_id to be an integer >= 0, got False"),
        (lambda: CachePlan.from_refresh_steps(5, []), r"refresh at step 0, got \[\]"),
        (lambda: CachePlan.from_refresh_steps(5, [1, 3]), r"refresh at step 0, got \[1, 3\]"),
        (lambda: CachePlan.from_refresh_steps(5, [0, 5]), r"refresh steps in 0\.\.4, got 5"),
        (lambda: CachePlan.from_refresh_steps(5, [0, -1]), r"refresh steps in 0\.\.4, got -1"),
        (lambda: CachePlan.from_refresh_steps(5, [0, True]), r"refresh steps in 0\.\.4, got True"),
        (lambda: CachePlan.from_refresh_steps(5, [0, 2, 2]), r"each refresh step once, got \[0, 2, 2\]"),
        (lambda: CachePlan.nonuniform(50, 5, 50, 1.4), r"center in \[0, 50\), got 50"),
        (lambda: CachePlan.nonuniform(50, 5, -1, 1.4), r"center in \[0, 50\), got -1"),
        (lambda: CachePlan.nonuniform(50, 5, math.nan, 1.4), r"center in \[0, 50\), got nan"),
        (lambda: CachePlan.nonuniform(50, 5, 15, 1.0), "power above 1, got 1.0"),
        (lambda: CachePlan.nonuniform(50, 5, 15, math.inf), "power above 1, got inf"),
        (lambda: CachePlan.nonuniform(50, 5, 15, math.nan), "power above 1, got nan"),
        (
            lambda: CachePlan.nonuniform(10, 2, 5, 1.4),
            "power in .* gives 5 distinct refreshes.*got none; use",
        ),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], CachePlan], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)
