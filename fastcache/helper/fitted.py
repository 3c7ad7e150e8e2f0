"""A fitted plan and a pipeline's scheduler -> a scheduler of diffusers that visits the plan's points by its rows.

Pipelines call it as any other: `set_timesteps` with the reference's steps, then `step` once a point. Knows nothing
about U-Nets or what is cached; what the last call of one gave, both halves apart, it asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastcache.helper.runs import is_guided
from fastcache.loop.fit import MOST_LOOKED_BACK, Fit
from fastcache.loop.fitted import fitted_table
from fastcache.loop.plan import CachePlan
from fastcache.sampler.scheduler import make_scheduler
from fastcache.sampler.table import SamplerTable, compile_sampler


def fitted_scheduler(plan: CachePlan, pipe: Any, last: Callable[[], Tensor | None]) -> Any:
    """The plan's sampler, made of the config of a pipeline's scheduler, with the rows of the plan's fit.

    `last` gives what the U-Net foretold last: of a pipeline that guides the unconditional half, then the conditional.
    All but how it sets timesteps and steps is the sampler's own. A run is a whole one: image to image begins in the
    middle, at points that only a bundle's pipeline finds.

    Raises: `ValueError` for a plan without a fit, or with points that the sampler does not have.
    """
    if plan.fit is None or plan.sampler is None:
        raise ValueError("expected a fitted plan, got one without a fit; use the pipeline's own scheduler")
    sampler: Any = make_scheduler(plan.sampler, pipe.scheduler.config)
    reference = compile_sampler(sampler, plan.fit.num_inference_steps)
    kind = type(sampler)
    sampler.__class__ = type(kind.__name__, (_Fitted, kind), {"__module__": kind.__module__})
    sampler.pipe, sampler.own, sampler.last = pipe, pipe.scheduler, last
    sampler.fit, sampler.table = plan.fit, fitted_table(reference, plan.fit)
    return sampler


class _Fitted:
    """What a fitted scheduler does in place of its class. A copy of it, or what is pickled of it, is the own one."""

    pipe: Any
    own: Any
    last: Callable[[], Tensor | None]
    fit: Fit
    table: SamplerTable
    timesteps: Tensor
    num_inference_steps: int | None
    _past: list[tuple[Tensor, Tensor, Tensor]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.own.__reduce_ex__(1)  # later protocols check that an object's class is the one that is named

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Begin a run; warn of another guidance. Raises: `ValueError` for other steps than the reference's."""
        if num_inference_steps != self.fit.num_inference_steps:
            raise ValueError(
                f"expected num_inference_steps of {self.fit.num_inference_steps}, which the plan was fitted for, got "
                f"{num_inference_steps}; draw with as many, or fit another plan"
            )
        self.fit.check_guidance(getattr(self.pipe, "_guidance_scale", None))
        self.timesteps = self.table.timesteps.to(device, copy=True)
        self.num_inference_steps, self._past, self._steps = num_inference_steps, [], 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Raises: `ValueError` for a run that does not begin at the first point."""
        if begin_index:
            raise ValueError(
                "expected a whole run with a fitted plan, got one that begins later, as image to image does; use a "
                "plan without a fit, or fastcache.load"
            )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample * float(self.table.input_scale[self._steps])

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """The row of the next point, in float64. Shapes: `model_output` and `sample` (N, C, H, W)."""
        if self._steps == len(self.fit.rows):
            raise ValueError("expected one step a point of the fitted plan, got one more; begin with set_timesteps")
        x = sample.double()
        self._past = [*self._past[1 - MOST_LOOKED_BACK :], (x, model_output.double(), self._added(x))]
        update = self.table.recursion()[self._steps]
        parts = [part for call in self._past[-update.window :] for part in call]
        weighed = [weight * part for weight, part in zip(update.weights, parts, strict=True) if weight]
        following = torch.stack(weighed).sum(0).to(sample.dtype)
        self._steps += 1
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    def _added(self, sample: Tensor) -> Tensor:
        """What guidance added at this call, nothing where the pipeline does not guide. Shapes: as `sample`.

        Raises: `ValueError` for rows that count it, in a pipeline whose guidance is of another kind.
        """
        noise_pred = self.last() if self.table.contrasts and is_guided(self.pipe) else None
        if noise_pred is None:
            return torch.zeros_like(sample)
        unconditional, conditional = noise_pred.double().chunk(2)
        return (float(self.pipe.guidance_scale) - 1) * (conditional - unconditional)
