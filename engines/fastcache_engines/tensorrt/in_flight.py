"""What a GPU may still be working with -> kept until it is done, without waiting for it.

Knows events, which say whether they have come to pass; knows nothing about TensorRT.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol


class Event(Protocol):
    def query(self) -> bool:
        """Whether all work before the event is done."""
        ...


class InFlight:
    """Things that nobody holds any more, each until its event has come to pass.

    `mark` makes an event behind all work that a thing may be in, or None where none can be made now: then it is asked
    again later.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Any, Callable[[], Event | None], Event | None]] = []
        self._lock = threading.RLock()  # again in one thread, for the garbage collector may come in between

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, thing: Any, mark: Callable[[], Event | None]) -> None:
        """Take a thing over, and let go of those that are done."""
        with self._lock:
            self._kept.append((thing, mark, None))
        self.let_go()

    def let_go(self) -> None:
        """Drop what is done."""
        with self._lock:
            kept, self._kept = self._kept, []
            for thing, mark, event in kept:
                event = event or mark()
                if event is None or not event.query():
                    self._kept.append((thing, mark, event))
