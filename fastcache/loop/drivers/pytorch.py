"""A run's own work in PyTorch's operations, on any device; for schedulers without a table their own `step`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fastcache.loop.drivers import Call, Guidance, Turn, contrast
from fastcache.loop.lane import Lane, Rows
from fastcache.loop.noise import Generators, draw
from fastcache.loop.scheduled import ScheduledSampler
from fastcache.sampler.table import SamplerTable
from fastcache_kernels import reference as kernels

_vector_norm = cast("Callable[..., Tensor]", torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]


class TorchDriver:
    """A run's steps in PyTorch's operations. Nothing is allocated while they run, but by a scheduler's own `step`."""

    def __init__(
        self, lane: Lane, sampler: SamplerTable | ScheduledSampler, guidance: Guidance, generator: Generators
    ) -> None:
        self._lane, self._sampler, self._guidance, self._generator = lane, sampler, guidance, generator
        self._timesteps = [float(timestep) for timestep in sampler.timesteps]
        self._scales = sampler.input_scale.float().unbind()
        if isinstance(sampler, SamplerTable):
            self.ring = lane.ring(sampler.numbers.ring_calls)
            self._weights = sampler.weights_at(guidance.scale).flatten(1).to(lane.device).split(1)
            self._rows = self.ring.view(3 * len(self.ring), -1)
            self._sum = self.ring.new_empty(1, self._rows.shape[1])
        else:
            self.ring = lane.ring(2)
        self._places = [call.unbind() for call in self.ring]
        self._rescaling = _Rescaling(lane, guidance) if guidance.rescale > 0 and lane.halves == 2 else None

    def turn(self, step: int, rows: Rows) -> Turn:
        latents = self._kept(step, 0)
        return Turn(
            [
                partial(kernels.duplicate, latents.expand_as(rows.model_input), self._scales[step], rows.model_input),
                partial(rows.tensors["timestep"].fill_, self._timesteps[step]),
            ],
            [*self._guide(step, rows), *self._third(step, rows), *self._row(step)],
        )

    def _kept(self, step: int, which: int) -> Tensor:
        return self._places[step % len(self._places)][which]

    def _guide(self, step: int, rows: Rows) -> list[Call]:
        """Source: arXiv 2207.12598, equation 6; of three parts: arXiv 2211.09800, equation 3."""
        result, scale = self._kept(step, 1), self._guidance.scale
        if len(rows.noise_pred) == 1:
            return [partial(result.copy_, rows.noise_pred[0])]
        if len(rows.noise_pred) == 3:
            unguided, of_image, of_both = rows.noise_pred
            return [
                partial(torch.lerp, unguided, of_image, self._guidance.image_scale, out=result),
                partial(result.add_, of_both, alpha=scale),
                partial(result.sub_, of_image, alpha=scale),
            ]
        if self._rescaling is not None:
            return self._rescaling.calls(result)
        return [partial(torch.lerp, *rows.noise_pred, scale, out=result)]

    def _third(self, step: int, rows: Rows) -> list[Call]:
        """What a row sums besides x and e: noise, or what guidance is made of."""
        if isinstance(self._sampler, ScheduledSampler):
            return []
        if self._sampler.contrasts:
            return [contrast(rows, self._kept(step, 2))]
        return [partial(draw, self._kept(step, 2), self._generator)] if self._sampler.draws_noise(step) else []

    def _row(self, step: int) -> list[Call]:
        following = self._kept(step + 1, 0)
        if isinstance(self._sampler, ScheduledSampler):
            return [partial(self._own_step, self._sampler, step, following)]
        return [
            partial(kernels.combine, self._rows, self._weights[step], self._sum),
            partial(following.copy_, self._sum.view_as(following)),
        ]

    def _own_step(self, sampler: ScheduledSampler, step: int, following: Tensor) -> None:
        timestep: Any = sampler.timesteps[step]
        stepped = sampler.scheduler.step(self._kept(step, 1), timestep, self._kept(step, 0), **sampler.step_kwargs)
        following.copy_(stepped.prev_sample)


class _Rescaling:
    """Guidance rescaled, with what memory it needs. Source: arXiv 2305.08891, equations 15 and 16."""

    def __init__(self, lane: Lane, guidance: Guidance) -> None:
        self._pair, self._guidance, both = lane.rows().noise_pred, guidance, lane.compared
        self._plain = both[lane.images :].view(lane.latent_shape)
        self._factor = both.new_empty(lane.images, 1)
        self._factoring = list(self._factor_calls(both))

    def calls(self, result: Tensor) -> list[Call]:
        each = self._factor.view(-1, *[1] * (self._plain.ndim - 1))
        return [*self._factoring, partial(torch.mul, self._plain, each, out=result)]

    def _factor_calls(self, both: Tensor) -> Iterator[Call]:
        """The deviations from both means at once: torch.std takes 180 microseconds for two of 64x64 on one thread of a
        CPU, these three 15.
        """
        mean, spread = both.new_empty(len(both), 1), both.new_empty(len(both), 1)
        averaging, one = torch.full_like(both[0], 1 / both.shape[1]), torch.ones_like(self._factor)
        centred = torch.empty_like(both)
        yield partial(torch.lerp, *self._pair, self._guidance.scale, out=self._plain)
        yield partial(torch.mv, both, averaging, out=mean[:, 0])
        yield partial(torch.sub, both, mean, out=centred)
        yield partial(_vector_norm, centred, dim=1, keepdim=True, out=spread)
        yield partial(torch.div, *spread.chunk(2), out=self._factor)
        yield partial(torch.lerp, one, self._factor, self._guidance.rescale, out=self._factor)
