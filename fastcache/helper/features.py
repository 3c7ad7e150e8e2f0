"""What a U-Net cached at its latest steps -> the feature that a step reuses: the last one as it is, or a forecast.

Under guidance a feature has two halves, the conditional one last. Knows nothing about how features are computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from fastcache.loop.features import extrapolate
from fastcache.loop.plan import Forecast


class _Stored(NamedTuple):
    step: int
    feature: Tensor
    halved: bool  # of the conditional half alone


class Features:
    """The features stored last, by name: one of each, or as many as the forecast reads.

    They are kept as they are given, so what is given must not be written to while it counts.
    """

    def __init__(self, forecast: Forecast | None = None) -> None:
        self._forecast, self._stored = forecast, dict[str, deque[_Stored]]()

    def clear(self) -> None:
        self._stored.clear()

    def store(self, step: int, features: Mapping[str, Tensor], halved: bool) -> None:
        """Keep what a step cached, `halved` where it ran on the conditional half alone."""
        count = 1 if self._forecast is None else self._forecast.order + 1
        for name, feature in features.items():
            self._stored.setdefault(name, deque(maxlen=count)).append(_Stored(step, feature, halved))

    def serves(self, name: str, halved: bool) -> bool:
        """Whether a step can reuse a feature: one on both halves cannot reuse what was stored of one alone."""
        return name in self._stored and (halved or not self._stored[name][-1].halved)

    def at(
        self,
        name: str,
        step: int,
        halved: bool,
        sigmas: Sequence[float] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The feature that a step reuses. `sigmas` are the noise levels of the run's calls, for a forecast by them.

        `out`, of its shape, takes a forecast; what is reused as it was stored stays where it is.

        Raises: `ValueError` for a forecast by sigma without sigmas.
        """
        stored = self._stored[name]
        if self._forecast is None:
            return _conditional(stored[-1]) if halved else stored[-1].feature
        usable = [*stored] if halved else [*takewhile(lambda kept: not kept.halved, reversed(stored))][::-1]
        weights = self._forecast.weights([kept.step for kept in usable], step, sigmas)
        features = {kept.step: _conditional(kept) if halved else kept.feature for kept in usable}
        sources = [features[source] for source in weights]
        if list(weights.values()) == [1.0]:
            return sources[0]
        forecast = torch.empty_like(sources[0]) if out is None else out
        extrapolate(sources, list(weights.values()), forecast)
        return forecast

    def halve(self) -> None:
        """From now on the conditional half is all there is: guidance was switched off."""
        for stored in self._stored.values():
            kept = [_Stored(old.step, _conditional(old), halved=False) for old in stored]
            stored.clear()
            stored.extend(kept)


def _conditional(stored: _Stored) -> Tensor:
    return stored.feature if stored.halved else stored.feature[len(stored.feature) // 2 :]
