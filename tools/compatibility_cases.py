"""What `compatibility.py` tries: pipelines of diffusers, the arguments of their calls, and callbacks.

Says nothing of what comes out. Where diffusers gets an argument or a callback that is not here, it is listed as not
tried.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import callbacks
from parity_pipelines import PIPELINES, sdxl
from parity_subjects import PIXELS, PROMPT, Subject, bundled, image, ip_adapter_weights, mask, randn, seeded, vary
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

OTHER_PROMPT = "a small green cross at the top on a gray background"
WIDER = PIXELS + 32
IP_SCALE = 0.8
_OF_SAMPLERS = ("SD, text to image, epsilon", "SD, PNDM", "SD, Heun", "LDM-4-G, a class's embedding")


def sdxl_with_text(kind: str, **arguments: Any) -> Subject:
    """An SDXL of random weights with both text encoders: the bundled one, and one of random weights."""
    demo, (pipe, _) = bundled(), sdxl(kind, width=2 * bundled().text_encoder.config.hidden_size)
    torch.manual_seed(4)
    config = CLIPTextConfig.from_dict(demo.text_encoder.config.to_dict() | {"projection_dim": 20})
    second = vary(CLIPTextModelWithProjection(config))
    pipe.register_modules(text_encoder=demo.text_encoder, text_encoder_2=second)
    pipe.register_modules(tokenizer=demo.tokenizer, tokenizer_2=demo.tokenizer)
    return Subject(pipe, {"prompt": PROMPT, **arguments})


_MASKED = {"image": image(), "mask_image": mask(), "height": PIXELS, "width": PIXELS}
SUBJECTS: dict[str, Callable[[], Subject]] = {
    **{name: make for name, make in PIPELINES.items() if name not in _OF_SAMPLERS},
    "SDXL, text to image": partial(sdxl_with_text, "StableDiffusionXLPipeline"),
    "SDXL, image to image": partial(sdxl_with_text, "StableDiffusionXLImg2ImgPipeline", image=image(), strength=0.8),
    "SDXL, inpaint": partial(sdxl_with_text, "StableDiffusionXLInpaintPipeline", strength=0.9, **_MASKED),
}

SD, IMG2IMG, INPAINT, EDIT = (
    *("SD, text to image, v-prediction", "SD, image to image", "SD, inpaint, 4 channels"),
    "InstructPix2Pix, 8 channels",
)
SDXL, REFINER, CONTROL, ADAPTER, IP = (
    *("SDXL, text to image", "SDXL, refiner", "ControlNet", "T2I-Adapter"),
    "IP-Adapter",
)
# Of rows with one U-Net and one set of weights, the row whose bundle serves them all.
SHARED = {
    **dict.fromkeys((IMG2IMG, INPAINT), SD),
    **dict.fromkeys(("SDXL, image to image", "SDXL, inpaint"), SDXL),
    "Two ControlNets, guess mode": "Two ControlNets",
}


def bundle_fields(name: str, subject: Subject, folder: Path) -> dict[str, Any]:
    """Save what a bundle of a pipeline is made from into a folder; returns the recipe's fields."""
    pipe, model, fields = subject.pipe, folder / "model", dict[str, Any]()
    if name == SD:
        fields["sizes"] = f"{PIXELS}x{PIXELS}", f"{WIDER}x{PIXELS}"
    if "ControlNet" in name:
        nets = getattr(pipe.controlnet, "nets", [pipe.controlnet])
        for index, net in enumerate(nets):
            net.save_pretrained(folder / f"controlnet-{index}")
        fields["controlnet"] = tuple(str(folder / f"controlnet-{index}") for index in range(len(nets)))
    if name == ADAPTER:
        pipe.adapter.save_pretrained(folder / "adapter")
        fields["t2i_adapter"] = str(folder / "adapter")
    if "IP-Adapter" in name:
        weights = ip_adapter_weights(pipe.unet)
        flat = {f"{part}.{key}": value for part, own in weights.items() for key, value in own.items()}
        save_file(flat, folder / "ip-adapter.safetensors")
        fields["ip_adapter"] = str(folder / "ip-adapter.safetensors")
    if name == "LoRA":
        from peft import get_peft_model_state_dict

        diffusers.StableDiffusionPipeline.save_lora_weights(folder, get_peft_model_state_dict(pipe.unet))
        fields["lora"] = (f"{folder / 'pytorch_lora_weights.safetensors'}:0.7",)
    if fields.keys() & {"controlnet", "t2i_adapter", "ip_adapter", "lora"}:  # the model itself without them
        pipe = sdxl("StableDiffusionXLPipeline")[0] if name.startswith("SDXL") else bundled()
    pipe.save_pretrained(model)
    return {"model": str(model), "backend": "onnxruntime", **fields}


def bundle_arguments(name: str, subject: Subject) -> dict[str, Any]:
    """The arguments of a pipeline's call by the names that they have with a bundle; a LoRA's scale is built in."""
    names = subject.bundle or ({"image": "control_image"} if "ControlNet" in name else {})
    given = {names.get(key, key): value for key, value in subject.arguments.items()}
    if "IP-Adapter" in name:
        given["ip_adapter_scale"] = IP_SCALE
    return {key: value for key, value in given.items() if not (name == "LoRA" and key == "cross_attention_kwargs")}


class Trial(NamedTuple):
    """An argument's value, the pipeline that it is tried on, and what else that call needs."""

    subject: str
    value: Any
    beside: dict[str, Any] = {}  # noqa: RUF012 (not changed)
    scheduler: str | None = None


_EMBEDS = {"prompt_embeds": randn(1, 32, 128), "negative_prompt_embeds": randn(1, 32, 128, seed=1)}
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
    "width": Trial(SD, WIDER),
    "num_inference_steps": Trial(SD, 3),
    "timesteps": Trial(SD, [900, 500, 100], scheduler="EulerDiscreteScheduler"),
    "sigmas": Trial(SD, [12.0, 3.0, 0.5], scheduler="EulerDiscreteScheduler"),
    "guidance_scale": Trial(SD, 3.0),
    "negative_prompt": Trial(SD, "a ring"),
    "num_images_per_prompt": Trial(SD, 2),
    "eta": Trial(SD, 0.5),
    "generator": Trial(SD, seeded(7)),
    "latents": Trial(SD, randn(1, 4, 16, 16)),
    "prompt_embeds": Trial(SD, _EMBEDS["prompt_embeds"], {"prompt": None}),
    "negative_prompt_embeds": Trial(SD, _EMBEDS["negative_prompt_embeds"], _EMBEDS | {"prompt": None}),
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
CALLED = [getattr(diffusers, f"StableDiffusion{kind}Pipeline") for kind in _KINDS]
CALLED += [diffusers.LatentConsistencyModelPipeline]


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
_TEXT = ("prompt_embeds",)
_XL = (*_TEXT, "add_text_embeds", "add_time_ids")
# diffusers' own; a new class of diffusers that is not here is listed as not tried.
OFFICIAL: dict[str, Called] = {
    "SDCFGCutoffCallback": Called(callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.5), _TEXT),
    "SDXLCFGCutoffCallback": Called(callbacks.SDXLCFGCutoffCallback(cutoff_step_ratio=0.5), _XL, SDXL),
    "IPAdapterScaleCutoffCallback": Called(
        callbacks.IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.5), ("latents",), IP
    ),
    "MultiPipelineCallbacks": Called(
        callbacks.MultiPipelineCallbacks([callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.5)]), _TEXT
    ),
}
