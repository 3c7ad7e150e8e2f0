"""A model's U-Net without its weights -> the shapes it takes, its size, and the multiply-adds of its two passes.

Everything runs on torch's meta device: nothing is loaded and nothing is computed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastcache.compile.models import SourceModel
from fastcache.compile.presets import PRESETS
from fastcache.cut.partition import partition_unet


@dataclass(frozen=True)
class Geometry:
    """What decides the shapes of a model's tensors. `size` is the image's own side in pixels, `scale` a latent's."""

    latent_channels: int
    scale: int
    size: int
    tokens: int
    text_width: int
    pooled_width: int | None
    weights_bytes: int


@dataclass(frozen=True)
class MultiplyAdds:
    """What one image costs in one U-Net call, in full and above the cut, without guidance; attention included."""

    full: int
    shallow: int

    def ceiling(self, num_calls: int, interval: int) -> float:
        """The speed-up of a uniform plan over no caching, if time were multiply-adds alone."""
        refreshes = -(-num_calls // interval)
        return num_calls * self.full / (refreshes * self.full + (num_calls - refreshes) * self.shallow)


def empty_unet(model: SourceModel) -> UNet2DConditionModel:
    """The model's U-Net with no memory behind its weights."""
    config: Any = PRESETS[model.name].unet if model.folder is None else model.folder / "unet"
    if model.folder is not None:
        config = UNet2DConditionModel.load_config(config, local_files_only=True)
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
    return unet.eval().requires_grad_(False)


def geometry(model: SourceModel) -> Geometry:
    """The model's shapes, from its configuration files."""
    unet = empty_unet(model)
    config: Any = unet.config
    scale, channels, tokens, pooled = 8, config.out_channels, 77, None  # Stable Diffusion's VAE and CLIP's text
    if model.folder is not None and "vae" in model.components:
        vae = json.loads((model.folder / "vae" / "config.json").read_text(encoding="utf-8"))
        scale, channels = 2 ** (len(vae["block_out_channels"]) - 1), vae["latent_channels"]
    if "text" in model.components:
        tokens = int(model.load_tokenizer().model_max_length)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    side = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    width = config.cross_attention_dim
    weights_bytes = sum(4 * parameter.numel() for parameter in unet.parameters())
    return Geometry(channels, scale, side * scale, tokens, width, pooled, weights_bytes)


def multiply_adds(model: SourceModel, branch_id: int, height: int, width: int) -> MultiplyAdds:
    """Count the products of both passes for one image of `height` x `width` pixels.

    Raises: `PartitionError` for a branch that the U-Net does not have.
    Source: `torch.utils.flop_counter`, which counts two operations for each multiply-add.
    """
    shapes, unet = geometry(model), empty_unet(model)
    cut = partition_unet(unet, branch_id)
    config: Any = unet.config

    def empty(*sizes: int) -> Tensor:
        return torch.empty(1, *sizes, device="meta")

    inputs = (
        empty(config.in_channels, height // shapes.scale, width // shapes.scale),
        empty(),
        empty(shapes.tokens, shapes.text_width),
    )
    added: dict[str, Any] = {}
    if shapes.pooled_width is not None:
        added = {"added_cond_kwargs": {"text_embeds": empty(shapes.pooled_width), "time_ids": empty(6)}}
    with torch.no_grad(), FlopCounterMode(display=False) as full:
        _, cached_feature = cut.full(*inputs, **added)
    with torch.no_grad(), FlopCounterMode(display=False) as shallow:
        cut.shallow(*inputs, cached_feature=cached_feature, **added)
    return MultiplyAdds(full.get_total_flops() // 2, shallow.get_total_flops() // 2)
