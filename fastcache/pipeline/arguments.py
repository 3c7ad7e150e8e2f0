"""A call's arguments -> the size, the plan, the part of the denoising and the conditioning that they mean for a bundle.

Refuses in one line what does not go together. Knows names and numbers; runs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from fastcache.bundle.manifest import Manifest, ModelInfo
from fastcache.bundle.recipe import Size
from fastcache.loop.features import check_reuse
from fastcache.loop.noise import Generators
from fastcache.loop.plan import CachePlan
from fastcache.loop.scheduler import Scheduler, same_sampler
from fastcache.pipeline.prompts import Embeds, Sizes
from fastcache.pipeline.schedule import Span

# What diffusers' pipelines do without a strength: image to image, and under a mask.
_STRENGTHS = {"sd": (0.8, 1.0), "sdxl": (0.3, 0.9999)}
_SIZE_NAMES = {field.name for field in dataclasses.fields(Sizes)}


def size_of(manifest: Manifest, height: int | None, width: int | None, image: Any, mask: Any) -> Size:
    """The size to draw: as asked for, else the image's own unless it is inpainted, else the bundle's usual one.

    Raises: `ValueError`, listing the bundle's, for a size that it does not have.
    """
    sizes = manifest.sizes
    usual, given = sizes[0], height is not None or width is not None
    if not given and image is not None and mask is None and (own := _pixels_of(image)) is not None:
        scale = 1 if _is_picture(image) else manifest.model.vae_scale_factor
        height, width = own[0] * scale, own[1] * scale
    found = usual.height if height is None else height, usual.width if width is None else width
    for size in sizes:
        if (size.height, size.width) == found:
            return size
    what = "" if given or image is None else "an image of "
    raise ValueError(
        f"expected {what}{', '.join(map(str, sizes))}, which this bundle was built for, got {found[1]}x{found[0]}; "
        + ("build another with --sizes" if given or image is None else "give height and width to resize it")
    )


def span_of(
    info: ModelInfo,
    image: Any,
    mask: Any,
    strength: float | None,
    start: float | None,
    end: float | None,
    latents: Tensor | None,
) -> Span:
    """Where to begin and end. Raises: `ValueError` for arguments that do not go together, or with this model."""
    channels = info.latent_channels
    known = {channels: (), 2 * channels: ("image",), 2 * channels + 1: ("image", "mask_image")}
    if info.in_channels not in known:
        raise ValueError(
            f"expected a U-Net of {', '.join(map(str, known))} channels, got {info.name} with {info.in_channels}; "
            "use the helper on its own pipeline"
        )
    needed = known[info.in_channels]
    if any({"image": image, "mask_image": mask}[name] is None for name in needed):
        raise ValueError(
            f"expected {' and '.join(needed)} for {info.name}, whose U-Net takes {info.in_channels} channels"
        )
    if image is None:
        for name, value in (("mask_image", mask), ("strength", strength), ("denoising_start", start)):
            if value is not None:
                raise ValueError(f"expected an image with {name}, got none")
        return Span(denoising_end=end)
    if latents is not None:
        raise ValueError("expected latents or image, got both")
    if info.edits:
        for name, value in (("mask_image", mask), ("strength", strength), ("denoising_start", start)):
            if value is not None:
                raise ValueError(f"expected no {name} for {info.name}, which edits a whole image, got {value}")
        return Span(denoising_end=end)
    if start is not None:
        return Span(None, start, end)
    return Span(_STRENGTHS[info.family][mask is not None] if strength is None else strength, None, end)


def conditioning(
    info: ModelInfo, arguments: dict[str, Any], embeds: Embeds, size: Size, guided: bool, *, from_image: bool
) -> dict[str, Any]:
    """The arguments with SDXL's sizes made into what its U-Net is told.

    Raises: `ValueError` for sizes that another model would not be told.
    """
    told = {name: value for name, value in arguments.items() if name in _SIZE_NAMES}
    others = {name: value for name, value in arguments.items() if name not in told}
    num_ids, rows = info.time_ids, embeds.hidden.shape[0]
    if num_ids is None and told:
        raise ValueError(f"expected no {', '.join(sorted(told))}, which only models of SDXL's kind are told")
    if num_ids is None:
        return others
    ids = Sizes(**told).time_ids(
        (size.height, size.width), num_ids=num_ids, rows=rows, guided=guided, from_image=from_image
    )
    return others | {"time_ids": ids, "text_embeds": embeds.pooled}


def images_of(
    info: ModelInfo, conditioning: Mapping[str, Tensor], latents: Tensor | None, generator: Generators, guided: bool
) -> int:
    """How many images inputs are for; with no conditioning as many as latents, or else generators."""
    rows = next(iter(conditioning.values()), None)
    if rows is not None:
        return len(rows) // info.guided_rows if guided else len(rows)
    if latents is not None:
        return len(latents)
    return len(generator) if isinstance(generator, Sequence) else 1


def check_generators(generator: Generators, batch: int) -> None:
    """Raises: `ValueError` for a list of generators that is not one for each image."""
    if isinstance(generator, Sequence) and len(generator) != batch:
        raise ValueError(f"expected one generator, or one for each of {batch} images, got {len(generator)}")


def plan_of(
    manifest: Manifest, plan: CachePlan | None, cache_interval: int, num_calls: int, sampler: str | Scheduler
) -> CachePlan:
    """The plan that was given, or a uniform one.

    Raises: `ValueError` for both, or a plan made for another model or sampler.
    """
    if plan is None:
        return CachePlan.uniform(num_calls, cache_interval, manifest.branch_id)
    if cache_interval != 1:
        raise ValueError("expected cache_interval or plan, got both")
    check_reuse(plan, manifest.passes)
    if plan.model not in (None, manifest.model.name):
        raise ValueError(f"expected a plan made for model {manifest.model.name}, got one for {plan.model}")
    if isinstance(sampler, str) and plan.sampler is not None and not same_sampler(plan.sampler, sampler):
        raise ValueError(f"expected a plan made for sampler {sampler}, got one for {plan.sampler}")
    return plan


def _is_picture(image: Any) -> bool:
    return not (isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] not in (1, 3))


def _pixels_of(image: Any) -> tuple[int, int] | None:
    """The rows and columns of the first of some images."""
    first = image[0] if isinstance(image, list | tuple) and image else image
    if isinstance(first, Image.Image):
        return first.height, first.width
    if isinstance(first, Tensor) and first.ndim >= 3:
        return first.shape[-2], first.shape[-1]
    shape = getattr(first, "shape", ())
    return (shape[-3], shape[-2]) if len(shape) >= 3 else None  # an array has its channels last
