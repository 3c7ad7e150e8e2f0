"""What a job brings along through the queue, as values: what to draw, by which plan, and whom to tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from fastcache.loop.plan import CachePlan
from fastcache.pipeline.arguments import Terms
from fastcache.pipeline.controls import Steering
from fastcache.pipeline.request import Request
from fastcache.pipeline.schedule import Schedule
from fastcache.serve.engine.events import Event


@dataclass(eq=False)
class Drawing:
    """What a job draws, the first image with `seed`, and what that means for the bundle.

    `steering` is made when its first image starts, for all of them: all that the U-Net takes besides latents.
    """

    request: Request
    terms: Terms
    seed: int
    schedule: Schedule
    plan: CachePlan
    steering: Steering | None = field(default=None, repr=False)


@dataclass(eq=False)
class Order:
    """A drawing, whom to tell of it, and how much. `notify` is called from the worker's thread.

    Units: seconds of `time.monotonic`.
    """

    drawing: Drawing
    notify: Callable[[Event], None]
    preview_steps: Collection[int] = ()
    each_step: bool = False
    route: str = "generations"
    plan_name: str = "uncached"
    quality: str | None = None
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
