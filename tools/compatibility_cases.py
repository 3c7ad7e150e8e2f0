"""The arguments and callbacks that `compatibility.py` tries, each with a value and the pipeline that it is tried on.

Says nothing of what comes out. What diffusers has and is not here is listed as not tried.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import diffusers
from compatibility_subjects import ADAPTER, CONTROL, EDIT, IMG2IMG, INPAINT, IP, REFINER, SD, SDXL, TEXTS, WIDER
from diffusers import callbacks
from parity_subjects import PIXELS, image, mask, randn, seeded

OTHER_PROMPT = "a small green cross at the top on a gray background"


class Trial(NamedTuple):
    """An argument's value, the pipeline that it is tried on, and what else that call needs."""

    subject: str
    value: Any
    beside: dict[str, Any] = {}  # noqa: RUF012 (not changed)
    scheduler: str | None = None


_XL_EMBEDS = {
    "prompt_embeds": randn(1, 32, 256),
    "negative_prompt_embeds": randn(1, 32, 256, seed=1),
    "pooled_prompt_embeds": randn(1, 20),
    "negative_pooled_prompt_embeds": randn(1, 20, seed=1),
    "prompt": None,
}


def _leave(*_: Any) -> dict[str, Any]:
    return {}


ARGUMENTS: dict[str, Trial] = {
    "prompt": Trial(SD, OTHER_PROMPT),
    "height": Trial(SD, PIXELS, {"width": WIDER}),
    "width": Trial(SD, WIDER, {"height": PIXELS}),  # diffusers takes its own size where one of the two is missing
    "num_inference_steps": Trial(SD, 3),
    "timesteps": Trial(SD, [900, 500, 100], scheduler="EulerDiscreteScheduler"),
    "sigmas": Trial(SD, [12.0, 3.0, 0.5], scheduler="EulerDiscreteScheduler"),
    "guidance_scale": Trial(SD, 3.0),
    "negative_prompt": Trial(SD, "a ring"),
    "num_images_per_prompt": Trial(SD, 2),
    "eta": Trial(SD, 0.5),
    "generator": Trial(SD, seeded(7)),
    "latents": Trial(SD, randn(1, 4, 16, 16)),
    "prompt_embeds": Trial(SD, TEXTS["prompt_embeds"], {"prompt": None}),
    "negative_prompt_embeds": Trial(SD, TEXTS["negative_prompt_embeds"], TEXTS | {"prompt": None}),
    "output_type": Trial(SD, "np"),
    "return_dict": Trial(SD, False),
    "cross_attention_kwargs": Trial(SD, {"scale": 0.5}),
    "guidance_rescale": Trial(SD, 0.5),
    "clip_skip": Trial(SD, 1),
    "callback_on_step_end": Trial(SD, _leave),
    "callback_on_step_end_tensor_inputs": Trial(SD, ["latents", "prompt_embeds"], {"callback_on_step_end": _leave}),
    "callback": Trial(SD, _leave),
    "callback_steps": Trial(SD, 2),
    "ip_adapter_image_embeds": Trial(IP, [randn(2, 1, 8, seed=9)]),
    "image": Trial(IMG2IMG, image(8)),
    "strength": Trial(IMG2IMG, 0.5),
    "mask_image": Trial(INPAINT, mask().flip(-1)),
    "masked_image_latents": Trial(INPAINT, randn(1, 4, 16, 16)),
    "padding_mask_crop": Trial(INPAINT, 8),
    "image_guidance_scale": Trial(EDIT, 1.2),
    "prompt_2": Trial(SDXL, OTHER_PROMPT),
    "negative_prompt_2": Trial(SDXL, "a ring", {"negative_prompt": "a square"}),
    "denoising_end": Trial(SDXL, 0.6),
    "denoising_start": Trial(REFINER, 0.5),
    "pooled_prompt_embeds": Trial(SDXL, _XL_EMBEDS["pooled_prompt_embeds"], _XL_EMBEDS),
    "negative_pooled_prompt_embeds": Trial(SDXL, _XL_EMBEDS["negative_pooled_prompt_embeds"], _XL_EMBEDS),
    "original_size": Trial(SDXL, (128, 96)),
    "crops_coords_top_left": Trial(SDXL, (8, 16)),
    "target_size": Trial(SDXL, (96, 96)),
    "negative_original_size": Trial(SDXL, (32, 32), {"negative_target_size": (64, 64)}),
    "negative_crops_coords_top_left": Trial(
        SDXL, (4, 4), {"negative_original_size": (32, 32), "negative_target_size": (64, 64)}
    ),
    "negative_target_size": Trial(SDXL, (48, 48), {"negative_original_size": (32, 32)}),
    "aesthetic_score": Trial(REFINER, 3.0),
    "negative_aesthetic_score": Trial(REFINER, 5.0),
    "controlnet_conditioning_scale": Trial(CONTROL, 0.4),
    "guess_mode": Trial(CONTROL, True),
    "control_guidance_start": Trial(CONTROL, 0.3),
    "control_guidance_end": Trial(CONTROL, 0.6),
    "adapter_conditioning_scale": Trial(ADAPTER, 0.4),
    "adapter_conditioning_factor": Trial(ADAPTER, 0.5),
    "original_inference_steps": Trial("Latent consistency", 20),
}
# The pipelines whose arguments are looked at, in the order in which a reader meets them.
_KINDS = ("", "Img2Img", "Inpaint", "InstructPix2Pix", "ControlNet", "Adapter", "XL", "XLImg2Img", "XLInpaint")
CALLED = [
    *(getattr(diffusers, f"StableDiffusion{kind}Pipeline") for kind in _KINDS),
    diffusers.LatentConsistencyModelPipeline,
]


class Called(NamedTuple):
    """A callback, what it asks to be shown, and the pipeline that it is tried on."""

    callback: Any
    shown: tuple[str, ...] = ("latents",)
    subject: str = SD


def _reads(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if not pipe.guidance_scale > 1 or step >= pipe.num_timesteps or not pipe.do_classifier_free_guidance:
        raise RuntimeError("expected a guided run")
    return tensors


def _returns_latents(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 0.9}


def _writes_latents(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["latents"].mul_(0.9)
    return tensors


def _interrupts(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step == 2
    return tensors


def _returns_embeds(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"prompt_embeds": tensors["prompt_embeds"] * 0.5}


def _writes_embeds(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["prompt_embeds"].mul_(0.5)
    return tensors


def _sets_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 1.5
    return tensors


FUNCTIONS: dict[str, Called] = {
    "reads guidance_scale, num_timesteps, do_classifier_free_guidance": Called(_reads),
    "returns other latents": Called(_returns_latents),
    "writes to the latents": Called(_writes_latents),
    "ends the run (pipe._interrupt)": Called(_interrupts),
    "returns other prompt_embeds": Called(_returns_embeds, ("prompt_embeds",)),
    "writes to the prompt_embeds": Called(_writes_embeds, ("prompt_embeds",)),
    "sets pipe._guidance_scale": Called(_sets_guidance),
}
_SHOWN = ("prompt_embeds",)
_SHOWN_XL = (*_SHOWN, "add_text_embeds", "add_time_ids")
# diffusers' own; a new class of diffusers that is not here is listed as not tried.
OFFICIAL: dict[str, Called] = {
    "SDCFGCutoffCallback": Called(callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.5), _SHOWN),
    "SDXLCFGCutoffCallback": Called(
        callbacks.SDXLCFGCutoffCallback(cutoff_step_ratio=0.5), (*_SHOWN, "add_text_embeds", "add_time_ids"), SDXL
    ),
    "IPAdapterScaleCutoffCallback": Called(
        callbacks.IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.5), ("latents",), IP
    ),
    "MultiPipelineCallbacks": Called(
        callbacks.MultiPipelineCallbacks([callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.5)]), _SHOWN
    ),
}
