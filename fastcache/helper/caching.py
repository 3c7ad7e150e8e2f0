"""A pipeline's calls of its U-Net and its ControlNet -> each FULL or SHALLOW, after a schedule and what may be reused.

This is what runs behind the objects that stand for the two. How a pass computes is `helper_passes.py`'s business.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any, TypeGuard

import torch
from diffusers import ControlNetModel, MultiControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from fastcache.cut.controlnet import partition_controlnet
from fastcache.helper.features import conditional_half
from fastcache.helper.passes import Arguments, Call, Passes
from fastcache.helper.watch import AdapterWatch, RunCounter, is_guided, same
from fastcache.loop.plan import CachePlan, Forecast
from fastcache.loop.table import noise_levels

# What is new in every call; of the sample the shape must stay, and of residuals whether there are any.
_PER_STEP = ("sample", "timestep")
_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


class Schedule:
    """What each step runs: after an interval, which suits any number of steps, or after a plan."""

    def __init__(self, interval: int, branch_id: int, plan: CachePlan | None = None) -> None:
        self._interval, self._branch_id, self._plan = interval, branch_id, plan
        self.forecast: Forecast | None = plan.forecast if plan else None
        self.unguided_steps = plan.unguided_steps if plan else ()

    @property
    def branch_ids(self) -> tuple[int, ...]:
        return (self._plan and self._plan.branch_ids) or (self._branch_id,)

    def branch(self, step: int) -> int | None:
        if self._plan is None:
            return None if step % self._interval == 0 else self._branch_id
        if step >= self._plan.num_steps:
            raise ValueError(
                f"expected a plan for every U-Net call of the run, got one for {self._plan.num_steps} and call "
                f"{step + 1}; make a plan for as many calls as the sampler takes"
            )
        return self._plan.branches[step]


class Caching:
    """What an exchanged U-Net does when it is called."""

    def __init__(self, pipe: Any, unet: nn.Module, passes: Passes, schedule: Schedule) -> None:
        self._pipe, self._unet, self._passes, self._schedule = pipe, unet, passes, schedule
        self._run, self._adapters = RunCounter(pipe), AdapterWatch(unet)
        self._stored: tuple[Arguments, object] | None = None  # what the cached feature was made under
        self._sigmas: tuple[float, ...] | None = None
        self._on = True

    def change(self, schedule: Schedule, passes: Passes | None) -> None:
        """Go on with another schedule, and other passes if there are some, as if a run began."""
        self._schedule, self._passes = schedule, passes or self._passes
        self._run.forget()
        self.spoil()

    def stop(self) -> None:
        """From now on the module's own forward runs, for whoever kept the object that stood for it."""
        self._on = False
        self.spoil()
        del self._passes

    def spoil(self) -> None:
        """The next call is FULL."""
        self._stored = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._on:
            return type(self._unet).forward(self._unet, *args, **kwargs)
        arguments, return_dict = _bind(self._unet, args, kwargs)
        noise_pred = self._noise_pred(arguments)
        return _output_class(type(self._unet))(sample=noise_pred) if return_dict else (noise_pred,)

    def branch_ahead(self, timestep: object) -> int | None:
        """The branch that the next call will run, as far as can be told before it, for what is called first."""
        step = self._run.index(timestep) if self._on else 0
        if step == 0 or self._stored is None or not same(self._stored[1], self._adapters.state()):
            return None
        return self._branch(step, self._halves(step))

    def _noise_pred(self, arguments: Arguments) -> Tensor:
        step = self._run.index(arguments["timestep"])
        self._schedule.branch(step)  # a plan that is too short is refused before anything is counted
        self._run.count(arguments["timestep"])
        if step == 0:
            self._sigmas = self._noise_levels()
        kept, halved = kept_of(arguments), self._halves(step)
        if step == 0 or not self._fits(kept):
            self._passes.refresh()
            self._stored, self._adapters = None, AdapterWatch(self._unet)
        given = conditional_half(arguments, len(arguments["sample"])) if halved else arguments
        noise_pred = self._predict(Call(step, given, halved, self._sigmas))
        self._stored = kept, self._adapters.state()
        return torch.cat([noise_pred] * 2) if halved else noise_pred

    def _predict(self, call: Call) -> Tensor:
        branch = None if self._stored is None else self._branch(call.step, call.halved)
        if branch is not None:
            return self._passes.shallow(branch, call)
        self._stored = None  # should this call fail, nothing is reused
        return self._passes.full(call)

    def _branch(self, step: int, halved: bool) -> int | None:
        """The branch of the schedule, where what is cached is of the rows that it needs."""
        branch = self._schedule.branch(step)
        return branch if branch is not None and self._passes.serves(branch, halved) else None

    def _halves(self, step: int) -> bool:
        """Whether the step runs on the conditional half alone, which the pipeline then guides by itself to itself."""
        return bool(self._schedule.unguided_steps) and is_guided(self._pipe) and step in self._schedule.unguided_steps

    def _fits(self, kept: Arguments) -> bool:
        """Whether what is cached was made under these arguments, or of guided ones whose conditional half they are."""
        if self._stored is None or not same(self._stored[1], self._adapters.state()):
            return False
        stored, (shape, *_) = self._stored[0], kept["sample"]
        if same(stored, kept):
            return True
        (rows, *others), *kind = stored["sample"]
        if [rows, *others] != [2 * shape[0], *shape[1:]]:
            return False
        half = conditional_half(stored, rows) | {"sample": [shape, *kind]}
        return same(half, kept) and self._passes.halve()

    def _noise_levels(self) -> tuple[float, ...] | None:
        """What a forecast by sigma runs along, from this call on."""
        if self._schedule.forecast is None or self._schedule.forecast.by != "sigma":
            return None
        return noise_levels(self._pipe.scheduler, self._run.timesteps_ahead())


class ControlCaching:
    """What an exchanged ControlNet does, which a pipeline calls before its U-Net.

    For a SHALLOW step it computes the residuals of the skip connections that step executes, and no others. A change of
    its own arguments, such as the scale that `control_guidance_end` sets to 0, makes the step FULL.
    """

    def __init__(self, net: nn.Module, caching: Caching) -> None:
        self._net, self._caching = net, caching
        self._kept: Arguments | None = None
        self._parts: dict[int, nn.Module] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments, return_dict = _bind(self._net, args, kwargs)
        kept = kept_of(arguments)
        if self._kept is None or not same(self._kept, kept):
            self._caching.spoil()
        self._kept = kept
        branch = self._caching.branch_ahead(arguments["timestep"])
        if branch is None:
            self._parts.clear()  # a LoRA may take the place of what they are made of
            return type(self._net).forward(self._net, *args, **kwargs)
        if branch not in self._parts:
            self._parts[branch] = partition_controlnet(self._net, branch).shallow
        residuals = self._parts[branch](**arguments)
        # Pipelines join the middle's residual to zeros for the unconditional half; a shallow pass does not read it.
        middle = residuals[0].new_zeros(0)
        return ControlNetOutput(residuals, middle) if return_dict else (residuals, middle)


def can_cut(controlnet: object) -> TypeGuard[nn.Module]:
    """Whether a ControlNet can compute a part alone. One of another class runs whole in every step."""
    nets = list(controlnet.nets) if isinstance(controlnet, MultiControlNetModel) else [controlnet]
    return all(type(net) is ControlNetModel for net in nets)


def kept_of(arguments: Arguments) -> Arguments:
    """What has to stay as it is while a feature is reused."""
    sample: Tensor = arguments["sample"]
    kept = {k: v for k, v in arguments.items() if k not in _PER_STEP and k not in _RESIDUALS}
    present = [name for name in _RESIDUALS if name in arguments]
    return _snapshot(kept | {"sample": (tuple(sample.shape), sample.dtype, sample.device), "residuals": present})


def _snapshot(value: Any) -> Any:
    """Dicts and lists as they are now, for pipelines add to their own and take from them after a call."""
    if isinstance(value, dict):
        return {key: _snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_snapshot(item) for item in value]
    return value


def _bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Arguments, bool]:
    """The arguments of a call by name, those that say nothing left out, and whether its result has names."""
    arguments = _signature(type(module)).bind(module, *args, **kwargs).arguments
    return_dict = arguments.pop("return_dict", True)
    given = {name: value for name, value in arguments.items() if value is not None and name != "self"}
    return given, return_dict


@functools.cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)


@functools.cache
def _output_class(kind: type[nn.Module]) -> Any:
    """The class that a U-Net's forward returns: that of its file, where diffusers has one for each U-Net."""
    for base in kind.__mro__:
        names = vars(importlib.import_module(base.__module__)).values()
        found = [
            value
            for value in names
            if inspect.isclass(value) and issubclass(value, BaseOutput) and value.__module__ == base.__module__
        ]
        if len(found) == 1:
            return found[0]
    raise ValueError(f"expected a U-Net of diffusers, got {kind.__name__}, whose output class is unknown")
