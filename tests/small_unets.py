"""Small U-Nets with the published models' structure and random weights, shared by the tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

_SMALL: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 32, 64, 64),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
_SDXL: dict[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sd21": {"attention_head_dim": (2, 2, 4, 4), "use_linear_projection": True},
    "sdxl": _SDXL,
    "inpaint": {"in_channels": 9},
    "two-blocks": {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "one-layer": {"layers_per_block": 1},
    "three-layers": {"layers_per_block": 3},
    "uneven-layers": {"layers_per_block": (1, 2, 3, 2)},
    "no-attention": {
        "down_block_types": ("DownBlock2D",) * 4,
        "up_block_types": ("UpBlock2D",) * 4,
        "mid_block_type": None,
    },
    "self-attention": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "resnet-resampling": {
        "down_block_types": ("ResnetDownsampleBlock2D",) * 4,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 4,
        "resnet_time_scale_shift": "scale_shift",
    },
    "class-labels": {"num_class_embeds": 10, "class_embeddings_concat": False},
    "time-cond": {"time_cond_proj_dim": 12, "center_input_sample": True, "time_embedding_act_fn": "silu"},
    "text-projection": {"encoder_hid_dim": 10, "encoder_hid_dim_type": "text_proj"},
}


def small_unet(name: str, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**(_SMALL | CONFIGS[name] | changes)).eval().requires_grad_(False)
    for parameter in unet.parameters():  # norms start as the identity; give every weight a say
        parameter.add_(torch.randn_like(parameter) * 0.02)
    return unet


def example(
    unet: UNet2DConditionModel, batch: int = 2, height: int = 16, width: int = 16
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for `unet.forward`, full and (less the cached feature) shallow."""
    config, generator = unet.config, torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width_in = config.encoder_hid_dim or config.cross_attention_dim
    args = (randn(batch, config.in_channels, height, width), torch.tensor(681), randn(batch, 7, width_in))
    kwargs: dict[str, Any] = {}
    if config.num_class_embeds:
        kwargs["class_labels"] = torch.arange(batch)
    if config.time_cond_proj_dim:
        kwargs["timestep_cond"] = randn(batch, config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        kwargs["added_cond_kwargs"] = {"text_embeds": randn(batch, 20), "time_ids": randn(batch, 6)}
    return args, kwargs
