"""A U-Net and a branch id -> a full module that also returns what is cached, and a shallow one that takes it.

The cut sits before the up layer that consumes skip connection `branch_id` (DeepCache, arXiv 2312.00858, section 3.2).
The full module runs the whole U-Net; the shallow one runs the down layers that make skip connections 0 to `branch_id`
and the up layers that consume them. The plain cut caches that layer's main-path input; the projected one caches what
the layer itself first makes of it (`project.py`). Knows nothing about steps, plans or engines.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcache.cut.project import ProjectedLayer, why_not
from fastcache.cut.unet import UNetParts, take_apart
from fastcache.errors import PartitionError


class _Pass(nn.Module):
    """The down layers that make the first `num_skips` skip connections, and the up layers from the cut on."""

    def __init__(self, parts: UNetParts, num_skips: int, above: nn.ModuleList) -> None:
        super().__init__()
        self.embeddings, self.conv_in, self.head = parts.embeddings, parts.conv_in, parts.head
        self.down = nn.ModuleList(parts.down[: num_skips - 1])
        self.above = above
        self._up_factor = 2**parts.num_upsamplers

    def _embed(self, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The embeddings, in the layers' dtype; their own may be wider (`compile.lower`)."""
        dtype = next(self.conv_in.parameters()).dtype
        sample, temb, context = self.embeddings(*inputs)
        return sample.to(dtype), temb.to(dtype), context.to(dtype)

    def _descend(self, sample: Tensor, temb: Tensor, context: Tensor) -> list[Tensor]:
        skips: list[Tensor] = [self.conv_in(sample)]
        for layer in self.down:
            skips.append(layer(skips[-1], temb, context))
        return skips

    def _ascend(
        self, layers: Iterable[nn.Module], h: Tensor, skips: list[Tensor], temb: Tensor, context: Tensor
    ) -> Tensor:
        for layer in layers:
            joined = torch.cat([h, skips.pop()], dim=1)
            h = layer(joined, temb, context, self._size(skips))
        return h

    def _size(self, skips: list[Tensor]) -> torch.Size | None:
        """As in diffusers: a size that upsamplers cannot double back to is taken from the next skip connection."""
        if skips and any(n % self._up_factor for n in skips[0].shape[-2:]):
            return skips[-1].shape[-2:]
        return None

    def _finish(self, cached: tuple[Tensor, ...], skips: list[Tensor], temb: Tensor, context: Tensor) -> Tensor:
        """From the cut to the noise prediction."""
        layers, h = list(self.above), cached[0]
        if isinstance(layers[0], ProjectedLayer):
            skip = skips.pop()
            h = layers.pop(0)(*cached, skip, temb, context, self._size(skips))
        return self.head(self._ascend(layers, h, skips, temb, context))


class FullUNet(_Pass):
    """The whole U-Net, returning `(noise_pred, *cached)`."""

    def __init__(self, parts: UNetParts, branch_id: int, above: nn.ModuleList) -> None:
        super().__init__(parts, parts.num_skips, above)
        self.middle = parts.middle
        self.below = nn.ModuleList(parts.up[: parts.num_skips - 1 - branch_id])

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, ...]:
        """Run everything.

        Shapes: `sample` (N, C, H, W); `timestep` () or (N,); `encoder_hidden_states` (N, tokens, width). Returns
        `noise_pred` (N, C', H, W) and, for each entry of `Cut.cached`, a tensor (N, its channels, H / s, W / s), where
        s is `Cut.feature_stride`.
        """
        sample, temb, context = self._embed(
            sample, timestep, encoder_hidden_states, class_labels, timestep_cond, added_cond_kwargs
        )
        skips = self._descend(sample, temb, context)
        h = self.middle(skips[-1], temb, context)
        cached = self.cached_of(self._ascend(self.below, h, skips, temb, context))
        return self._finish(cached, skips, temb, context), *cached

    def cached_of(self, feature: Tensor) -> tuple[Tensor, ...]:
        """What the shallow pass is given for a feature at the cut: itself, or its projections."""
        consumer = self.above[0]
        return consumer.cached(feature) if isinstance(consumer, ProjectedLayer) else (feature,)


class ShallowUNet(_Pass):
    """What lies above the cut: `noise_pred` from the sample and what is cached."""

    def __init__(self, parts: UNetParts, branch_id: int, above: nn.ModuleList) -> None:
        super().__init__(parts, branch_id + 1, above)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        cached_feature: Tensor,
        cached_residual: Tensor | None = None,
        *,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Run the layers above the cut; `cached_residual` belongs to the projected cut.

        Shapes: as in `FullUNet.forward`; returns `noise_pred`.
        """
        sample, temb, context = self._embed(
            sample, timestep, encoder_hidden_states, class_labels, timestep_cond, added_cond_kwargs
        )
        cached = (cached_feature,) if cached_residual is None else (cached_feature, cached_residual)
        return self._finish(cached, self._descend(sample, temb, context), temb, context)


@dataclass(frozen=True)
class Cut:
    """The two halves of DeepCache over one U-Net's weights, and where the cut lies.

    `cached` are the tensors that cross, by name, with their channels: `cached_feature`, and in the projected cut
    `cached_residual`. `feature_channels` are those of the feature at the cut, whichever form of it is cached.
    """

    full: FullUNet
    shallow: ShallowUNet
    branch_id: int
    num_branches: int
    feature_channels: int
    feature_stride: int
    kind: Literal["plain", "projected"]
    cached: dict[str, int]


def partition_unet(unet: nn.Module, branch_id: int = 0, cut: Literal["auto", "plain", "projected"] = "plain") -> Cut:
    """Cut a U-Net at skip connection `branch_id`, 0 the shallowest (DeepCacheSDHelper's counting).

    The modules share the U-Net's submodules; the U-Net itself is not changed. `projected` copies the weights of one
    resnet in halves, and `auto` is that where it is possible.

    Raises: `PartitionError` for a branch id out of range (the message names the range), a U-Net that cannot be cut, or
    a cut that cannot be projected.
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
    above: list[nn.Module] = list(parts.up[last - branch_id :])
    cached: dict[str, int] = {"cached_feature": channels}
    kind: Literal["plain", "projected"] = "plain"
    reason = why_not(parts.up[last - branch_id], channels)
    if cut == "projected" and reason is not None:
        raise PartitionError(f"expected a cut that can be projected, got branch {branch_id}: {reason}; use cut plain")
    if cut != "plain" and reason is None:
        above[0] = ProjectedLayer(parts.up[last - branch_id], channels)
        cached, kind = dict.fromkeys(("cached_feature", "cached_residual"), consumer.out_channels), "projected"
    layers = nn.ModuleList(above)
    full, shallow = FullUNet(parts, branch_id, layers), ShallowUNet(parts, branch_id, layers)
    return Cut(full, shallow, branch_id, parts.num_skips, channels, stride, kind, cached)
