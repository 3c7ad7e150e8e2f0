"""Bound engines, a sampler and a plan -> the latents, one step at a time.

`denoise` gives an iterator: progress, previews and cancelling are its caller's business. What a step does, the next
model input, an engine, guidance, the sampler's update, is a list of calls on buffers that exist, made before the first
step. Knows nothing about prompts, images or files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from fastcache.run.buffers import BufferPool, Rows
from fastcache.run.forecast import Calls, forecasts
from fastcache.run.plan import CachePlan
from fastcache.run.sampler import SamplerTable, noise_levels
from fastcache_kernels import reference as kernels

Generators = torch.Generator | Sequence[torch.Generator] | None
Call = Callable[[], object]

_vector_norm = cast("Callable[..., Tensor]", torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]


@dataclass(frozen=True, slots=True)
class Step:
    """What a finished step left: `latents` is the buffer itself, to be read before the next step, or written to."""

    index: int
    timestep: float
    full: bool
    latents: Tensor


class DenoiseOptions(TypedDict, total=False):
    """What `denoise` takes by name."""

    guidance_scale: float
    guidance_rescale: float
    conditioning_scales: Sequence[float] | None
    generator: Generators


def denoise(
    pool: BufferPool,
    sampler: SamplerTable | ScheduledSampler,
    plan: CachePlan,
    *,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    image_guidance_scale: float | None = None,
    conditioning_scales: Sequence[float] | None = None,
    generator: Generators = None,
) -> Iterator[Step]:
    """Run a plan from the noise in `pool.latents[0]`, yielding after each step.

    The last step's `latents` are the result. `generator` draws the noise of stochastic samplers, one for the whole
    batch or one for each image. `image_guidance_scale` is for pools of three rows an image, where guidance has three
    parts: without text and image, with the image, with both. `conditioning_scales` are a ControlNet's at each step,
    where they are not all those that the pool's inputs were set to.

    Raises: `ValueError`, at once, where the plan and the sampler do not have the same number of U-Net calls, or there
    is no engine for a branch. A step raises `RuntimeError` where a newer run has taken the pool over.
    """
    if plan.num_steps != len(sampler.timesteps):
        raise ValueError(
            f"expected a plan for the sampler's {len(sampler.timesteps)} U-Net calls, got one for {plan.num_steps}"
        )
    for step, branch in enumerate(plan.branches):
        pool.binding(branch, plan.is_guided(step))
    forecast = forecasts(pool, plan, sampler.sigmas)
    guide = _Guide(pool, guidance_scale, guidance_rescale, image_guidance_scale)
    return _steps(pool, pool.run, sampler, plan, forecast, guide, generator, conditioning_scales)


def _steps(
    pool: BufferPool,
    run: int,
    sampler: SamplerTable | ScheduledSampler,
    plan: CachePlan,
    forecast: tuple[Calls, Calls],
    guide: _Guide,
    generator: Generators,
    conditioning_scales: Sequence[float] | None,
) -> Iterator[Step]:
    timesteps = [float(timestep) for timestep in sampler.timesteps]
    steps = [Step(i, timesteps[i], plan.is_full(i), pool.latents[i + 1]) for i in range(plan.num_steps)]
    every = step_calls(pool, sampler, plan, forecast, guide, generator, conditioning_scales)
    for step, calls in zip(steps, every, strict=True):
        if pool.run != run:
            raise RuntimeError("a newer run has taken this one's buffers; finish or drop a stream before the next call")
        for call in calls:
            call()
        yield step


def step_calls(
    pool: BufferPool,
    sampler: SamplerTable | ScheduledSampler,
    plan: CachePlan,
    forecast: tuple[Calls, Calls],
    guide: _Guide,
    generator: Generators,
    conditioning_scales: Sequence[float] | None = None,
) -> list[list[Call]]:
    """For each step all that it does, in turn, with every view and number in place."""
    before, after = forecast
    timesteps = [float(timestep) for timestep in sampler.timesteps]
    scales = sampler.input_scale.float().unbind()
    updates = (
        sampler.updates(pool) if isinstance(sampler, ScheduledSampler) else table_updates(sampler, pool, generator)
    )
    return [
        [
            partial(kernels.duplicate, rows.repeated[i], scales[i], rows.model_input),
            partial(rows.tensors["timestep"].fill_, timesteps[i]),
            *(
                [partial(rows.tensors["conditioning_scale"].fill_, conditioning_scales[i])]
                if conditioning_scales
                else ()
            ),
            *before.get(i, ()),
            pool.binding(branch, guided).run,
            *after.get(i, ()),
            *guide.calls(rows, i),
            *updates[i],
        ]
        for i, branch in enumerate(plan.branches)
        for guided in [plan.is_guided(i)]
        for rows in [pool.rows(guided)]
    ]


class _Guide:
    """Classifier-free guidance of a run, rescaled or not, with what memory it needs.

    Source: arXiv 2207.12598, equation 6; rescaled: arXiv 2305.08891, equations 15 and 16.
    """

    def __init__(self, pool: BufferPool, scale: float, rescale: float, image_scale: float | None) -> None:
        self._results, self._pair, self._image_scale = pool.guided, pool.rows().noise_pred, image_scale or 0.0
        self._scale, self._rescaling = scale, list[Call]()
        if rescale > 0 and pool.halves == 2:
            self._plain, self._factor = torch.empty_like(pool.guided[0]), pool.history.new_empty(pool.batch, 1)
            self._rescaling = list(self._factoring(rescale))
            self._each = self._factor.view(-1, *[1] * (self._plain.ndim - 1))

    def calls(self, rows: Rows, step: int) -> list[Call]:
        """What makes a step's prediction out of its engine's."""
        result = self._results[step]
        if len(rows.noise_pred) == 1:
            return [partial(result.copy_, rows.noise_pred[0])]
        if len(rows.noise_pred) == 3:  # arXiv 2211.09800, equation 3
            unguided, of_image, of_both = rows.noise_pred
            return [
                partial(torch.lerp, unguided, of_image, self._image_scale, out=result),
                partial(result.add_, of_both, alpha=self._scale),
                partial(result.sub_, of_image, alpha=self._scale),
            ]
        if not self._rescaling:
            return [partial(torch.lerp, *self._pair, self._scale, out=result)]
        return [*self._rescaling, partial(torch.mul, self._plain, self._each, out=result)]

    def _factoring(self, rescale: float) -> Iterator[Call]:
        """Deviations from the mean in two passes: torch.std takes three times as long, in one thread on a CPU."""
        conditional, plain = self._pair[1].flatten(1), self._plain.flatten(1)
        centred, mean, spread = torch.empty_like(plain), plain.new_empty(len(plain)), torch.empty_like(self._factor)
        averaging, one = torch.full_like(plain[0], 1 / plain.shape[1]), torch.ones_like(self._factor)
        yield partial(torch.lerp, *self._pair, self._scale, out=self._plain)
        for values, out in ((conditional, self._factor), (plain, spread)):
            yield partial(torch.mv, values, averaging, out=mean)
            yield partial(torch.sub, values, mean[:, None], out=centred)
            yield partial(_vector_norm, centred, dim=1, keepdim=True, out=out)
        yield partial(torch.div, self._factor, spread, out=self._factor)
        yield partial(torch.lerp, one, self._factor, rescale, out=self._factor)


def table_updates(table: SamplerTable, pool: BufferPool, generator: Generators) -> list[list[Call]]:
    """For each call, what turns its noise prediction into the next latents."""
    combines = pool.updates(table)
    return [
        [partial(draw, pool.noise[i], generator), combine] if table.draws_noise(i) else [combine]
        for i, combine in enumerate(combines)
    ]


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
