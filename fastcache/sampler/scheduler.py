"""A sampler's name, as users know it -> the diffusers scheduler it stands for, made from a model's own settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from types import MappingProxyType
from typing import Any, Final, Protocol, cast

from fastcache.expect import expected, suggested


class Scheduler(Protocol):
    """What is used of a diffusers scheduler."""

    @property
    def config(self) -> Any: ...
    @property
    def timesteps(self) -> Any: ...
    def set_timesteps(self, *args: Any, **kwargs: Any) -> Any: ...
    def step(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class SchedulerChoice:
    """The diffusers class a sampler's name stands for, and the settings that the name implies."""

    class_name: str
    overrides: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def _choice(class_name: str, **overrides: Any) -> SchedulerChoice:
    return SchedulerChoice(class_name, MappingProxyType(overrides))


def _dpm(algorithm_type: str, use_karras_sigmas: bool = False) -> SchedulerChoice:
    return _choice(
        "DPMSolverMultistepScheduler",
        algorithm_type=algorithm_type,
        solver_order=2,
        use_karras_sigmas=use_karras_sigmas,
        thresholding=False,
    )


_PNDM: Final = _choice("PNDMScheduler", skip_prk_steps=True)

SAMPLERS: Final[Mapping[str, SchedulerChoice]] = MappingProxyType(
    {
        "ddim": _choice("DDIMScheduler", clip_sample=False, thresholding=False),
        "pndm": _PNDM,
        "plms": _PNDM,
        "ddpm": _choice("DDPMScheduler", clip_sample=False, thresholding=False),
        "euler": _choice("EulerDiscreteScheduler"),
        "euler_a": _choice("EulerAncestralDiscreteScheduler"),
        "dpm++_2m": _dpm("dpmsolver++"),
        "dpm++_2m_karras": _dpm("dpmsolver++", use_karras_sigmas=True),
        "dpm++_2m_sde": _dpm("sde-dpmsolver++"),
        "unipc": _choice("UniPCMultistepScheduler", thresholding=False),
        "heun": _choice("HeunDiscreteScheduler", clip_sample=False),
        "lms": _choice("LMSDiscreteScheduler"),
        "lcm": _choice("LCMScheduler", clip_sample=False, thresholding=False),
    }
)


_importing = Lock()


def make_scheduler(name: str, config: Mapping[str, Any]) -> Scheduler:
    """The diffusers scheduler that users call `name`, for a model whose own scheduler has this config.

    The class name of the model's own stands for that one, just as the config has it.

    Raises: ValueError for an unknown name; ImportError where the scheduler needs a package (lms: scipy).
    """
    choice = SAMPLERS.get(name)
    if choice is None and name == config.get("_class_name"):
        choice = _choice(name)
    if choice is None:
        raise expected(
            f"a sampler out of {', '.join(SAMPLERS)}", name, suggested(name, SAMPLERS) or "choose one of these"
        )
    with _importing:  # of two threads at once, one finds diffusers' lazy modules half made
        import diffusers
        from diffusers.schedulers.scheduling_utils import SchedulerMixin

        scheduler_class: Any = getattr(diffusers, choice.class_name, None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        raise expected("the model's scheduler to be one of diffusers", choice.class_name, "choose a sampler by name")
    accepted = inspect.signature(scheduler_class.__init__).parameters
    # Not `from_config`: it imports every other scheduler, for 1.5 s, to see what values are another class's defaults,
    # which the config says itself.
    unset = config.get("_use_default_values", ())
    own = {key: value for key, value in config.items() if key in accepted and key not in unset}
    return cast(Scheduler, scheduler_class(**{**own, **choice.overrides}))


def own_sampler(config: Mapping[str, Any]) -> str:
    """What `make_scheduler` calls a model's own scheduler: by its name if that draws the same, else by its class.

    A config without a class, as architecture presets have it, leaves `ddim`.
    """
    own_class = config.get("_class_name")
    if own_class is None:
        return "ddim"
    same_class = [name for name, choice in SAMPLERS.items() if choice.class_name == own_class]
    own = _settings(make_scheduler(own_class, config)) if same_class else {}
    return next((name for name in same_class if _settings(make_scheduler(name, config)) == own), str(own_class))


def _settings(scheduler: Scheduler) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def same_sampler(name: str, other: str) -> bool:
    """Whether two names stand for the same sampler, as `pndm` and `plms` do."""
    return name == other or (name in SAMPLERS and SAMPLERS[name] is SAMPLERS.get(other))


def step_arguments(scheduler: Any, eta: float, generator: Any = None) -> dict[str, Any]:
    """What of eta and generator this scheduler's `step` takes; eta also where it is 0, which is not TCD's own."""
    accepted = inspect.signature(scheduler.step).parameters
    arguments = {"eta": eta, "generator": generator}
    return {name: value for name, value in arguments.items() if name in accepted and value is not None}
