"""A U-Net and branch ids -> a full module that also returns what is cached, and shallow ones that take it.

A cut sits before the up layer that consumes skip connection `branch_id` (DeepCache, arXiv 2312.00858, section 3.2).
The full module runs the whole U-Net; a shallow one runs the down layers that make skip connections 0 to `branch_id`
and the up layers that consume them. The plain cut caches that layer's main-path input; the projected one caches what
the layer itself first makes of it (`project.py`). Knows nothing about steps, plans or engines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

from fastcache.cut.names import CutKind, CutWish
from fastcache.cut.project import JoinedLayer, ProjectedLayer, why_not
from fastcache.cut.signals import Conditioning, Signals
from fastcache.cut.unet import UNetParts, check_branches, take_apart
from fastcache.errors import PartitionError

UpLayers = Sequence[JoinedLayer | ProjectedLayer]


class _Pass(nn.Module):
    """The down layers that make the first skip connections, and the up layers that consume them."""

    def __init__(self, parts: UNetParts, up: UpLayers, emits: Sequence[int]) -> None:
        super().__init__()
        self.embeddings, self.conv_in, self.head = parts.embeddings, parts.conv_in, parts.head
        self.down = nn.ModuleList(parts.down[: len(up) - 1])
        self.up = nn.ModuleList(up)
        self.emits = tuple(emits)
        self._adapted = parts.adapted
        self._up_factor = 2 ** sum(layer.resampler is not None for layer in parts.up)

    def cached_of(self, feature: Tensor, branch_id: int) -> tuple[Tensor, ...]:
        """What is cached of a feature at a cut: itself, or its projections."""
        consumer: Any = self.up[len(self.up) - 1 - branch_id]
        return consumer.take(feature)

    def _embed(
        self, sample: Tensor, timestep: Tensor, text: Tensor | None, conditioning: Conditioning
    ) -> tuple[Tensor, Signals]:
        dtype = get_parameter_dtype(self.conv_in)  # which weights may only be stored apart from (layerwise casting)
        return self.embeddings.enter(dtype, sample, timestep, text, conditioning)

    def _descend(self, sample: Tensor, signals: Signals, adapter: Sequence[Tensor]) -> list[Tensor]:
        """The skip connections; a T2I-Adapter's residuals join one layer a block, and flow on from there."""
        added = dict(zip(self._adapted, adapter, strict=False))
        skips: list[Tensor] = [self.conv_in(sample)]
        for index, layer in enumerate(self.down):
            h = layer(skips[-1], signals)
            skips.append(h + added[index].to(h.dtype) if index in added else h)
        return skips

    def _ascend(self, taken: tuple[Tensor, ...], skips: list[Tensor], signals: Signals) -> tuple[Tensor, ...]:
        """From what the first up layer takes to `(noise_pred, *emitted)`."""
        emitted: dict[int, tuple[Tensor, ...]] = {}
        h: Tensor | None = None
        for layer in self.up:
            consumer: Any = layer
            branch_id, skip = len(skips) - 1, skips.pop()
            taken = taken if h is None else consumer.take(h)
            if branch_id in self.emits:
                emitted[branch_id] = taken
            h = consumer(taken, skip, signals, self._size(skips))
        noise_pred = self.embeddings.restore(self.head(h), signals)
        return noise_pred, *(tensor for branch_id in self.emits for tensor in emitted[branch_id])

    def _size(self, skips: list[Tensor]) -> torch.Size | None:
        """As in diffusers: a size that upsamplers cannot double back to is taken from the next skip connection."""
        if skips and any(n % self._up_factor for n in skips[0].shape[-2:]):
            return skips[-1].shape[-2:]
        return None


class FullUNet(_Pass):
    """The whole U-Net, returning `(noise_pred, *cached)`."""

    def __init__(self, parts: UNetParts, up: UpLayers, emits: Sequence[int]) -> None:
        super().__init__(parts, up, emits)
        self.middle = parts.middle

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        **conditioning: Unpack[Conditioning],
    ) -> tuple[Tensor, ...]:
        """Run everything. Arguments are those of the U-Net's own forward, by name.

        Shapes: `sample` (N, C, H, W), a video's as its U-Net takes it; `timestep` () or (N,); `encoder_hidden_states`
        (N, tokens, width). Returns `noise_pred` as the U-Net does and, for each entry of `Cut.cached`, a tensor
        (N, its channels, H / s, W / s), where s is `Cut.feature_stride` and N counts the frames of a video.

        Raises: `ValueError` for a ControlNet's residuals without its middle one, or not one for each skip connection.
        """
        if (down_block_additional_residuals is None) != (mid_block_additional_residual is None):
            raise ValueError(
                "expected a ControlNet's down_block_additional_residuals and mid_block_additional_residual together, "
                "got one of them; a T2I-Adapter's are down_intrablock_additional_residuals"
            )
        sample, signals = self._embed(sample, timestep, encoder_hidden_states, conditioning)
        adapter = down_intrablock_additional_residuals or ()
        skips = self._descend(sample, signals, adapter)
        h = self.middle(skips[-1], signals)
        # The residual after the last block's is the middle's, where it fits: T2I-Adapter-XL has one, others have none.
        own = adapter[len(self._adapted) :]
        if own and self.middle.block is not None and own[0].shape == h.shape:
            h = h + own[0].to(h.dtype)
        if mid_block_additional_residual is not None:
            h = h + mid_block_additional_residual.to(h.dtype)
        skips = _controlled(skips, down_block_additional_residuals)
        return self._ascend(self.cached_of(h, len(skips) - 1), skips, signals)


class ShallowUNet(_Pass):
    """What lies above the cut: `noise_pred` from the sample and what is cached."""

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        cached_feature: Tensor | None = None,
        cached_residual: Tensor | None = None,
        *,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        **conditioning: Unpack[Conditioning],
    ) -> Any:
        """Run the layers above the cut; `cached_residual` belongs to the projected cut.

        Residuals are taken for the skip connections that this pass makes: the first `branch_id` + 1 of a ControlNet's,
        the first blocks' of a T2I-Adapter's. What comes beyond, and the middle one, concerns layers below the cut.

        Shapes: as in `FullUNet.forward`. Returns `noise_pred`; a pass that refreshes shallower cuts returns
        `(noise_pred, *refreshed)`, by `Cut.refreshes`.

        Raises: `ValueError` without `cached_feature`, or with fewer of a ControlNet's residuals.
        """
        if cached_feature is None:
            raise ValueError("expected cached_feature, which the full pass returns, got none")
        sample, signals = self._embed(sample, timestep, encoder_hidden_states, conditioning)
        skips = self._descend(sample, signals, down_intrablock_additional_residuals or ())
        skips = _controlled(skips, down_block_additional_residuals)
        cached = (cached_feature,) if cached_residual is None else (cached_feature, cached_residual)
        outputs = self._ascend(cached, skips, signals)
        return outputs if self.emits else outputs[0]


def _controlled(skips: list[Tensor], residuals: Sequence[Tensor] | None) -> list[Tensor]:
    """The skip connections as the up layers get them, with a ControlNet's residuals added."""
    if residuals is None:
        return skips
    if len(residuals) < len(skips):
        raise ValueError(
            f"expected down_block_additional_residuals for {len(skips)} skip connections, got {len(residuals)}"
        )
    return [skip + residual.to(skip.dtype) for skip, residual in zip(skips, residuals, strict=False)]


@dataclass(frozen=True)
class Cut:
    """The two halves of DeepCache over one U-Net's weights, and where the cut lies.

    `cached` are the tensors that cross, by name, with their channels: `cached_feature`, and in the projected cut
    `cached_residual`. `feature_channels` are those of the feature at the cut, whichever form of it is cached.
    `refreshes` are the tensors of shallower cuts that the shallow pass returns after `noise_pred` (`Cuts`).
    """

    full: FullUNet
    shallow: ShallowUNet
    branch_id: int
    num_branches: int
    feature_channels: int
    feature_stride: int
    kind: CutKind
    cached: dict[str, int]
    refreshes: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class Cuts:
    """One full pass and a shallow pass for each of several branch ids, over one U-Net's weights.

    `at[b]` is the cut at branch b, in the order that was asked for; the first is the primary one. `full` is the full
    pass of them all and returns `(noise_pred, *cached)`, by `cached`. `at[b].shallow` takes what is cached at b as
    `cached_feature` and, if projected, `cached_residual`; it returns `noise_pred`, and behind it what the shallower
    branches cache, by `at[b].refreshes`, as a deeper shallow step computes it anyway. The primary branch's tensors
    have a single cut's names; those of branch b are `cached_feature_b` and `cached_residual_b`.
    """

    at: dict[int, Cut]

    @property
    def full(self) -> FullUNet:
        return next(iter(self.at.values())).full

    @property
    def cached(self) -> dict[str, int]:
        """Every tensor that crosses, by name, with its channels, in the order in which `full` returns them."""
        return {name: channels for cut in self.at.values() for name, channels in cut.cached.items()}


def partition_unet(unet: nn.Module, branch_id: int = 0, cut: CutWish = "plain") -> Cut:
    """Cut a U-Net at skip connection `branch_id`, 0 the shallowest (DeepCacheSDHelper's counting).

    The modules share the U-Net's submodules; the U-Net itself is not changed. `projected` copies the weights of one
    resnet in halves, and `auto` is that where it is possible. Load adapters before cutting: what replaces a layer of
    the U-Net later may not be seen.

    Raises: `PartitionError` for a branch id out of range (the message names the range), a U-Net that cannot be cut, or
    a cut that cannot be projected.
    Source: DeepCache, arXiv 2312.00858, section 3.2, equations 4 to 6.
    """
    return partition_branches(unet, (branch_id,), cut).at[branch_id]


def partition_branches(unet: nn.Module, branch_ids: Iterable[int], cut: CutWish = "plain") -> Cuts:
    """Cut a U-Net at several skip connections at once, for plans that choose a depth at each step.

    Raises: `PartitionError` as `partition_unet`, and for no branch id or the same one twice.
    """
    parts = take_apart(unet)
    wanted, last = check_branches(branch_ids, parts), parts.num_skips - 1
    up: list[JoinedLayer | ProjectedLayer] = [JoinedLayer(layer) for layer in parts.up]
    for branch_id in wanted:
        layer, channels = parts.up[last - branch_id], parts.main_channels[branch_id]
        reason = why_not(layer, channels)
        if cut == "projected" and reason is not None:
            raise PartitionError(
                f"expected a cut that can be projected, got branch {branch_id}: {reason}; use cut plain"
            )
        if cut != "plain" and reason is None:
            up[last - branch_id] = ProjectedLayer(layer, channels)
    full = FullUNet(parts, up, wanted)
    names = {b: _cached(parts, up, b, "" if b == wanted[0] else f"_{b}") for b in wanted}
    return Cuts({branch_id: _cut(parts, up, branch_id, full, names) for branch_id in wanted})


def _cached(parts: UNetParts, up: UpLayers, branch_id: int, suffix: str) -> dict[str, int]:
    consumer = up[parts.num_skips - 1 - branch_id]
    if isinstance(consumer, ProjectedLayer):
        channels = consumer.conv.in_channels
        return {f"cached_feature{suffix}": channels, f"cached_residual{suffix}": channels}
    return {f"cached_feature{suffix}": parts.main_channels[branch_id]}


def _cut(parts: UNetParts, up: UpLayers, branch_id: int, full: FullUNet, names: dict[int, dict[str, int]]) -> Cut:
    shallower = [other for other in names if other < branch_id]
    return Cut(
        full=full,
        shallow=ShallowUNet(parts, up[parts.num_skips - 1 - branch_id :], shallower),
        branch_id=branch_id,
        num_branches=parts.num_skips,
        feature_channels=parts.main_channels[branch_id],
        feature_stride=parts.skip_strides[branch_id],
        kind="projected" if isinstance(up[parts.num_skips - 1 - branch_id], ProjectedLayer) else "plain",
        cached=names[branch_id],
        refreshes={name: channels for other in shallower for name, channels in names[other].items()},
    )
