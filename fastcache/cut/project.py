"""The layer that consumes the cached feature -> two halves, of which the cached one need not be computed again.

That layer's resnet joins the cached feature h and a skip connection s, and nothing before its second norm mixes them:
GroupNorm works group by group, a convolution of a join is the sum of two convolutions. So what h gives, after its norm
and convolution and after the shortcut's, is the same until h changes; the full pass keeps it, the shallow pass adds it.
Source: DeepCache, arXiv 2312.00858, whose cached feature is h itself.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from fastcache.cut.signals import Signals
from fastcache.cut.unet import Layer


def why_not(layer: Layer, channels: int) -> str | None:
    """Why a layer whose first `channels` input channels are cached cannot be taken in halves; None if it can."""
    resnet: Any = layer.resnet
    if not isinstance(resnet, ResnetBlock2D):
        return f"its first up layer is a {type(resnet).__name__}, not a ResnetBlock2D"
    if resnet.upsample is not None or resnet.downsample is not None or resnet.conv_shortcut is None:
        return "its first up layer resamples, or has no shortcut convolution"
    if resnet.time_embedding_norm not in ("default", "scale_shift"):
        return f"its first up layer's time_embedding_norm is {resnet.time_embedding_norm!r}"
    if type(resnet.conv1) is not nn.Conv2d or type(resnet.conv_shortcut) is not nn.Conv2d:
        return f"its first up layer's convolutions carry an adapter ({type(resnet.conv1).__name__}); fuse it first"
    group = resnet.norm1.num_channels // resnet.norm1.num_groups
    if channels % group:
        return f"a group of {group} channels of its norm straddles the {channels} cached ones"
    return None


class _Half(nn.Module):
    """The norm, first convolution and shortcut of a resnet for some of its input channels.

    Shapes: (N, `channels`, H, W) -> two of (N, C_out, H, W), biases added where `biased`.
    """

    def __init__(self, resnet: Any, channels: slice, biased: bool) -> None:
        super().__init__()
        norm, own = resnet.norm1, range(*channels.indices(resnet.norm1.num_channels))
        groups = norm.num_groups * len(own) // norm.num_channels
        self.norm = nn.GroupNorm(groups, len(own), norm.eps, device="meta")
        self.norm.weight, self.norm.bias = _frozen(norm.weight[channels]), _frozen(norm.bias[channels])
        self.act = resnet.nonlinearity
        self.conv, self.shortcut = (_part(conv, channels, biased) for conv in (resnet.conv1, resnet.conv_shortcut))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(self.act(self.norm(x))), self.shortcut(x)


def _part(conv: Any, channels: slice, biased: bool) -> nn.Conv2d:
    weight, bias = conv.weight[:, channels], conv.bias if biased else None
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    part = nn.Conv2d(weight.shape[1], weight.shape[0], kernel, stride, padding, bias=bias is not None, device="meta")
    part.weight, part.bias = _frozen(weight), None if bias is None else _frozen(bias)
    return part


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().contiguous(), requires_grad=False)


class JoinedLayer(nn.Module):
    """An up layer that takes the feature as it is, and joins its skip connection to it."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def take(self, feature: Tensor) -> tuple[Tensor, ...]:
        """What this layer is to be given of a feature, which is what a cut before it caches."""
        return (feature,)

    def forward(self, taken: tuple[Tensor, ...], skip: Tensor, signals: Signals, size: torch.Size | None) -> Tensor:
        return self.layer(torch.cat([*taken, skip], dim=1), signals, size)


class SecondHalf(nn.Module):
    """What `ResnetBlock2D` does after its first convolution, up to the sum with its shortcut."""

    def __init__(self, resnet: Any) -> None:
        super().__init__()
        self.act, self.time_emb_proj = resnet.nonlinearity, resnet.time_emb_proj
        self.norm, self.conv = resnet.norm2, resnet.conv2
        self._time_acts, self._scale_shift = not resnet.skip_time_act, resnet.time_embedding_norm == "scale_shift"

    def _transform(self, h: Tensor, temb: Tensor) -> Tensor:
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(self.act(temb) if self._time_acts else temb)[:, :, None, None]
            if self._scale_shift:
                scale, shift = temb.chunk(2, dim=1)
                return self.conv(self.act(self.norm(h) * (1 + scale) + shift))
            h = h + temb
        return self.conv(self.act(self.norm(h)))


class ResnetTail(SecondHalf):
    """The second half of a layer's resnet, and what follows it in the layer."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.resnet)
        resnet: Any = layer.resnet
        self.rest = Layer(None, layer.attention, layer.motion, layer.resampler)
        self._output_scale: float = resnet.output_scale_factor

    def _finish(self, h: Tensor, residual: Tensor, signals: Signals, size: torch.Size | None) -> Tensor:
        """The layer's output from that of its first convolution and that of its shortcut."""
        return self.rest((residual + self._transform(h, signals.temb)) / self._output_scale, signals, size)


class ProjectedLayer(ResnetTail):
    """A layer whose resnet is given its cached half as `take` makes it, and the other, a skip connection, anew."""

    def __init__(self, layer: Layer, channels: int) -> None:
        super().__init__(layer)
        self.cached = _Half(layer.resnet, slice(None, channels), biased=False)
        self.fresh = _Half(layer.resnet, slice(channels, None), biased=True)

    def take(self, feature: Tensor) -> tuple[Tensor, ...]:
        return self.cached(feature)

    def forward(self, taken: tuple[Tensor, ...], skip: Tensor, signals: Signals, size: torch.Size | None) -> Tensor:
        hidden, residual = taken
        own_hidden, own_residual = self.fresh(skip)
        return self._finish(hidden + own_hidden, residual + own_residual, signals, size)
