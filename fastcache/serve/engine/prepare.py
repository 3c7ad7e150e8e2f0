"""A checked request and the bundle that is served -> a job: pictures read, plan chosen, the sampler's table made.

Runs in a thread beside the event loop; draws nothing.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fastcache.loop.features import moves
from fastcache.loop.plan import CachePlan
from fastcache.pipeline.arguments import Terms, plan_for, size_named, terms_of
from fastcache.pipeline.controls import refreshed
from fastcache.pipeline.request import Request
from fastcache.pipeline.schedule import Schedule
from fastcache.serve.engine.events import Event
from fastcache.serve.engine.order import Drawing, Order
from fastcache.serve.engine.requests import Served, at_most, bad
from fastcache.serve.engine.scheduler import Job
from fastcache.serve.engine.shown import fitted, shown
from fastcache.serve.http.errors import ApiError
from fastcache.serve.http.limits import Limits
from fastcache.serve.http.schema import EditRequest, ImageRequest
from fastcache.serve.models.quality import BEST_FIRST, OWN_SETTINGS, PLAN_NAMES, Quality

# The argument that a refusal of the pipeline names first -> the field.
_FIELDS: Final = {
    "mask_image": "mask",
    "image": "image",
    **{name: name for name in ("control_image", "adapter_image", "ip_adapter_image", "strength")},
    **{name: name for name in ("control_guidance_start", "controlnet_conditioning_scale", "ip_adapter_scale")},
}

Latency = Callable[[int, CachePlan, bool, int], float]


@dataclass(frozen=True)
class Arrival:
    """How a request came: the job's name, when, until when it must be done, for whom, and whom to tell.

    Units: seconds of `time.monotonic`.
    """

    job_id: str
    arrived: float
    deadline: float
    owner: str
    notify: Callable[[Event], None]


@dataclass(frozen=True)
class _Choice:
    """A plan that a request may be drawn by; None for what the request itself says."""

    name: str
    quality: Quality | None = None
    plan: CachePlan | None = None


def prepare(asked: ImageRequest, arrival: Arrival, served: Served, limits: Limits, latency: Latency) -> Job[Order]:
    """The job; takes milliseconds, or seconds for a new sampler of many steps.

    Raises: `ApiError`.
    """
    for name, text in (("prompt", asked.prompt), ("negative_prompt", asked.negative_prompt or "")):
        most, got = served.manifest.model.tokens or 0, served.tokens_of(text)
        if got > most:
            raise bad(name, f"expected at most {most} tokens, the model's limit, got {got}; shorten it")
    seed = secrets.randbits(31) if asked.seed is None else asked.seed
    pictures = shown(asked, served.manifest)
    size = size_named(served.manifest, asked.size, pictures)
    arguments = {**fitted(pictures, size), "height": size.height, "width": size.width, "seed": seed}
    choice, drawing = _chosen(asked, arrival, served, limits, latency, arguments)
    plan, terms = drawing.plan, drawing.terms
    partial = asked.partial_images or 0
    previews = sorted({(k + 1) * plan.num_steps // (partial + 1) - 1 for k in range(partial)} - {-1})
    order = Order(
        drawing,
        arrival.notify,
        tuple(previews),
        bool(asked.stream_steps or asked.is_job),
        "edits" if isinstance(asked, EditRequest) else "generations",
        choice.name,
        choice.quality,
    )
    return Job(
        id=arrival.job_id,
        bundle=served.number,
        size=str(terms.size),
        plan=plan,
        guided=terms.guided,
        count=asked.count,
        deadline=arrival.deadline,
        content=order,
        owner=arrival.owner,
    )


def _chosen(
    asked: ImageRequest,
    arrival: Arrival,
    served: Served,
    limits: Limits,
    latency: Latency,
    arguments: Mapping[str, Any],
) -> tuple[_Choice, Drawing]:
    """The best plan that is done in time, as the server stands now. Raises: `ApiError` 422 where none is."""
    least = float("inf")
    for choice in _choices(asked, served, arguments):
        drawing = _drawing(asked, served, limits, choice, arguments)
        if asked.max_latency_ms is None:
            return choice, drawing
        left_s = latency(served.number, drawing.plan, drawing.terms.guided, asked.count)
        takes_ms = 1e3 * (time.monotonic() - arrival.arrived + left_s)
        if takes_ms <= asked.max_latency_ms:
            return choice, drawing
        least = min(least, takes_ms)
    raise ApiError(
        422,
        f"max_latency_ms: expected {least:.0f} or more, the least that this server can do now, "
        f"got {asked.max_latency_ms:.0f}; allow more, or ask again later",
        code="latency_unattainable",
        param="max_latency_ms",
    )


def _choices(asked: ImageRequest, served: Served, arguments: Mapping[str, Any]) -> Iterator[_Choice]:
    """Plans that answer what was asked for, the best first."""
    plans = {
        quality: _Choice(PLAN_NAMES[quality], quality, served.plans[quality])
        for quality in BEST_FIRST
        if quality in served.plans
    }
    if asked.quality in plans:
        yield plans[asked.quality]
        return
    own = any(getattr(asked, name) is not None for name in OWN_SETTINGS)
    fits = [
        one
        for one in plans.values()
        if one.plan is not None
        and one.plan.fit is not None
        and (one.plan.fit.height, one.plan.fit.width) == (arguments["height"], arguments["width"])
    ]
    if own or not fits or (asked.quality != "auto" and asked.max_latency_ms is None):
        yield _Choice(_name_of(asked))
    elif asked.max_latency_ms is None:
        yield next(one for one in fits if one.quality == "medium")
    else:
        yield _Choice("uncached")
        yield from fits


def _name_of(asked: ImageRequest) -> str:
    if asked.plan is not None:
        return "given"
    return "interval" if (asked.cache_interval or 1) > 1 else "uncached"


def _drawing(
    asked: ImageRequest, served: Served, limits: Limits, choice: _Choice, arguments: Mapping[str, Any]
) -> Drawing:
    """What is drawn by a plan. Raises: `ApiError`."""
    request, terms = _request(asked, served, choice, arguments)
    steps = terms.steps.count
    if asked.num_inference_steps is None and asked.plan is None:
        steps = min(steps, limits.max_steps)
    at_most("num_inference_steps", steps, limits.max_steps)
    schedule = _schedule(served, request, terms, steps)
    try:
        plan = plan_for(request, served.manifest, schedule.sampler.num_calls, terms.sampler)
        plan = refreshed(plan, served.executor.pipe.controls.scales(request, plan.num_steps))
        sigmas = getattr(schedule.sampler, "sigmas", None)
        moves(plan, served.manifest.passes, sigmas)
    except ValueError as error:
        raise bad(_field(error, "plan" if choice.quality is None else "quality"), str(error)) from None
    return Drawing(request, terms, int(arguments["seed"]), schedule, plan)


def _schedule(served: Served, request: Request, terms: Terms, steps: int) -> Schedule:
    try:
        wanted = terms.steps if terms.steps.fitted else steps
        schedule = served.executor.schedule(terms.sampler_name, wanted, terms.span)
    except ValueError as error:
        if terms.steps.fitted:
            raise bad("strength" if request.image is not None else "plan", str(error)) from None
        raise bad("num_inference_steps", f"{terms.sampler_name} cannot take {steps} steps: {error}") from None
    if request.mask_image is not None and not schedule.takes_new_latents:
        what = "a plan without fitted rows" if terms.steps.fitted else "a sampler that does not look far back, as ddim"
        raise bad("mask", f"expected {what} with a mask, which changes what each step left; choose another")
    return schedule


def _request(
    asked: ImageRequest, served: Served, choice: _Choice, arguments: Mapping[str, Any]
) -> tuple[Request, Terms]:
    """The request that each of a body's images stands for, and what that means here. Raises: `ApiError`."""
    plan = choice.plan
    try:
        if asked.plan is not None:
            plan = CachePlan.from_json(json.dumps(asked.plan))
    except ValueError as error:
        raise bad("plan", str(error)) from None
    pipe = served.executor.pipe
    try:
        request = Request(
            asked.prompt,
            negative_prompt=asked.negative_prompt,
            num_inference_steps=asked.num_inference_steps,
            guidance_scale=asked.guidance,
            sampler=asked.sampler,
            cache_interval=asked.cache_interval,
            plan=plan,
            **arguments,
        )
        pipe.controls.check(request)
        if request.image is not None and "vae_encoder" not in served.manifest.engines:
            raise ValueError("expected no image for a bundle without a vae_encoder; build it with --components all")
        return request, terms_of(request, served.manifest, samplers=pipe.bundle.samplers)
    except ValueError as error:
        raise bad(_field(error, "prompt" if plan is None else "plan"), str(error)) from None


def _field(error: ValueError, otherwise: str) -> str:
    """The field that a refusal is about: the first that its line names."""
    words = str(error).replace(",", " ").replace("=", " ").split()
    return next((_FIELDS[word] for word in words if word in _FIELDS), otherwise)
