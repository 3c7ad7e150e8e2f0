"""The refresh steps of the paper's non-uniform schedule: dense around one step, thinning out as a power of distance.

Pure Python, but for the published code's own rounding. Knows nothing about plans.
"""

from __future__ import annotations

import math
from typing import Final

_POWER_DECREMENT: Final = 0.02  # the paper's code lowers the power by this until the number of refreshes fits


def power_spaced(num_steps: int, count: int, center: float, power: float, as_shipped: bool) -> list[int]:
    """`count` steps from 0 on, the power lowered until they are distinct; `as_shipped` rounds as the published code.

    Raises: ValueError where no power above 1 gives that many.
    Source: DeepCache, arXiv 2312.00858, section 3.3, and `sample_from_quad_center` in its code.
    """
    if count == num_steps:  # no freedom left, and distinct integers that close would need power 1
        return list(range(num_steps))
    spaced = _shipped_distances if as_shipped else _signed_distances
    tried = power
    while tried > 1:
        distances = sorted(set(spaced(num_steps, count, center, tried)))
        steps = [0, *(int(distance + center) for distance in distances[1:-1])]
        if len(steps) == count:
            return steps
        tried -= _POWER_DECREMENT
    raise ValueError(
        f"expected a power in (1, {power}] that gives {count} distinct refreshes of {num_steps} steps around "
        f"{center}, got none; use another interval or center, or CachePlan.uniform"
    )


def _signed_distances(num_steps: int, count: int, center: float, power: float) -> list[int]:
    first, last = -(center ** (1 / power)), (num_steps - center) ** (1 / power)
    points = (first + (last - first) * i / count for i in range(1, count))
    inner = (int(math.copysign(abs(point) ** power, point)) for point in points)
    return [int(-center), *inner, int(num_steps - center)]  # the ends are known: no rounding to a neighbour


def _shipped_distances(num_steps: int, count: int, center: float, power: float) -> list[int]:
    # numpy, as there: it rounds otherwise than Python's complex power, and the end at -center is truncated
    import numpy as np

    first, last = (-center) ** (1 / power), (num_steps - center) ** (1 / power)
    return [int(value) for value in (np.linspace(first, last, count + 1) ** power).real]
