"""A U-Net and a branch id -> a full module that also returns the feature at the cut, and a shallow one that takes it.

The cut sits before the up layer that consumes skip connection `branch_id` (DeepCache, arXiv 2312.00858, section 3.2).
The full module runs the whole U-Net; the shallow one runs the down layers that make skip connections 0 to `branch_id`
and the up layers that consume them. Knows nothing about steps, plans or engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcache.cut.unet import UNetParts, take_apart
from fastcache.errors import PartitionError


class _Pass(nn.Module):
    """The down layers that make the first `num_skips` skip connections, and the up layers that consume them."""

    def __init__(self, parts: UNetParts, num_skips: int) -> None:
        super().__init__()
        self.embeddings, self.conv_in, self.head = parts.embeddings, parts.conv_in, parts.head
        self.down = nn.ModuleList(parts.down[: num_skips - 1])
        self.up = nn.ModuleList(parts.up[parts.num_skips - num_skips :])
        self._up_factor = 2**parts.num_upsamplers

    def _descend(self, sample: Tensor, temb: Tensor, context: Tensor) -> list[Tensor]:
        skips: list[Tensor] = [self.conv_in(sample)]
        for layer in self.down:
            skips.append(layer(skips[-1], temb, context))
        return skips

    def _ascend(self, layers: nn.ModuleList, h: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor) -> Tensor:
        # As in diffusers: a size that the upsamplers cannot double back to is taken from the next skip connection.
        odd = any(n % self._up_factor for n in skips[0].shape[-2:])
        for layer in layers:
            h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, temb, context, skips[-1].shape[-2:] if odd and skips else None)
        return h


class FullUNet(_Pass):
    """The whole U-Net, returning `(noise_pred, cached_feature)`."""

    def __init__(self, parts: UNetParts, branch_id: int) -> None:
        super().__init__(parts, parts.num_skips)
        self.middle = parts.middle
        self._before = parts.num_skips - 1 - branch_id

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run everything.

        Shapes: `sample` (N, C, H, W); `timestep` () or (N,); `encoder_hidden_states` (N, tokens, width). Returns
        `noise_pred` (N, C', H, W) and `cached_feature` (N, `Cut.feature_channels`, H / s, W / s), where s is
        `Cut.feature_stride`.
        """
        sample, temb, context = self.embeddings(
            sample, timestep, encoder_hidden_states, class_labels, timestep_cond, added_cond_kwargs
        )
        skips = self._descend(sample, temb, context)
        h = self.middle(skips[-1], temb, context)
        cached_feature = self._ascend(self.up[: self._before], h, skips, temb, context)
        return self.head(self._ascend(self.up[self._before :], cached_feature, skips, temb, context)), cached_feature


class ShallowUNet(_Pass):
    """What lies above the cut: `noise_pred` from the sample and the cached feature."""

    def __init__(self, parts: UNetParts, branch_id: int) -> None:
        super().__init__(parts, branch_id + 1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        cached_feature: Tensor,
        *,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Run the layers above the cut. Shapes: as in `FullUNet.forward`; returns `noise_pred`."""
        sample, temb, context = self.embeddings(
            sample, timestep, encoder_hidden_states, class_labels, timestep_cond, added_cond_kwargs
        )
        skips = self._descend(sample, temb, context)
        return self.head(self._ascend(self.up, cached_feature, skips, temb, context))


@dataclass(frozen=True)
class Cut:
    """The two halves of DeepCache over one U-Net's weights, and where the cut lies."""

    full: FullUNet
    shallow: ShallowUNet
    branch_id: int
    num_branches: int
    feature_channels: int
    feature_stride: int


def partition_unet(unet: nn.Module, branch_id: int = 0) -> Cut:
    """Cut a U-Net at skip connection `branch_id`, 0 the shallowest (DeepCacheSDHelper's counting).

    The modules share the U-Net's submodules; the U-Net itself is not changed.

    Raises: `PartitionError` for a branch id out of range (the message names the range) or a U-Net that cannot be cut.
    Source: DeepCache, arXiv 2312.00858, section 3.2, equations 4 to 6.
    """
    parts = take_apart(unet)
    last = parts.num_skips - 1
    if isinstance(branch_id, bool) or not isinstance(branch_id, int) or not 0 <= branch_id <= last:
        raise PartitionError(f"expected a branch_id from 0 to {last} for this U-Net, got {branch_id!r}")
    makers: list[Any] = [parts.conv_in, *(layer.resnet or layer.resampler for layer in parts.down)]
    consumer: Any = parts.up[last - branch_id].resnet
    stride = 2 ** sum(layer.resampler is not None for layer in parts.down[:branch_id])
    channels = consumer.in_channels - makers[branch_id].out_channels
    return Cut(FullUNet(parts, branch_id), ShallowUNet(parts, branch_id), branch_id, parts.num_skips, channels, stride)
