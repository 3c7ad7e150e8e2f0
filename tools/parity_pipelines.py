"""diffusers' own pipeline classes, one a row of the parity table, over the bundled model or small random weights.

`PIPELINES` names functions that make a pipeline and the arguments of one call of it. Knows nothing about caching.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from fastcache.demo import MODEL_DIRECTORY
from fastcache.run.scheduler import make_scheduler

STEPS = 6
PIXELS = 64
PROMPT = "a large red circle at the left on a white background"


class Subject(NamedTuple):
    """A pipeline and the arguments of a call.

    `engines` where they can be built; `old_fault` where DeepCacheSDHelper is wrong, so that nothing is compared.
    """

    pipe: Any
    arguments: dict[str, Any]
    weights: str = "random"
    engines: bool = False
    old_fault: str = ""

    def draw(self, **more: Any) -> Tensor:
        arguments = {"generator": seeded(1), "num_inference_steps": STEPS, "output_type": "latent"}
        result = self.pipe(**{**arguments, **self.arguments, **more})[0]
        return torch.as_tensor(result).float()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def vary(module: nn.Module) -> Any:
    """Norms start as the identity, and a ControlNet's and a motion module's last layers at zero; all get a say."""
    generator = seeded(2)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return module.eval().requires_grad_(False)


def bundled() -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32)


def like_bundled(**changes: Any) -> Any:
    """A U-Net of the bundled one's structure, half its width and random weights."""
    torch.manual_seed(0)
    config = dict(bundled().unet.config) | {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 4}
    return vary(diffusers.UNet2DConditionModel.from_config(config | changes))


def of_sd(kind: str, unet: Any = None, **components: Any) -> Any:
    """A pipeline of Stable Diffusion's kind, the bundled model but for its U-Net."""
    parts = dict(bundled().components)
    parts |= {"unet": parts["unet"] if unet is None else unet, **components}
    parts |= {"requires_safety_checker": False}
    pipeline_class = getattr(diffusers, kind)
    if "image_encoder" not in pipeline_class.__init__.__annotations__:
        parts.pop("image_encoder")
    return pipeline_class(**parts)


def image(seed: int = 5) -> Tensor:
    return torch.rand(1, 3, PIXELS, PIXELS, generator=seeded(seed))


def mask() -> Tensor:
    half = torch.zeros(1, 1, PIXELS, PIXELS)
    half[..., PIXELS // 2 :] = 1
    return half


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
    return Subject(pipe, {"prompt": PROMPT, "image": image()}, "bundled")


def two_control_nets() -> Subject:
    unet = bundled().unet
    pipe = of_sd("StableDiffusionControlNetPipeline", unet, controlnet=[control(unet), control(unet, 4)])
    arguments = {"image": [image(), image(6)], "guess_mode": True}
    return Subject(pipe, {"prompt": PROMPT, **arguments}, "bundled")


def control(unet: Any, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    # The condition is brought from pixels to latents by two halvings here, three in Stable Diffusion.
    channels = (16, 32, 64)
    return vary(diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels))


def t2i_adapter() -> Subject:
    torch.manual_seed(0)
    channels = list(bundled().unet.config.block_out_channels)
    adapter = diffusers.T2IAdapter(
        in_channels=3, channels=channels, num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter"
    )
    pipe = of_sd("StableDiffusionAdapterPipeline", adapter=vary(adapter))
    return Subject(pipe, {"prompt": PROMPT, "image": image()}, "bundled")


def ip_adapter() -> Subject:
    pipe = bundled()
    load_ip_adapter(pipe.unet)
    pipe.set_ip_adapter_scale(0.8)
    return Subject(pipe, {"prompt": PROMPT, "ip_adapter_image_embeds": [randn(2, 1, 8)]}, "bundled")


def load_ip_adapter(unet: Any) -> None:
    """An IP-Adapter of random weights, for image embeddings of width 8."""
    torch.manual_seed(0)
    width, state, key_id = unet.config.cross_attention_dim, dict[str, Tensor](), 1
    for name in unet.attn_processors:
        if not name.endswith("attn1.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            for kind in ("to_k_ip", "to_v_ip"):
                state[f"{key_id}.{kind}.weight"] = torch.randn(attention.to_k.out_features, width) / 4
            key_id += 2
    projection = diffusers.models.embeddings.ImageProjection(8, width, 4).state_dict()
    renamed = {name.replace("image_embeds", "proj"): value for name, value in projection.items()}
    unet._load_ip_adapter_weights([{"image_proj": renamed, "ip_adapter": state}])


def lora() -> Subject:
    from peft import LoraConfig

    pipe = bundled()
    torch.manual_seed(0)
    targets = ["to_q", "to_v", "conv_in", "conv_out"]
    pipe.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    return Subject(pipe, {"prompt": PROMPT, "cross_attention_kwargs": {"scale": 0.7}}, "bundled")


def ldm_text_to_image() -> Subject:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    demo = bundled()
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "encoder_ffn_dim": 64, "encoder_attention_heads": 2, "head_dim": 16, "d_model": 128}
    bert = LDMBertModel(LDMBertConfig(vocab_size=len(demo.tokenizer), **sizes)).eval()
    pipe = diffusers.LDMTextToImagePipeline(demo.vae, bert, demo.tokenizer, like_bundled(), demo.scheduler)
    arguments = {"prompt": PROMPT, "guidance_scale": 4.0, "height": 128, "width": 128, "output_type": "pt"}
    return Subject(pipe, arguments)


def ddpm() -> Subject:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return Subject(diffusers.DDPMPipeline(vary(unet), diffusers.DDPMScheduler()), {"output_type": "np"})


def stable_video() -> Subject:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2 + ("DownBlockSpatioTemporal",),
        up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 2,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        cross_attention_dim=32,
        num_attention_heads=(2, 4, 4),
        layers_per_block=2,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    vision = {"hidden_size": 32, "projection_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, image_size=32, patch_size=16))
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", use_karras_sigmas=True, timestep_type="continuous", sigma_min=0.002,
        sigma_max=700.0, timestep_spacing="leading", steps_offset=1, beta_schedule="scaled_linear",
    )  # fmt: skip
    crop = CLIPImageProcessor(crop_size=32, size=32)
    pipe = diffusers.StableVideoDiffusionPipeline(vary(vae), vary(encoder), vary(unet), scheduler, crop)
    arguments = {"image": image()[..., :32, :32], "num_frames": 3, "height": 32, "width": 32}
    return Subject(pipe, arguments | {"min_guidance_scale": 1.5})


def animate_diff() -> Subject:
    unet = like_bundled()
    adapter = diffusers.MotionAdapter(
        block_out_channels=tuple(unet.config.block_out_channels),
        motion_layers_per_block=2,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
    )
    demo = bundled()
    pipe = diffusers.AnimateDiffPipeline(
        demo.vae, demo.text_encoder, demo.tokenizer, unet, vary(adapter), demo.scheduler
    )
    return Subject(pipe, {"prompt": PROMPT, "num_frames": 3, "height": PIXELS, "width": PIXELS})


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
    "Two ControlNets, guess mode": two_control_nets,
    "T2I-Adapter": t2i_adapter,
    "IP-Adapter": ip_adapter,
    "LoRA": lora,
    "LDM, text to image": ldm_text_to_image,
    "DDPM": ddpm,
    "Stable Video Diffusion": stable_video,
    "AnimateDiff": animate_diff,
}
