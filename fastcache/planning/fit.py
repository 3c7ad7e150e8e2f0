"""A reference run and a network -> rows that keep a run of fewer and cheaper calls on the reference's path.

One row after another, in closed form: ridge regression of what the default row misses of the reference's next state, on
the state, the noise foretold at the last calls, and what guidance added to it. The calibration pictures take the fitted
step themselves, so later rows are fitted to the states that they will meet. Knows nothing about engines, prompts or
files.
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

Predict = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]
"""A step's number and x -> its guided prediction e, and what guidance added, where there is any. Shapes: (N, ...)."""

Past = tuple[Tensor, ...]
"""Of one call x and e, and what guidance added where there is guidance. Shapes: (N, ...)."""

_CONTRASTS: Final = 2  # calls whose guidance counts for itself; a third gains nothing (docs/findings.md)

RIDGES: Final = (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True, eq=False)
class Fitted:
    """Rows and contrasts as `loop.fit.Fit` has them, where the pictures ended, how many steps kept the default row.

    Shapes: `result` (N, ...), float64.
    """

    rows: tuple[tuple[float, ...], ...]
    contrasts: tuple[tuple[float, ...], ...]
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
    grid, defaults, kept = Grid.of(table, prediction_type), default_rows(table, prediction_type, points), 0
    rows, contrasts, past = list[tuple[float, ...]](), list[tuple[float, ...]](), list[Past]()
    x = reference[0]
    for step, end in enumerate([*points[1:], table.num_calls]):
        e, added = predict(step, x)
        past = [*past[1 - MOST_LOOKED_BACK :], (x, e.double(), *([] if added is None else [added.double()]))]
        raw = torch.stack([part for call in past for part in call], -1)
        default = _widened(defaults[step], past)
        rest = (reference[end] - raw @ default).flatten(1)[:fit_on]
        fits = list[tuple[float, Tensor, Tensor]]()
        for basis in columns(grid, points[: step + 1][-len(past) :], past):
            weights, missed = ridge_fit((raw @ basis).flatten(1, -2)[:fit_on], rest)
            fits += [] if weights is None else [(missed, basis, weights)]
        kept += not fits
        if fits:
            _, basis, weights = min(fits, key=lambda fit: fit[0])
            weighed = default + basis @ weights
            x = raw @ weighed
            pairs, own = weighed.unflatten(0, (len(past), -1)).split([2, len(past[0]) - 2], dim=1)
            rows.append(tuple(pairs.flatten().tolist()))
            contrasts.append(tuple(own[-_CONTRASTS:].flatten().tolist()) if bool(own.any()) else ())
        else:
            x = raw @ default
            rows.append(defaults[step])
            contrasts.append(())
    return Fitted(tuple(rows), tuple(contrasts) if any(contrasts) else (), x, kept)


def _widened(row: Sequence[float], past: Sequence[Past]) -> Tensor:
    """A row over all that is there of the last calls."""
    widened = torch.zeros(len(past), len(past[0]), dtype=torch.float64)
    widened[-len(row) // 2 :, :2] = torch.tensor(row, dtype=torch.float64).view(-1, 2)
    return widened.flatten()


def columns(grid: Grid, points: Sequence[int], past: Sequence[Past]) -> list[Tensor]:
    """What regressions are on, out of what is there of the last calls, which were at these points.

    The state; the noise foretold and its differences from call to call, which are small where it changes little, so
    that a ridge holds back what they amplify. And the same with what guidance added, and its last difference.

    Shapes: returns (parts of all calls, columns) each, float64.
    """
    calls, width = len(past), len(past[0])
    foretold = torch.zeros(calls, calls, width, dtype=torch.float64)  # eps of each call
    added = torch.zeros_like(foretold)
    for place, point in enumerate(points):
        of_x, of_e = grid.eps_weights(point)
        foretold[place, place, :2] = torch.tensor((of_x, of_e))
        added[place, place, 2:] = of_e
    state = torch.zeros(1, calls, width, dtype=torch.float64)
    state[0, -1, 0] = 1.0
    plain = torch.cat([state, foretold[-1:], foretold.diff(dim=0)]).flatten(1).T
    if width == 2:
        return [plain]
    contrasts = torch.cat([added[-1:], added[-_CONTRASTS:].diff(dim=0)]).flatten(1).T
    return [plain, torch.cat([plain, contrasts], 1)]


def ridge_fit(columns: Tensor, target: Tensor) -> tuple[Tensor | None, float]:
    """The weights of the ridge that serves left-out pictures best, and the squares that these then miss.

    None where no ridge serves them better than nothing.

    Shapes: `columns` (N, n, k), `target` (N, n); returns (k,); float64.
    """
    images, _, count = columns.shape
    if images < 2:
        return None, float(target.square().sum())
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
    return None if best is None else solve(triangles.flatten(0, 1), best, 1.0), least
