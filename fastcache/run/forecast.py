"""A plan's forecasts -> for each step, what keeps the feature that it stored and what makes the one that it reuses.

The features stored last are kept in slots beside the buffer that the engines share, and extrapolated into that buffer.
What is stored under the projected cut are two projections of the feature; its residual is linear in the feature, so
there extrapolating is the same, while the other has passed a norm and SiLU, and is extrapolated as it is.
Knows tensors and plans; knows nothing about engines or samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from fastcache.run.buffers import BufferPool
from fastcache.run.plan import CachePlan

Calls = dict[int, list[Callable[[], object]]]  # step -> what to call


def forecasts(pool: BufferPool, plan: CachePlan, sigmas: Sequence[float] | None) -> tuple[Calls, Calls]:
    """What to call before a step's engine runs, and what after it; nothing for a plan without a forecast.

    Raises: `ValueError` for a forecast by sigma where the sampler has no `sigmas`.
    """
    before, after = Calls(), Calls()
    if plan.forecast is not None:
        for branch in plan.branch_ids:
            weights = {step: plan.feature_weights(step, sigmas) for step in _steps_at(plan, branch)}
            _forecast_branch(pool, plan, branch, plan.forecast.order + 1, weights, before, after)
    return before, after


def _steps_at(plan: CachePlan, branch: int) -> list[int]:
    return [step for step, own in enumerate(plan.branches) if own == branch]


def _forecast_branch(
    pool: BufferPool,
    plan: CachePlan,
    branch: int,
    count: int,
    weights: Mapping[int, Mapping[int, float]],
    before: Calls,
    after: Calls,
) -> None:
    stores = [step for step in range(plan.num_steps) if plan.stores(step, branch)]
    slot_of = {step: place % count for place, step in enumerate(stores)}
    for name in pool.taken(branch):
        slots = pool.tensors[name].new_empty(count, *pool.tensors[name].shape)
        in_place: int | None = None  # the step whose feature the buffer holds as it was stored
        for step in range(plan.num_steps):
            own = pool.rows(plan.is_guided(step)).tensors[name]
            if step in slot_of:
                _add(after, step, partial(slots[slot_of[step], -len(own) :].copy_, own))
                in_place = step
            elif step in weights and list(weights[step]) != [in_place]:
                kept = [slots[slot_of[source], -len(own) :] for source in weights[step]]
                _add(before, step, partial(extrapolate, kept, list(weights[step].values()), own))
                in_place = None


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
