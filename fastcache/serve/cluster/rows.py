"""Rows of a table, each a prompt and how to draw it -> pictures, those of equal settings in one batch.

What `batch.py` runs in its workers and `triton.py` in Triton. Knows the pipeline; nothing about files or clusters.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

from PIL import Image as Pillow
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fastcache.bundle.manifest import Manifest
from fastcache.files import sha256_of
from fastcache.loop.plan import CachePlan
from fastcache.pipeline.arguments import size_named
from fastcache.pipeline.images import read_image
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.pipeline.request import MAX_SEED, Request
from fastcache.sampler.scheduler import SAMPLERS


def _known(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(f"expected a sampler out of {', '.join(SAMPLERS)}, got {name!r}")
    return name


class Shown(BaseModel):
    """A picture's file that a row is shown, at the same path on every machine, and the hash of what it holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Shown:
        """Raises: `ValueError` for a file that is none, or no picture."""
        read_image(path)
        return cls(path=str(path.resolve()), sha256=sha256_of(path))


PICTURES: Final = {
    "image": "image",
    "mask": "mask_image",
    "control_image": "control_image",
    "adapter_image": "adapter_image",
    "ip_adapter_image": "ip_adapter_image",
}
_SCALES: Final = ("strength", "controlnet_conditioning_scale", "adapter_conditioning_scale", "ip_adapter_scale")


class Row(BaseModel):
    """One picture to draw, with the field names of the images API. `id` names its file, `model` one of several bundles.

    What is left out is the model's own way, or of the plan the bundle's: no caching.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    id: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$")
    prompt: str = Field(min_length=1)
    model: str = ""
    negative_prompt: str | None = None
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = None
    sampler: Annotated[str, AfterValidator(_known)] | None = None
    cache_interval: int | None = Field(None, ge=1)
    plan: dict[str, Any] | None = None
    image: Shown | None = None
    mask: Shown | None = None
    strength: float | None = Field(None, gt=0, le=1)
    control_image: Shown | None = None
    controlnet_conditioning_scale: float | None = None
    adapter_image: Shown | None = None
    adapter_conditioning_scale: float | None = None
    ip_adapter_image: Shown | None = None
    ip_adapter_scale: float | None = None
    size: str | None = Field(None, pattern=r"^(auto|[1-9][0-9]*x[1-9][0-9]*)$")
    seed: int = Field(ge=0, le=MAX_SEED)

    @property
    def settings(self) -> str:
        """What rows must have in common to be drawn in one batch; each picture begins a batch of its own."""
        own = {"id", "prompt", "negative_prompt", "seed"}
        return json.dumps([self.model_dump(exclude=own), self.negative_prompt is None], sort_keys=True)

    def digest(self, bundle_sha256: str) -> str:
        """The hash of everything that decides the picture."""
        # What came later than the first rows counts only where it says something, so that their pictures stay theirs.
        later = {name for name in (*PICTURES, *_SCALES, "size") if getattr(self, name) is None}
        # Whatever a model is called, its bundle says what it is.
        content = [bundle_sha256, self.model_dump(mode="json", exclude={*later, "model"})]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seed_of(row_id: str, seed: int) -> int:
    """A row's own seed: the first 63 bits of SHA-256 of `SEED:ID`, whatever other rows there are, and their order."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row_id}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Outcome:
    """A row drawn, and the record of how; or why it cannot be."""

    row: Row
    picture: Pillow.Image | None = None
    made: dict[str, object] = field(default_factory=dict[str, object])
    error: str | None = None


def draw_rows(pipe: FastCachePipeline, rows: Sequence[Row]) -> Iterator[Outcome]:
    """Draw every row, in no particular order; one that does not fit the bundle is an outcome with an error."""
    most = pipe.bundle.manifest.profiles["batch"].max
    for _, alike in itertools.groupby(sorted(rows, key=lambda row: row.settings), key=lambda row: row.settings):
        together = list(alike)
        for first in range(0, len(together), most):
            chosen = together[first : first + most]
            try:
                yield from _draw(pipe, chosen)
            except ValueError as error:
                yield from (Outcome(row, error=str(error)) for row in chosen)


def request_of(rows: Sequence[Row], manifest: Manifest) -> Request:
    """The request that rows of equal settings stand for, an image each. Raises: `ValueError`."""
    first = rows[0]
    shown = {argument: getattr(first, name) for name, argument in PICTURES.items()}
    pictures = {name: read_image(Path(one.path)) for name, one in shown.items() if one is not None}
    numbers = {name: getattr(first, name) for name in _SCALES}
    size = size_named(manifest, first.size, pictures)
    return Request(
        [row.prompt for row in rows],
        negative_prompt=None if first.negative_prompt is None else [row.negative_prompt or "" for row in rows],
        num_inference_steps=first.num_inference_steps,
        guidance_scale=first.guidance_scale,
        sampler=first.sampler,
        cache_interval=first.cache_interval,
        plan=None if first.plan is None else CachePlan.from_json(json.dumps(first.plan)),
        seed=[row.seed for row in rows],
        height=size.height,
        width=size.width,
        **pictures,
        **{name: number for name, number in numbers.items() if number is not None},
    )


def _draw(pipe: FastCachePipeline, rows: Sequence[Row]) -> Iterator[Outcome]:
    result = pipe.draw(request_of(rows, pipe.bundle.manifest))
    for row, picture in zip(rows, result.images, strict=True):
        own = {"prompt": row.prompt, "negative_prompt": row.negative_prompt or "", "seed": row.seed}
        yield Outcome(row, picture, result.made | own)
