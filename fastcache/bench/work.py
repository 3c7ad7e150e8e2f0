"""A model's U-Net without its weights -> the shapes it takes, its size, and the multiply-adds of its passes.

Everything runs on torch's meta device: nothing is loaded and nothing is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNetSpatioTemporalConditionModel
from torch import Tensor

from fastcache.compile.describe import CLIP_TOKENS, describe
from fastcache.compile.models import SourceModel
from fastcache.compile.passes import call_unet, unet_inputs
from fastcache.compile.presets import PRESETS
from fastcache.cut.signals import UNET_CLASSES
from fastcache.cut.work import UNetWork, count_work
from fastcache.cut.work import empty_unet as make_empty
from fastcache.errors import PartitionError


@dataclass(frozen=True)
class Geometry:
    """What decides the shapes of a model's tensors. In pixels, `height` and `width` are its own, `scale` a latent's.

    `tokens` is 0 for a model without cross-attention; `time_ids` and `guided_rows` are as in `ModelInfo`.
    """

    latent_channels: int
    scale: int
    tokens: int
    weights_bytes: int
    height: int
    width: int
    time_ids: int | None
    guided_rows: int

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """A height and a width in pixels, the model's own where none is asked for.

        Raises: `ValueError` for a side that is not a whole number of latents.
        """
        sides = self.height if height is None else height, self.width if width is None else width
        if any(side % self.scale or side <= 0 for side in sides):
            raise ValueError(f"expected a height and width divisible by {self.scale}, got {sides}; give others")
        return sides


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
    scale = info.vae_scale_factor
    own = config.sample_size if isinstance(config.sample_size, list | tuple) else (config.sample_size,) * 2
    height, width = preset.size if preset is not None and preset.size else (own[0] * scale, own[1] * scale)
    return Geometry(
        latent_channels=info.latent_channels,
        scale=scale,
        tokens=CLIP_TOKENS if info.tokens is None else info.tokens,
        weights_bytes=sum(4 * parameter.numel() for parameter in unet.parameters()),
        height=height,
        width=width,
        time_ids=info.time_ids,
        guided_rows=info.guided_rows,
    )


def unet_work(model: SourceModel, height: int | None = None, width: int | None = None) -> UNetWork:
    """The work of a model's U-Net for one image, or one video, of `height` x `width` pixels; its own if left out.

    Raises: `ValueError` for a size that is not a whole number of latents; `PartitionError` for a U-Net that cannot be
    cut.
    """
    unet, shapes = empty_unet(model), geometry(model)
    height, width = shapes.size(height, width)
    latent = height // shapes.scale, width // shapes.scale
    if isinstance(unet, UNetSpatioTemporalConditionModel):
        inputs = _video_inputs(unet, shapes, latent)
    else:
        inputs = unet_inputs(unet, 1, *latent, shapes.tokens, shapes.time_ids or 0)
    row = {name: tensor.to("meta") for name, tensor in inputs.items()}
    return count_work(unet, lambda full: call_unet(full, row))


def _video_inputs(unet: Any, shapes: Geometry, latent: tuple[int, int]) -> dict[str, Tensor]:
    """What a U-Net of videos is called with, of which no engines are built."""
    return {
        "sample": torch.empty(1, unet.config.num_frames, unet.config.in_channels, *latent, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, shapes.tokens, unet.config.cross_attention_dim, device="meta"),
        "added_time_ids": torch.empty(1, 3, device="meta"),
    }
