"""Bound engines, a sampler and a plan -> the latents, one step at a time.

`denoise` gives an iterator: progress, previews and cancelling are its caller's business. Between two engine calls it
does three things, into buffers that exist: guidance, the sampler's update, the next model input. Knows nothing about
prompts, images or files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastcache.run.buffers import BufferPool
from fastcache.run.plan import CachePlan
from fastcache.run.sampler import SamplerTable
from fastcache_kernels import reference as kernels

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True, slots=True)
class Step:
    """What a finished step left: `latents` is the buffer itself, to be read before the next step, or written to."""

    index: int
    timestep: float
    full: bool
    latents: Tensor


def denoise(
    pool: BufferPool,
    sampler: SamplerTable | ScheduledSampler,
    plan: CachePlan,
    *,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    generator: Generators = None,
) -> Iterator[Step]:
    """Run a plan from the noise in `pool.latents[0]`, yielding after each step.

    The last step's `latents` are the result. `generator` draws the noise of stochastic samplers, one for the whole
    batch or one for each image.

    Raises: `ValueError`, at once, where the plan and the sampler do not have the same number of U-Net calls. A step
    raises `RuntimeError` where a newer run has taken the pool over.
    """
    if plan.num_steps != len(sampler.timesteps):
        raise ValueError(
            f"expected a plan for the sampler's {len(sampler.timesteps)} U-Net calls, got one for {plan.num_steps}"
        )
    updates = (
        sampler.updates(pool, generator)
        if isinstance(sampler, ScheduledSampler)
        else table_updates(sampler, pool, generator)
    )
    return _steps(pool, pool.run, sampler, plan, updates, guidance_scale, guidance_rescale)


def _steps(
    pool: BufferPool,
    run: int,
    sampler: SamplerTable | ScheduledSampler,
    plan: CachePlan,
    updates: Sequence[Callable[[], None]],
    guidance_scale: float,
    guidance_rescale: float,
) -> Iterator[Step]:
    timestep, noise_pred = pool.tensors["timestep"], pool.noise_pred
    timesteps, scales = sampler.timesteps.tolist(), sampler.input_scale.float().unbind()
    for i, update in enumerate(updates):
        if pool.run != run:
            raise RuntimeError("a newer run has taken this one's buffers; finish or drop a stream before the next call")
        kernels.duplicate(pool.repeated[i], scales[i], pool.model_input)
        timestep.fill_(timesteps[i])
        full = plan.is_full(i)
        (pool.full if full else pool.shallow).run()
        if pool.halves == 2:
            kernels.guide(noise_pred[0], noise_pred[1], guidance_scale, guidance_rescale, pool.guided[i])
        else:
            pool.guided[i].copy_(noise_pred[0])
        update()
        yield Step(i, timesteps[i], full, pool.latents[i + 1])


def table_updates(table: SamplerTable, pool: BufferPool, generator: Generators) -> list[Callable[[], None]]:
    """For each call, what turns its noise prediction into the next latents, with every view made beforehand."""
    updates: list[Callable[[], None]] = []
    for i, (rule, weights) in enumerate(zip(table.recursion(), table.weights, strict=True)):
        drawn = table.draws_noise(i)
        end = 3 * i + 3
        rows = pool.history[3 * rule.first : end if drawn else end - 1]  # its own noise comes last
        own = weights[:, : len(rows)].to(rows.device)
        combine = partial(kernels.combine, rows, own, pool.history[end : end + 1])
        updates.append(partial(_draw_and_combine, pool.noise[i], generator, combine) if drawn else combine)
    return updates


def _draw_and_combine(noise: Tensor, generator: Generators, combine: Callable[[], None]) -> None:
    draw(noise, generator)
    combine()


@dataclass(frozen=True)
class ScheduledSampler:
    """A diffusers scheduler whose `step` is not linear, so that it has no table and runs itself.

    `timesteps` are set; `step_kwargs` go to every `step`.
    """

    scheduler: Any
    step_kwargs: dict[str, Any]

    @property
    def timesteps(self) -> Tensor:
        return self.scheduler.timesteps

    @property
    def input_scale(self) -> Tensor:
        """What the scheduler multiplies the model's input by at each step, asked of a fresh copy each time."""
        one = torch.ones(1)
        return torch.cat([copy.deepcopy(self.scheduler).scale_model_input(one, t) for t in self.timesteps])

    @property
    def init_noise_sigma(self) -> float:
        return float(self.scheduler.init_noise_sigma)

    def updates(self, pool: BufferPool, generator: Generators) -> list[Callable[[], None]]:
        def updater(i: int, timestep: Tensor) -> Callable[[], None]:
            def update() -> None:
                previous = self.scheduler.step(pool.guided[i], timestep, pool.latents[i], **self.step_kwargs)
                pool.latents[i + 1].copy_(previous.prev_sample)

            return update

        return [updater(i, t) for i, t in enumerate(self.timesteps)]


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
