"""U-Net calls, one after the other -> which run each belongs to, and whether a stored feature still fits it.

A pipeline says neither where a run begins nor what it changed between two calls. Both are read off objects, never off
values on the device, so that nothing waits for it. Knows nothing about plans or about what is cached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn


class RunCounter:
    """Counts the calls of the run at hand.

    A run begins where the pipeline set its timesteps: every diffusers scheduler's `set_timesteps` makes a new tensor,
    of which each call's timestep is a view. So a run is known by that tensor, held here lest its address be given to
    another, and never by a timestep's value, which PNDM and Heun repeat. Where the same tensor is walked through
    again, a call's view lies before the last one's.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.forget()

    def forget(self) -> None:
        """The next call begins a run."""
        self._calls, self._schedule, self._timestep = 0, None, None

    def index(self, timestep: object) -> int:
        """The index of the call that comes now, from 0, without counting it."""
        return self._calls if self._goes_on(timestep) else 0

    def count(self, timestep: object) -> None:
        """A call is made."""
        self._calls = self.index(timestep) + 1
        self._schedule, self._timestep = self._set_timesteps(), timestep

    def timesteps_ahead(self) -> Tensor:
        """The timesteps of the run's calls, from the last that was counted on.

        Raises: `ValueError` for a timestep that is no entry of the scheduler's.
        """
        here, every = self._timestep, self._set_timesteps()
        if not (isinstance(every, Tensor) and _is_view(here)):
            raise ValueError(
                f"expected timesteps out of the scheduler's own, as pipelines give them, got {here!r}; use a plan "
                "that forecasts by step"
            )
        return every[cast(Tensor, here).storage_offset() - every.storage_offset() :]

    def _goes_on(self, timestep: object) -> bool:
        if self._calls == 0 or self._set_timesteps() is not self._schedule:
            return False
        last = self._timestep
        if not (_is_view(timestep) and _is_view(last)):
            return True
        here, before = cast(Tensor, timestep), cast(Tensor, last)
        same = here.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
        return same and here.storage_offset() >= before.storage_offset()

    def _set_timesteps(self) -> object:
        return getattr(getattr(self._pipe, "scheduler", None), "timesteps", None)


def _is_view(timestep: object) -> bool:
    """Whether a timestep is an entry of a longer tensor, as a loop over `scheduler.timesteps` gives it."""
    return isinstance(timestep, Tensor) and timestep.untyped_storage().nbytes() > timestep.nbytes


def is_guided(pipe: Any) -> bool:
    """Whether a pipeline guides: whether it calls its U-Net with two rows for each image, the conditional one last.

    Raises: `ValueError` for a pipeline that does not say so, or calls it with three.
    """
    kind = type(pipe)
    three = hasattr(kind, "image_guidance_scale") or getattr(pipe, "do_perturbed_attention_guidance", False)
    if three or not hasattr(kind, "do_classifier_free_guidance"):
        raise ValueError(
            f"expected a pipeline with two halves for guidance to leave one out, got {kind.__name__}; use a plan "
            "without unguided_steps"
        )
    return bool(pipe.do_classifier_free_guidance)


class AdapterWatch:
    """The parts of a U-Net that change what it computes without a new run: LoRA and IP-Adapter.

    `state` costs nothing where there is neither: the modules that have a scale are looked up when this is made.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._unet = unet
        modules = [m for m in unet.modules() if m is not unet]
        self._lora: list[Any] = [m for m in modules if isinstance(getattr(m, "scaling", None), dict)]
        processors = [getattr(m, "processor", None) for m in modules]
        self._scaled: list[Any] = [p for p in processors if isinstance(getattr(p, "scale", None), list)]

    def state(self) -> object:
        """What compares equal as long as adapters are the same, at the same scales."""
        return (
            # Adapters of the outermost layers, and IP-Adapter's projection, take the place of direct children.
            [id(child) for child in self._unet.children()],
            list(getattr(self._unet, "peft_config", ())),
            [_lora_state(layer) for layer in self._lora],
            [list(processor.scale) for processor in self._scaled],
        )


def _lora_state(layer: Any) -> object:
    return layer.disable_adapters, list(layer.active_adapters), dict(layer.scaling), list(layer.merged_adapters)


def same(a: object, b: object) -> bool:
    """Whether two arguments say the same.

    Tensors are compared by value only where they are not the same object: that waits for the device, and happens where
    a pipeline makes its conditioning anew for each step, as `LDMTextToImagePipeline` does.
    """
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return alike and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, cast("Iterable[Any]", a), cast("Iterable[Any]", b)))
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
