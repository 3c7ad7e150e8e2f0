"""What one bundle's work has taken lately -> what more of it will take. Plain Python; runs nothing and keeps no clock.

Times are of an image: a call that several shared is split between them, so what company costs is in them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from fastcache.loop.plan import CachePlan

_WEIGHT: Final = 0.1  # of what was measured last: some ten steps back count
Stage = Literal["encode", "decode"]


class Speeds:
    """Moving averages of a step by its pass and guidance, of encoding a job's prompt, of decoding an image.

    Units: seconds. Written by the worker's thread and read by others, a float at a time.
    """

    def __init__(self) -> None:
        self._steps: dict[tuple[str, bool], float] = {}
        self._stages: dict[Stage, float] = {"encode": 0.0, "decode": 0.0}

    def note_step(self, name: str, guided: bool, seconds: float) -> None:
        before = self._steps.get((name, guided), seconds)
        self._steps[name, guided] = before + _WEIGHT * (seconds - before)

    def note(self, stage: Stage, seconds: float) -> None:
        before = self._stages[stage] or seconds
        self._stages[stage] = before + _WEIGHT * (seconds - before)

    def step_s(self, name: str, guided: bool) -> float:
        """A step's time; of a pass that never ran the longest of any."""
        return self._steps.get((name, guided), max(self._steps.values(), default=0.0))

    def steps_s(self, plan: CachePlan, guided: bool, first: int = 0) -> float:
        """What the steps of a plan take, from one on."""
        steps = range(first, plan.num_steps)
        return sum(self.step_s(plan.passes[step], guided and plan.is_guided(step)) for step in steps)

    def image_s(self, plan: CachePlan, guided: bool, first: int = 0) -> float:
        """What is left of an image after some of its steps, its decoding included."""
        return self.steps_s(plan, guided, first) + self._stages["decode"]

    @property
    def encode_s(self) -> float:
        return self._stages["encode"]


def latency_s(own_s: float, others_s: Iterable[float], *, waits: bool) -> float:
    """When a job of so much work is done, beside clients that have so much left.

    Turns go round, so that each of the others holds it up by what they have, or as long as it is itself if that is
    less. One that `waits` for a free slot may have to let all of it pass first.
    """
    others = list(others_s)
    return own_s + (sum(others) if waits else sum(min(own_s, left) for left in others))
