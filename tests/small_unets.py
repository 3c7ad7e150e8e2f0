"""Small U-Nets with the published models' structure and random weights, shared by the tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    ModelMixin,
    UNet2DConditionModel,
    UNet2DModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor

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
    "sdxl-refiner": _SDXL
    | {
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 2,
        "attention_head_dim": (2, 4, 8, 8),
        "projection_class_embeddings_input_dim": 5 * 8 + 20,
    },
    "inpaint": {"in_channels": 9},
    "instruct-pix2pix": {"in_channels": 8},
    "ldm4g": {
        "in_channels": 3,
        "out_channels": 3,
        "attention_head_dim": 1,
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    },
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


_IMAGE: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}
_VIDEO: dict[str, Any] = {  # its resnets norm 32 groups, whatever the configuration
    "block_out_channels": (32, 32, 64, 64),
    "num_attention_heads": (1, 2, 2, 4),
    "cross_attention_dim": 24,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 3 * 8,
}
_MOTION: dict[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "cross_attention_dim": 24,
    "num_attention_heads": 4,
    "motion_num_attention_heads": 4,
    "norm_num_groups": 8,
}
OTHERS: dict[str, tuple[type[ModelMixin], dict[str, Any]]] = {
    "ddpm": (UNet2DModel, _IMAGE | {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}),
    "ddpm-classes": (UNet2DModel, _IMAGE | {"num_class_embeds": 10, "center_input_sample": True}),
    "ddpm-resnets": (
        UNet2DModel,
        _IMAGE
        | {
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "mid_block_type": None,
        },
    ),
    "svd": (UNetSpatioTemporalConditionModel, _VIDEO),
    "svd-two-blocks": (
        UNetSpatioTemporalConditionModel,
        _VIDEO
        | {
            "block_out_channels": (32, 64),
            "num_attention_heads": (1, 2),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        },
    ),
    "animatediff": (UNetMotionModel, _MOTION),
    "animatediff-sdxl": (
        UNetMotionModel,
        _MOTION
        | {
            "use_motion_mid_block": False,
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
            "up_block_types": ("CrossAttnUpBlockMotion", "UpBlockMotion"),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 20,
        },
    ),
}


def small_unet(name: str, **changes: Any) -> UNet2DConditionModel:
    return _randomised(UNet2DConditionModel, _SMALL | CONFIGS[name] | changes)


def any_small_unet(name: str) -> Any:
    """A small U-Net of any class: one of `CONFIGS` or `OTHERS`."""
    return small_unet(name) if name in CONFIGS else _randomised(*OTHERS[name])


def small_controlnet(**changes: Any) -> ControlNetModel:
    """A ControlNet for the small `sd15`."""
    small = {key: value for key, value in _SMALL.items() if key != "sample_size"}
    return _randomised(ControlNetModel, small | {"conditioning_embedding_out_channels": (8, 16)} | changes)


def _randomised(kind: type[ModelMixin], config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    made: Any = kind
    model = made(**config).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms start as the identity, ControlNets at 0; give every weight a say
        parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def example(
    unet: UNet2DConditionModel, batch: int = 2, height: int = 16, width: int = 16
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for `unet.forward`, full and (less the cached feature) shallow."""
    config, randn = unet.config, _seeded()
    width_in = config.encoder_hid_dim or config.cross_attention_dim
    args = (randn(batch, config.in_channels, height, width), torch.tensor(681), randn(batch, 7, width_in))
    kwargs: dict[str, Any] = {}
    if config.num_class_embeds:
        kwargs["class_labels"] = torch.arange(batch)
    if config.time_cond_proj_dim:
        kwargs["timestep_cond"] = randn(batch, config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        kwargs["added_cond_kwargs"] = _sizes(config, batch, randn)
    return args, kwargs


def named_example(unet: Any, batch: int = 2, height: int = 16, width: int = 16) -> dict[str, Any]:
    """The same by name, for a U-Net of any class; videos have three frames."""
    config, randn, frames = unet.config, _seeded(), 3
    if isinstance(unet, UNet2DConditionModel):
        (sample, timestep, text), kwargs = example(unet, batch, height, width)
        return {"sample": sample, "timestep": timestep, "encoder_hidden_states": text, **kwargs}
    if isinstance(unet, UNet2DModel):
        labels = {"class_labels": torch.arange(batch)} if config.num_class_embeds else {}
        return {"sample": randn(batch, config.in_channels, height, width), "timestep": torch.tensor(681), **labels}
    if isinstance(unet, UNetSpatioTemporalConditionModel):
        return {
            "sample": randn(batch, frames, config.in_channels, height, width),
            "timestep": torch.tensor(0.5),
            "encoder_hidden_states": randn(batch, 1, config.cross_attention_dim),
            "added_time_ids": randn(batch, 3),
        }
    added = {"added_cond_kwargs": _sizes(config, batch, randn)} if config.addition_embed_type else {}
    return {
        "sample": randn(batch, config.in_channels, frames, height, width),
        "timestep": torch.tensor(681),
        "encoder_hidden_states": randn(batch * frames, 7, config.cross_attention_dim),
        **added,
    }


def _sizes(config: Any, batch: int, randn: Any) -> dict[str, Tensor]:
    """SDXL's added conditioning; the refiner is told five numbers, the base six."""
    ids = (config.projection_class_embeddings_input_dim - 20) // config.addition_time_embed_dim
    return {"text_embeds": randn(batch, 20), "time_ids": randn(batch, ids)}


def _seeded() -> Any:
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator)
