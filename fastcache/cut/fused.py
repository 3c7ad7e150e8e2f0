"""A cut -> the same cut whose first norm above it is one operator of `fastcache_kernels`, in place.

In the plain cut that is the norm of the cached feature beside the skip connection, read where they lie; in the
projected one, the norm of the half that is computed anew. Behind the operator stand kernels on a GPU, and plain PyTorch
operations elsewhere; torch.export keeps it. Knows nothing about engines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcache.cut.partition import Cut
from fastcache.cut.project import ProjectedLayer, ResnetTail, why_not
from fastcache.cut.signals import Signals
from fastcache.cut.unet import Layer
from fastcache.errors import PartitionError
from fastcache_kernels import ops


def fuse_first_norm(cut: Cut) -> None:
    """Put the operator into the first layer above a cut, in both passes; the U-Net itself is not changed.

    Raises: `PartitionError` for a layer that does not begin with GroupNorm, SiLU and a convolution.
    """
    consumer: Any = cut.shallow.up[0]
    projected = isinstance(consumer, ProjectedLayer)
    reason = None if projected else why_not(consumer.layer, 0)  # groups may straddle the joint here
    activation = consumer.act if projected else getattr(consumer.layer.resnet, "nonlinearity", None)
    if reason is None and not isinstance(activation, nn.SiLU):
        reason = f"its activation is {type(activation).__name__}"
    if reason is not None:
        raise PartitionError(
            f"expected a layer that begins with GroupNorm, SiLU and a convolution, got branch {cut.branch_id}: "
            f"{reason}; leave the kernels out"
        )
    if projected:
        fresh: Any = consumer.fresh
        fresh.norm, fresh.act = _FusedNorm(fresh.norm), nn.Identity()
    else:
        cut.shallow.up[0] = cut.full.up[len(cut.full.up) - len(cut.shallow.up)] = FusedLayer(consumer.layer)


class _FusedNorm(nn.Module):
    """GroupNorm and SiLU. Shapes: (N, C, H, W) -> the same."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return ops.groupnorm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


class FusedLayer(ResnetTail):
    """A layer whose resnet norms the feature and the skip connection where they lie.

    Its shortcut takes them joined, which the operator writes as it reads them.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        resnet: Any = layer.resnet
        self.first_norm, self.first_conv, self.shortcut = resnet.norm1, resnet.conv1, resnet.conv_shortcut

    def take(self, feature: Tensor) -> tuple[Tensor, ...]:
        return (feature,)

    def forward(self, taken: tuple[Tensor, ...], skip: Tensor, signals: Signals, size: torch.Size | None) -> Tensor:
        norm = self.first_norm
        normed, joined = ops.concat_groupnorm_silu_joined(
            *taken, skip, norm.weight, norm.bias, norm.num_groups, norm.eps
        )
        return self._finish(self.first_conv(normed), self.shortcut(joined), signals, size)
