"""A request's body and the bundle that is served -> a job, or an error that says what does not fit.

Knows the API's fields and what a bundle can do; runs nothing.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from typing import Any, cast

from fastcache.bundle.manifest import Manifest
from fastcache.loop.features import moves
from fastcache.loop.plan import CachePlan
from fastcache.pipeline.arguments import Terms, plan_for, terms_of
from fastcache.pipeline.request import Request
from fastcache.serve.engine.events import Event
from fastcache.serve.engine.executor import Drawing, Executor
from fastcache.serve.engine.scheduler import Job
from fastcache.serve.engine.worker import Order
from fastcache.serve.http.errors import ApiError
from fastcache.serve.http.limits import Limits
from fastcache.serve.http.schema import ImageRequest

_CALLS_A_STEP = 2  # at most: Heun's and its kin
_MOST_FIELDS = 64
_LONGEST_TEXT = 256  # of a plan's: they are written into each picture


class Served:
    """A bundle that is loaded and served: its number, its executor, its name, and what requests are checked against."""

    def __init__(self, number: int, executor: Executor, name: str) -> None:
        self.number, self.executor, self.model = number, executor, name

    @property
    def manifest(self) -> Manifest:
        return self.executor.pipe.bundle.manifest

    @property
    def sizes(self) -> list[str]:
        """The sizes of the bundle as WIDTHxHEIGHT, its usual one first."""
        return [str(size) for size in self.manifest.sizes]

    def tokens_of(self, text: str) -> int:
        """How long a text is for the model, its marks of start and end included."""
        return len(self.executor.pipe.tokenizer.ids(text))


def check(asked: ImageRequest, served: Served, limits: Limits) -> None:
    """Refuse at once what no preparation is needed for. Raises: `ApiError`."""
    if asked.size not in (None, "auto", *served.sizes):
        raise _bad("size", f"expected {', '.join(served.sizes)}, what this server draws, or auto, got another")
    _at_most("n", asked.n, min(limits.max_images, limits.queue + served.executor.count))
    _at_most("num_inference_steps", asked.num_inference_steps, limits.max_steps)
    _at_most("timeout", asked.timeout, limits.timeout_s)
    for name, text in (("prompt", asked.prompt), ("negative_prompt", asked.negative_prompt or "")):
        if len(text) > limits.max_prompt_chars:
            raise _bad(name, f"expected at most {limits.max_prompt_chars} characters, got {len(text)}")
    if asked.stream and asked.count > 1:
        raise _bad("n", f"expected 1 with stream, got {asked.n}; ask for one image at a time")
    if not asked.stream and (asked.partial_images or asked.stream_steps):
        raise _bad("stream", "expected stream with partial_images or stream_steps; set it true or leave these out")
    if asked.output_compression is not None and asked.file_format == "png":
        raise _bad("output_compression", "expected it with output_format jpeg or webp only; a png has none")
    if asked.plan is not None and asked.cache_interval is not None:
        raise _bad("plan", "expected plan or cache_interval, got both")
    if asked.plan is not None:
        _check_extent(asked.plan, _CALLS_A_STEP * (asked.num_inference_steps or limits.max_steps) + 8)


def _check_extent(plan: dict[str, Any], most: int) -> None:
    """Refuse what is too long for any plan of so many calls, before anything is made of it."""
    seen: list[Any] = [plan]
    while seen:
        value = seen.pop()
        if isinstance(value, str) and len(value) > _LONGEST_TEXT:
            raise _bad("plan", f"expected texts of at most {_LONGEST_TEXT} characters, got {len(value)}")
        if isinstance(value, list):
            items = cast("list[Any]", value)
            if len(items) > most:
                raise _bad("plan", f"expected a plan of at most {most} calls for these steps, got {len(items)}")
            seen += items
        elif isinstance(value, dict):
            fields = cast("dict[str, Any]", value)
            if len(fields) > _MOST_FIELDS:
                raise _bad("plan", f"expected at most {_MOST_FIELDS} fields, got {len(fields)}")
            seen += [*fields, *fields.values()]


def prepare(
    asked: ImageRequest, job_id: str, served: Served, limits: Limits, notify: Callable[[Event], None], deadline: float
) -> Job[Order]:
    """The job, by its name, of a checked request; takes milliseconds, or seconds for a new sampler of many steps.

    Raises: `ApiError`.
    """
    for name, text in (("prompt", asked.prompt), ("negative_prompt", asked.negative_prompt or "")):
        most, got = served.manifest.model.tokens or 0, served.tokens_of(text)
        if got > most:
            raise _bad(name, f"expected at most {most} tokens, the model's limit, got {got}; shorten it")
    seed = secrets.randbits(31) if asked.seed is None else asked.seed
    request, terms = _request(asked, served, seed)
    steps = terms.steps.count
    if asked.num_inference_steps is None and asked.plan is None:
        steps = min(steps, limits.max_steps)
    _at_most("num_inference_steps", steps, limits.max_steps)
    try:
        table = served.executor.table(terms.sampler_name, terms.steps if terms.steps.fitted else steps)
    except ValueError as error:
        raise _bad("num_inference_steps", f"{terms.sampler_name} cannot take {steps} steps: {error}") from None
    try:
        plan = plan_for(request, served.manifest, table.num_calls, terms.sampler)
        moves(plan, served.manifest.passes, table.sigmas)
    except ValueError as error:
        raise _bad("plan", str(error)) from None
    drawing = Drawing(request, terms, seed, table, plan)
    partial = asked.partial_images or 0
    previews = sorted({(k + 1) * plan.num_steps // (partial + 1) - 1 for k in range(partial)} - {-1})
    order = Order(drawing, notify, tuple(previews), bool(asked.stream_steps))
    return Job(
        id=job_id,
        bundle=served.number,
        size=str(terms.size),
        plan=plan,
        guided=terms.guided,
        count=asked.count,
        deadline=deadline,
        content=order,
    )


def _request(asked: ImageRequest, served: Served, seed: int) -> tuple[Request, Terms]:
    """The request that each of a body's images stands for, and what that means here. Raises: `ApiError`."""
    size = served.manifest.sizes[served.sizes.index(asked.size) if asked.size in served.sizes else 0]
    try:
        plan = None if asked.plan is None else CachePlan.from_json(json.dumps(asked.plan))
    except ValueError as error:
        raise _bad("plan", str(error)) from None
    try:
        request = Request(
            asked.prompt,
            negative_prompt=asked.negative_prompt,
            height=size.height,
            width=size.width,
            num_inference_steps=asked.num_inference_steps,
            guidance_scale=asked.guidance_scale,
            sampler=asked.sampler,
            cache_interval=asked.cache_interval,
            plan=plan,
            seed=seed,
        )
        return request, terms_of(request, served.manifest, samplers=served.executor.pipe.bundle.samplers)
    except ValueError as error:
        raise _bad("prompt" if plan is None else "plan", str(error)) from None


def told(text: str) -> str:
    """A prompt as logs have it."""
    return f"{len(text)} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _at_most(name: str, value: float | None, most: float) -> None:
    if value is not None and value > most:
        raise _bad(name, f"expected at most {most:g}, this server's limit, got {value:g}")


def _bad(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", code="invalid_value", param=param)
