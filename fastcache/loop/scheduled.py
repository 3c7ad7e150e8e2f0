"""A diffusers scheduler whose `step` is not linear -> a sampler that runs that very `step`, for it has no table."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcache.sampler.table import noise_levels


@dataclass(frozen=True)
class ScheduledSampler:
    """A scheduler that runs itself, its timesteps set, and where it begins; `step_kwargs` go to every `step`.

    Of its calls those from `begin` to `end`, not included, are made.
    """

    scheduler: Any
    step_kwargs: dict[str, Any]
    begin: int = 0
    end: int | None = None

    @property
    def timesteps(self) -> Tensor:
        return self.scheduler.timesteps[self.begin : self.end]

    @property
    def num_calls(self) -> int:
        return len(self.timesteps)

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
