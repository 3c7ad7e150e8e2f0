"""A sampler and the calls that are made -> rows of a run whose other steps foretell the noise in place of a call.

What Spectrum and ZEUS do: the sampler takes all of its steps, and where the network is not called its noise is
extrapolated from the last calls. Both are linear in what the calls gave, so all steps from one call to the next are one
row, and the run is that of a plan which visits its calls alone. Nothing is fitted. Knows tables; runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fastcache.loop.fit import MOST_LOOKED_BACK
from fastcache.loop.fitted import Grid
from fastcache.sampler.table import SamplerTable

_FORETOLD_FROM: Final = MOST_LOOKED_BACK - 1  # calls; a sampler of two steps looks back to what one of them foretold

Foretell = Callable[[Sequence[float], float], list[float]]
"""Where the last calls were, oldest first, and where a step without one is -> what each call's noise counts there."""


def reused(places: Sequence[float], place: float) -> list[float]:
    """The last call's noise, as it was."""
    return [0.0] * (len(places) - 1) + [1.0]


def along_a_line(places: Sequence[float], place: float) -> list[float]:
    """A line through the last two calls. Source: ZEUS, arXiv 2604.01552, whose calls are a step apart."""
    if len(places) < 2:
        return reused(places, place)
    before, last = places[-2:]
    share = (place - last) / (last - before)
    return [0.0] * (len(places) - 2) + [-share, 1 + share]


def by_chebyshev(places: Sequence[float], place: float, degree: int = 3, ridge: float = 0.1) -> list[float]:
    """Chebyshev polynomials up to a degree, by ridge regression on the last calls. Source: Spectrum (CVPR 2026)."""
    most = min(degree, len(places) - 1)
    first, span = places[0], (place - places[0]) or 1.0
    at = np.polynomial.chebyshev.chebvander([2 * (p - first) / span - 1 for p in [*places, place]], most)
    design, wanted = at[:-1], at[-1]
    normal = design.T @ design + ridge * np.diag([0.0] + [1.0] * most)
    return (wanted @ np.linalg.solve(normal, design.T)).tolist()


FORETOLD: dict[str, Foretell] = {"reuse": reused, "line": along_a_line, "chebyshev": by_chebyshev}


def skipping_rows(
    table: SamplerTable, prediction_type: str, points: Sequence[int], foretell: Foretell
) -> list[tuple[float, ...]]:
    """The rows of a run that calls the network at these points and foretells it at all other calls of the table.

    Shapes: of each row (2 * window,), x and e of the last calls, as `Fit.rows`.

    Raises: `ValueError` as `Grid.of`, and for a sampler whose steps look back further than a row may.
    """
    grid, calls = Grid.of(table, prediction_type), table.num_calls
    # Everything is written in x and e of the points: row 2k is x of point k, row 2k + 1 its e.
    basis = torch.eye(2 * len(points), dtype=torch.float64)
    states, predictions = list[Tensor](), list[Tensor]()
    rows, state = list[tuple[float, ...]](), basis[0]
    numbers = {point: k for k, point in enumerate(points)}
    last = 0
    for call, update in enumerate(table.recursion()):
        if call in numbers:
            if call:
                rows.append(_row(state, last))
            last = numbers[call]
            state, prediction = basis[2 * last], basis[2 * last + 1]
        else:
            prediction = _foretold(grid, state, basis, points[: last + 1], call, foretell)
        states.append(state)
        predictions.append(prediction)
        weights = list(zip(range(update.first, call + 1), update.weights[::3], update.weights[1::3], strict=True))
        state = torch.stack([of_x * states[k] + of_e * predictions[k] for k, of_x, of_e in weights]).sum(0)
        if call == calls - 1:
            rows.append(_row(state, last))
    return rows


def _foretold(grid: Grid, state: Tensor, basis: Tensor, called: Sequence[int], call: int, foretell: Foretell) -> Tensor:
    """What the network would give at a call, by the noise of the last ones."""
    first = max(0, len(called) - _FORETOLD_FROM)
    noise = torch.zeros_like(state)
    for k, share in enumerate(foretell([float(point) for point in called[first:]], float(call)), first):
        of_x, of_e = grid.eps_weights(called[k])
        noise = noise + share * (of_x * basis[2 * k] + of_e * basis[2 * k + 1])
    of_x, of_e = grid.eps_weights(call)
    return (noise - of_x * state) / of_e


def _row(state: Tensor, last: int) -> tuple[float, ...]:
    first = max(0, last + 1 - MOST_LOOKED_BACK)
    if state[: 2 * first].abs().sum() > 1e-9:
        raise ValueError("expected a sampler that looks back over five calls at most, got one of more; use ddim")
    return tuple(state[2 * first : 2 * (last + 1)].tolist())
