"""How an interval between two refreshes may run -> what that does to the picture, and how long it takes.

A way says at which depth the interval's shallow steps run and which of its steps are guided. With several ways to
choose from, `search.py` finds the refreshes and the way of each interval together. Knows calibrations, times and
plans; nothing about tensors or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from fastcache.loop.plan import CachePlan
from fastcache.planning.calibration import Array, Calibration
from fastcache.planning.search import Intervals, Prices

_ROUNDING = 1e-6  # of a tick: sums of floats are not exact
_EVERY = (2, 3, 4)  # a deeper step at every second, third or fourth shallow one


@dataclass(frozen=True)
class Way:
    """One way to run an interval: its shallow steps at the branches of `cycle`, again and again, guided or not.

    A guided shallow step reuses what a guided refresh stored, so `shallow_guided` needs `full_guided`.
    """

    cycle: tuple[int, ...]
    full_guided: bool = True
    shallow_guided: bool = True

    def steps(self, length: int) -> list[tuple[int | None, bool]]:
        """For each step of an interval its branch, None in full, and whether it is guided."""
        shallow = [(self.cycle[k % len(self.cycle)], self.shallow_guided) for k in range(length - 1)]
        return [(None, self.full_guided), *shallow]


@dataclass(frozen=True)
class StepTimes:
    """What a U-Net call and all that a step does besides take on this machine: in full, and shallow by branch id.

    `unguided_ms` is of steps without guidance, by branch id, None in full; empty where that was not timed.
    """

    full_ms: float
    shallow_ms: dict[int, float]
    batch: int
    unguided_ms: dict[int | None, float] = field(default_factory=dict[int | None, float])

    def step_ms(self, branch: int | None, guided: bool = True) -> float:
        if not guided:
            return self.unguided_ms[branch]
        return self.full_ms if branch is None else self.shallow_ms[branch]

    def loop_ms(self, plan: CachePlan) -> float:
        return sum(self.step_ms(branch, plan.is_guided(step)) for step, branch in enumerate(plan.branches))

    def check(self, latency_ms: float, calls: int) -> None:
        """Raises: `ValueError` where even the fastest plan takes longer."""
        first = min(self.full_ms, self.unguided_ms.get(None, self.full_ms))
        least = first + (calls - 1) * min(first, *self.shallow_ms.values(), *self.unguided_ms.values())
        if not least <= latency_ms:
            raise ValueError(
                f"expected --max-latency-ms of {least:.1f} or more, which {calls} U-Net calls with one refresh take at "
                f"batch {self.batch} on this machine, got {latency_ms:g}; take fewer steps"
            )


def ways_of(branch_ids: Sequence[int], *, guidance: bool = False) -> list[Way]:
    """Intervals at one depth, or at the shallowest with a deeper step now and then; with `guidance` also without it."""
    first, *deeper = sorted(branch_ids)
    cycles = [(branch,) for branch in (first, *deeper)]
    cycles += [(first,) * (every - 1) + (branch,) for branch in deeper for every in _EVERY]
    guided = [(True, True), (True, False), (False, False)] if guidance else [(True, True)]
    return [Way(cycle, *on) for on in guided for cycle in cycles]


def prices(times: StepTimes, ways: Sequence[Way], calls: int, tick_ms: float) -> Prices:
    """What an interval of so many steps takes, in whole ticks, rounded up. Shapes: returns (ways, calls + 1)."""
    each_ms = np.array([[0, *(times.step_ms(*step) for step in way.steps(calls))] for way in ways])
    return np.ceil(each_ms.cumsum(axis=1) / tick_ms - _ROUNDING).astype(np.int64)


def plan_of(intervals: Intervals, ways: Sequence[Way], calls: int) -> CachePlan:
    """The plan whose intervals start where they are said to, and run in these ways."""
    starts = [start for start, _ in intervals]
    lengths = [end - start for start, end in pairwise([*starts, calls])]
    steps = [step for (_, way), length in zip(intervals, lengths, strict=True) for step in ways[way].steps(length)]
    unguided = tuple(step for step, (_, guided) in enumerate(steps) if not guided)
    return CachePlan.from_branches([branch for branch, _ in steps], unguided_steps=unguided)


def step_errors(calibration: Calibration, branches: Sequence[int | None], first: int = 0) -> Array:
    """The error of each step's noise prediction, from step `first` on, which runs in full.

    A shallow step above a deeper one reuses what that stored: to its own error comes what was wrong there, as if the
    two pointed the same way. Shapes: `branches` (n,), from step `first` on; returns (N, n).
    """
    found = np.zeros((len(calibration.samples), len(branches)))
    stored = dict[int, tuple[int, Array | float]]()  # branch id -> the step that stored it last, and its error
    for place, branch in enumerate(branches):
        step = first + place
        if branch is not None:
            source, inherited = stored[branch]
            found[:, place] = calibration.errors[:, calibration.branch(branch), step, source] + inherited
        renewed = [b for b in calibration.branch_ids if branch is None or b < branch]
        stored |= {b: (step, found[:, place].copy()) for b in renewed}
    return found


def way_costs(calibration: Calibration, way: Way) -> Array:
    """How far an interval alone moves the picture: mean square, for a refresh at s and the next one at r.

    An error at step j moves the final picture in proportion, and movements add up as vectors, whose products the
    couplings are: so the cost is the sum of e(j, s) e(k, s) couplings[j, k] over the steps j, k between s and r.
    Reuse and missing guidance are taken to move it at right angles, and a step without guidance to err by reuse as one
    with it, though that has the error of one half only, not of their difference many times.
    Shapes: returns (T, T + 1), [s, r], infinite where r <= s.
    """
    calls = calibration.num_calls
    costs = np.full((calls, calls + 1), np.inf)
    unguided = _block_sums(calibration.unguided.mean(0)) if not way.shallow_guided else np.zeros((calls + 1,) * 2)
    for s in range(calls):
        own = step_errors(calibration, [branch for branch, _ in way.steps(calls - s)], s)
        coupled = own[:, :, None] * calibration.couplings[:, s:, s:] * own[:, None, :]
        reuse = np.diagonal(coupled.mean(0).cumsum(0).cumsum(1))
        left_out = unguided[s if not way.full_guided else s + 1, s + 1 :]
        costs[s, s + 1 :] = reuse + left_out
    return costs


def _block_sums(matrix: Array) -> Array:
    """Sums over the rows and columns a ... b - 1. Shapes: (T, T) to (T + 1, T + 1), [a, b]."""
    sums = np.pad(matrix.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    diagonal = np.diagonal(sums)
    return diagonal[None, :] + diagonal[:, None] - sums - sums.T


def expected_moves(calibration: Calibration, plan: CachePlan) -> Array:
    """How far a whole plan moves each sample's picture, mean square, its intervals' effects on each other included.

    Shapes: returns (N,).
    """
    own = step_errors(calibration, plan.branches)
    found = np.einsum("nj,njk,nk->n", own, calibration.couplings, own)
    if plan.unguided_steps:
        off = list(plan.unguided_steps)
        found += calibration.unguided[:, off][:, :, off].sum((1, 2))
    return found
