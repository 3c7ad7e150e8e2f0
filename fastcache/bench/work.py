"""A model's U-Net without its weights -> the shapes it takes, its size, and the multiply-adds of its passes.

Everything runs on torch's meta device: nothing is loaded and nothing is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel, UNetSpatioTemporalConditionModel
from torch import Tensor

from fastcache.compile.describe import CLIP_TOKENS, describe
from fastcache.compile.models import SourceModel
from fastcache.compile.presets import PRESETS
from fastcache.cut.signals import UNET_CLASSES
from fastcache.cut.work import UNetWork, count_work
from fastcache.cut.work import empty_unet as make_empty
from fastcache.errors import PartitionError


@dataclass(frozen=True)
class Geometry:
    """What decides the shapes of a model's tensors. `size` is the image's own side in pixels, `scale` a latent's.

    `height` and `width` are its own, too. `tokens` and `text_width` are 0 for a model without cross-attention;
    `time_ids` and `guided_rows` are as in `ModelInfo`.
    """

    latent_channels: int
    scale: int
    size: int
    tokens: int
    text_width: int
    pooled_width: int | None
    weights_bytes: int
    height: int
    width: int
    time_ids: int | None
    guided_rows: int


@dataclass(frozen=True)
class MultiplyAdds:
    """What one image costs in one U-Net call, in full and above the cut, without guidance; attention included."""

    full: int
    shallow: int

    def ceiling(self, num_calls: int, interval: int) -> float:
        """The speed-up of a uniform plan over no caching, if time were multiply-adds alone."""
        return self.full / self.average(num_calls, interval)

    def average(self, num_calls: int, interval: int) -> float:
        """What a call costs on average under a uniform plan."""
        refreshes = -(-num_calls // interval)
        return (refreshes * self.full + (num_calls - refreshes) * self.shallow) / num_calls


def empty_unet(model: SourceModel) -> Any:
    """The model's U-Net with no memory behind its weights.

    Raises: `PartitionError` for a U-Net of a class that cannot be cut.
    """
    if model.folder is None:
        return make_empty(PRESETS[model.name].unet_class, PRESETS[model.name].unet)
    config: Any = UNet2DConditionModel.load_config(model.folder / "unet", local_files_only=True)
    if config["_class_name"] not in UNET_CLASSES:
        raise PartitionError(f"expected a U-Net of {', '.join(UNET_CLASSES)}, got {config['_class_name']}")
    return make_empty(UNET_CLASSES[config["_class_name"]], config)


def geometry(model: SourceModel) -> Geometry:
    """The model's shapes, from its configuration files."""
    unet = empty_unet(model)
    config: Any = unet.config
    info = describe(model, unet)
    preset = PRESETS[model.name] if model.folder is None else None
    scale, pooled = info.vae_scale_factor, None
    if info.time_ids is not None:
        pooled = config.projection_class_embeddings_input_dim - info.time_ids * config.addition_time_embed_dim
    own = config.sample_size if isinstance(config.sample_size, list | tuple) else (config.sample_size,) * 2
    height, width = preset.size if preset is not None and preset.size else (own[0] * scale, own[1] * scale)
    return Geometry(
        latent_channels=info.latent_channels,
        scale=scale,
        size=own[0] * scale,
        tokens=CLIP_TOKENS if info.tokens is None else info.tokens,
        text_width=getattr(config, "cross_attention_dim", 0),
        pooled_width=pooled,
        weights_bytes=sum(4 * parameter.numel() for parameter in unet.parameters()),
        height=height,
        width=width,
        time_ids=info.time_ids,
        guided_rows=info.guided_rows,
    )


def multiply_adds(model: SourceModel, branch_id: int, height: int, width: int) -> MultiplyAdds:
    """Count the products of both passes for one image of `height` x `width` pixels.

    Raises: `PartitionError` for a branch that the U-Net does not have.
    """
    work = unet_work(model, height, width)
    if not 0 <= branch_id < len(work.shallow):
        last = len(work.shallow) - 1
        raise PartitionError(f"expected a branch_id from 0 to {last} for {model.name}, got {branch_id!r}")
    return MultiplyAdds(work.full.total, work.shallow[branch_id].total)


def unet_work(model: SourceModel, height: int | None = None, width: int | None = None) -> UNetWork:
    """The work of a model's U-Net for one image, or one video, of `height` x `width` pixels; its own if left out.

    Raises: `ValueError` for a size that is not a whole number of latents; `PartitionError` for a U-Net that cannot be
    cut.
    """
    unet, shapes = empty_unet(model), geometry(model)
    pixels = height or shapes.height, width or shapes.width
    if any(side % shapes.scale or side <= 0 for side in pixels):
        raise ValueError(f"expected a height and a width divisible by {shapes.scale} for {model.name}, got {pixels}")
    latent = pixels[0] // shapes.scale, pixels[1] // shapes.scale
    inputs = _inputs(unet, shapes, latent)
    return count_work(unet, lambda full: full(**inputs))


def _inputs(unet: Any, shapes: Geometry, latent: tuple[int, int]) -> dict[str, Any]:
    """What a U-Net is called with for one sample, as tensors without content."""
    config: Any = unet.config

    def empty(*sizes: int) -> Tensor:
        return torch.empty(1, *sizes, device="meta")

    inputs: dict[str, Any] = {"sample": empty(config.in_channels, *latent), "timestep": empty()}
    if isinstance(unet, UNet2DModel):
        if config.num_class_embeds:
            inputs["class_labels"] = torch.zeros(1, dtype=torch.int64, device="meta")
        return inputs
    inputs["encoder_hidden_states"] = empty(shapes.tokens, shapes.text_width)
    if isinstance(unet, UNetSpatioTemporalConditionModel):
        inputs["sample"] = empty(config.num_frames, config.in_channels, *latent)
        return inputs | {"added_time_ids": empty(3)}
    if shapes.pooled_width is not None and shapes.time_ids is not None:
        inputs["added_cond_kwargs"] = {"text_embeds": empty(shapes.pooled_width), "time_ids": empty(shapes.time_ids)}
    return inputs
