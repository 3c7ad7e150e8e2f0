"""Bound engines, a sampler and a plan -> the latents, one step at a time.

`denoise` is a generator: progress, previews and cancelling are its caller's business. Between two engine calls it does
three things, into buffers that exist: guidance, the sampler's update, the next model input. Knows nothing about
prompts, images or files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcache.run.buffers import BufferPool
from fastcache.run.plan import CachePlan
from fastcache.run.sampler import SamplerTable
from fastcache_kernels import reference as kernels

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
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
    """Run a plan from the noise in `pool.latents(0)`, yielding after each step.

    The last step's `latents` are the result. `generator` draws the noise of stochastic samplers, one for the whole
    batch or one for each image.

    Raises: `ValueError` where the plan and the sampler do not have the same number of U-Net calls.
    """
    if plan.num_steps != len(sampler.timesteps):
        raise ValueError(
            f"expected a plan for the sampler's {len(sampler.timesteps)} U-Net calls, got one for {plan.num_steps}"
        )
    noise_pred, timestep = pool.tensors["noise_pred"], pool.tensors["timestep"]
    updates = (
        sampler.updates(pool, generator)
        if isinstance(sampler, ScheduledSampler)
        else table_updates(sampler, pool, generator)
    )
    timesteps, scales = sampler.timesteps.tolist(), sampler.input_scale.float().unbind()
    halves = (pool.halves, *pool.latent_shape)
    latents = [pool.latents(3 * i) for i in range(plan.num_steps + 1)]
    repeated = [x.expand(halves) for x in latents]
    guided = [pool.latents(3 * i + 1) for i in range(plan.num_steps)]
    for i, update in enumerate(updates):
        kernels.duplicate(repeated[i], scales[i], pool.model_input)
        timestep.fill_(timesteps[i])
        full = plan.is_full(i)
        (pool.full if full else pool.shallow).run()
        if pool.halves == 2:
            kernels.guide(noise_pred, guidance_scale, guidance_rescale, guided[i])
        else:
            guided[i].copy_(noise_pred)
        update()
        yield Step(i, timesteps[i], full, latents[i + 1])


def table_updates(table: SamplerTable, pool: BufferPool, generator: Generators) -> list[Callable[[], None]]:
    """For each call, what turns its noise prediction into the next latents, with every view made beforehand."""
    updates: list[Callable[[], None]] = []
    for i, rule in enumerate(table.recursion()):
        rows, out = pool.history[3 * rule.first : 3 * (i + 1)], pool.history[3 * (i + 1)]
        weights = torch.tensor(rule.weights, dtype=torch.float32)
        noise = pool.latents(3 * i + 2) if table.draws_noise(i) else None
        updates.append(_TableUpdate(rows, weights, out, noise, generator))
    return updates


@dataclass(frozen=True)
class _TableUpdate:
    rows: Tensor
    weights: Tensor
    out: Tensor
    noise: Tensor | None
    generator: Generators

    def __call__(self) -> None:
        if self.noise is not None:
            draw(self.noise, self.generator)
        kernels.combine(self.rows, self.weights, self.out)


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
                x, e, out = pool.latents(3 * i), pool.latents(3 * i + 1), pool.latents(3 * i + 3)
                out.copy_(self.scheduler.step(e, timestep, x, **self.step_kwargs).prev_sample)

            return update

        return [updater(i, t) for i, t in enumerate(self.timesteps)]


def draw(out: Tensor, generator: Generators) -> None:
    """Fill `out` with the noise diffusers' `randn_tensor` would draw: one generator for all, or one for each image."""
    if generator is None or isinstance(generator, torch.Generator):
        out.normal_(generator=generator)
    else:
        for image, own in zip(out, generator, strict=True):
            image.normal_(generator=own)
