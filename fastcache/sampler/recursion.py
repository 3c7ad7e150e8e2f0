"""A row of a sampler's table -> the same update as a weighted sum over few past calls, so a step reads few tensors.

Pure linear algebra in float64; knows nothing about schedulers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor

MAX_WINDOW: Final = 5  # PLMS of order 4 passes over one of its first calls: the deepest history but UniPC's

# Of a row's largest entry: the named samplers leave 4e-15 in a window that holds, 2e-6 and more in one too small.
_WINDOW_TOLERANCE: Final = 1e-8
# A window whose terms cancel to a thirtieth loses that much of float32; the named samplers stay below 4.
_MAX_CANCELLATION: Final = 30.0


@dataclass(frozen=True)
class Update:
    """x_{i+1} = weights @ history[3 * first : 3 * (i + 1)], the update after U-Net call i.

    Shapes: history has the rows x_0, e_0, z_0, x_1, e_1, z_1, ... (x_0 = x_T, e = the guided model output,
    z = the noise drawn at that call), weights has 3 for each call of the window.
    """

    first: int
    weights: tuple[float, ...]

    @property
    def window(self) -> int:
        """How many calls the update looks back over, its own included."""
        return len(self.weights) // 3


def own_update(row: Tensor, call: int) -> Update:
    """An update that is given in the basis of the history, from the first call that it uses."""
    first = min([*map(int, row.nonzero().flatten().unbind()), 3 * call]) // 3
    return Update(first, floats(row[3 * first : 3 * (call + 1)]))


def shortest_update(rows: Tensor, call: int) -> Update:
    """The update of one call, over as few calls as hold it.

    Shapes: `rows` are x_0, x_1, ... in the basis x_T, e_0, z_0, e_1, z_1, ...
    """
    for first in range(call, max(call - MAX_WINDOW, -1), -1):
        weights = _window_weights(rows, first, call)
        if weights is not None:
            return Update(first, weights)
    dense = torch.zeros(call + 1, 3, dtype=torch.float64, device="cpu")
    dense[0, 0] = rows[call + 1, 0]
    dense[:, 1:] = rows[call + 1, 1 : 2 * call + 3].reshape(call + 1, 2)
    return Update(0, floats(dense))


def _window_weights(rows: Tensor, first: int, call: int) -> tuple[float, ...] | None:
    """Weights over the calls first..call that give x_{call+1}, or None where that window does not hold it.

    What the window's own e and z add is free; all older coordinates must come out of its x alone.
    """
    target, xs = rows[call + 1], rows[first : call + 1]
    scale = target.abs().max()
    older = 1 + 2 * first
    # rcond: of x that are nearly the same to float32, use one rather than a large difference
    lstsq = cast("Callable[..., Any]", torch.linalg.lstsq)  # pyright: ignore[reportUnknownMemberType]
    solution = cast(Tensor, lstsq(xs[:, :older].T, target[:older, None], rcond=1e-7, driver="gelsd").solution[:, 0])
    rest = target - solution @ xs
    if not rest[:older].abs().max() <= _WINDOW_TOLERANCE * scale:
        return None
    if (solution.abs() * xs.abs().amax(1)).sum() > _MAX_CANCELLATION * scale:
        return None
    own = rest[older : 2 * call + 3].reshape(-1, 2)
    return floats(torch.cat([solution[:, None], own], dim=1))


def floats(weights: Tensor) -> tuple[float, ...]:
    return tuple(map(float, weights.flatten().unbind()))
