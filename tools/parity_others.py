"""Rows of the parity table beyond Stable Diffusion: latent and pixel diffusion of other kinds, and videos."""

from __future__ import annotations

import diffusers
import torch
from parity_subjects import PIXELS, PROMPT, Subject, bundled, image, like_bundled, of_sd, randn, vary

from fastcache.compile.presets import PRESETS


def ldm_4_g() -> Subject:
    """The class-conditional U-Net of ImageNet, which reads one embedding for a class, and another for none.

    diffusers has no pipeline class for it. This one takes the embeddings as those of prompts.
    """
    torch.manual_seed(0)
    small = {"sample_size": 16, "block_out_channels": (32, 64, 96, 160), "cross_attention_dim": 32}
    pipe = of_sd("StableDiffusionPipeline", vary(diffusers.UNet2DConditionModel(**PRESETS["ldm4g"].unet | small)))
    return Subject(pipe, {"prompt_embeds": randn(1, 1, 32), "negative_prompt_embeds": randn(1, 1, 32, seed=1)})


def ldm_super_resolution() -> Subject:
    """Its U-Net takes the small image beside the latents."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=3,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    )
    pipe = diffusers.LDMSuperResolutionPipeline(vary(diffusers.VQModel()), vary(unet), bundled().scheduler)
    return Subject(pipe, {"image": image()[..., :16, :16] * 2 - 1, "output_type": "pt"})


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
