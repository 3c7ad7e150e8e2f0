"""Turn a wish ("a refresh every third step") into a cache plan: for each step, the name of the pass that it runs.

Besides the pass of each step a plan says where guidance is off, and whether cached features are reused as they were
stored or forecast. Pure Python: knows nothing about tensors, engines, schedulers or timestep values, nor what a pass is
made of. A step is the index of a U-Net call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal

from fastcache.cut.names import FULL, branch_of, shallow_pass
from fastcache.expect import at_least, expected, is_int, is_number, listed
from fastcache.loop.adjustment import ScaleShift
from fastcache.loop.fit import Fit
from fastcache.loop.spacing import power_spaced

_NAME: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Forecast:
    """Extrapolate the cached feature from those stored last, in place of reusing the last one as it is.

    A polynomial of `order` 1 or 2 through the last `order + 1` stored features; through fewer while fewer are stored.
    It runs `by` the index of the U-Net call (`step`), or by the calls' noise levels (`sigma`), which the sampler has:
    of two calls at the same one the later counts. `damping` is how much of what it adds to the last feature counts,
    from 0, plain reuse, to 1.

    Raises: ValueError for another order, damping or coordinate.
    Source: the idea is TaylorSeer's, arXiv 2503.06923; the polynomial is Lagrange's, for unequal distances.
    """

    order: int = 1
    damping: float = 1.0
    by: Literal["step", "sigma"] = "step"

    def __post_init__(self) -> None:
        if not isinstance(self.by, str) or self.by not in ("step", "sigma"):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise expected("a forecast by step or sigma", self.by, "choose one of these")
        if not is_int(self.order) or self.order not in (1, 2):
            raise expected("a forecast of order 1 or 2", self.order, "leave the forecast out for plain reuse")
        if not is_number(self.damping) or not 0 <= self.damping <= 1:
            raise expected("a damping from 0 to 1", self.damping, "0 is plain reuse, 1 the whole extrapolation")

    def weights(self, stored: Sequence[int], step: int, sigmas: Sequence[float] | None = None) -> dict[int, float]:
        """What the features stored at these steps, ascending, count at a later one, if anything. They sum to 1.

        Raises: ValueError for a forecast by sigma without the calls' sigmas.
        """
        if self.by == "sigma" and sigmas is None:
            raise expected("the sampler's noise levels with a forecast by sigma", None, "forecast by step")
        place = sigmas if self.by == "sigma" and sigmas is not None else range(step + 1)
        apart = {place[own]: own for own in stored}  # of two at one place the later
        weights: dict[int, float] = {}
        for x, own in apart.items():
            whole = math.prod((place[step] - other) / (x - other) for other in apart if other != x)
            weight = self.damping * whole + (1 - self.damping) * (own == stored[-1])
            weights |= {own: weight} if weight else {}
        return weights


@dataclass(frozen=True)
class CachePlan:
    """Which pass each step runs.

    `passes[step]` is `"full"` where the step runs the whole U-Net and stores every cached feature, else the name of a
    pass that reuses some: `"shallow-0"`, as the bundle's manifest has them. The first step is FULL: nothing is cached
    across requests. At `unguided_steps`, ascending, classifier-free guidance is off: they run on the conditional half
    alone, and store no other. A `fit` says which calls of a longer run the steps are, and
    what row each takes; such a plan names its sampler. `scale_shift` repairs the residuals of blocks that are reused.

    Raises: ValueError if the plan is empty, does not start FULL, or names something that is not a pass or a step.
        Whether each pass finds what it reuses is told by `features.check_reuse`, which knows a bundle's passes.
    Source: DeepCache, arXiv 2312.00858, section 3.3; guidance in an interval: arXiv 2404.07724, section 3.
    """

    passes: tuple[str, ...]
    model: str | None = None
    sampler: str | None = None
    made_by: str = "given"
    unguided_steps: tuple[int, ...] = ()
    forecast: Forecast | None = None
    fit: Fit | None = None
    scale_shift: ScaleShift | None = None

    def __post_init__(self) -> None:
        _check_passes(self.passes)
        for name, value in (("model", self.model), ("sampler", self.sampler)):
            if not (value is None or isinstance(value, str)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise expected(f"{name} to be a string or None", value, f"name the {name} or leave it out")
        if not isinstance(self.made_by, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise expected("made_by to be a string", self.made_by, "say which constructor made the plan")
        if not (self.forecast is None or isinstance(self.forecast, Forecast)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise expected("a Forecast or None", self.forecast, "give Forecast(order, damping)")
        _check_unguided(self.unguided_steps, self.num_steps)
        if self.fit is not None:
            self._check_fit(self.fit)
        if self.scale_shift is not None:
            _check_scale_shift(self.scale_shift, self.num_steps)

    def _check_fit(self, fit: object) -> None:
        if not isinstance(fit, Fit):
            raise expected("a Fit or None", fit, "make one with fastcache.planning")
        if self.sampler is None:
            raise expected("the sampler that a fitted plan was fitted for", None, "name it")
        if len(fit.points) != self.num_steps:
            raise expected(f"{self.num_steps} points in a fit, one a step", len(fit.points), "fit the plan again")

    @property
    def num_steps(self) -> int:
        return len(self.passes)

    @property
    def refresh_steps(self) -> tuple[int, ...]:
        """The steps that run the full pass, ascending."""
        return tuple(step for step, name in enumerate(self.passes) if name == FULL)

    @property
    def pass_names(self) -> tuple[str, ...]:
        """The passes that the plan runs, each once, in the order of their first steps."""
        return tuple(dict.fromkeys(self.passes))

    @property
    def branches(self) -> tuple[int | None, ...]:
        """The plan in DeepCache's terms: each step's branch id, None where it is FULL.

        Raises: ValueError for a plan of other passes.
        """
        return tuple(branch_of(name) for name in self.passes)

    @property
    def branch_ids(self) -> tuple[int, ...]:
        """The branches that SHALLOW steps name, ascending. Raises: as `branches`."""
        return tuple(sorted({branch for branch in map(branch_of, self.pass_names) if branch is not None}))

    def is_full(self, step: int) -> bool:
        return self.passes[step] == FULL

    def is_guided(self, step: int) -> bool:
        """Whether guidance is on at a step of a guided run."""
        return step not in self._unguided

    @cached_property
    def _unguided(self) -> frozenset[int]:
        return frozenset(self.unguided_steps)

    def last_steps(self, count: int) -> CachePlan:
        """The passes of a plan's last steps, without a fit, which is for all of them; the plan if it has no more."""
        gone = self.num_steps - count
        if gone <= 0:
            return self
        unguided = tuple(step - gone for step in self.unguided_steps if step >= gone)
        adjusted = None if self.scale_shift is None else self.scale_shift.last_steps(count)
        return replace(self, passes=self.passes[gone:], unguided_steps=unguided, fit=None, scale_shift=adjusted)

    def guided_within(self, first: int, end: int) -> CachePlan:
        """The same plan with guidance at the steps first..end-1 only.

        Raises: ValueError if these are no steps of the plan, or step `first` is SHALLOW and guidance was off before.
        """
        if not (is_int(first) and is_int(end) and 0 <= first < end <= self.num_steps):
            raise expected(
                f"guidance from a step to a later one, up to {self.num_steps}", (first, end), "steps count from 0"
            )
        return replace(self, unguided_steps=(*range(first), *range(end, self.num_steps)))

    @classmethod
    def all_full(cls, num_steps: int) -> CachePlan:
        """No caching: every step runs the full engine."""
        return cls((FULL,) * at_least(1, num_steps=num_steps), made_by="all_full()")

    @classmethod
    def from_branches(cls, branches: Iterable[int | None], **fields: Any) -> CachePlan:
        """A plan in DeepCache's terms: each step's branch id, None where it is FULL. `fields` are the plan's others.

        Raises: ValueError for what is neither.
        """
        given = listed("branches", branches)
        return cls(tuple(FULL if branch is None else shallow_pass(branch) for branch in given), **fields)

    @classmethod
    def uniform(cls, num_steps: int, interval: int, branch_id: int = 0) -> CachePlan:
        """A refresh at steps 0, interval, 2 * interval, ...

        Raises: ValueError if num_steps or interval is below 1 or branch_id below 0.
        Source: DeepCache, arXiv 2312.00858, section 3.3 ("uniform 1:N").
        """
        at_least(1, num_steps=num_steps)
        refreshes = range(0, num_steps, at_least(1, interval=interval))
        return cls(_passes(num_steps, refreshes, branch_id), made_by=f"uniform(interval={interval})")

    @classmethod
    def nonuniform(
        cls,
        num_steps: int,
        interval: int,
        center: float,
        power: float,
        branch_id: int = 0,
        as_shipped: bool = False,
    ) -> CachePlan:
        """As many refreshes as `uniform`, dense around step `center`, thinning out as a power of distance.

        By default the power keeps the sign of the distance, as the paper's formula means it. With
        `as_shipped=True` negative distances take their complex power, whose imaginary part is dropped, as in
        the published code.
        Where the refreshes collide, the power is lowered in steps of 0.02 until all are distinct.

        Raises: ValueError if center is not a step, power not above 1, or no power in (1, power] fits.
        Source: DeepCache, arXiv 2312.00858, section 3.3, and `sample_from_quad_center` in its code.
        """
        count = math.ceil(at_least(1, num_steps=num_steps) / at_least(1, interval=interval))
        if not is_number(center) or not 0 <= center < num_steps:
            raise expected(f"center in [0, {num_steps})", center, "give the step to refresh most around")
        if not is_number(power) or not 1 < power < math.inf:
            raise expected("a finite power above 1", power, "use 1.2 to 1.5, or CachePlan.uniform")
        if not isinstance(as_shipped, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise expected("as_shipped to be True or False", as_shipped, "leave it out for the paper's formula")
        options = ", as_shipped=True" if as_shipped else ""
        refreshes = power_spaced(num_steps, count, center, power, as_shipped)
        return cls(
            _passes(num_steps, refreshes, branch_id),
            made_by=f"nonuniform(interval={interval}, center={center}, power={power}{options})",
        )

    @classmethod
    def from_refresh_steps(cls, num_steps: int, refresh_steps: Iterable[int], branch_id: int = 0) -> CachePlan:
        """FULL at the steps given, in any order, SHALLOW elsewhere.

        Raises: ValueError if step 0 is missing, or a step is repeated, no integer or outside the plan.
        """
        at_least(1, num_steps=num_steps)
        return cls(_passes(num_steps, refresh_steps, branch_id), made_by="from_refresh_steps()")

    def to_json(self) -> str:
        """The plan as a one-line JSON document that `from_json` reads back unchanged."""
        from fastcache.loop.plan_file import written

        return written(self)

    @classmethod
    def from_json(cls, text: str) -> CachePlan:
        """The plan that `to_json` wrote, or that an earlier version did.

        Raises: ValueError, in one line, if the text is not JSON, of another schema, or not a valid plan.
        """
        from fastcache.loop.plan_file import read

        return read(text)


def _passes(num_steps: int, refresh_steps: Iterable[int], branch_id: int) -> tuple[str, ...]:
    shallow, refreshes = shallow_pass(branch_id), listed("refresh_steps", refresh_steps)
    for step in refreshes:
        if not is_int(step) or not 0 <= step < num_steps:
            raise expected(f"refresh steps in 0..{num_steps - 1}", step, "steps count U-Net calls from 0")
    chosen = set(refreshes)
    if len(chosen) != len(refreshes):
        raise expected("each refresh step once", refreshes, "drop the repeats")
    if 0 not in chosen:
        raise expected("a refresh at step 0", refreshes, "add 0: nothing is cached across requests")
    return tuple(FULL if step in chosen else shallow for step in range(num_steps))


def _check_passes(passes: Sequence[object]) -> None:
    if not isinstance(passes, tuple) or not passes:
        raise expected("passes to be a tuple with a name a step", passes, "give at least one step")
    names = set(passes) if all(isinstance(name, str) for name in passes) else passes
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise expected(f"passes[{passes.index(name)}] to name a pass", name, 'such as "full" or "shallow-0"')
    if passes[0] != FULL:
        raise expected('the first step to be FULL ("full")', passes[0], "nothing is cached across requests")


def _check_scale_shift(value: object, num_steps: int) -> None:
    if not isinstance(value, ScaleShift):
        raise expected("a ScaleShift or None", value, "make one with fastcache.planning")
    if value.num_steps != num_steps:
        raise expected(f"a scale and shift for {num_steps} steps", value.num_steps, "make the plan again")


def _check_unguided(steps: Sequence[object], num_steps: int) -> None:
    if not isinstance(steps, tuple):
        raise expected("unguided_steps to be a tuple of steps", steps, "give () for guidance throughout")
    known = [step for step in steps if is_int(step) and 0 <= step < num_steps]
    if len(known) != len(steps):
        raise expected(f"unguided_steps in 0..{num_steps - 1}", steps, "steps count U-Net calls from 0")
    if sorted(set(known)) != known:
        raise expected("unguided_steps in ascending order, each once", steps, "sort them and drop the repeats")
