"""A request and a bundle -> what it means there: the size, the sampler, the steps, the guidance, and the plan.

Fills in the model's own ways where a request says nothing, and refuses in one line what does not fit the bundle. Knows
names and numbers; runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image
from torch import Tensor

from fastcache.bundle.manifest import Manifest, ModelInfo
from fastcache.bundle.recipe import Size
from fastcache.expect import expected
from fastcache.loop.features import check_channels, check_reuse
from fastcache.loop.fit import Fit
from fastcache.loop.plan import CachePlan
from fastcache.pipeline.request import Request, Sizes
from fastcache.pipeline.schedule import WHOLE, Span, Steps, steps_for
from fastcache.sampler.scheduler import Scheduler, same_sampler
from fastcache.sampler.stored import Samplers

# What diffusers' pipelines do without a strength: image to image, and under a mask.
_STRENGTHS = {"sd": (0.8, 1.0), "sdxl": (0.3, 0.9999)}
_SIZE_NAMES = {field.name for field in fields(Sizes)}


@dataclass(frozen=True, eq=False)
class Terms:
    """What a request means for a bundle. `image_guidance_scale` is None where guidance has two parts."""

    size: Size
    sampler: str | Scheduler
    steps: Steps
    span: Span
    guided: bool
    guidance_scale: float
    image_guidance_scale: float | None

    @property
    def sampler_name(self) -> str:
        """The sampler as plans and pictures have it; of a scheduler of diffusers its class."""
        return self.sampler if isinstance(self.sampler, str) else type(self.sampler).__name__


def terms_of(
    request: Request,
    manifest: Manifest,
    *,
    samplers: Samplers | None = None,
    span: Span | None = None,
    guided: bool | None = None,
) -> Terms:
    """What a request means for a bundle, its model's own ways filled in where nobody said.

    A plan's sampler and steps stand for the request's where that names none; `span` and `guided` for what the request's
    pictures and guidance say. `samplers` are the bundle's, which need no library for what they were built with.

    Raises: `ValueError` for what this bundle or its model cannot do.
    """
    info, usual = manifest.model, manifest.model.defaults
    if info.time_ids is None and (told := sorted(_SIZE_NAMES & request.given.keys())):
        raise ValueError(f"expected no {', '.join(told)}, which only models of SDXL's kind are told, got them")
    if request.num_images_per_prompt > (most := manifest.profiles["batch"].max):
        raise ValueError(
            f"expected at most {most} images at once, got num_images_per_prompt {request.num_images_per_prompt}; "
            "build with --batch MIN:OPT:MAX for more"
        )
    guidance = usual.guidance_scale if request.guidance_scale is None else request.guidance_scale
    of_image = usual.image_guidance_scale if request.image_guidance_scale is None else request.image_guidance_scale
    if guided is None:
        guided = guidance > 1 and not info.unconditional and (not info.edits or of_image >= 1)
    shown = request.picture if request.image is None else request.image
    span = span or span_of(request, info)
    samplers = samplers or Samplers(info.scheduler)
    sampler = _sampler(request, samplers)
    return Terms(
        size=size_of(manifest, request.height, request.width, shown, request.mask_image),
        sampler=sampler,
        steps=_steps(request, manifest, sampler, samplers, span),
        span=span,
        guided=guided,
        guidance_scale=guidance,
        image_guidance_scale=of_image if info.edits and guided else None,
    )


def _sampler(request: Request, samplers: Samplers) -> str | Scheduler:
    if request.sampler is not None:
        return request.sampler
    if request.plan is not None and request.plan.sampler is not None:
        return request.plan.sampler
    return samplers.own


def _steps(request: Request, manifest: Manifest, sampler: str | Scheduler, samplers: Samplers, span: Span) -> Steps:
    places = request.timesteps or request.sigmas
    if request.plan is not None and request.plan.fit is not None:
        return _steps_of_fit(request, request.plan, request.plan.fit)
    if places is not None:
        named = {"timesteps": request.timesteps, "sigmas": request.sigmas}
        given = {name: tuple(values) for name, values in named.items() if values is not None}
        return Steps(len(places), timesteps=given.get("timesteps"), sigmas=given.get("sigmas"))
    if request.num_inference_steps is None and request.plan is not None and span == WHOLE:
        calls = request.plan.num_steps
        found = samplers.steps_for(sampler, calls) if isinstance(sampler, str) else None
        found = found or steps_for(samplers.make(sampler) if isinstance(sampler, str) else sampler, calls)
        if found is None:
            raise expected(
                "a plan for as many U-Net calls as its sampler makes", request.plan.num_steps, "give another plan"
            )
        return Steps(found)
    return Steps(request.num_inference_steps or manifest.model.defaults.num_inference_steps)


def _steps_of_fit(request: Request, plan: CachePlan, fit: Fit) -> Steps:
    """Those of the reference run, which a fitted plan says itself."""
    if request.timesteps is not None or request.sigmas is not None:
        raise ValueError(
            "expected no timesteps or sigmas with a fitted plan, which says itself where to stop, got some"
        )
    if request.num_inference_steps not in (None, fit.num_inference_steps, plan.num_steps):
        raise expected(
            f"num_inference_steps {plan.num_steps}, or none, with this fitted plan",
            request.num_inference_steps,
            "leave it out: the plan says it",
        )
    return Steps(fit.num_inference_steps, fitted=plan)


def size_named(manifest: Manifest, name: str | None, shown: Mapping[str, Any]) -> Size:
    """The size that a name as `512x768` means; without one, or for `auto`, that of a picture shown if the bundle has
    it, else the usual one. `shown` are a request's arguments.

    Raises: `ValueError`, listing the bundle's, for a size that it does not have.
    """
    sizes = {str(size): size for size in manifest.sizes}
    if name not in (None, "auto"):
        if name not in sizes:
            raise ValueError(f"expected {', '.join(sizes)}, what this bundle draws, or auto, got {name}")
        return sizes[name]
    first = shown.get("image") or shown.get("control_image") or shown.get("adapter_image")
    picture = first[0] if isinstance(first, list) else first
    return sizes.get("" if picture is None else f"{picture.width}x{picture.height}", manifest.sizes[0])


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
        + (
            "build another with --sizes, or leave height and width out"
            if given or image is None
            else "give height and width to resize it"
        )
    )


def span_of(request: Request, info: ModelInfo) -> Span:
    """Where to begin and end. Raises: `ValueError` for arguments that do not go together, or with this model."""
    image, mask = request.image, request.mask_image
    strength, start, end = request.strength, request.denoising_start, request.denoising_end
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
                raise ValueError(f"expected an image with {name}, got none; give the image that it is about")
        return Span(denoising_end=end)
    if request.latents is not None:
        raise ValueError("expected latents or image, got both; leave one out")
    if info.edits:
        for name, value in (("mask_image", mask), ("strength", strength), ("denoising_start", start)):
            if value is not None:
                raise ValueError(f"expected no {name} for {info.name}, which edits a whole image, got one")
        return Span(denoising_end=end)
    if start is not None:
        return Span(None, start, end)
    return Span(_STRENGTHS[info.family][mask is not None] if strength is None else strength, None, end)


def plan_for(request: Request, manifest: Manifest, num_calls: int, sampler: str | Scheduler) -> CachePlan:
    """The request's plan, or a uniform one. Raises: `ValueError` as `check_plan`."""
    if request.plan is None:
        return CachePlan.uniform(num_calls, request.cache_interval or 1, manifest.branch_id)
    plan = request.plan
    if plan.fit is not None:
        check_fit(plan.fit, request, manifest)
        plan = plan.last_steps(num_calls)  # image to image begins at one of its later points
    check_plan(plan, manifest, num_calls, sampler)
    return plan


def check_fit(fit: Fit, request: Request, manifest: Manifest) -> None:
    """Refuse a plan whose rows were fitted for another model or size; warn of another guidance.

    Raises: `ValueError`.
    """
    if fit.weights_sha256 != manifest.weights_sha256:
        raise expected(
            f"a plan fitted for {manifest.model.name} as it was built here", fit.weights_sha256, "fit it again"
        )
    height, width = request.height or manifest.height, request.width or manifest.width
    if request.image is None and (fit.height, fit.width) != (height, width):
        raise ValueError(
            f"expected a plan fitted for {width}x{height}, got one for {fit.width}x{fit.height}; fit it again"
        )
    fit.check_guidance(request.guidance_scale)


def check_plan(plan: CachePlan, manifest: Manifest, num_calls: int, sampler: str | Scheduler) -> None:
    """Whether a plan is one for this bundle, and for so many U-Net calls of this sampler.

    Raises: `ValueError` for a plan of another length, or made for another model or sampler, or of other passes.
    """
    name = manifest.model.public_name
    if plan.num_steps != num_calls:
        raise ValueError(
            f"expected a plan for the sampler's {num_calls} U-Net calls, got one for {plan.num_steps}; "
            "draw with as many steps, or make another with `fastcache plan`"
        )
    check_reuse(plan, manifest.passes)
    check_channels(plan.scale_shift, sum(block.channels for block in manifest.blocks))
    if plan.model not in (None, manifest.model.name, name):
        raise expected(f"a plan made for model {name}", plan.model, "make another with `fastcache plan`")
    if isinstance(sampler, str) and plan.sampler is not None and not same_sampler(plan.sampler, sampler):
        raise expected(f"a plan made for sampler {sampler}", plan.sampler, "draw with that sampler, or plan anew")


def images_of(info: ModelInfo, inputs: Mapping[str, Tensor], request: Request, guided: bool) -> int:
    """How many images inputs are for; with none as many as latents, or else generators."""
    rows = next(iter(inputs.values()), None)
    if rows is not None:
        return len(rows) // info.guided_rows if guided else len(rows)
    if request.latents is not None:
        return len(request.latents)
    each = request.generator if request.seed is None else request.seed
    return len(each) if isinstance(each, Sequence) else 1


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
