"""What stands in for CUDA graphs where there is no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastcache.loop.drivers import Call


class ListRecorder:
    """A recording that is a list of calls, made anew at every launch; counts recordings.

    Takes what a CUDA graph takes, or, with `anything`, every engine.
    """

    def __init__(self, *, anything: bool = False) -> None:
        self.anything = anything
        self.recordings = 0
        self.warm_ups = 0

    def warm_up(self, calls: Sequence[Call]) -> None:
        self.warm_ups += 1
        for call in calls:
            call()

    def capturable(self, binding: Any) -> bool:
        return self.anything or binding.capturable()

    def record(self, calls: Sequence[Call]) -> Any:
        self.recordings += 1
        return lambda: [call() for call in calls]
