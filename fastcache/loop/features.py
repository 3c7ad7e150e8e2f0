"""A plan and a bundle's passes -> for each step, what keeps the features that it stored and what makes those it reuses.

Without a forecast that is nothing: a feature stays in the tensor that the engines share. With one, the features stored
last are kept beside it, and extrapolated into it. What is stored under the projected cut are two projections of the
feature; its residual is linear in the feature, so there extrapolating is the same, while the other has passed a norm
and SiLU, and is extrapolated as it is. Knows nothing about engines or samplers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, takewhile

import torch
from torch import Tensor

from fastcache.loop.adjustment import ScaleShift
from fastcache.loop.lane import Lane, Pass
from fastcache.loop.plan import CachePlan

Calls = dict[int, list[Callable[[], object]]]  # step -> what to call


def check_reuse(plan: CachePlan, passes: Mapping[str, Pass]) -> None:
    """Refuse a plan whose passes are not there, or do not find what they reuse.

    Raises: `ValueError` for a pass that the bundle lacks, a feature that no step before stored, or a guided step that
        reuses what an unguided one stored, which is the conditional half alone.
    """
    if strange := [name for name in plan.pass_names if name not in passes]:
        raise ValueError(
            f"expected a plan of the passes {', '.join(passes)}, which the bundle was built with, got one with "
            f"{', '.join(strange)}; build with --branch-id for others"
        )
    stored = dict[str, int]()
    for step, name in enumerate(plan.passes):
        for feature in passes[name].takes:
            if feature not in stored:
                raise ValueError(f"expected a step that stores {feature} before step {step} ({name}), got none")
            if plan.is_guided(step) and not plan.is_guided(source := stored[feature]):
                raise ValueError(
                    f"expected the guided step {step} ({name}) to reuse a guided step's feature, got one that the "
                    f"unguided step {source} stored; make step {step} FULL or step {source} guided"
                )
        stored |= dict.fromkeys(passes[name].stores, step)


def check_channels(own: ScaleShift | None, channels: int) -> None:
    """Refuse scales and shifts for other blocks than those of a bundle. Raises: `ValueError`."""
    if own is not None and own.channels != channels:
        raise ValueError(
            f"expected a scale and shift for {channels} channels, those of the bundle's blocks, got them for "
            f"{own.channels}; make the plan with this bundle"
        )


@dataclass(frozen=True)
class Moves:
    """What a plan's forecast keeps of a feature, in `count` places that take turns, and what it makes of them.

    `keeps[step]` is the place for what a step stored; `makes[step]` are the places that a step's own feature is the sum
    of, and what each counts. A step in neither finds it where the step before left it.
    """

    count: int
    keeps: dict[int, int] = field(default_factory=dict[int, int])
    makes: dict[int, tuple[Sequence[int], Sequence[float]]] = field(
        default_factory=dict[int, tuple[Sequence[int], Sequence[float]]]
    )


def moves(plan: CachePlan, passes: Mapping[str, Pass], sigmas: Sequence[float] | None) -> dict[str, Moves]:
    """A plan's moves by feature; none without a forecast.

    Raises: `ValueError` for a forecast by sigma where the sampler has no `sigmas`.
    """
    if plan.forecast is None:
        return {}
    taken = dict.fromkeys(feature for name in plan.pass_names for feature in passes[name].takes)
    return {feature: _moves_of(plan, passes, feature, sigmas) for feature in taken}


def _moves_of(plan: CachePlan, passes: Mapping[str, Pass], feature: str, sigmas: Sequence[float] | None) -> Moves:
    """A guided step's forecast goes back to the last unguided one that stored, and no further."""
    count = plan.forecast.order + 1 if plan.forecast else 1
    found, latest = Moves(count), deque[int](maxlen=count)  # the steps that stored it last, newest first
    in_place: int | None = None  # the step whose feature lies there as it was stored
    for step, name in enumerate(plan.passes):
        if plan.forecast is not None and feature in passes[name].takes:
            usable = takewhile(plan.is_guided, latest) if plan.is_guided(step) else latest
            weights = plan.forecast.weights(sorted(usable), step, sigmas)
            if list(weights) != [in_place]:
                found.makes[step] = [found.keeps[source] for source in weights], list(weights.values())
                in_place = None
        if feature in passes[name].stores:
            found.keeps[step] = len(found.keeps) % count
            latest.appendleft(step)
            in_place = step
    return found


def forecasts(
    lane: Lane, plan: CachePlan, sigmas: Sequence[float] | None, *, guided: bool = True
) -> tuple[Calls, Calls]:
    """What to call before a step's pass runs, and what after it; nothing for a plan without a forecast.

    Raises: as `moves`.
    """
    before, after = Calls(), Calls()
    for name, of_feature in moves(plan, lane.passes, sigmas).items():
        places = lane.kept(name, of_feature.count)
        for step, place in of_feature.keeps.items():
            own = lane.rows(guided and plan.is_guided(step)).tensors[name]
            after.setdefault(step, []).append(partial(places[place, -len(own) :].copy_, own))
        for step, (sources, weights) in of_feature.makes.items():
            own = lane.rows(guided and plan.is_guided(step)).tensors[name]
            kept = [places[source, -len(own) :] for source in sources]
            before.setdefault(step, []).extend([partial(extrapolate, kept, weights, own), partial(lane.touch, name)])
    return before, after


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
