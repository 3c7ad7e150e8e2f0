"""Messages of long work -> how far it is, and how long the rest takes. Pure Python; knows nothing of what is done.

Work counts in its messages: `round 2 of 5` and `drawing pictures 9 to 16 of 32` begin a part, `3 of 5: name` ends one.
A build has no parts of a kind, but the same ones each time: `shares` names them, with how much of the whole is done
when they begin.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

_ENDED = re.compile(r"(\d+) of (\d+)\b")
_BEGUN = re.compile(r"\b(\d+)(?: to \d+)? of (\d+)\b")
_DIGITS = re.compile(r"\d+")
_LONG_S = 2.0  # what takes less is over before one has read of it


def counted(message: str) -> tuple[int, int] | None:
    """How many parts are done, and of how many, where a message says so."""
    if ended := _ENDED.match(message):
        done, total = int(ended[1]), int(ended[2])
    elif begun := _BEGUN.search(message):
        done, total = int(begun[1]) - 1, int(begun[2])
    else:
        return None
    return (done, total) if 0 <= done <= total else None


@dataclass
class Pace:
    """How far the work is, from 0 to 1, by the messages so far; a new kind of message begins anew."""

    shares: Mapping[str, float] = field(default_factory=dict[str, float])
    share: float | None = None
    _kind: str = ""
    _began: tuple[float, float] = (0.0, 0.0)  # when, and at which share
    _end: float | None = None

    def hear(self, message: str, now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        kind, share = self._place(message)
        if kind != self._kind:
            self._kind, self._began, self._end = kind, (now, share or 0.0), None
        self.share = share
        begun, first = self._began
        if share is not None and share > first and now - begun >= _LONG_S:
            self._end = now + (now - begun) * (1 - share) / (share - first)

    def left_s(self, now: float | None = None) -> float | None:
        """Seconds until the end, by the pace so far; None before there is one."""
        now = time.monotonic() if now is None else now
        return None if self._end is None else max(0.0, self._end - now)

    def left(self) -> str:
        """The same in words, or nothing."""
        seconds = self.left_s()
        if seconds is None or seconds < 1:
            return ""
        return f"about {seconds:.0f} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"

    def _place(self, message: str) -> tuple[str, float | None]:
        known = next((share for start, share in self.shares.items() if message.startswith(start)), None)
        if known is not None:
            return "shares", known
        count = counted(message)
        if count is None:
            return ("shares", self.share) if self.shares else (message, None)
        return _DIGITS.sub("", message.partition(":")[0]), count[0] / count[1] if count[1] else None
