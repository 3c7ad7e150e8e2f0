"""Bound engines, a sampler and a plan -> the latents, one step at a time.

`denoise` gives an iterator: progress, previews and cancelling are its caller's business. What a step does is a list of
calls on buffers that exist, made before the first step: an engine's `run`, and `between.py`'s around it. Knows nothing
about prompts, images or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor

from fastcache.loop.between import (
    Around,
    Call,
    Generators,
    Guidance,
    Scales,
    ScheduledSampler,
    compiled,
    composed,
)
from fastcache.loop.buffers import BufferPool
from fastcache.loop.features import Calls, forecasts
from fastcache.loop.plan import CachePlan
from fastcache.loop.table import SamplerTable


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
    conditioning_scales: Scales | None
    generator: Generators


def denoise(
    pool: BufferPool,
    sampler: SamplerTable | ScheduledSampler,
    plan: CachePlan,
    *,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    image_guidance_scale: float | None = None,
    conditioning_scales: Scales | None = None,
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
    guidance = Guidance(guidance_scale, guidance_rescale, image_guidance_scale or 0.0)
    around = compiled(pool, sampler, plan, guidance, generator) or composed(pool, sampler, plan, guidance, generator)
    calls = partial(step_calls, pool, plan, forecast, around, conditioning_scales)  # a benchmark wraps bindings first
    timesteps = [float(timestep) for timestep in sampler.timesteps]
    steps = [Step(i, timesteps[i], plan.is_full(i), own.latents) for i, own in enumerate(around)]
    return _steps(pool, pool.run, steps, calls)


def _steps(
    pool: BufferPool, run: int, steps: Sequence[Step], every: Callable[[], Sequence[Sequence[Call]]]
) -> Iterator[Step]:
    for step, calls in zip(steps, every(), strict=True):
        if pool.run != run:
            raise RuntimeError("a newer run has taken this one's buffers; finish or drop a stream before the next call")
        for call in calls:
            call()
        yield step


def step_calls(
    pool: BufferPool,
    plan: CachePlan,
    forecast: tuple[Calls, Calls],
    around: Sequence[Around],
    conditioning_scales: Scales | None,
) -> list[list[Call]]:
    """For each step all that it does, in turn, with every view and number in place."""
    before, after = forecast
    scales = None if conditioning_scales is None else torch.tensor(conditioning_scales, device=pool.history.device)
    return [
        [
            *own.before,
            *([partial(rows["conditioning_scale"].copy_, scales[i])] if scales is not None else ()),
            *before.get(i, ()),
            pool.binding(branch, guided).run,
            *after.get(i, ()),
            *own.after,
        ]
        for i, (branch, own) in enumerate(zip(plan.branches, around, strict=True))
        for guided in [plan.is_guided(i)]
        for rows in [pool.rows(guided).tensors]
    ]
