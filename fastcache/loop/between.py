"""A pool, a sampler and a plan -> what each step does besides its engine, as calls on buffers that exist.

That is the model's next input, guidance and the sampler's update: on a CPU one call of compiled C before the engine and
one after it, where `fastcache_kernels` was built with it; else PyTorch's operations. Both have one meaning, that of
`fastcache_kernels.reference`. Knows nothing about engines.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fastcache.loop.buffers import BufferPool, Rows
from fastcache.loop.plan import CachePlan
from fastcache.loop.table import SamplerTable, noise_levels
from fastcache_kernels import reference as kernels
from fastcache_kernels.cpu_step import CpuSteps, Library, found_library

Generators = torch.Generator | Sequence[torch.Generator] | None
Scales = Sequence[float] | Sequence[Sequence[float]]  # of one ControlNet, or of several, at each step
Call = Callable[[], object]

_vector_norm = cast("Callable[..., Tensor]", torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]


@dataclass(frozen=True, slots=True)
class Around:
    """What a step does before its engine runs and after it, and where it leaves the latents."""

    before: list[Call]
    after: list[Call]
    latents: Tensor


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance of a run; `image_scale` counts where it has three parts."""

    scale: float
    rescale: float
    image_scale: float


@dataclass(frozen=True)
class ScheduledSampler:
    """A diffusers scheduler whose `step` is not linear, so that it has no table and runs itself.

    Its timesteps are set, and where it begins; `step_kwargs` go to every `step`. Of its calls those from `begin` to
    `end`, not included, are made.
    """

    scheduler: Any
    step_kwargs: dict[str, Any]
    begin: int = 0
    end: int | None = None

    @property
    def timesteps(self) -> Tensor:
        return self.scheduler.timesteps[self.begin : self.end]

    @property
    def input_scale(self) -> Tensor:
        """What the scheduler multiplies the model's input by at each step, asked of a fresh copy each time."""
        one, scales = torch.ones(1), list[Tensor]()
        for call, timestep in enumerate(self.timesteps, self.begin):
            fresh = copy.deepcopy(self.scheduler)
            if self.begin and hasattr(fresh, "set_begin_index"):
                fresh.set_begin_index(call)
            scales.append(fresh.scale_model_input(one, timestep))
        return torch.cat(scales)

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        return noise_levels(self.scheduler, self.timesteps)

    @property
    def init_noise_sigma(self) -> float:
        return float(self.scheduler.init_noise_sigma)

    def updates(self, pool: BufferPool) -> list[list[Call]]:
        """For each call, what turns its noise prediction into the next latents."""

        def update(i: int, timestep: Tensor) -> None:
            previous = self.scheduler.step(pool.guided[i], timestep, pool.latents[i], **self.step_kwargs)
            pool.latents[i + 1].copy_(previous.prev_sample)

        return [[partial(update, i, t)] for i, t in enumerate(self.timesteps)]


def compiled(
    pool: BufferPool,
    sampler: SamplerTable | ScheduledSampler,
    plan: CachePlan,
    guidance: Guidance,
    generator: Generators,
) -> list[Around] | None:
    """Each step's work in compiled C, on a ring of the history's first rows, for the cache's sake.

    Noise is drawn by PyTorch, in a call of its own. None where there is no C, or not for these tensors or this sampler.
    """
    library = found_library()
    tensors = [pool.tensors[name] for name in ("sample", "timestep", "noise_pred")]
    if not isinstance(library, Library) or isinstance(sampler, ScheduledSampler):
        return None
    if any(x.dtype != torch.float32 or x.device.type != "cpu" for x in tensors):
        return None
    kept = sampler.widest_window
    steps = CpuSteps(
        library,
        pool.history[: 3 * kept].view(kept, 3, *pool.latent_shape),
        [(update.first, update.weights) for update in sampler.recursion()],
        input_scales=sampler.input_scale.numpy().tolist(),
        timesteps=sampler.timesteps.numpy().tolist(),
        guidance_scale=guidance.scale,
        image_guidance_scale=guidance.image_scale,
        rescale=guidance.rescale,
    )
    rows = {
        guided: steps.rows(*(own[name] for name in ("sample", "timestep", "noise_pred")))
        for guided in {plan.is_guided(step) for step in range(plan.num_steps)}
        for own in [pool.rows(guided).tensors]
    }
    made = list[Around]()
    for i in range(plan.num_steps):
        begin, end = steps.calls(i, rows[plan.is_guided(i)])
        noise = [partial(draw, pool.noise[i % kept], generator)] if sampler.draws_noise(i) else []
        made.append(Around([begin], [*noise, end], pool.latents[(i + 1) % kept]))
    return made


def composed(
    pool: BufferPool,
    sampler: SamplerTable | ScheduledSampler,
    plan: CachePlan,
    guidance: Guidance,
    generator: Generators,
) -> list[Around]:
    """Each step's work in PyTorch's operations."""
    timesteps = [float(timestep) for timestep in sampler.timesteps]
    scales = sampler.input_scale.float().unbind()
    updates = (
        sampler.updates(pool) if isinstance(sampler, ScheduledSampler) else table_updates(sampler, pool, generator)
    )
    guide = _Guide(pool, guidance)
    return [
        Around(
            [
                partial(kernels.duplicate, rows.repeated[i], scales[i], rows.model_input),
                partial(rows.tensors["timestep"].fill_, timesteps[i]),
            ],
            [*guide.calls(rows, i), *updates[i]],
            pool.latents[i + 1],
        )
        for i in range(plan.num_steps)
        for rows in [pool.rows(plan.is_guided(i))]
    ]


class _Guide:
    """Guidance in PyTorch's operations, with what memory it needs.

    Source: arXiv 2207.12598, equation 6; rescaled: arXiv 2305.08891, equations 15 and 16.
    """

    def __init__(self, pool: BufferPool, guidance: Guidance) -> None:
        self._results, self._pair, self._guidance = pool.guided, pool.rows().noise_pred, guidance
        self._rescaling = list[Call]()
        if guidance.rescale > 0 and pool.halves == 2:
            self._plain = pool.compared[pool.batch :].view_as(pool.guided[0])
            self._factor = pool.history.new_empty(pool.batch, 1)
            self._rescaling = list(self._factoring(pool.compared))
            self._each = self._factor.view(-1, *[1] * (self._plain.ndim - 1))

    def calls(self, rows: Rows, step: int) -> list[Call]:
        """What makes a step's prediction out of its engine's."""
        result, scale = self._results[step], self._guidance.scale
        if len(rows.noise_pred) == 1:
            return [partial(result.copy_, rows.noise_pred[0])]
        if len(rows.noise_pred) == 3:  # arXiv 2211.09800, equation 3
            unguided, of_image, of_both = rows.noise_pred
            return [
                partial(torch.lerp, unguided, of_image, self._guidance.image_scale, out=result),
                partial(result.add_, of_both, alpha=scale),
                partial(result.sub_, of_image, alpha=scale),
            ]
        if not self._rescaling:
            return [partial(torch.lerp, *self._pair, scale, out=result)]
        return [*self._rescaling, partial(torch.mul, self._plain, self._each, out=result)]

    def _factoring(self, both: Tensor) -> Iterator[Call]:
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


def table_updates(table: SamplerTable, pool: BufferPool, generator: Generators) -> list[list[Call]]:
    """For each call, what turns its noise prediction into the next latents."""
    combines = pool.updates(table)
    return [
        [partial(draw, pool.noise[i], generator), combine] if table.draws_noise(i) else [combine]
        for i, combine in enumerate(combines)
    ]


def draw(out: Tensor, generator: Generators) -> None:
    """Fill `out` with the noise diffusers' `randn_tensor` would draw: one generator for all, or one for each image.

    A generator of the CPU draws there, also for a GPU, so that a seed gives the same picture on both.
    """
    if generator is None or isinstance(generator, torch.Generator):
        _draw(out, generator)
    else:
        for image, own in zip(out, generator, strict=True):
            _draw(image, own)


def _draw(out: Tensor, generator: torch.Generator | None) -> None:
    if generator is None or generator.device.type == out.device.type:
        out.normal_(generator=generator)
    else:
        out.copy_(torch.randn(out.shape, generator=generator, device=generator.device))
