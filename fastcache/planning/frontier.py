"""A fitting and what its passes take -> plans for a budget, a time, or draft, standard and fine, and their rivals.

Budgets are in full steps, by the times of this machine's own passes. Says what planning costs before it begins. How a
route is found and a row fitted is the business of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

from fastcache.cut.names import shallow_pass
from fastcache.evaluate.evaluate import UNCACHED, Candidate, num_calls
from fastcache.loop.plan import CachePlan, Forecast
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.planning.calibration import Calibration
from fastcache.planning.fitting import Fitting, costs_of
from fastcache.planning.planning import optimal_plan, threshold_plan
from fastcache.planning.routes import Scope
from fastcache.planning.search import threshold_for
from fastcache.planning.skipping import FORETOLD
from fastcache.planning.ways import StepTimes

Say = Callable[[str], None]

QUALITIES: Final[Mapping[str, float]] = {"draft": 1 / 6, "standard": 1 / 4, "fine": 0.4}  # of the uncached time
_FEWER_STEPS: Final = ("ddim", "dpm++_2m", "unipc", "euler")


def budget_plan(fitting: Fitting, times: StepTimes, budget: float, say: Say, *, blocks: bool = False) -> CachePlan:
    """The best fitted plan that takes no longer than so many full steps; with `blocks` it may run patterns of them.

    Raises: `ValueError` for a budget below one step.
    """
    return _plans(fitting, times, {"budget": budget}, say, blocks)["budget"]


def quality_plans(fitting: Fitting, times: StepTimes, say: Say, *, blocks: bool = False) -> dict[str, CachePlan]:
    """A plan for each of draft, standard and fine, by one search; `blocks` as for `budget_plan`."""
    calls = fitting.table.num_calls
    return _plans(fitting, times, {name: share * calls for name, share in QUALITIES.items()}, say, blocks)


def _plans(
    fitting: Fitting, times: StepTimes, budgets: Mapping[str, float], say: Say, blocks: bool
) -> dict[str, CachePlan]:
    costs, calls = costs_of(times), fitting.table.num_calls
    if not min(budgets.values()) >= 1:
        raise ValueError(f"expected a budget of 1 full step or more, got {min(budgets.values()):g}; allow more time")
    within = tuple(min(calls, budget) for budget in budgets.values())
    scope = Scope(within)
    steps = fitting.full_steps(costs, scope)
    say(f"planning takes about {steps:.0f} full steps of a picture, {steps * times.full_ms / times.batch / 1e3:.0f} s")
    routes = fitting.routes(costs, scope)
    patterns = fitting.patterns() if blocks else {}
    return {name: fitting.best(routes, costs, scope, budget, patterns) for name, budget in budgets.items()}


def rivals(
    pipe: FastCachePipeline, fitting: Fitting, budgets: Sequence[float], times: StepTimes, calibration: Calibration
) -> list[Candidate]:
    """The uncached run, and what else there is for these budgets.

    Fewer steps of four samplers; all steps, of which some foretell the noise in place of a call; and all steps with
    refreshes at an interval, dense around a step, by a threshold, or at the optimal steps, with and without a forecast.
    """
    manifest, sampler, steps = pipe.bundle.manifest, fitting.reference.sampler, fitting.reference.num_inference_steps
    calls, costs = fitting.table.num_calls, costs_of(times)
    branch = min(times.shallow_ms, key=times.shallow_ms.__getitem__)  # of those that were timed
    shallow = costs[shallow_pass(branch)]
    found = [Candidate(UNCACHED, CachePlan.all_full(calls), sampler, steps)]
    for budget in budgets:
        fewer = math.floor(budget)
        for name in _FEWER_STEPS:
            plan = CachePlan.all_full(num_calls(manifest, name, fewer))
            found.append(Candidate(f"{name} {fewer}", plan, name, fewer))
        found += [Candidate(f"skip {how} {fewer}", fitting.skipping(fewer, how), sampler, steps) for how in FORETOLD]
        refreshes = math.floor((budget - calls * shallow) / (1 - shallow)) if shallow < 1 else 0
        if refreshes >= 1:
            plans = _of_all_steps(calls, math.ceil(calls / refreshes), refreshes, branch, calibration)
            found += [Candidate(name, plan, sampler, steps) for name, plan in plans.items()]
    return list({arm.name: arm for arm in found}.values())


def _of_all_steps(
    calls: int, interval: int, refreshes: int, branch: int, calibration: Calibration
) -> dict[str, CachePlan]:
    uniform, optimal = CachePlan.uniform(calls, interval, branch), optimal_plan(calibration, branch, refreshes)
    by_sigma = Forecast(by="sigma")
    found = {
        f"1:{interval}": uniform,
        f"1:{interval} forecast": replace(uniform, forecast=by_sigma),
        f"threshold {refreshes}": threshold_plan(
            calibration, branch, threshold_for(calibration.change[calibration.branch(branch)], refreshes)
        ),
        f"optimal {refreshes}": optimal,
        f"optimal {refreshes} forecast": replace(optimal, forecast=by_sigma),
    }
    if not 1 < interval < calls:
        return found
    with suppress(ValueError):  # so many distinct steps are not around this centre
        found[f"non-uniform 1:{interval}"] = CachePlan.nonuniform(calls, interval, 0.3 * calls, 1.4, branch)
    return found
