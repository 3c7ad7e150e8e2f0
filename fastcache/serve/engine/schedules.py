"""A sampler, its steps and the part of them to do -> its calls as a table, made once. Draws nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import Final

from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.pipeline.schedule import WHOLE, Schedule, Span, Steps
from fastcache.sampler.table import SamplerTable

_KEPT: Final = 128


@dataclass(eq=False)
class _Made:
    """A schedule, once a thread has made it; the others wait for that one."""

    schedule: Schedule | None = None
    making: Lock = field(default_factory=Lock)


class Schedules:
    """The schedules of one bundle, however many threads ask for them at the same time."""

    def __init__(self, pipe: FastCachePipeline) -> None:
        self._pipe, self._asking = pipe, Lock()
        self._tables = lru_cache(maxsize=_KEPT)(lambda *_: _Made())

    def __call__(self, sampler: str, num_steps: int | Steps, span: Span = WHOLE) -> Schedule:
        """Raises: `ValueError` for steps that the sampler cannot take, or a sampler that is no table."""
        with self._asking:
            made = self._tables(sampler, num_steps, span)
        with made.making:
            made.schedule = made.schedule or self._make(sampler, num_steps, span)
        return made.schedule

    def _make(self, sampler: str, num_steps: int | Steps, span: Span) -> Schedule:
        schedule = self._pipe.schedule(sampler, num_steps, span=span)
        if not isinstance(schedule.sampler, SamplerTable):
            raise ValueError(f"expected a sampler that is a table, got {sampler}, which is not; name another sampler")
        return schedule
