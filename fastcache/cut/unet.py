"""A diffusers U-Net -> its parts in the order they run: embeddings, down layers, middle, up layers, head.

The parts hold the U-Net's own submodules, so they share its weights and compute bit for bit what it computes. A
down layer makes exactly one skip connection and an up layer consumes exactly one, whatever blocks they came from.
Knows nothing about where the U-Net is cut.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from fastcache.errors import PartitionError

_DOWN_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"}
_UP_BLOCKS = {"UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"}
_NOT_EMBEDDINGS = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out")


class Embeddings(nn.Module):
    """Timestep and further conditioning -> what every layer receives: (sample, temb, context)."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        # The U-Net's own methods compute the embeddings for every configuration; a copy of the object without its
        # blocks carries those methods and no more weights than they need.
        self.embedder = copy.copy(unet)
        self.embedder._modules = {k: m for k, m in unet._modules.items() if k not in _NOT_EMBEDDINGS}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None,
        timestep_cond: Tensor | None,
        added_cond_kwargs: dict[str, Any] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        unet: Any = self.embedder
        if unet.config.center_input_sample:
            sample = 2 * sample - 1.0
        temb = unet.time_embedding(unet.get_time_embed(sample, timestep), timestep_cond)
        classes = unet.get_class_embed(sample, class_labels)
        if classes is not None:
            temb = torch.cat([temb, classes], -1) if unet.config.class_embeddings_concat else temb + classes
        added = unet.get_aug_embed(temb, encoder_hidden_states, added_cond_kwargs)
        if unet.config.addition_embed_type == "image_hint":
            added, hint = added
            sample = torch.cat([sample, hint], dim=1)
        if added is not None:
            temb = temb + added
        if unet.time_embed_act is not None:
            temb = unet.time_embed_act(temb)
        return sample, temb, unet.process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs)


class Layer(nn.Module):
    """A resnet and its attention, a resampler, or both; whatever stands between two skip connections."""

    def __init__(self, resnet: nn.Module | None, attention: nn.Module | None, resampler: nn.Module | None) -> None:
        super().__init__()
        self.resnet, self.attention, self.resampler = resnet, attention, resampler

    def forward(self, h: Tensor, temb: Tensor, context: Tensor, size: torch.Size | None = None) -> Tensor:
        if self.resnet is not None:
            h = self.resnet(h, temb)
        if isinstance(self.attention, Transformer2DModel | DualTransformer2DModel):
            h = self.attention(h, encoder_hidden_states=context, return_dict=False)[0]
        elif self.attention is not None:
            h = self.attention(h)
        if isinstance(self.resampler, ResnetBlock2D):
            h = self.resampler(h, temb)
        elif self.resampler is not None:
            h = self.resampler(h) if size is None else self.resampler(h, size)
        return h


class Middle(nn.Module):
    """The U-Net's middle block, with or without cross-attention, or nothing."""

    def __init__(self, block: nn.Module | None) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        if self.block is None:
            return h
        if getattr(self.block, "has_cross_attention", False):
            return self.block(h, temb, encoder_hidden_states=context)
        return self.block(h, temb)


class Head(nn.Module):
    """The last norm, activation and convolution."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.norm, self.act, self.conv = unet.conv_norm_out, unet.conv_act, unet.conv_out

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h if self.norm is None or self.act is None else self.act(self.norm(h)))


@dataclass(frozen=True)
class UNetParts:
    """A U-Net taken apart. `down[k]` makes skip connection k + 1 (conv_in makes 0); `up[k]` consumes the
    (k + 1)-th last."""

    embeddings: Embeddings
    conv_in: nn.Module
    down: tuple[Layer, ...]
    middle: Middle
    up: tuple[Layer, ...]
    head: Head
    num_upsamplers: int

    @property
    def num_skips(self) -> int:
        return len(self.up)


def take_apart(unet: nn.Module) -> UNetParts:
    """The parts of a U-Net, sharing its weights.

    Raises: `PartitionError` for a class, block or option whose data flow these parts would not reproduce.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise PartitionError(
            f"expected a UNet2DConditionModel, got {type(unet).__name__}; pass pipe.unet of a U-Net pipeline"
        )
    _refuse_unknown(unet)
    down, up = tuple(_down_layers(unet)), tuple(_up_layers(unet))
    if len(up) != len(down) + 1:
        raise PartitionError(
            f"expected as many up layers as skip connections, got {len(up)} up layers for {len(down) + 1} "
            "skip connections; such a U-Net does not run in diffusers either"
        )
    return UNetParts(Embeddings(unet), unet.conv_in, down, Middle(unet.mid_block), up, Head(unet), unet.num_upsamplers)


def _refuse_unknown(unet: UNet2DConditionModel) -> None:
    for blocks, known in ((unet.down_blocks, _DOWN_BLOCKS), (unet.up_blocks, _UP_BLOCKS)):
        for block in blocks:
            if type(block).__name__ not in known:
                raise PartitionError(
                    f"cannot cut a U-Net with a {type(block).__name__}; "
                    f"blocks that can be cut: {', '.join(sorted(known))}"
                )
    if getattr(unet, "position_net", None) is not None:
        raise PartitionError("cannot cut a GLIGEN U-Net (position_net): its grounding inputs are not supported")
    if any(getattr(block, "b1", None) for block in unet.up_blocks):
        raise PartitionError("cannot cut a U-Net with FreeU enabled; call disable_freeu() first")


def _pairs(block: Any) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return zip(block.resnets, attentions, strict=True)


def _down_layers(unet: UNet2DConditionModel) -> Iterator[Layer]:
    blocks: Any = unet.down_blocks
    for block in blocks:
        for resnet, attention in _pairs(block):
            yield Layer(resnet, attention, None)
        for resampler in block.downsamplers or ():
            yield Layer(None, None, resampler)


def _up_layers(unet: UNet2DConditionModel) -> Iterator[Layer]:
    blocks: Any = unet.up_blocks
    for block in blocks:
        *before, last = _pairs(block)
        for resnet, attention in before:
            yield Layer(resnet, attention, None)
        yield Layer(*last, block.upsamplers[0] if block.upsamplers else None)
