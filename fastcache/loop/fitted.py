"""A sampler's table and a fit -> the table of a run that visits some of its calls, by rows that were fitted.

What a run would be without a fit is here too: between any two calls of a sampler the exact transfer of the picture and
the noise that the network foretells (DDIM's step, in the sampler's own scaling). Double precision throughout. Knows
nothing about engines, nor how rows are fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastcache.loop.fit import MOST_LOOKED_BACK, Fit
from fastcache.loop.plan import CachePlan
from fastcache.sampler.recursion import Update
from fastcache.sampler.table import SamplerTable


@dataclass(frozen=True, eq=False)
class Grid:
    """A reference run's states in terms of what its network foretells: x_i = picture[i] x0 + noise[i] eps.

    `scales[i]` and `timesteps[i]` are what call i feeds the network, which gives e_i = shown[i] x0 + heard[i] eps.

    Shapes: `picture` and `noise` (calls + 1,), the last that of the result; `shown` and `heard` (calls,); float64.
    """

    picture: Tensor
    noise: Tensor
    shown: Tensor
    heard: Tensor

    @classmethod
    def of(cls, table: SamplerTable, prediction_type: str) -> Grid:
        """The grid of a sampler.

        Raises: `ValueError` for a sampler that draws noise, or does not tell its noise levels.
        """
        if table.noise.any():
            raise ValueError("expected a sampler that draws no noise for a fitted plan, got one that does; use ddim")
        if table.sigmas is None:
            raise ValueError("expected a sampler that tells its noise levels for a fitted plan, got none; use ddim")
        sigmas = torch.tensor(table.sigmas, dtype=torch.float64)
        signal = 1 / (1 + sigmas.square()).sqrt()
        zeros, ones = torch.zeros_like(sigmas), torch.ones_like(sigmas)
        shown, heard = {
            "epsilon": (zeros, ones),
            "sample": (ones, zeros),
            "v_prediction": (-sigmas * signal, signal),
        }[prediction_type]
        start = signal[0] / table.input_scale[0]
        picture = torch.cat([start[None], table.x * start + table.eps @ shown])
        noise = torch.cat([(start * sigmas[0])[None], table.x * start * sigmas[0] + table.eps @ heard])
        return cls(picture, noise, shown, heard)

    def eps_weights(self, call: int) -> tuple[float, float]:
        """What x and e of a call count in the noise that its network foretells."""
        picture, noise, shown, heard = (float(v[call]) for v in (self.picture, self.noise, self.shown, self.heard))
        determinant = picture * heard - noise * shown
        return -shown / determinant, picture / determinant

    def transfer(self, call: int, following: int) -> tuple[float, float]:
        """What x and e of a call count in the state before a later one, or in the result, where nothing changes."""
        picture, noise, shown, heard = (float(v[call]) for v in (self.picture, self.noise, self.shown, self.heard))
        determinant = picture * heard - noise * shown
        of_picture, of_noise = float(self.picture[following]), float(self.noise[following])
        return (
            (of_picture * heard - of_noise * shown) / determinant,
            (of_noise * picture - of_picture * noise) / determinant,
        )


def default_rows(table: SamplerTable, prediction_type: str, points: Sequence[int]) -> list[tuple[float, ...]]:
    """The rows of a run that visits these calls, unfitted: the sampler's own where it visits all, else transfers.

    Shapes: of each row (2 * window,), x and e of the last calls, as `Fit.rows`.
    """
    if len(points) == table.num_calls and table.widest_window <= MOST_LOOKED_BACK:
        return [_pairs(update.weights) for update in table.recursion()]
    grid = Grid.of(table, prediction_type)
    return [grid.transfer(point, end) for point, end in zip(points, [*points[1:], table.num_calls], strict=True)]


def _pairs(weights: Sequence[float]) -> tuple[float, ...]:
    return tuple(weight for place, weight in enumerate(weights) if place % 3 != 2)


def fitted_table(reference: SamplerTable, fit: Fit) -> SamplerTable:
    """The table of a fitted plan's run.

    Raises: `ValueError` for a fit of other calls than the reference makes.
    """
    if fit.points[-1] >= reference.num_calls:
        raise ValueError(
            f"expected points below {reference.num_calls}, the reference's U-Net calls, got {fit.points[-1]}; "
            "fit the plan again"
        )
    points = list(fit.points)
    updates = [_update(step, row, fit.contrast(step)) for step, row in enumerate(fit.rows)]
    x, eps, contrasts = _dense(updates)
    return replace(
        reference,
        timesteps=reference.timesteps[points],
        input_scale=reference.input_scale[points],
        x=x,
        eps=eps,
        noise=contrasts,
        noise_drawn=(False,) * len(points),
        stepwise=tuple(updates),
        sigmas=None if reference.sigmas is None else tuple(reference.sigmas[point] for point in points),
        contrasts=any(fit.contrasts),
    )


def begun_at(plan: CachePlan, reference: SamplerTable, prediction_type: str, begin: int) -> CachePlan:
    """A fitted plan from its first FULL point at or after a call of the reference, as image to image starts there.

    Rows that look back to before it are the default ones.

    Raises: `ValueError` for a plan without a fit, or one that has no such point.
    """
    fit = plan.fit
    if fit is None:
        raise ValueError("expected a fitted plan to begin at a point, got one without a fit")
    if begin <= fit.points[0]:
        return plan
    later = [step for step, point in enumerate(fit.points) if point >= begin and plan.is_full(step)]
    if not later:
        raise ValueError(
            f"expected a FULL point at or after call {begin} of {reference.num_calls}, where this run begins, got a "
            f"plan whose last is {fit.points[plan.refresh_steps[-1]]}; use a higher strength"
        )
    first = later[0]
    defaults = default_rows(reference, prediction_type, fit.points[first:])
    rows, contrasts = list[tuple[float, ...]](), list[tuple[float, ...]]()
    for step, row in enumerate(fit.rows[first:]):
        contrast = fit.contrast(first + step)
        fits = max(len(row) // 2, len(contrast)) <= step + 1
        rows.append(row if fits else defaults[step])
        contrasts.append(contrast if fits else ())
    return replace(
        plan,
        passes=plan.passes[first:],
        unguided_steps=tuple(step - first for step in plan.unguided_steps if step >= first),
        fit=replace(
            fit, points=fit.points[first:], rows=tuple(rows), contrasts=tuple(contrasts) if any(contrasts) else ()
        ),
    )


def _update(step: int, row: Sequence[float], contrast: Sequence[float]) -> Update:
    window = max(len(row) // 2, len(contrast))
    pairs = [0.0] * (2 * window - len(row)) + [*row]
    thirds = [0.0] * (window - len(contrast)) + [*contrast]
    weights = [value for three in zip(pairs[::2], pairs[1::2], thirds, strict=True) for value in three]
    return Update(step + 1 - window, tuple(weights))


def _dense(updates: Sequence[Update]) -> tuple[Tensor, Tensor, Tensor]:
    """Each state in terms of the first, of every e and of every contrast. Shapes: (calls,) and (calls, calls) twice."""
    calls = len(updates)
    states = torch.zeros(calls + 1, 1 + 2 * calls, dtype=torch.float64)
    states[0, 0] = 1.0
    for call, update in enumerate(updates):
        for place in range(update.window):
            own, (of_x, of_e, of_contrast) = update.first + place, update.weights[3 * place : 3 * place + 3]
            states[call + 1] += of_x * states[own]
            states[call + 1, 1 + own] += of_e
            states[call + 1, 1 + calls + own] += of_contrast
    return states[1:, 0].clone(), states[1:, 1 : 1 + calls].clone(), states[1:, 1 + calls :].clone()
