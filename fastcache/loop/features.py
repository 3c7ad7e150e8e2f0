"""A plan's forecasts -> for each step, what keeps the feature that it stored and what makes the one that it reuses.

The features stored last are kept in slots beside the buffer that the engines share, and extrapolated into that buffer.
What is stored under the projected cut are two projections of the feature; its residual is linear in the feature, so
there extrapolating is the same, while the other has passed a norm and SiLU, and is extrapolated as it is.
Knows tensors and plans; knows nothing about engines or samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from fastcache.loop.buffers import BufferPool
from fastcache.loop.plan import CachePlan

Calls = dict[int, list[Callable[[], object]]]  # step -> what to call


@dataclass(frozen=True)
class Moves:
    """What a plan's forecast keeps of a branch's features, in `count` places that take turns, and makes of them.

    `keeps[step]` is the place for what a step stored; `makes[step]` are the places that a step's own feature is the sum
    of, and what each counts. A step in neither finds it where the step before left it.
    """

    count: int
    keeps: Mapping[int, int]
    makes: Mapping[int, tuple[Sequence[int], Sequence[float]]]


def moves(plan: CachePlan, sigmas: Sequence[float] | None) -> dict[int, Moves]:
    """A plan's moves by branch; none without a forecast.

    Raises: `ValueError` for a forecast by sigma where the sampler has no `sigmas`.
    """
    if plan.forecast is None:
        return {}
    count = plan.forecast.order + 1
    return {branch: _moves_of(plan, branch, count, sigmas) for branch in plan.branch_ids}


def _moves_of(plan: CachePlan, branch: int, count: int, sigmas: Sequence[float] | None) -> Moves:
    keeps, makes = dict[int, int](), dict[int, tuple[Sequence[int], Sequence[float]]]()
    in_place: int | None = None  # the step whose feature lies there as it was stored
    for step, own in enumerate(plan.branches):
        if plan.stores(step, branch):
            keeps[step] = len(keeps) % count
            in_place = step
        elif own == branch:
            weights = plan.feature_weights(step, sigmas)
            if list(weights) != [in_place]:
                makes[step] = [keeps[source] for source in weights], list(weights.values())
                in_place = None
    return Moves(count, keeps, makes)


def forecasts(pool: BufferPool, plan: CachePlan, sigmas: Sequence[float] | None) -> tuple[Calls, Calls]:
    """What to call before a step's engine runs, and what after it; nothing for a plan without a forecast.

    Raises: as `moves`.
    """
    before, after = Calls(), Calls()
    for branch, of_branch in moves(plan, sigmas).items():
        for name in pool.taken(branch):
            places = pool.tensors[name].new_empty(of_branch.count, *pool.tensors[name].shape)
            for step, place in of_branch.keeps.items():
                own = pool.rows(plan.is_guided(step)).tensors[name]
                _add(after, step, partial(places[place, -len(own) :].copy_, own))
            for step, (sources, weights) in of_branch.makes.items():
                own = pool.rows(plan.is_guided(step)).tensors[name]
                kept = [places[source, -len(own) :] for source in sources]
                _add(before, step, partial(extrapolate, kept, weights, own))
    return before, after


def _add(calls: Calls, step: int, call: Callable[[], object]) -> None:
    calls.setdefault(step, []).append(call)


def extrapolate(features: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """The sum of features by weights that sum to 1, in one pass for each but the first; nothing is allocated.

    Between two passes a feature of 16 bits is rounded to them.
    """
    if len(features) == 1:
        out.copy_(features[0])
        return
    shares = [weight / total for weight, total in zip(weights, accumulate(weights), strict=True)]
    torch.lerp(features[0], features[1], shares[1], out=out)
    for feature, share in zip(features[2:], shares[2:], strict=True):
        torch.lerp(out, feature, share, out=out)
