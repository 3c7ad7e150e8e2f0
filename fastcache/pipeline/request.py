"""What is asked for, by the command line, over HTTP, in a batch, by Triton or in Python -> one value, checked.

A field here is an argument of `pipe(...)`, and its check stands beside it. Knows no bundle: what a request means for
one is `arguments.py`'s business.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Annotated, Any, Final, Literal, TypeAlias, get_args, get_type_hints

import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fastcache.expect import encodable, flag
from fastcache.loop.noise import Generators
from fastcache.loop.plan import CachePlan
from fastcache.pipeline import checks
from fastcache.sampler.scheduler import Scheduler

OutputType = Literal["pil", "np", "pt", "latent"]
Texts = str | Sequence[str] | None
Images = Image.Image | npt.NDArray[Any] | Tensor | Sequence[Image.Image] | Sequence[npt.NDArray[Any]] | Sequence[Tensor]
Numbers = float | Sequence[float]
MAX_SEED: Final = 2**63 - 1
MAX_STEPS: Final = 1000  # as many as models are trained with; a table grows with the square

_Texts: TypeAlias = Annotated[Texts, checks.texts]
_Count: TypeAlias = Annotated[int | None, checks.integers(1)]
_Pair: TypeAlias = Annotated[tuple[int, int] | None, checks.pair]
_Finite: TypeAlias = Annotated[float | None, checks.numbers()]
_Guidance: TypeAlias = Annotated[float | None, checks.numbers(0)]
_Share: TypeAlias = Annotated[float, checks.numbers(0, 1)]
_Shares: TypeAlias = Annotated[Numbers | None, checks.one_or_several(checks.numbers(0, 1))]
_Fraction: TypeAlias = Annotated[float | None, checks.fraction]
_Places: TypeAlias = Annotated[Sequence[float] | None, checks.list_of(checks.numbers(0))]
_Embeds: TypeAlias = Annotated[Tensor | None, checks.tensors(3)]
_Pooled: TypeAlias = Annotated[Tensor | None, checks.tensors(2)]
_Images: TypeAlias = Annotated[Images | None, checks.pictures]


@dataclass(frozen=True, eq=False, kw_only=True)
class Sizes:
    """What SDXL is told of an image's making: sizes as (height, width), and the refiner how beautiful it should be.

    Source: arXiv 2307.01952, section 2.2; `_get_add_time_ids` of diffusers' pipelines.
    """

    original_size: _Pair = None
    crops_coords_top_left: Annotated[tuple[int, int], checks.pair] = (0, 0)
    target_size: _Pair = None
    negative_original_size: _Pair = None
    negative_crops_coords_top_left: Annotated[tuple[int, int], checks.pair] = (0, 0)
    negative_target_size: _Pair = None
    aesthetic_score: Annotated[float, checks.numbers()] = 6.0
    negative_aesthetic_score: Annotated[float, checks.numbers()] = 2.5

    def time_ids(self, size: tuple[int, int], *, num_ids: int, rows: int, guided: bool, from_image: bool) -> Tensor:
        """Shapes: returns (rows, num_ids), the first half of the rows unconditional under guidance."""
        original, target = self.original_size or size, self.target_size or size
        told = [*original, *self.crops_coords_top_left, *target]
        untold, no_original = told, self.negative_original_size or original
        if from_image or (self.negative_original_size and self.negative_target_size):
            no_target = self.negative_target_size or target
            # As diffusers has it: image to image without a score keeps the crop of the positive side.
            crop = self.crops_coords_top_left if from_image else self.negative_crops_coords_top_left
            untold = [*no_original, *crop, *no_target]
        if num_ids == 5:
            told = [*original, *self.crops_coords_top_left, self.aesthetic_score]
            untold = [*no_original, *self.negative_crops_coords_top_left, self.negative_aesthetic_score]
        ids = torch.tensor([untold, told] if guided else [told], dtype=torch.float32, device="cpu")
        return ids.repeat_interleave(rows // len(ids), dim=0)


@dataclass(frozen=True, eq=False, kw_only=True)
class ControlArguments:
    """Pictures that steer a run, and how much each counts.

    `adapter_image` is `image` in diffusers, and `ip_adapter_scale` what `set_ip_adapter_scale` sets; where nothing is
    said, all count 1. For several ControlNets `control_image` is a list with what each is shown, or a list of such
    lists, one a picture; of the numbers each may have its own.
    """

    control_image: Annotated[Images | Sequence[Images] | None, checks.pictures] = None
    controlnet_conditioning_scale: Annotated[Numbers | None, checks.one_or_several(checks.numbers())] = None
    control_guidance_start: _Shares = None
    control_guidance_end: _Shares = None
    guess_mode: Annotated[bool, flag] = False
    adapter_image: _Images = None
    adapter_conditioning_scale: _Finite = None
    ip_adapter_image: Annotated[Any, checks.pictures] = None
    ip_adapter_image_embeds: Annotated[Sequence[Tensor] | None, checks.list_of(checks.tensors(3, 4))] = None
    ip_adapter_scale: _Finite = None

    @property
    def picture(self) -> Images | Sequence[Images] | None:
        """The picture whose size a call draws that names none, or a list that begins with it."""
        return self.adapter_image if self.control_image is None else self.control_image


@dataclass(frozen=True, eq=False)
class Request(Sizes, ControlArguments):
    """What to draw and how, by diffusers' argument names; None leaves the choice to the model.

    `image` alone is image to image, with a `mask_image`, white where to draw, inpainting; both at `strength`.
    InstructPix2Pix edits it, by `guidance_scale` and `image_guidance_scale`. `sampler` is a name, or a scheduler of
    diffusers. `cache_interval` N refreshes the cached feature every Nth step (1: no caching), `plan` says it step by
    step, and may name the sampler, too. Of `seed` the first image takes this one, the others those that follow, or each
    its own of a list; so an image does not depend on its neighbours, nor by a list of generators. A callback is given
    pipe, step, timestep and a dict with the latents, and may return others.

    Shapes: `latents` (N, C, H / 8, W / 8) as drawn from a unit normal; `prompt_embeds` (N, tokens, width).

    Raises: `ValueError` that names the argument.
    """

    prompt: _Texts = None
    height: _Count = None
    width: _Count = None
    num_inference_steps: Annotated[int | None, checks.integers(1, MAX_STEPS)] = None
    guidance_scale: _Guidance = None
    negative_prompt: _Texts = None
    num_images_per_prompt: Annotated[int, checks.integers(1)] = 1
    _: KW_ONLY
    cache_interval: _Count = None
    plan: Annotated[CachePlan | None, checks.plan] = None
    sampler: Annotated[str | Scheduler | None, checks.sampler] = None
    timesteps: _Places = None
    sigmas: _Places = None
    eta: _Share = 0.0
    seed: Annotated[int | Sequence[int] | None, checks.one_or_several(checks.integers(0, MAX_SEED))] = None
    generator: Annotated[Generators, checks.one_or_several(checks.generator)] = None
    latents: Annotated[Tensor | None, checks.tensors(4)] = None
    prompt_2: _Texts = None
    negative_prompt_2: _Texts = None
    prompt_embeds: _Embeds = None
    negative_prompt_embeds: _Embeds = None
    pooled_prompt_embeds: _Pooled = None
    negative_pooled_prompt_embeds: _Pooled = None
    clip_skip: Annotated[int | None, checks.integers(0)] = None
    guidance_rescale: _Share = 0.0
    image_guidance_scale: _Guidance = None
    image: _Images = None
    mask_image: _Images = None
    strength: Annotated[float | None, checks.numbers(0, 1)] = None
    denoising_start: _Fraction = None
    denoising_end: _Fraction = None
    output_type: Annotated[OutputType, checks.choice(*get_args(OutputType))] = "pil"
    return_dict: Annotated[bool, flag] = True
    callback_on_step_end: Annotated[Callable[[Any, int, Any, dict[str, Any]], Any] | None, checks.callback] = None
    callback_on_step_end_tensor_inputs: Annotated[Sequence[str] | None, checks.list_of(encodable)] = None

    def __post_init__(self) -> None:
        checked = _checks()
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not field.default:
                object.__setattr__(self, field.name, checked[field.name](field.name, value))
        for one, other in (("plan", "cache_interval"), ("seed", "generator"), ("timesteps", "sigmas")):
            if {one, other} <= self.given.keys():
                raise ValueError(f"expected {other} or {one}, got both; leave one out")
        start, end = self.denoising_start, self.denoising_end
        if start is not None and end is not None and start >= end:
            raise ValueError(f"expected denoising_start below denoising_end, got {start} and {end}; swap them")

    @functools.cached_property
    def given(self) -> dict[str, Any]:
        """The arguments that say something, by name."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value is not default}

    def generators(self, images: int) -> Generators:
        """What draws the noise of so many images: one for all, or one for each.

        Raises: `ValueError` for a list that is not one for each image.
        """
        found, name = self.generator, "generator"
        if self.seed is not None:
            seeds = [self.seed + k for k in range(images)] if isinstance(self.seed, int) else self.seed
            found, name = [torch.Generator("cpu").manual_seed(seed) for seed in seeds], "seed"
        if isinstance(found, Sequence) and len(found) != images:
            raise ValueError(f"expected one {name}, or one for each of {images} images, got {len(found)}")
        return found


@functools.cache
def _checks() -> Mapping[str, checks.Check]:
    """The check that stands beside each field."""
    hints = get_type_hints(Request, include_extras=True)
    return {field.name: hints[field.name].__metadata__[0] for field in fields(Request)}
