"""What passes gave on the way of one plan -> the same for another that begins alike, without calling an engine again.

A search changes a plan a little and runs it again: up to the change its pictures are where they were. Knows walks and
stops, not what comes between two calls.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from torch import Tensor

from fastcache.cut.names import FULL
from fastcache.planning.climb import Stops
from fastcache.planning.fit import Predict
from fastcache.planning.walks import Walks

Given = tuple[Tensor, Tensor | None]

_KEPT: Final = 128  # calls; at 512x512 each takes a megabyte for four pictures


class Beginnings:
    """What was foretold at the end of every beginning of a plan that walked lately.

    How rows are fitted has to be the same for all plans, so that equal beginnings lead to equal states.
    """

    def __init__(self, walks: Walks) -> None:
        self._walks = walks
        self._known: OrderedDict[Stops, Given] = OrderedDict()

    def walk(self, stops: Stops) -> Predict:
        """One plan's calls, to be made one after the other."""
        states, stale = list[Tensor](), False  # stale: the lanes' features are not what this plan left there

        def call(step: int) -> Given:
            point, name = stops[step]
            return self._walks.guided(name, point, states[step])

        def predict(step: int, x: Tensor) -> Given:
            nonlocal stale
            states.append(x)
            key = stops[: step + 1]
            if key in self._known:
                self._known.move_to_end(key)
                stale = True
                return self._known[key]
            if stale and self._walks.takes(stops[step][1]):
                last = max(k for k in range(step) if stops[k][1] == FULL)
                for before in range(last, step):
                    call(before)
            stale = False
            self._known[key] = found = call(step)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
            return found

        return predict
