"""diffusers' own pipeline classes, one a row of the parity table, over the bundled model or small random weights.

`PIPELINES` names functions that make a pipeline and the arguments of one call of it. Knows nothing about caching.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from parity_others import (
    animate_diff,
    ddpm,
    ldm_4_g,
    ldm_super_resolution,
    ldm_text_to_image,
    stable_video,
)
from parity_subjects import (
    PIXELS,
    PROMPT,
    Subject,
    bundled,
    control,
    image,
    like_bundled,
    load_ip_adapter,
    mask,
    of_sd,
    randn,
    vary,
)

from fastcache.sampler.scheduler import make_scheduler


def sdxl(kind: str, *, refiner: bool = False, scores: int = 6) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1 + refiner)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=24,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=scores * 8 + 20,
    )
    demo = bundled()
    pipe = getattr(diffusers, kind)(
        vae=demo.vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=vary(unet),
        scheduler=demo.scheduler,
        **({"requires_aesthetics_score": refiner} if kind != "StableDiffusionXLPipeline" else {}),
        add_watermarker=False,
    )
    arguments = {
        "prompt_embeds": randn(1, 77, 24),
        "negative_prompt_embeds": randn(1, 77, 24, seed=1),
        "pooled_prompt_embeds": randn(1, 20),
        "negative_pooled_prompt_embeds": randn(1, 20, seed=1),
    }
    return pipe, arguments


def text_to_image() -> Subject:
    return Subject(bundled(), {"prompt": PROMPT}, "bundled", engines=True)


def image_to_image() -> Subject:
    pipe = of_sd("StableDiffusionImg2ImgPipeline")
    return Subject(pipe, {"prompt": PROMPT, "image": image(), "strength": 0.8}, "bundled", engines=True)


def inpaint_4() -> Subject:
    pipe = of_sd("StableDiffusionInpaintPipeline")
    arguments = {"prompt": PROMPT, "image": image(), "mask_image": mask(), "height": PIXELS, "width": PIXELS}
    return Subject(pipe, arguments, "bundled", engines=True)


def inpaint_9() -> Subject:
    pipe = of_sd("StableDiffusionInpaintPipeline", like_bundled(in_channels=9))
    arguments = {"prompt": PROMPT, "image": image(), "mask_image": mask(), "height": PIXELS, "width": PIXELS}
    return Subject(pipe, arguments, engines=True)


def instruct_pix2pix() -> Subject:
    pipe = of_sd("StableDiffusionInstructPix2PixPipeline", like_bundled(in_channels=8))
    return Subject(pipe, {"prompt": PROMPT, "image": image()})


def sd_epsilon() -> Subject:
    pipe = of_sd("StableDiffusionPipeline", like_bundled())
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon")
    return Subject(pipe, {"prompt": PROMPT})


def with_sampler(name: str) -> Subject:
    pipe = bundled()
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    return Subject(pipe, {"prompt": PROMPT}, "bundled", old_fault="wrong: it looks timesteps up by value")


def consistency() -> Subject:
    pipe = of_sd("LatentConsistencyModelPipeline", like_bundled(time_cond_proj_dim=32))
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    return Subject(pipe, {"prompt": PROMPT})


def upscale() -> Subject:
    demo = bundled()
    unet = like_bundled(in_channels=7, num_class_embeds=1000)
    parts = (demo.vae, demo.text_encoder, demo.tokenizer, unet, diffusers.DDPMScheduler(), demo.scheduler)
    pipe = diffusers.StableDiffusionUpscalePipeline(*parts)
    return Subject(pipe, {"prompt": PROMPT, "image": image()[..., :16, :16]})


def sdxl_base() -> Subject:
    return Subject(*sdxl("StableDiffusionXLPipeline"), engines=True)


def sdxl_image_to_image() -> Subject:
    pipe, arguments = sdxl("StableDiffusionXLImg2ImgPipeline")
    return Subject(pipe, arguments | {"image": image(), "strength": 0.8})


def sdxl_inpaint() -> Subject:
    pipe, arguments = sdxl("StableDiffusionXLInpaintPipeline")
    arguments |= {"image": image(), "mask_image": mask(), "height": PIXELS, "width": PIXELS, "strength": 0.9}
    return Subject(pipe, arguments)


def sdxl_control_net() -> Subject:
    """Its pipeline adds the image embeddings to a dict that the ControlNet has been given before."""
    base, arguments = sdxl("StableDiffusionXLPipeline")
    net = control(base.unet)
    parts = dict(base.components) | {"controlnet": net}
    pipe = diffusers.StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    load_ip_adapter(pipe.unet)
    return Subject(pipe, arguments | {"image": image(), "ip_adapter_image_embeds": [randn(2, 1, 8)]})


def sdxl_refiner() -> Subject:
    pipe, arguments = sdxl("StableDiffusionXLImg2ImgPipeline", refiner=True, scores=5)
    return Subject(pipe, arguments | {"image": randn(1, 4, 16, 16), "denoising_start": 0.3})


def control_net() -> Subject:
    unet = bundled().unet
    pipe = of_sd("StableDiffusionControlNetPipeline", unet, controlnet=control(unet))
    return Subject(pipe, {"prompt": PROMPT, "image": image()}, "bundled", bundle={"image": "control_image"})


def two_control_nets(**arguments: Any) -> Subject:
    unet = bundled().unet
    pipe = of_sd("StableDiffusionControlNetPipeline", unet, controlnet=[control(unet), control(unet, 4)])
    drawn = None if arguments.get("guess_mode") else {"image": "control_image"}
    return Subject(pipe, {"prompt": PROMPT, "image": [image(), image(6)], **arguments}, "bundled", bundle=drawn)


def t2i_adapter() -> Subject:
    torch.manual_seed(0)
    channels = list(bundled().unet.config.block_out_channels)
    adapter = diffusers.T2IAdapter(
        in_channels=3, channels=channels, num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter"
    )
    pipe = of_sd("StableDiffusionAdapterPipeline", adapter=vary(adapter))
    return Subject(pipe, {"prompt": PROMPT, "image": image()}, "bundled", bundle={"image": "adapter_image"})


def ip_adapter() -> Subject:
    pipe = bundled()
    load_ip_adapter(pipe.unet)
    pipe.set_ip_adapter_scale(0.8)
    return Subject(pipe, {"prompt": PROMPT, "ip_adapter_image_embeds": [randn(2, 1, 8)]}, "bundled")


def lora() -> Subject:
    from peft import LoraConfig

    pipe = bundled()
    torch.manual_seed(0)
    targets = ["to_q", "to_v", "conv_in", "conv_out"]
    pipe.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    return Subject(pipe, {"prompt": PROMPT, "cross_attention_kwargs": {"scale": 0.7}}, "bundled")


PIPELINES: dict[str, Callable[[], Subject]] = {
    "SD, text to image, v-prediction": text_to_image,
    "SD, text to image, epsilon": sd_epsilon,
    "SD, PNDM": partial(with_sampler, "pndm"),
    "SD, Heun": partial(with_sampler, "heun"),
    "SD, image to image": image_to_image,
    "SD, inpaint, 4 channels": inpaint_4,
    "SD, inpaint, 9 channels": inpaint_9,
    "InstructPix2Pix, 8 channels": instruct_pix2pix,
    "Upscale, class labels": upscale,
    "Latent consistency": consistency,
    "SDXL, text to image": sdxl_base,
    "SDXL, image to image": sdxl_image_to_image,
    "SDXL, inpaint": sdxl_inpaint,
    "SDXL, refiner": sdxl_refiner,
    "ControlNet": control_net,
    "SDXL, ControlNet and IP-Adapter": sdxl_control_net,
    "Two ControlNets": partial(two_control_nets, controlnet_conditioning_scale=[0.6, 0.9]),
    "Two ControlNets, guess mode": partial(two_control_nets, guess_mode=True),
    "T2I-Adapter": t2i_adapter,
    "IP-Adapter": ip_adapter,
    "LoRA": lora,
    "LDM, text to image": ldm_text_to_image,
    "LDM-4-G, a class's embedding": ldm_4_g,
    "LDM, super-resolution": ldm_super_resolution,
    "DDPM": ddpm,
    "Stable Video Diffusion": stable_video,
    "AnimateDiff": animate_diff,
}
