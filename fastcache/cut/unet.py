"""A diffusers U-Net -> its parts in the order they run: embeddings, down layers, middle, up layers, head.

One description serves every class. The parts hold the U-Net's own submodules, so they share its weights and compute
bit for bit what it computes. A down layer makes exactly one skip connection and an up layer consumes exactly one,
whatever blocks they came from. Knows nothing about where the U-Net is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

from fastcache.cut.signals import Embeddings, Signals, embeddings_of
from fastcache.errors import PartitionError

_KINDS = ("SpatioTemporal", "Motion", "2D")
_DOWN_BLOCKS = {"AttnDownBlock2D", "ResnetDownsampleBlock2D"} | {
    f"{attention}DownBlock{kind}" for attention in ("", "CrossAttn") for kind in _KINDS
}
_UP_BLOCKS = {"AttnUpBlock2D", "ResnetUpsampleBlock2D"} | {
    f"{attention}UpBlock{kind}" for attention in ("", "CrossAttn") for kind in _KINDS
}


def _run(module: nn.Module, h: Tensor, signals: Signals) -> Tensor:
    """Call a resnet or an attention with the signals that its class takes."""
    if isinstance(module, ResnetBlock2D):
        return module(h, signals.temb)
    if isinstance(module, SpatioTemporalResBlock):
        return module(h, signals.temb, signals.image_only)
    if isinstance(module, Transformer2DModel | DualTransformer2DModel):
        return module(h, encoder_hidden_states=signals.context, return_dict=False, **signals.attention)[0]
    if isinstance(module, TransformerSpatioTemporalModel):
        return module(h, signals.context, signals.image_only, return_dict=False)[0]
    if isinstance(module, AnimateDiffTransformer3D):
        return module(h, num_frames=signals.num_frames)
    return module(h)


class Layer(nn.Module):
    """A resnet, its attention and its motion module, a resampler, or all; what stands between two skip connections."""

    def __init__(
        self,
        resnet: nn.Module | None = None,
        attention: nn.Module | None = None,
        motion: nn.Module | None = None,
        resampler: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.resnet, self.attention, self.motion, self.resampler = resnet, attention, motion, resampler

    def forward(self, h: Tensor, signals: Signals, size: torch.Size | None = None) -> Tensor:
        for module in (self.resnet, self.attention, self.motion):
            if module is not None:
                h = _run(module, h, signals)
        if self.resampler is None:
            return h
        if size is None or isinstance(self.resampler, ResnetBlock2D):
            return _run(self.resampler, h, signals)
        return self.resampler(h, size)


class Middle(nn.Module):
    """The U-Net's middle block, with or without cross-attention, or nothing."""

    def __init__(self, block: nn.Module | None) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: Tensor, signals: Signals) -> Tensor:
        if self.block is None:
            return h
        if not getattr(self.block, "has_cross_attention", False):
            return self.block(h, signals.temb)
        video: dict[str, Any] = {}
        if signals.image_only is not None:
            video["image_only_indicator"] = signals.image_only
        elif hasattr(self.block, "motion_modules"):
            video["num_frames"] = signals.num_frames
        return self.block(h, signals.temb, encoder_hidden_states=signals.context, **signals.attention, **video)


class Head(nn.Module):
    """The last norm, activation and convolution."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.norm, self.act, self.conv = unet.conv_norm_out, unet.conv_act, unet.conv_out

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h if self.norm is None or self.act is None else self.act(self.norm(h)))


@dataclass(frozen=True)
class UNetParts:
    """A U-Net taken apart. `down[k]` makes skip connection k + 1 (conv_in makes 0); `up[k]` consumes the
    (k + 1)-th last. `adapted` are the down layers to whose output a T2I-Adapter adds, one a block."""

    embeddings: Embeddings
    conv_in: nn.Module
    down: tuple[Layer, ...]
    adapted: tuple[int, ...]
    middle: Middle
    up: tuple[Layer, ...]
    head: Head

    @property
    def num_skips(self) -> int:
        return len(self.up)

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """The channels of each skip connection."""
        makers: list[Any] = [self.conv_in, *(layer.resnet or layer.resampler for layer in self.down)]
        return tuple(_channels(maker)[1] for maker in makers)

    @property
    def main_channels(self) -> tuple[int, ...]:
        """The channels of what each up layer joins to its skip connection, in the order of those."""
        consumers = [_channels(layer.resnet)[0] for layer in reversed(self.up)]
        return tuple(total - own for total, own in zip(consumers, self.skip_channels, strict=True))

    @property
    def skip_strides(self) -> tuple[int, ...]:
        """By how much each skip connection is smaller than the sample."""
        halvings = [sum(layer.resampler is not None for layer in self.down[:k]) for k in range(self.num_skips)]
        return tuple(2**n for n in halvings)


def _channels(module: Any) -> tuple[int, int]:
    """What a resnet, a resampler or a convolution takes and gives."""
    plain = getattr(module, "base_layer", module)  # of a layer that a LoRA was put around
    spatial: Any = getattr(plain, "spatial_res_block", plain)
    return spatial.channels if isinstance(spatial, Downsample2D) else spatial.in_channels, spatial.out_channels


def take_apart(unet: nn.Module) -> UNetParts:
    """The parts of a U-Net, sharing its weights.

    Raises: `PartitionError` for a class, block or option whose data flow these parts would not reproduce.
    """
    embeddings, model = embeddings_of(unet), cast(Any, unet)
    _refuse_unknown(model.down_blocks, _DOWN_BLOCKS)
    _refuse_unknown(model.up_blocks, _UP_BLOCKS)
    if getattr(unet, "position_net", None) is not None:
        raise PartitionError("cannot cut a GLIGEN U-Net (position_net): its grounding inputs are not supported")
    if any(getattr(block, "b1", None) for block in model.up_blocks):
        raise PartitionError("cannot cut a U-Net with FreeU enabled; call disable_freeu() first")
    (down, adapted), up = down_layers(model.down_blocks), tuple(_up_layers(model.up_blocks))
    if len(up) != len(down) + 1:
        raise PartitionError(
            f"expected as many up layers as skip connections, got {len(up)} up layers for {len(down) + 1} "
            "skip connections; such a U-Net does not run in diffusers either"
        )
    return UNetParts(embeddings, model.conv_in, down, adapted, Middle(model.mid_block), up, Head(model))


def check_branches(branch_ids: Iterable[int], parts: UNetParts) -> tuple[int, ...]:
    """Branch ids of a U-Net, one or more. Raises: `PartitionError` for one out of range, or the same one twice."""
    wanted, last = tuple(branch_ids), parts.num_skips - 1
    for branch_id in wanted:
        if type(branch_id) is not int or not 0 <= branch_id <= last:  # True would pass for 1
            raise PartitionError(f"expected a branch_id from 0 to {last} for this U-Net, got {branch_id!r}")
    if not wanted or len(set(wanted)) != len(wanted):
        raise PartitionError(f"expected branch ids from 0 to {last}, each once, got {list(wanted)}")
    return wanted


def _refuse_unknown(blocks: Any, known: set[str]) -> None:
    for block in blocks:
        if type(block).__name__ not in known:
            raise PartitionError(
                f"cannot cut a U-Net with a {type(block).__name__}; blocks that can be cut: {', '.join(sorted(known))}"
            )


def _stages(block: Any) -> Iterator[tuple[nn.Module | None, ...]]:
    nothing = [None] * len(block.resnets)
    others = [getattr(block, name, None) or nothing for name in ("attentions", "motion_modules")]
    return zip(block.resnets, *others, strict=True)


def down_layers(blocks: Any) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """The layers of a U-Net's or ControlNet's down blocks, and which of them an adapter adds to.

    In a block with cross-attention that is the layer before the downsampler, in another the block's last.
    """
    layers: list[Layer] = []
    adapted: list[int] = []
    for block in blocks:
        layers += [Layer(*stages) for stages in _stages(block)]
        before = len(layers) - 1
        layers += [Layer(resampler=resampler) for resampler in block.downsamplers or ()]
        adapted.append(before if getattr(block, "has_cross_attention", False) else len(layers) - 1)
    return tuple(layers), tuple(adapted)


def _up_layers(blocks: Any) -> Iterator[Layer]:
    for block in blocks:
        *before, last = _stages(block)
        yield from (Layer(*stages) for stages in before)
        yield Layer(*last, resampler=block.upsamplers[0] if block.upsamplers else None)
