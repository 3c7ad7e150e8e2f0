"""What is called after each step -> the latents it replaces, an early end, and where guidance ends.

A run's steps are laid out before the first, so a callback may change latents and end the run; what it cannot change is
refused by name. Knows diffusers' conventions for callbacks; nothing about engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from fastcache.expect import expected
from fastcache.loop.plan import CachePlan
from fastcache.loop.steps import Step
from fastcache.pipeline.request import Request

Callback = Callable[[Any, int, Any, dict[str, Any]], Any]

_LATENTS: Final = "latents"
# What diffusers' pipelines call a U-Net's inputs in a callback: theirs, ours, and whether only the first half is meant.
_INPUTS: Final[Mapping[str, tuple[str, bool]]] = {
    "prompt_embeds": ("encoder_hidden_states", False),
    "negative_prompt_embeds": ("encoder_hidden_states", True),
    "add_text_embeds": ("text_embeds", False),
    "add_time_ids": ("time_ids", False),
}
_CUTOFFS: Final = ("SDCFGCutoffCallback", "SDXLCFGCutoffCallback", "SDXLControlnetCFGCutoffCallback")


@dataclass(frozen=True, eq=False)
class Callbacks:
    """A request's callbacks: those that are called, what they are shown, and after which step guidance ends."""

    called: tuple[Callback, ...]
    shown: tuple[str, ...]
    cutoffs: tuple[Callable[[int], int], ...] = ()

    def cut(self, plan: CachePlan) -> CachePlan:
        """The plan with guidance off from the step after a cutoff on."""
        unguided = {step for cutoff in self.cutoffs for step in range(cutoff(plan.num_steps) + 1, plan.num_steps)}
        return replace(plan, unguided_steps=tuple(sorted(unguided.union(plan.unguided_steps)))) if unguided else plan

    def after(self, pipe: Any, step: Step, inputs: Mapping[str, Tensor]) -> None:
        """Call them after a step, and put the latents that they return in place of the step's.

        Raises: `ValueError` for latents of another shape, and for what is changed that a run cannot change.
        """
        if not self.called:
            return
        shown = {name: step.latents if name == _LATENTS else _seen(name, inputs) for name in self.shown}
        given, versions, scale = (
            dict(shown),
            {name: value._version for name, value in shown.items()},
            pipe.guidance_scale,
        )
        timestep = torch.tensor(step.timestep, dtype=torch.float32, device="cpu")
        for callback in self.called:
            shown = callback(pipe, step.index, timestep, shown) or shown
        for name, value in given.items():
            if name != _LATENTS and (shown.get(name, value) is not value or value._version != versions[name]):
                raise _fixed(name, "latents only")
        if pipe.guidance_scale != scale:
            raise _fixed("guidance_scale", "plan.guided_within(first, end), or diffusers' SDCFGCutoffCallback")
        latents = shown.get(_LATENTS)
        if latents is not None and latents is not step.latents:
            if not isinstance(latents, Tensor) or latents.shape != step.latents.shape:
                raise expected(
                    f"latents of shape {list(step.latents.shape)} from a callback", latents, "keep their shape"
                )
            step.latents.copy_(latents)


def callbacks_of(request: Request) -> Callbacks:
    """Raises: `ValueError` for one of diffusers' that does not work here, and for tensors that no callback is shown."""
    every = _each(request.callback_on_step_end)
    cutoffs, called = list[Callable[[int], int]](), list[Callback]()
    for each in every:
        if type(each).__name__ in _CUTOFFS:
            cutoffs.append(_cutoff(each))
        elif _is_official(each):
            raise expected(
                f"a function, or {', '.join(_CUTOFFS)}, as callback_on_step_end", type(each).__name__, "leave it out"
            )
        else:
            called.append(each)
    shown = tuple(request.callback_on_step_end_tensor_inputs or (_LATENTS,))
    if strange := [name for name in shown if name != _LATENTS and name not in _INPUTS]:
        known = ", ".join((_LATENTS, *_INPUTS))
        raise expected(f"callback_on_step_end_tensor_inputs out of {known}", strange[0], "leave it out")
    return Callbacks(tuple(called), shown, tuple(cutoffs))


def _each(callback: Any) -> Sequence[Any]:
    if callback is None:
        return ()
    if type(callback).__name__ == "MultiPipelineCallbacks":
        return list(callback.callbacks)
    return [callback]


def _is_official(callback: Any) -> bool:
    """Whether it derives from diffusers' `PipelineCallback`, without importing that."""
    return any(base.__name__ == "PipelineCallback" for base in type(callback).__mro__)


def _cutoff(callback: Any) -> Callable[[int], int]:
    """After which of so many steps guidance ends. Source: `callback_fn` of diffusers' `SDCFGCutoffCallback`."""
    index, ratio = callback.config.cutoff_step_index, callback.config.cutoff_step_ratio
    return lambda num_steps: int(num_steps * ratio) if index is None else int(index)


def _seen(name: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """A copy of an input, which the run goes on with as it is."""
    own, first_half = _INPUTS[name]
    if own not in inputs:
        raise expected("callback_on_step_end_tensor_inputs that this model has", name, "leave it out")
    value = inputs[own].clone()
    return value[: len(value) // 2] if first_half else value


def _fixed(name: str, remedy: str) -> ValueError:
    return ValueError(f"expected a callback to leave {name}, which the steps to come are laid out for; give {remedy}")
