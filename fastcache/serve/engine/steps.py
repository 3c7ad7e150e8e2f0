"""An image in its slot -> what each of its steps does besides the engine, as calls on tensors that exist.

The serving side's counterpart of `run/between.py`, on a ring of the last calls instead of a whole run's history: in
compiled C on a CPU where it is there, else in PyTorch's operations. Knows nothing about engines or who shares a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastcache.loop.between import Around, Call, draw
from fastcache.loop.recursion import MAX_WINDOW
from fastcache.loop.table import SamplerTable
from fastcache_kernels import reference as kernels
from fastcache_kernels.cpu_step import CpuSteps, Library, found_library


@dataclass(frozen=True, eq=False)
class RingTable:
    """A sampler's table over a history that keeps the last MAX_WINDOW calls only, however many steps there are.

    `updates[i]` are call i's as in `SamplerTable.recursion`: the first call it looks back to, and weights from there.
    `weights[i]` are the same over the ring, for rows x, e, z of each call j at 3 * (j % MAX_WINDOW); `clean[i]` those
    of x and e of call i in the picture without noise that it foretells.

    Shapes: each of weights (1, 3 * MAX_WINDOW), float32.
    """

    timesteps: Sequence[float]
    input_scale: Sequence[Tensor]
    updates: Sequence[tuple[int, Sequence[float]]]
    weights: Sequence[Tensor]
    draws_noise: Sequence[bool]
    init_noise_sigma: float
    clean: Sequence[tuple[float, float]]
    sigmas: Sequence[float] | None = None

    @classmethod
    def of(cls, table: SamplerTable, device: str, prediction_type: str = "epsilon") -> RingTable:
        """Raises: `ValueError` for a sampler that looks back further than the ring reaches."""
        if table.widest_window > MAX_WINDOW:
            raise ValueError(f"expected a sampler that looks back {MAX_WINDOW} calls, got {table.widest_window}")
        updates = [(rule.first, rule.weights) for rule in table.recursion()]
        weights = torch.zeros(table.num_calls, MAX_WINDOW, 3)
        for call, (first, of_calls) in enumerate(updates):
            for j, of_call in enumerate(torch.tensor(of_calls).view(-1, 3)):
                weights[call, (first + j) % MAX_WINDOW] = of_call
        return cls(
            table.timesteps.tolist(),
            table.input_scale.float().to(device).unbind(),
            updates,
            weights.flatten(1).to(device).split(1),
            [table.draws_noise(call) for call in range(table.num_calls)],
            table.init_noise_sigma,
            _clean_weights(table, prediction_type),
            table.sigmas,
        )


def _clean_weights(table: SamplerTable, prediction_type: str) -> list[tuple[float, float]]:
    """What x and e of each call count in the picture that it foretells; x alone where no noise levels are known.

    Source: arXiv 2010.02502, equation 9, for noise; arXiv 2202.00512, section 4, for v.
    """
    if table.sigmas is None:
        return [(1.0, 0.0)] * table.num_calls
    if prediction_type == "sample":
        return [(0.0, 1.0)] * table.num_calls
    scales = zip(table.sigmas, table.input_scale.tolist(), strict=True)
    signals = [(sigma, scale, 1 / math.hypot(1, sigma)) for sigma, scale in scales]
    if prediction_type == "v_prediction":
        return [(scale * signal, -sigma * signal) for sigma, scale, signal in signals]
    return [(scale / signal, -sigma) for sigma, scale, signal in signals]


class Place(NamedTuple):
    """Where one image's rows of an engine call lie, the conditional one first.

    Shapes: `sample` and `noise_pred` (halves, C, H, W); `timestep` (halves,); each of `parts`, those of `noise_pred`,
    (1, C, H, W).
    """

    sample: Tensor
    timestep: Tensor
    noise_pred: Tensor
    parts: Sequence[Tensor]


class Steps:
    """One image on its way: its noise, and x, e and z of the last MAX_WINDOW calls, in a slot's own history.

    Shapes: `history` (3 * MAX_WINDOW + 1, C * H * W), zeros; `shape` is (1, C, H, W).
    """

    def __init__(
        self, history: Tensor, shape: Sequence[int], table: RingTable, guidance_scale: float, seed: int
    ) -> None:
        self._table, self._scale, self._generator = table, guidance_scale, torch.Generator().manual_seed(seed)
        self._ring, self._sum = history.split([len(history) - 1, 1])
        self._rows = [row.view(shape) for row in self._ring.unbind()]
        self._compiled = self._compile()
        self.latents = self._rows[0]  # where the last step left them
        draw(self.latents, [self._generator])
        self.latents.mul_(table.init_noise_sigma)

    def _compile(self) -> Callable[[int, Place], tuple[Call, Call]] | None:
        """What gives a step's two calls of compiled C, where there is any for these tensors."""
        library, table = found_library(), self._table
        if not isinstance(library, Library) or self._ring.device.type != "cpu":
            return None
        compiled = CpuSteps(
            library,
            self._ring.view(MAX_WINDOW, 3, *self._rows[0].shape),
            table.updates,
            input_scales=[float(scale) for scale in table.input_scale],
            timesteps=table.timesteps,
            guidance_scale=1 - self._scale,  # for the conditional half is the first one here
        )
        rows = lru_cache(maxsize=4)(compiled.rows)
        return lambda step, place: compiled.calls(step, rows(*place[:3]))

    def around(self, step: int, place: Place) -> Around:
        """What a step does before its engine and after it, with the engine's rows in a place."""
        if self._compiled is None or any(x.dtype != torch.float32 for x in place[:3]):
            return self._composed(step, place)
        begin, end = self._compiled(step, place)
        return Around([begin], [*self._noise(step), end], self._row(3 * step + 3))

    def _composed(self, step: int, place: Place) -> Around:
        table, x, e, following = self._table, *(self._row(3 * step + k) for k in (0, 1, 3))
        conditional, *unconditional = place.parts
        return Around(
            [
                partial(kernels.duplicate, x.expand_as(place.sample), table.input_scale[step], place.sample),
                partial(place.timestep.fill_, table.timesteps[step]),
            ],
            [
                partial(kernels.guide, *unconditional, conditional, self._scale, 0.0, e)
                if unconditional
                else partial(e.copy_, conditional),
                *self._noise(step),
                partial(kernels.combine, self._ring, table.weights[step], self._sum),
                partial(following.copy_, self._sum.view_as(following)),
            ],
            following,
        )

    def _noise(self, step: int) -> list[Call]:
        return [partial(draw, self._row(3 * step + 2), [self._generator])] if self._table.draws_noise[step] else []

    def foretold(self, step: int) -> Tensor:
        """The latents without noise that a step, the last one taken, foretells. Shapes: (1, C, H, W)."""
        of_sample, of_noise = self._table.clean[step]
        return of_sample * self._row(3 * step) + of_noise * self._row(3 * step + 1)

    def _row(self, number: int) -> Tensor:
        return self._rows[number % len(self._rows)]
