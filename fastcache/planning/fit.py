"""A reference run and a network -> rows that keep a run of fewer and cheaper calls on the reference's path.

One row after another, in closed form: ridge regression of what the default row misses of the reference's next state, on
the state and the noise foretold at the last calls. The calibration pictures take the fitted step
themselves, so later rows are fitted to the states that they will meet. Knows nothing about engines, prompts or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fastcache.loop.fit import MOST_LOOKED_BACK
from fastcache.loop.fitted import Grid, default_rows
from fastcache.sampler.table import SamplerTable

Predict = Callable[[int, Tensor], Tensor]
"""A step's number and x -> its guided prediction e. Shapes: both (N, ...)."""

RIDGES: Final = (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True, eq=False)
class Fitted:
    """Rows, as `loop.fit.Fit` has them, where the pictures ended, and how many steps kept the default row.

    Shapes: `result` (N, ...), float64.
    """

    rows: tuple[tuple[float, ...], ...]
    result: Tensor
    defaults: int


def fit_rows(
    predict: Predict,
    reference: Sequence[Tensor],
    table: SamplerTable,
    prediction_type: str,
    points: Sequence[int],
    *,
    fit_on: int | None = None,
) -> Fitted:
    """Fit the rows of a run that visits these points of a reference, on the first `fit_on` pictures; all walk on them.

    A row leaves the default one only where pictures that were left out come nearer to the reference by it.

    Shapes: `reference` (calls + 1) states of (N, ...), x_T first, the result last; float64.
    """
    grid, rows = Grid.of(table, prediction_type), list[tuple[float, ...]]()
    defaults, kept = default_rows(table, prediction_type, points), 0
    past: list[tuple[Tensor, Tensor]] = []
    x = reference[0]
    for step, end in enumerate([*points[1:], table.num_calls]):
        past = [*past[1 - MOST_LOOKED_BACK :], (x, predict(step, x).double())]
        raw = torch.stack([part for pair in past for part in pair], -1)
        default = _widened(defaults[step], len(past))
        basis = columns(grid, points, step, len(past))
        rest = reference[end] - raw @ default
        fitted = ridge_fit((raw @ basis).flatten(1, -2)[:fit_on], rest.flatten(1)[:fit_on])
        kept += fitted is None
        x = raw @ (default if fitted is None else default + basis @ fitted)
        rows.append(tuple(defaults[step] if fitted is None else (default + basis @ fitted).tolist()))
    return Fitted(tuple(rows), x, kept)


def _widened(row: Sequence[float], calls: int) -> Tensor:
    """A row over more calls than it looks back over."""
    return torch.tensor([0.0] * (2 * calls - len(row)) + list(row), dtype=torch.float64)


def columns(grid: Grid, points: Sequence[int], step: int, calls: int) -> Tensor:
    """What the regression is on, out of x and e of the last calls.

    The state; the noise foretold and its differences from call to call, which are small where it changes little, so
    that a ridge holds back what they amplify.

    Shapes: returns (2 * calls, columns), float64.
    """
    weights = torch.zeros(calls, 2 * calls, dtype=torch.float64)  # eps of each call
    for place in range(calls):
        weights[place, 2 * place : 2 * place + 2] = torch.tensor(grid.eps_weights(points[step + 1 - calls + place]))
    state = torch.zeros(1, 2 * calls, dtype=torch.float64)
    state[0, -2] = 1.0
    return torch.cat([state, weights[-1:], weights.diff(dim=0)]).T


def ridge_fit(columns: Tensor, target: Tensor) -> Tensor | None:
    """The weights of the ridge that serves left-out pictures best; None where none serves them better than nothing.

    Shapes: `columns` (N, n, k), `target` (N, n); returns (k,); float64.
    """
    images, _, count = columns.shape
    if images < 2:
        return None
    triangles = torch.linalg.qr(torch.cat([columns, target[..., None]], -1), mode="r").R  # all that counts of a picture
    sizes = columns.square().sum((0, 1)).sqrt().clamp(min=1e-300)
    squares = target.square().sum(1)

    def solve(rows: Tensor, ridge: float, share: float) -> Tensor:
        damped = torch.cat([rows[:, :count] / sizes, (ridge * share) ** 0.5 * torch.eye(count, dtype=rows.dtype)])
        wanted = torch.cat([rows[:, count], rows.new_zeros(count)])
        return torch.linalg.lstsq(damped, wanted[:, None], driver="gelsd").solution[:, 0] / sizes

    best, least = None, float(squares.sum())
    for ridge in RIDGES:
        error = 0.0
        for left_out in range(images):
            others = torch.cat([triangles[:left_out], triangles[left_out + 1 :]]).flatten(0, 1)
            weights = solve(others, ridge, (images - 1) / images)
            own = triangles[left_out]
            error += float((own[:, :count] @ weights - own[:, count]).square().sum())
        if error < least:
            best, least = ridge, error
    return None if best is None else solve(triangles.flatten(0, 1), best, 1.0)
