"""Turn a wish ("a refresh every third step") into a cache plan: for each step, FULL or SHALLOW.

Pure Python: knows nothing about tensors, engines, schedulers or timestep values. A step is the index of a
U-Net call.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, cast

FULL: Final = None
SCHEMA: Final = "fastcache.plan/1"

_KEYS: Final = {"schema", "model", "sampler", "made_by", "num_steps", "branches"}
_POWER_DECREMENT: Final = 0.02  # the paper's code lowers the power by this until the number of refreshes fits


@dataclass(frozen=True)
class CachePlan:
    """Which engine each step runs.

    `branches[step]` is `FULL` (None) where the step runs the full engine and stores the cached feature, else
    the branch_id of the shallow engine that reuses it. The first step is FULL: nothing is cached across
    requests.

    Raises: ValueError if the plan is empty, starts SHALLOW, or names something that is not a branch_id.
    Source: DeepCache, arXiv 2312.00858, section 3.3.
    """

    branches: tuple[int | None, ...]
    model: str | None = None
    sampler: str | None = None
    made_by: str = "given"

    def __post_init__(self) -> None:
        _check_branches(self.branches)
        for name, value in (("model", self.model), ("sampler", self.sampler)):
            if not (value is None or isinstance(value, str)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise _expected(f"{name} to be a string or None", value, f"name the {name} or leave it out")
        if not isinstance(self.made_by, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise _expected("made_by to be a string", self.made_by, "say which constructor made the plan")

    @property
    def num_steps(self) -> int:
        return len(self.branches)

    @property
    def refresh_steps(self) -> tuple[int, ...]:
        """The steps that run the full engine, ascending."""
        return tuple(step for step, branch in enumerate(self.branches) if branch is FULL)

    def is_full(self, step: int) -> bool:
        return self.branches[step] is FULL

    @classmethod
    def all_full(cls, num_steps: int) -> CachePlan:
        """No caching: every step runs the full engine."""
        return cls((FULL,) * _at_least(1, num_steps=num_steps), made_by="all_full()")

    @classmethod
    def uniform(cls, num_steps: int, interval: int, branch_id: int = 0) -> CachePlan:
        """A refresh at steps 0, interval, 2 * interval, ...

        Raises: ValueError if num_steps or interval is below 1 or branch_id below 0.
        Source: DeepCache, arXiv 2312.00858, section 3.3 ("uniform 1:N").
        """
        _at_least(1, num_steps=num_steps)
        refreshes = range(0, num_steps, _at_least(1, interval=interval))
        return cls(_branches(num_steps, refreshes, branch_id), made_by=f"uniform(interval={interval})")

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
        count = math.ceil(_at_least(1, num_steps=num_steps) / _at_least(1, interval=interval))
        if not 0 <= center < num_steps:
            raise _expected(f"center in [0, {num_steps})", center, "give the step to refresh most around")
        if not 1 < power < math.inf:
            raise _expected("a finite power above 1", power, "use 1.2 to 1.5, or CachePlan.uniform")
        options = ", as_shipped=True" if as_shipped else ""
        refreshes = _power_spaced(num_steps, count, center, power, as_shipped)
        return cls(
            _branches(num_steps, refreshes, branch_id),
            made_by=f"nonuniform(interval={interval}, center={center}, power={power}{options})",
        )

    @classmethod
    def from_refresh_steps(cls, num_steps: int, refresh_steps: Iterable[int], branch_id: int = 0) -> CachePlan:
        """FULL at the steps given, in any order, SHALLOW elsewhere.

        Raises: ValueError if step 0 is missing, or a step is repeated, no integer or outside the plan.
        """
        _at_least(1, num_steps=num_steps)
        return cls(_branches(num_steps, refresh_steps, branch_id), made_by="from_refresh_steps()")

    def to_json(self) -> str:
        """The plan as a one-line JSON document that `from_json` reads back unchanged."""
        fields: dict[str, object] = {
            "schema": SCHEMA,
            "model": self.model,
            "sampler": self.sampler,
            "made_by": self.made_by,
            "num_steps": self.num_steps,
            "branches": self.branches,
        }
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> CachePlan:
        """The plan that `to_json` wrote.

        Raises: ValueError, in one line, if the text is not JSON, of another schema, or not a valid plan.
        """
        remedy = "write plans with CachePlan.to_json"
        try:
            parsed = cast(object, json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"expected a plan as JSON, got {reprlib.repr(text)} ({error}); {remedy}") from error
        if not isinstance(parsed, dict):
            raise _expected("a JSON object", parsed, remedy)
        fields = cast("dict[str, object]", parsed)
        if fields.get("schema") != SCHEMA:
            raise _expected(f'schema "{SCHEMA}"', fields.get("schema"), "make the plan again with this fastcache")
        if fields.keys() != _KEYS:
            raise ValueError(f"expected the keys {sorted(_KEYS)}, got {reprlib.repr(sorted(fields))}; {remedy}")
        branches = fields["branches"]
        if not isinstance(branches, list):
            raise _expected("branches to be a list", branches, remedy)
        plan = cls(  # __post_init__ checks the types
            tuple(cast("list[int | None]", branches)),
            cast("str | None", fields["model"]),
            cast("str | None", fields["sampler"]),
            cast(str, fields["made_by"]),
        )
        if not _is_int(fields["num_steps"]) or fields["num_steps"] != plan.num_steps:
            raise _expected(f"num_steps {plan.num_steps}, one a branch", fields["num_steps"], remedy)
        return plan


def _power_spaced(num_steps: int, count: int, center: float, power: float, as_shipped: bool) -> list[int]:
    if count == num_steps:  # no freedom left, and distinct integers that close would need power 1
        return list(range(num_steps))
    spaced = _shipped_distances if as_shipped else _signed_distances
    tried = power
    while tried > 1:
        distances = sorted(set(spaced(num_steps, count, center, tried)))
        steps = [0, *(int(distance + center) for distance in distances[1:-1])]
        if len(steps) == count:
            return steps
        tried -= _POWER_DECREMENT
    raise ValueError(
        f"expected a power in (1, {power}] that gives {count} distinct refreshes of {num_steps} steps around "
        f"{center}, got none; use another interval or center, or CachePlan.uniform"
    )


def _signed_distances(num_steps: int, count: int, center: float, power: float) -> list[int]:
    first, last = -(center ** (1 / power)), (num_steps - center) ** (1 / power)
    points = (first + (last - first) * i / count for i in range(1, count))
    inner = (int(math.copysign(abs(point) ** power, point)) for point in points)
    return [int(-center), *inner, int(num_steps - center)]  # the ends are known: no rounding to a neighbour


def _shipped_distances(num_steps: int, count: int, center: float, power: float) -> list[int]:
    # numpy, as there: it rounds otherwise than Python's complex power, and the end at -center is truncated
    import numpy as np

    first, last = (-center) ** (1 / power), (num_steps - center) ** (1 / power)
    return [int(value) for value in (np.linspace(first, last, count + 1) ** power).real]


def _branches(num_steps: int, refresh_steps: Iterable[int], branch_id: int) -> tuple[int | None, ...]:
    _at_least(0, branch_id=branch_id)
    refreshes = list(refresh_steps)
    for step in refreshes:
        if not _is_int(step) or not 0 <= step < num_steps:
            raise _expected(f"refresh steps in 0..{num_steps - 1}", step, "steps count U-Net calls from 0")
    if len(set(refreshes)) != len(refreshes):
        raise _expected("each refresh step once", refreshes, "drop the repeats")
    if 0 not in refreshes:
        raise _expected("a refresh at step 0", refreshes, "add 0: nothing is cached across requests")
    chosen = set(refreshes)
    return tuple(FULL if step in chosen else branch_id for step in range(num_steps))


def _check_branches(branches: object) -> None:
    if not isinstance(branches, tuple) or not branches:
        raise _expected("branches to be a tuple with an entry a step", branches, "give at least one step")
    entries = cast("tuple[object, ...]", branches)
    for step, branch in enumerate(entries):
        if branch is not FULL and not (_is_int(branch) and cast(int, branch) >= 0):
            raise _expected(f"branches[{step}] to be None or an integer >= 0", branch, "None is a FULL step")
    if entries[0] is not FULL:
        raise _expected("the first step to be FULL (None)", entries[0], "nothing is cached across requests")


def _at_least(least: int, **named: int) -> int:
    ((name, value),) = named.items()
    if not _is_int(value) or value < least:
        raise _expected(f"{name} to be an integer >= {least}", value, f"give another {name}")
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # True would pass for branch 1


def _expected(what: str, got: object, remedy: str) -> ValueError:
    return ValueError(f"expected {what}, got {reprlib.repr(got)}; {remedy}")
