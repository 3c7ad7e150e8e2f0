"""A ControlNet and a branch id -> the part of it that feeds the skip connections which a shallow pass executes.

A ControlNet mirrors the down half of its U-Net: one residual for each skip connection, and one for the middle. A full
step needs them all, so its full pass is the ControlNet itself; a shallow step cut at `branch_id` uses the first
`branch_id` + 1, and these need only as many of the down layers. Knows nothing about the U-Net.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ControlNetModel, MultiControlNetModel
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from fastcache.cut.signals import Embeddings, control_embeddings
from fastcache.cut.unet import down_layers
from fastcache.errors import PartitionError
from fastcache.expect import is_int


class ShallowControlNet(nn.Module):
    """The first residuals of a ControlNet, computed from as little as they need."""

    def __init__(self, controlnet: ControlNetModel, embeddings: Embeddings, branch_id: int) -> None:
        super().__init__()
        model: Any = controlnet
        self.embeddings, self.conv_in, self.conditioning = embeddings, model.conv_in, model.controlnet_cond_embedding
        self.down = nn.ModuleList(down_layers(model.down_blocks)[0][:branch_id])
        self.out = nn.ModuleList(model.controlnet_down_blocks[: branch_id + 1])
        self._num_scales = len(model.controlnet_down_blocks) + 1
        self._flips = model.config.controlnet_conditioning_channel_order == "bgr"
        self._pools: bool = model.config.global_pool_conditions

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        guess_mode: bool = False,
        **conditioning: Any,
    ) -> tuple[Tensor, ...]:
        """The residuals of skip connections 0 to `branch_id`. Arguments are those of `ControlNetModel.forward`.

        Shapes: `controlnet_cond` (N, 3, H, W) in pixels; residuals as those skip connections, or 1 x 1 where the
        ControlNet pools them.
        """
        sample, signals = self.embeddings(sample, timestep, encoder_hidden_states, **conditioning)
        condition = controlnet_cond.flip(1) if self._flips else controlnet_cond
        skips: list[Tensor] = [self.conv_in(sample) + self.conditioning(condition)]
        for layer in self.down:
            skips.append(layer(skips[-1], signals))
        residuals = [out(skip) for out, skip in zip(self.out, skips, strict=True)]
        if guess_mode and not self._pools:  # from a tenth at the shallowest to all of the middle's
            scales: Any = torch.logspace(-1, 0, self._num_scales, device=sample.device) * conditioning_scale
        else:
            scales = [conditioning_scale] * self._num_scales
        residuals = [residual * scale for residual, scale in zip(residuals, scales, strict=False)]
        return tuple(r.mean(dim=(2, 3), keepdim=True) if self._pools else r for r in residuals)


class ShallowControlNets(nn.Module):
    """Several ControlNets' first residuals, summed; images and scales come as lists."""

    def __init__(self, controlnets: Sequence[ShallowControlNet]) -> None:
        super().__init__()
        self.controlnets = nn.ModuleList(controlnets)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Sequence[Tensor],
        conditioning_scale: Sequence[float],
        guess_mode: bool = False,
        **conditioning: Any,
    ) -> tuple[Tensor, ...]:
        every = [
            controlnet(sample, timestep, encoder_hidden_states, image, scale, guess_mode, **conditioning)
            for controlnet, image, scale in zip(self.controlnets, controlnet_cond, conditioning_scale, strict=True)
        ]
        return tuple(functools.reduce(torch.add, residuals) for residuals in zip(*every, strict=True))


def shallow_controlnet(controlnet: nn.Module, branch_id: int) -> ShallowControlNet | ShallowControlNets:
    """What a shallow pass at `branch_id` needs of a ControlNet, or of several in a `MultiControlNetModel`.

    It shares the ControlNet's submodules; the ControlNet itself is not changed.

    Raises: `PartitionError` for a branch id out of range, or another class.
    """
    nets: list[Any] = list(controlnet.nets) if isinstance(controlnet, MultiControlNetModel) else [controlnet]
    for net in nets:
        if type(net) is not ControlNetModel:
            raise PartitionError(f"expected a ControlNetModel, got {type(net).__name__}; leave caching off with it")
    last = min(len(net.controlnet_down_blocks) for net in nets) - 1
    if not is_int(branch_id) or not 0 <= branch_id <= last:
        raise PartitionError(f"expected a branch_id from 0 to {last} for this ControlNet, got {branch_id!r}")
    parts = [ShallowControlNet(net, control_embeddings(net), branch_id) for net in nets]
    return ShallowControlNets(parts) if isinstance(controlnet, MultiControlNetModel) else parts[0]
