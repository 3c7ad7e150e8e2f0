"""Published U-Net configurations by name, for speed measurements with random weights.

Sources: the `unet/config.json` of runwayml/stable-diffusion-v1-5, runwayml/stable-diffusion-inpainting,
stabilityai/stable-diffusion-2-1 and stabilityai/stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
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
    """A U-Net's configuration (what differs from diffusers' defaults) and its noise schedule."""

    unet: dict[str, Any]
    scheduler: dict[str, Any]


PRESETS: dict[str, Preset] = {
    "sd15": Preset(_SD15, _SCHEDULE),
    "sd15-inpaint": Preset(_SD15 | {"in_channels": 9}, _SCHEDULE),
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
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        _SCHEDULE,
    ),
}
