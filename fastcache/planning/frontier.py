"""A fitting and what its passes take -> plans for a budget, a time, or draft, standard and fine, and their rivals.

Budgets are in full steps, by the times of this machine's own passes. Says what planning costs before it begins. How a
route is found and a row fitted is the business of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from fastcache.cut.names import FULL
from fastcache.evaluate.evaluate import UNCACHED, Candidate, num_calls
from fastcache.loop.plan import CachePlan, Forecast
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.planning.fitting import Fitting, costs_of
from fastcache.planning.routes import Scope
from fastcache.planning.ways import StepTimes

Say = Callable[[str], None]

QUALITIES: Final[Mapping[str, float]] = {"draft": 1 / 6, "standard": 1 / 4, "fine": 0.4}  # of the uncached time
_FEWER_STEPS: Final = ("ddim", "dpm++_2m", "unipc", "euler")


def budget_plan(fitting: Fitting, times: StepTimes, budget: float, say: Say) -> CachePlan:
    """The best fitted plan that takes no longer than so many full steps.

    Raises: `ValueError` for a budget below one step.
    """
    return _plans(fitting, times, {"budget": budget}, say)["budget"]


def quality_plans(fitting: Fitting, times: StepTimes, say: Say) -> dict[str, CachePlan]:
    """A plan for each of draft, standard and fine, by one search."""
    calls = fitting.table.num_calls
    return _plans(fitting, times, {name: share * calls for name, share in QUALITIES.items()}, say)


def _plans(fitting: Fitting, times: StepTimes, budgets: Mapping[str, float], say: Say) -> dict[str, CachePlan]:
    costs, calls = costs_of(times), fitting.table.num_calls
    if not min(budgets.values()) >= 1:
        raise ValueError(f"expected a budget of 1 full step or more, got {min(budgets.values()):g}; allow more time")
    within = tuple(min(calls, budget) for budget in budgets.values())
    scope = Scope(within)
    steps = fitting.full_steps(costs, scope)
    say(f"planning takes about {steps:.0f} full steps of a picture, {steps * times.full_ms / times.batch / 1e3:.0f} s")
    routes = fitting.routes(costs, scope)
    return {name: fitting.best(routes, costs, budget) for name, budget in budgets.items()}


def rivals(
    pipe: FastCachePipeline, sampler: str, steps: int, budgets: Sequence[float], times: StepTimes
) -> list[Candidate]:
    """The uncached run, and what else there is for these budgets: fewer steps, refreshes at intervals, a forecast."""
    calls, costs = num_calls(pipe.bundle.manifest, sampler, steps), costs_of(times)
    shallow = min(cost for name, cost in costs.items() if name != FULL)
    branch = pipe.bundle.manifest.branch_id
    found = [Candidate(UNCACHED, CachePlan.all_full(calls), sampler, steps)]
    for budget in budgets:
        fewer = math.floor(budget)
        for name in _FEWER_STEPS:
            plan = CachePlan.all_full(num_calls(pipe.bundle.manifest, name, fewer))
            found.append(Candidate(f"{name} {fewer}", plan, name, fewer))
        refreshes = math.floor((budget - calls * shallow) / (1 - shallow))
        if refreshes < 1:
            continue
        interval = math.ceil(calls / refreshes)
        uniform = CachePlan.uniform(calls, interval, branch)
        found += [
            Candidate(f"1:{interval}", uniform, sampler, steps),
            Candidate(f"1:{interval} forecast", replace(uniform, forecast=Forecast(by="sigma")), sampler, steps),
        ]
        if 1 < interval < calls:
            nonuniform = CachePlan.nonuniform(calls, interval, 0.3 * calls, 1.4, branch)
            found.append(Candidate(f"non-uniform 1:{interval}", nonuniform, sampler, steps))
    return list({arm.name: arm for arm in found}.values())
