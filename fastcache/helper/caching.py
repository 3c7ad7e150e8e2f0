"""A pipeline's calls of its U-Net and its ControlNet -> each a pass, after a plan and what may be reused.

This is what runs behind the objects that stand for the two. How a pass computes is `passes.py`'s business.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from diffusers import ControlNetModel, MultiControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from torch import Tensor, nn

from fastcache.cut.controlnet import shallow_controlnet
from fastcache.cut.names import FULL, branch_of, is_pattern, shallow_pass
from fastcache.helper.arguments import Arguments, Kept, bind, conditional_half, output_class
from fastcache.helper.network import NetworkWatch
from fastcache.helper.passes import PassRunner, UNetCall
from fastcache.helper.runs import RunCounter, is_guided
from fastcache.loop.plan import CachePlan, Forecast
from fastcache.sampler.table import noise_levels


class Pacing:
    """Which pass each step runs: after an interval, which suits any number of steps, or after a plan."""

    def __init__(self, interval: int, branch_id: int, plan: CachePlan | None = None) -> None:
        self._interval, self._shallow, self._plan = interval, shallow_pass(branch_id), plan
        self.forecast: Forecast | None = plan.forecast if plan else None
        self.scale_shift = plan.scale_shift if plan else None
        self.unguided_steps = plan.unguided_steps if plan else ()
        self.fitted = plan if plan is not None and plan.fit is not None else None

    @property
    def names(self) -> tuple[str, ...]:
        """The passes that may run; of a plan without caching, one more that a U-Net is cut for."""
        planned = self._plan.pass_names if self._plan else (FULL,)
        return planned if len(planned) > 1 else (FULL, self._shallow)

    def at(self, step: int) -> str:
        if self._plan is None:
            return FULL if step % self._interval == 0 else self._shallow
        if step >= self._plan.num_steps:
            raise ValueError(
                f"expected a plan for every U-Net call of the run, got one for {self._plan.num_steps} and call "
                f"{step + 1}; make a plan for as many calls as the sampler takes"
            )
        return self._plan.passes[step]


class Caching:
    """What an exchanged U-Net does when it is called."""

    def __init__(self, pipe: Any, unet: nn.Module, passes: PassRunner, pacing: Pacing) -> None:
        self._pipe, self._unet, self._passes, self._pacing = pipe, unet, passes, pacing
        self._run, self._network = RunCounter(pipe), NetworkWatch(unet)
        self._stored: Kept | None = None  # what the cached feature was made under
        self._sigmas: tuple[float, ...] | None = None
        self.last: Tensor | None = None  # what the last call gave
        self._on = True

    def change(self, pacing: Pacing, passes: PassRunner | None) -> None:
        """Go on at another pace, and other passes if there are some, as if a run began."""
        self._pacing, self._passes = pacing, passes or self._passes
        self._run.forget()
        self.spoil()

    def stop(self) -> None:
        """From now on the module's own forward runs, for whoever kept the object that stood for it."""
        self._on, self.last = False, None
        self.spoil()
        del self._passes

    def spoil(self) -> None:
        """The next call is FULL."""
        self._stored = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._on:
            return type(self._unet).forward(self._unet, *args, **kwargs)
        arguments, return_dict = bind(self._unet, args, kwargs)
        noise_pred = self._noise_pred(arguments)
        return output_class(type(self._unet))(sample=noise_pred) if return_dict else (noise_pred,)

    def pass_ahead(self, arguments: Arguments) -> str:
        """The pass that the next call will run, as far as can be told before it, for what is called first."""
        step = self._run.index(arguments["timestep"], arguments["sample"]) if self._on else 0
        if step == 0 or self._stored is None or self._network.change():
            return FULL
        return self._pass(step, self._halves(step))

    def _noise_pred(self, arguments: Arguments) -> Tensor:
        timestep, sample, kept = arguments["timestep"], arguments["sample"], Kept(arguments)
        step = self._run.index(timestep, sample)
        self._pacing.at(step)  # a plan that is too short is refused before anything is counted
        self._run.count(step, timestep, sample)
        if step == 0:
            self._sigmas = self._noise_levels()
        if step == 0 or not self._fits(kept):
            self._stored = None
            self._passes.refresh()
            if self._network.change():
                self._network = NetworkWatch(self._unet)
        halved = self._halves(step)
        given = conditional_half(arguments, len(sample)) if halved else arguments
        noise_pred = self._predict(UNetCall(step, given, halved, self._sigmas))
        self._stored = kept
        self.last = torch.cat([noise_pred] * 2) if halved else noise_pred
        return self.last

    def _predict(self, call: UNetCall) -> Tensor:
        name = FULL if self._stored is None else self._pass(call.step, call.halved)
        if name == FULL:
            self._stored = None  # should this call fail, nothing is reused
        return self._passes.run(name, call)

    def _pass(self, step: int, halved: bool) -> str:
        """The pass that is planned, where what is stored is of the rows that it needs."""
        name = self._pacing.at(step)
        return name if name == FULL or self._passes.serves(name, halved) else FULL

    def _halves(self, step: int) -> bool:
        """Whether the step runs on the conditional half alone, which the pipeline then guides by itself to itself."""
        return bool(self._pacing.unguided_steps) and is_guided(self._pipe) and step in self._pacing.unguided_steps

    def _fits(self, kept: Kept) -> bool:
        """Whether what is cached was made under these arguments, or of guided ones whose conditional half they are."""
        if self._stored is None or self._network.change():
            return False
        if self._stored.fits(kept):
            return True
        return self._stored.fits_half(kept) and self._passes.halve()

    def _noise_levels(self) -> tuple[float, ...] | None:
        """What a forecast by sigma runs along, from this call on."""
        if self._pacing.forecast is None or self._pacing.forecast.by != "sigma":
            return None
        return noise_levels(self._pipe.scheduler, self._run.timesteps_ahead())


class ControlCaching:
    """What an exchanged ControlNet does, which a pipeline calls before its U-Net.

    For a SHALLOW step it computes the residuals of the skip connections that step executes, and no others. A change of
    it or of its own arguments, such as the scale that `control_guidance_end` sets to 0, makes the step FULL.
    """

    def __init__(self, net: nn.Module, caching: Caching) -> None:
        self._net, self._caching, self._network = net, caching, NetworkWatch(net)
        self._kept: Kept | None = None
        self._parts: dict[str, nn.Module] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments, return_dict = bind(self._net, args, kwargs)
        kept = Kept(arguments)
        if self._kept is None or not self._kept.fits(kept):
            self._caching.spoil()
        if self._network.change():
            self._caching.spoil()
            self._network = NetworkWatch(self._net)
        self._kept = kept
        name = self._caching.pass_ahead(arguments)
        branch = None if is_pattern(name) else branch_of(name)
        if branch is None:
            self._parts.clear()  # a LoRA may take the place of what they are made of
            return type(self._net).forward(self._net, *args, **kwargs)
        if name not in self._parts:
            self._parts[name] = shallow_controlnet(self._net, branch)
        residuals = self._parts[name](**arguments)
        # Pipelines join the middle's residual to zeros for the unconditional half; a shallow pass does not read it.
        middle = residuals[0].new_zeros(0)
        return ControlNetOutput(residuals, middle) if return_dict else (residuals, middle)


def can_cut(controlnet: object) -> TypeGuard[nn.Module]:
    """Whether a ControlNet can compute a part alone. One of another class runs whole in every step."""
    nets = list(controlnet.nets) if isinstance(controlnet, MultiControlNetModel) else [controlnet]
    return all(type(net) is ControlNetModel for net in nets)
