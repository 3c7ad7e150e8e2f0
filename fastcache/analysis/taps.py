"""A diffusers U-Net or DiT -> the tensors worth looking at in it.

What Block Caching calls C is the residual branch's output, before it joins the shortcut: `conv2` of a resnet,
`proj_out` of a transformer; of a DiT block, the output of its attention and of its feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from fastcache.analysis.recorder import Tap
from fastcache.cut.partition import partition_unet
from fastcache.cut.unet import take_apart

_WORDS = {
    "down_blocks": "down",
    "mid_block": "mid",
    "up_blocks": "up",
    "resnets": "resnet",
    "attentions": "transformer",
    "downsamplers": "downsampler",
    "upsamplers": "upsampler",
}


def unet_taps(unet: nn.Module, branch_ids: Sequence[int]) -> list[Tap]:
    """The cached feature at each cut and the output of each up block; the residual of each resnet and transformer."""
    blocks: Any = unet
    up = take_apart(unet).up
    taps: list[Tap] = []
    for branch_id in branch_ids:
        take = partial(_first_channels, partition_unet(unet, branch_id).feature_channels)
        consumer = up[len(up) - 1 - branch_id].resnet
        if consumer is not None:
            taps.append(Tap(cached_name(branch_id), "cached feature", "similarity", consumer, take))
    taps += [Tap(f"up {i}", "up block", "similarity", block) for i, block in enumerate(blocks.up_blocks)]
    for name, module in _blocks(unet):
        if isinstance(module, ResnetBlock2D):
            taps.append(Tap(name, "resnet", "change", module.conv2))
        elif isinstance(module, Transformer2DModel):
            projection: Any = module.proj_out
            taps.append(Tap(name, "transformer", "change", projection))
    return taps


def cached_name(branch_id: int) -> str:
    return f"cached feature, branch {branch_id}"


def _first_channels(channels: int, arguments: tuple[Any, ...], _: Any) -> Tensor:
    return arguments[0][:, :channels]  # what was joined comes after it


def _blocks(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every resnet and transformer by a short name, `up_blocks.1.resnets.0` being "up 1 resnet 0"."""
    for path, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D | Transformer2DModel):
            yield " ".join(_WORDS.get(part, part) for part in path.split(".")), module


def dit_taps(transformer: nn.Module) -> list[Tap]:
    """The output of each block; the residual of each block's attention and feed-forward layer."""
    blocks: Any = transformer
    taps = [Tap(f"block {i}", "block", "similarity", block) for i, block in enumerate(blocks.transformer_blocks)]
    for i, block in enumerate(blocks.transformer_blocks):
        taps.append(Tap(f"block {i} attention", "attention", "change", block.attn1))
        taps.append(Tap(f"block {i} feed-forward", "feed-forward", "change", block.ff))
    return taps
