"""A request's body and the bundle that is served -> an error that says what does not fit, before any work is done.

Knows the API's fields and what a bundle can do; runs nothing.
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

from fastcache.bundle.manifest import Manifest
from fastcache.serve.engine.executor import Executor
from fastcache.serve.http.errors import ApiError
from fastcache.serve.http.limits import Limits
from fastcache.serve.http.schema import ImageRequest
from fastcache.serve.models.quality import OWN_SETTINGS, PLAN_NAMES, Plans

_CALLS_A_STEP = 2  # at most: Heun's and its kin
_MOST_FIELDS = 64
_LONGEST_TEXT = 256  # of a plan's: they are written into each picture


class Served:
    """A bundle that is loaded and served: number, executor, name, plans, and what requests are checked against."""

    def __init__(self, number: int, executor: Executor, name: str, plans: Plans) -> None:
        self.number, self.executor, self.model = number, executor, name
        self.plans = plans

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
        raise bad("size", f"expected {', '.join(served.sizes)}, what this server draws, or auto, got another")
    at_most("n", asked.n, min(limits.max_images, limits.queue + served.executor.count))
    at_most("num_inference_steps", asked.num_inference_steps, limits.max_steps)
    at_most("timeout", asked.timeout, limits.timeout_s)
    for name, text in (("prompt", asked.prompt), ("negative_prompt", asked.negative_prompt or "")):
        if len(text) > limits.max_prompt_chars:
            raise bad(name, f"expected at most {limits.max_prompt_chars} characters, got {len(text)}")
    if asked.stream and asked.count > 1:
        raise bad("n", f"expected 1 with stream, got {asked.n}; ask for one image at a time")
    if not asked.stream and (asked.stream_steps or (asked.partial_images and not asked.is_job)):
        raise bad("stream", "expected stream with partial_images or stream_steps; set it true or leave these out")
    if asked.output_compression is not None and asked.file_format == "png":
        raise bad("output_compression", "expected it with output_format jpeg or webp only; a png has none")
    if asked.plan is not None and asked.cache_interval is not None:
        raise bad("plan", "expected plan or cache_interval, got both")
    _check_quality(asked, served)
    if asked.is_job and asked.stream:
        raise bad("background", "expected background true without stream; ask for the job's previews, or stream")
    if asked.plan is not None:
        calls = _CALLS_A_STEP * (asked.num_inference_steps or limits.max_steps) + 8
        _check_extent(_without_table(asked.plan, served.manifest, calls), calls)


def _check_quality(asked: ImageRequest, served: Served) -> None:
    if asked.quality not in PLAN_NAMES:
        return
    if not served.plans:
        message = (
            f"expected auto or standard, got another; this server has no fitted plans for {served.model} (--plans)"
        )
        raise bad("quality", message)
    for name in OWN_SETTINGS:
        if getattr(asked, name) is not None:
            raise bad("quality", f"expected it without {name}, which its plan says itself; leave one out")


def _without_table(plan: dict[str, Any], manifest: Manifest, calls: int) -> dict[str, Any]:
    """A plan but for its scales and shifts. Raises: `ApiError` for more of them than a bundle's blocks need."""
    own: Any = plan.get("scale_shift")
    if not isinstance(own, dict) or not isinstance(table := cast("dict[str, Any]", own).get("data"), str):
        return plan
    channels = sum(block.channels for block in manifest.blocks)
    if own.get("channels") != channels:
        raise bad("plan", f"expected a scale_shift for {channels} channels, those of the bundle's blocks, got another")
    if len(table) > (most := _LONGEST_TEXT + 11 * channels * calls):  # 8 bytes a channel and call, as base64
        raise bad("plan", f"expected a scale_shift of at most {most} characters for these steps, got {len(table)}")
    return {**plan, "scale_shift": {**own, "data": ""}}


def _check_extent(plan: dict[str, Any], most: int) -> None:
    """Refuse what is too long for any plan of so many calls, before anything is made of it."""
    seen: list[Any] = [plan]
    while seen:
        value = seen.pop()
        if isinstance(value, str) and len(value) > _LONGEST_TEXT:
            raise bad("plan", f"expected texts of at most {_LONGEST_TEXT} characters, got {len(value)}")
        if isinstance(value, list):
            items = cast("list[Any]", value)
            if len(items) > most:
                raise bad("plan", f"expected a plan of at most {most} calls for these steps, got {len(items)}")
            seen += items
        elif isinstance(value, dict):
            fields = cast("dict[str, Any]", value)
            if len(fields) > _MOST_FIELDS:
                raise bad("plan", f"expected at most {_MOST_FIELDS} fields, got {len(fields)}")
            seen += [*fields, *fields.values()]


def told(text: str) -> str:
    """A prompt as logs have it."""
    return f"{len(text)} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def at_most(name: str, value: float | None, most: float) -> None:
    if value is not None and value > most:
        raise bad(name, f"expected at most {most:g}, this server's limit, got {value:g}")


def bad(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", code="invalid_value", param=param)
