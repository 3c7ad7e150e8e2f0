"""Published U-Net configurations by name, for speed measurements with random weights.

Sources: `unet/config.json` and `scheduler/scheduler_config.json` of runwayml/stable-diffusion-v1-5,
runwayml/stable-diffusion-inpainting, timbrooks/instruct-pix2pix, stabilityai/stable-diffusion-2-1,
stabilityai/stable-diffusion-xl-base-1.0 and -refiner-1.0, stabilityai/stable-video-diffusion-img2vid-xt and
google/ddpm-bedroom-256. LDM-4-G has no published configuration in diffusers' terms: it is
`configs/latent-diffusion/cin256-v2.yaml` of CompVis/latent-diffusion, translated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel, UNetSpatioTemporalConditionModel

_SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "prediction_type": "epsilon",
}


@dataclass(frozen=True)
class Preset:
    """A U-Net's class and configuration (what differs from diffusers' defaults), and its noise schedule.

    `scale` is how many pixels a latent is, `tokens` the length of what cross-attention reads, `size` the height and
    width in pixels where they are not those of the configuration, `settings` the pipeline's own.
    """

    unet: dict[str, Any]
    scheduler: dict[str, Any]
    unet_class: type[Any] = UNet2DConditionModel
    scale: int = 8
    tokens: int = 77
    size: tuple[int, int] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def make(self, dtype: torch.dtype = torch.float32) -> Any:
        """The U-Net with the weights that its layers begin with, never more than one of them wider than `dtype`."""
        with torch.device("meta"):
            unet = self.unet_class(**self.unet)
        for layer in unet.modules():
            if any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
                layer.to_empty(device="cpu", recurse=False)
                layer.reset_parameters()
                layer.to(dtype)
        return unet.eval().requires_grad_(False)


PRESETS: dict[str, Preset] = {
    "sd15": Preset(_SD15, _SCHEDULE),
    "sd15-inpaint": Preset(_SD15 | {"in_channels": 9}, _SCHEDULE),
    "instruct-pix2pix": Preset(_SD15 | {"in_channels": 8}, _SCHEDULE),
    "sd21": Preset(
        {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        _SCHEDULE | {"prediction_type": "v_prediction"},
    ),
    "sdxl": Preset(
        _SDXL
        | {
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "projection_class_embeddings_input_dim": 2816,
        },
        _SCHEDULE,
    ),
    "sdxl-refiner": Preset(
        _SDXL
        | {
            "cross_attention_dim": 1280,
            "attention_head_dim": (6, 12, 24, 24),
            "block_out_channels": (384, 768, 1536, 1536),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": 4,
            "projection_class_embeddings_input_dim": 2560,
        },
        _SCHEDULE,
        settings={"requires_aesthetics_score": True},
    ),
    "svd-xt": Preset(
        {"sample_size": 96, "num_frames": 25},
        _SCHEDULE
        | {
            "prediction_type": "v_prediction",
            "timestep_type": "continuous",
            "timestep_spacing": "leading",
            "use_karras_sigmas": True,
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
        UNetSpatioTemporalConditionModel,
        tokens=1,
        size=(576, 1024),
    ),
    "ldm4g": Preset(
        {
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 3,
            "cross_attention_dim": 512,
            "attention_head_dim": 1,  # heads, in this class
            "block_out_channels": (192, 384, 576, 960),
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        },
        _SCHEDULE | {"beta_start": 0.0015, "beta_end": 0.0195},
        scale=4,
        tokens=1,  # the embedding of a class
    ),
    "ddpm256": Preset(
        {
            "sample_size": 256,
            "block_out_channels": (128, 128, 256, 256, 512, 512),
            "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
            "attention_head_dim": None,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
        },
        {
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "num_train_timesteps": 1000,
            "clip_sample": True,
            "variance_type": "fixed_small",
            "prediction_type": "epsilon",
        },
        UNet2DModel,
        scale=1,
        tokens=0,
    ),
}
