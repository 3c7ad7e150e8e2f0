"""Rows of a table, each a prompt and how to draw it -> pictures, those of equal settings in one batch.

What `ray_batch.py` runs in its workers and `triton.py` in Triton. Knows the pipeline; nothing about files or clusters.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import torch
from PIL import Image as Pillow
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fastcache.loop.plan import CachePlan
from fastcache.loop.scheduler import SAMPLERS
from fastcache.pipeline.pipeline import FastCachePipeline

MAX_SEED: Final = 2**63 - 1


def _known(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(f"expected a sampler out of {', '.join(SAMPLERS)}, got {name!r}")
    return name


class Row(BaseModel):
    """One picture to draw, with the field names of the images API. `id` names its file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    id: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$")
    prompt: str = Field(min_length=1)
    negative_prompt: str | None = None
    num_inference_steps: int = Field(50, ge=1, le=1000)
    guidance_scale: float = 7.5
    sampler: Annotated[str, AfterValidator(_known)] = "ddim"
    cache_interval: int = Field(1, ge=1)
    plan: dict[str, Any] | None = None
    seed: int = Field(ge=0, le=MAX_SEED)

    @property
    def settings(self) -> str:
        """What rows must have in common to be drawn in one batch."""
        own = {"id", "prompt", "negative_prompt", "seed"}
        return json.dumps([self.model_dump(exclude=own), self.negative_prompt is None], sort_keys=True)

    def digest(self, bundle_sha256: str) -> str:
        """The hash of everything that decides the picture."""
        content = [bundle_sha256, self.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seed_of(row_id: str, seed: int) -> int:
    """A row's own seed: the first 63 bits of SHA-256 of `SEED:ID`, whatever other rows there are, and their order."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row_id}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Outcome:
    """A row drawn, or why it cannot be."""

    row: Row
    picture: Pillow.Image | None = None
    plan: CachePlan | None = None
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


def _draw(pipe: FastCachePipeline, rows: Sequence[Row]) -> Iterator[Outcome]:
    first = rows[0]
    result = pipe(
        [row.prompt for row in rows],
        negative_prompt=None if first.negative_prompt is None else [row.negative_prompt or "" for row in rows],
        num_inference_steps=first.num_inference_steps,
        guidance_scale=first.guidance_scale,
        sampler=first.sampler,
        cache_interval=first.cache_interval,
        plan=None if first.plan is None else CachePlan.from_json(json.dumps(first.plan)),
        generator=[torch.Generator().manual_seed(row.seed) for row in rows],
    )
    for row, picture in zip(rows, result.images, strict=True):
        yield Outcome(row, picture, result.plan)


def made_by(pipe: FastCachePipeline, outcome: Outcome) -> dict[str, object]:
    """How a picture was made, for its PNG."""
    row = outcome.row
    plan = {} if outcome.plan is None else pipe.provenance(outcome.plan)
    return plan | {
        "prompt": row.prompt,
        "negative_prompt": row.negative_prompt or "",
        "sampler": row.sampler,
        "steps": row.num_inference_steps,
        "guidance_scale": row.guidance_scale,
        "seed": row.seed,
    }
