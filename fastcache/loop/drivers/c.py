"""A run's own work on a CPU in compiled C: one call before each pass and one after it.

PyTorch draws the noise of stochastic samplers, in a call of its own. The C is `fastcache_kernels.cpu_step`.
"""

from __future__ import annotations

from functools import partial

import torch

from fastcache.loop.drivers import Guidance, Turn
from fastcache.loop.lane import WRITTEN, Lane, Rows
from fastcache.loop.noise import Generators, draw
from fastcache.sampler.table import SamplerTable
from fastcache_kernels.cpu_step import CpuSteps, Library, StepRows


def fits(lane: Lane) -> bool:
    """Whether the C is for this lane's tensors: float32 on a CPU."""
    tensors = [lane.tensors[name] for name in WRITTEN]
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)


class CDriver:
    """A run's steps in compiled C, laid out once."""

    def __init__(
        self, library: Library, lane: Lane, table: SamplerTable, guidance: Guidance, generator: Generators
    ) -> None:
        self._table, self._generator = table, generator
        self.ring = lane.ring(table.numbers.ring_calls)
        self._steps = CpuSteps(
            library,
            self.ring,
            [(update.first, update.weights) for update in table.updates_at(guidance.scale)],
            input_scales=table.input_scale.tolist(),
            timesteps=table.timesteps.tolist(),
            guidance_scale=guidance.scale,
            image_guidance_scale=guidance.image_scale,
            rescale=guidance.rescale,
            contrasts=table.contrasts,
        )
        self._rows: dict[Rows, StepRows] = {}

    def turn(self, step: int, rows: Rows) -> Turn:
        if rows not in self._rows:
            self._rows[rows] = self._steps.rows(*(rows.tensors[name] for name in WRITTEN))
        begin, end = self._steps.calls(step, self._rows[rows])
        if not self._table.draws_noise(step):
            return Turn([begin], [end])
        return Turn([begin], [partial(draw, self.ring[step % len(self.ring), 2], self._generator), end])
