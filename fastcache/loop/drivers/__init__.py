"""What carries out a step's own work, around its pass: PyTorch's operations, compiled C, or one kernel on a device.

A driver is made for one run on one lane. It keeps the run's last calls in the lane's ring, call i in place i % calls:
the latents x, the guided prediction e and the noise z, or what guidance is made of where fitted rows count that. All
drivers mean the same: the pass's input is the scaled latents, once a half; e is the halves guided; the row's weights
sum x, e and z of the last calls to the next x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

import torch
from torch import Tensor

from fastcache.loop.lane import Rows

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance of a run; `image_scale` counts where it has three parts."""

    scale: float = 1.0
    rescale: float = 0.0
    image_scale: float = 0.0


UNGUIDED: Final = Guidance()


def contrast(rows: Rows, out: Tensor) -> Call:
    """Write the conditional prediction less the unconditional one; zero on rows without guidance."""
    if len(rows.noise_pred) == 1:
        return out.zero_
    return partial(torch.sub, rows.noise_pred[-1], rows.noise_pred[-2], out=out)


@dataclass(frozen=True, slots=True)
class Turn:
    """What a step does before its pass and after it."""

    input: Sequence[Call]
    update: Sequence[Call]


class Driver(Protocol):
    """One run's own work, as calls on tensors that exist, every view made and every number in place."""

    ring: Tensor

    def turn(self, step: int, rows: Rows) -> Turn:
        """What writes a pass's input, sample and timestep, to the rows that it runs on; then guidance and the row."""
        ...
