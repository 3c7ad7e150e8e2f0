"""The pipelines that `compatibility.py` tries, and what a bundle of each is built of and called with.

Where a bundle is built for one row alone, its U-Net is small. Knows nothing of what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from parity_pipelines import PIPELINES, sdxl
from parity_subjects import (
    PIXELS,
    PROMPT,
    Subject,
    bundled,
    control,
    image,
    ip_adapter_weights,
    load_ip_adapter,
    mask,
    of_sd,
    randn,
    vary,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

WIDER = PIXELS + 32
IP_SCALE, LORA_SCALE = 0.8, 0.7
_OF_SAMPLERS = ("SD, text to image, epsilon", "SD, PNDM", "SD, Heun", "LDM-4-G, a class's embedding")


_XL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "use_linear_projection": True,
}
TEXTS = {"prompt_embeds": randn(1, 32, 128), "negative_prompt_embeds": randn(1, 32, 128, seed=1)}
_MASKED = {"image": image(), "mask_image": mask(), "height": PIXELS, "width": PIXELS}


def small(**changes: Any) -> Any:
    """A U-Net of two levels and random weights, of which a bundle is built in seconds."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 128,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return vary(diffusers.UNet2DConditionModel(**config | changes))


def inpaint_9() -> Subject:
    return Subject(of_sd("StableDiffusionInpaintPipeline", small(in_channels=9)), TEXTS | _MASKED)


def instruct_pix2pix() -> Subject:
    return Subject(of_sd("StableDiffusionInstructPix2PixPipeline", small(in_channels=8)), {**TEXTS, "image": image()})


def control_nets(count: int, **arguments: Any) -> Subject:
    unet = small()
    nets = [control(unet, seed) for seed in range(3, 3 + count)]
    pipe = of_sd("StableDiffusionControlNetPipeline", unet, controlnet=nets if count > 1 else nets[0])
    shown = [image(seed) for seed in range(5, 5 + count)]
    return Subject(pipe, {**TEXTS, "image": shown if count > 1 else shown[0], **arguments})


def t2i_adapter() -> Subject:
    unet = small()
    sizes = {"channels": list(unet.config.block_out_channels), "num_res_blocks": 1, "downscale_factor": 4}
    torch.manual_seed(0)
    adapter = vary(diffusers.T2IAdapter(in_channels=3, adapter_type="full_adapter", **sizes))
    return Subject(of_sd("StableDiffusionAdapterPipeline", unet, adapter=adapter), {**TEXTS, "image": image()})


def ip_adapter() -> Subject:
    pipe = of_sd("StableDiffusionPipeline", small())
    load_ip_adapter(pipe.unet)
    return Subject(pipe, {**TEXTS, "ip_adapter_image_embeds": [randn(2, 1, 8)]})


def lora() -> Subject:
    from peft import LoraConfig

    pipe = of_sd("StableDiffusionPipeline", small())
    torch.manual_seed(0)
    targets = ["to_q", "to_v", "conv_in", "conv_out"]
    # A file of weights does not tell alpha, which is then taken to be the rank.
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets))
    return Subject(pipe, {**TEXTS, "cross_attention_kwargs": {"scale": LORA_SCALE}})


def small_sdxl(kind: str, *, scores: int = 6, width: int = 24, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A pipeline of SDXL's kind, and the embeddings for a call; its text encoders, if any, are others' business."""
    pipe, embeds = sdxl(kind, **options)
    unet = small(**_XL, cross_attention_dim=width, projection_class_embeddings_input_dim=scores * 8 + 20)
    pipe.register_modules(unet=unet)
    return pipe, embeds


def sdxl_with_text(kind: str, **arguments: Any) -> Subject:
    """Both text encoders: the bundled one, and one of random weights."""
    demo = bundled()
    pipe, _ = small_sdxl(kind, width=2 * demo.text_encoder.config.hidden_size)
    torch.manual_seed(4)
    config = CLIPTextConfig.from_dict(demo.text_encoder.config.to_dict() | {"projection_dim": 20})
    second = vary(CLIPTextModelWithProjection(config))
    pipe.register_modules(text_encoder=demo.text_encoder, text_encoder_2=second)
    pipe.register_modules(tokenizer=demo.tokenizer, tokenizer_2=demo.tokenizer)
    return Subject(pipe, {"prompt": PROMPT, **arguments})


def sdxl_refiner() -> Subject:
    pipe, embeds = small_sdxl("StableDiffusionXLImg2ImgPipeline", scores=5, refiner=True)
    return Subject(pipe, embeds | {"image": randn(1, 4, 16, 16), "denoising_start": 0.3})


def sdxl_control_net() -> Subject:
    base, embeds = small_sdxl("StableDiffusionXLPipeline")
    parts = dict(base.components) | {"controlnet": control(base.unet)}
    pipe = diffusers.StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    load_ip_adapter(pipe.unet)
    return Subject(pipe, embeds | {"image": image(), "ip_adapter_image_embeds": [randn(2, 1, 8)]})


SUBJECTS: dict[str, Callable[[], Subject]] = {
    **{name: make for name, make in PIPELINES.items() if name not in _OF_SAMPLERS},
    "SD, inpaint, 9 channels": inpaint_9,
    "InstructPix2Pix, 8 channels": instruct_pix2pix,
    "SDXL, text to image": partial(sdxl_with_text, "StableDiffusionXLPipeline"),
    "SDXL, image to image": partial(sdxl_with_text, "StableDiffusionXLImg2ImgPipeline", image=image(), strength=0.8),
    "SDXL, inpaint": partial(sdxl_with_text, "StableDiffusionXLInpaintPipeline", strength=0.9, **_MASKED),
    "SDXL, refiner": sdxl_refiner,
    "ControlNet": partial(control_nets, 1),
    "SDXL, ControlNet and IP-Adapter": sdxl_control_net,
    "Two ControlNets": partial(control_nets, 2, controlnet_conditioning_scale=[0.6, 0.9]),
    "Two ControlNets, guess mode": partial(control_nets, 2, guess_mode=True),
    "T2I-Adapter": t2i_adapter,
    "IP-Adapter": ip_adapter,
    "LoRA": lora,
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
    pipe, fields = subject.pipe, dict[str, Any]()
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
        fields["lora"] = (f"{folder / 'pytorch_lora_weights.safetensors'}:{LORA_SCALE}",)
    if fields.keys() & {"controlnet", "t2i_adapter", "ip_adapter", "lora"}:  # beside the model, which is without them
        plain = (
            small_sdxl("StableDiffusionXLPipeline")[0] if "SDXL" in name else of_sd("StableDiffusionPipeline", small())
        )
        plain.save_pretrained(folder / "model")
        return {"model": str(folder / "model"), "backend": "onnxruntime", "components": ("unet",), **fields}
    pipe.save_pretrained(folder / "model")
    return {"model": str(folder / "model"), "backend": "onnxruntime", **fields}


def bundle_arguments(name: str, subject: Subject) -> dict[str, Any]:
    """The arguments of a pipeline's call by the names that they have with a bundle; a LoRA's scale is built in."""
    given = dict(subject.arguments)
    if "ControlNet" in name or name == ADAPTER:
        given["adapter_image" if name == ADAPTER else "control_image"] = given.pop("image")
    if "IP-Adapter" in name:
        given["ip_adapter_scale"] = IP_SCALE
    if name == "LoRA":
        del given["cross_attention_kwargs"]
    return given
