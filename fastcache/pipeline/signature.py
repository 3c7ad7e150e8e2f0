"""A method that takes a request -> the same method called with the request's own arguments, which editors then list.

Knows the arguments of diffusers' pipelines that no request has, and says what to use instead.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, get_type_hints

from fastcache.expect import expected, suggested
from fastcache.pipeline.request import Request

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")

_ELSEWHERE: Final[Mapping[str, str]] = {
    "cross_attention_kwargs": "adapters are merged into a bundle: build it with --lora PATH:WEIGHT",
    "callback": "give callback_on_step_end",
    "callback_steps": "give callback_on_step_end, which is called after each step",
    "masked_image_latents": "give image and mask_image",
    "padding_mask_crop": "crop image and mask_image before, and paste the result",
    "original_inference_steps": "give sampler an LCMScheduler with original_inference_steps in its config",
    "adapter_conditioning_factor": "give adapter_conditioning_scale; an adapter counts in every step",
    "cache_branch_id": "give plan: CachePlan.uniform(num_steps, interval, branch_id)",
    "scheduler": "give sampler",
    "steps": "give num_inference_steps",
}


def arguments_of(make: Callable[P, Request]) -> Callable[[Callable[[S, Request], R]], Callable[Concatenate[S, P], R]]:
    """Make a method that takes a request take what `make` makes one of.

    Raises: `ValueError`, when the method is called, for an argument that no request has.
    """

    def of(draw: Callable[[S, Request], R]) -> Callable[Concatenate[S, P], R]:
        @functools.wraps(draw)
        def called(self: S, *arguments: P.args, **named: P.kwargs) -> R:
            return draw(self, make(*arguments, **_known(named)))  # pyright: ignore[reportCallIssue] (fewer of them)

        vars(called)["__signature__"] = _signature(draw)
        return called

    return of


def _known(named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, but for those of diffusers that say nothing. Raises: `ValueError` for unknown ones."""
    known, kept = inspect.signature(Request).parameters, dict[str, Any]()
    for name, value in named.items():
        if name in known:
            kept[name] = value
        elif not (name in _ELSEWHERE and (value is None or value == {})):
            remedy = _ELSEWHERE.get(name) or suggested(name, known) or "help(pipe.__call__) lists what it takes"
            raise expected(f"arguments of pipe(...), which {name} is not", value, remedy)
    return kept


def _signature(draw: Callable[..., Any]) -> inspect.Signature:
    """A method's, with a request's arguments, their types as they are without checks."""
    own, hints = inspect.signature(draw), get_type_hints(Request)
    first = next(iter(own.parameters.values()))
    others = [each.replace(annotation=hints[name]) for name, each in inspect.signature(Request).parameters.items()]
    return own.replace(parameters=[first, *others])
