"""A request, what it meant for a bundle, and the plan that ran -> the record of a picture's making, and its PNG file.

The one such record: of the command line, the server, a batch, Triton and Python. Knows no files.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Final

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastcache.bundle.manifest import Manifest
from fastcache.loop.plan import CachePlan
from fastcache.pipeline.arguments import Terms
from fastcache.pipeline.request import Request

# What says nothing of one picture, or is said otherwise.
_APART: Final = {
    *("cache_interval", "callback_on_step_end_tensor_inputs", "num_images_per_prompt", "num_inference_steps"),
    *("output_type", "return_dict", "seed"),
}


def record(manifest: Manifest, request: Request, terms: Terms, plan: CachePlan, /, **own: object) -> dict[str, object]:
    """How a picture was made: engines, plan, and each argument that was given; `own` is what the caller knows better.

    Of pictures and embeddings that went in it says nothing, unless `own` does.
    """
    said = {name: value for name, value in request.given.items() if name not in _APART and _can_be_said(value)}
    made: dict[str, object] = {
        "Software": f"fastcache {manifest.versions['fastcache']}",
        "model": manifest.model.public_name,
        "bundle_sha256": manifest.bundle_sha256,
        "plan": _plan_text(plan),
        "negative_prompt": "",
        **said,
        "sampler": terms.sampler_name,
        "steps": terms.steps.count,
        "guidance_scale": terms.guidance_scale,
    }
    return made | own


def _plan_text(plan: CachePlan) -> str:
    """A plan's file, but that of scales and shifts, which are megabytes, only the hash is told."""
    if plan.scale_shift is None:
        return plan.to_json()
    told = {"channels": plan.scale_shift.channels, "sha256": hashlib.sha256(plan.scale_shift.data).hexdigest()}
    return json.dumps(json.loads(plan.to_json()) | {"scale_shift": told})


def _can_be_said(value: object) -> bool:
    return isinstance(value, str | int | float) or (isinstance(value, tuple) and all(map(_can_be_said, value)))


def png_bytes(image: Image.Image, made: Mapping[str, object]) -> bytes:
    """The image as a PNG that says in text chunks how it was made."""
    info = PngInfo()
    for key, value in made.items():
        info.add_itxt(key, str(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
