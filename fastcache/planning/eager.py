"""A diffusers U-Net in PyTorch and its conditioning -> a `Denoiser` with as many cuts as are asked for.

The U-Net runs as diffusers runs it; features are taken by hooks where the cuts lie, so that one pass gives them for
every branch, and whatever else hooks into its modules sees a plain run. Knows nothing about samplers or plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcache.compile.passes import call_unet
from fastcache.cut.partition import Cut, partition_unet
from fastcache.cut.unet import take_apart
from fastcache.planning.trajectory import Feature, guide

_LATENT_ELEMENTS = 2**18  # in one call: 64 rows of 16x16 latents, 16 of 64x64; more gain nothing on a CPU
_MAX_ROWS = 64


class EagerDenoiser:
    """The `Denoiser` of a U-Net in PyTorch, for the P images that `conditioning` describes.

    Shapes: `conditioning`, the U-Net's inputs by name beside sample and timestep, of 2P rows, unconditional first, or
    of P rows for a model without guidance; `latent_size` (height, width) of the latents.
    Raises: `PartitionError` for a U-Net that cannot be cut, or a branch id that it does not have.
    """

    def __init__(
        self,
        unet: nn.Module,
        conditioning: Mapping[str, Tensor],
        images: int,
        latent_size: tuple[int, int],
        branch_ids: Sequence[int] = (0,),
    ) -> None:
        weight = next(unet.parameters())
        self.device, self._dtype, self._unet = str(weight.device), weight.dtype, unet
        self._conditioning = {name: rows.to(weight.device) for name, rows in conditioning.items()}
        self.images = images
        self._halves = max([1, *(len(rows) // images for rows in conditioning.values())])
        self.branch_ids = tuple(branch_ids)
        self._cuts: dict[int, Cut] = {branch_id: partition_unet(unet, branch_id) for branch_id in branch_ids}
        up = take_apart(unet).up
        self._consumers: dict[int, Any] = {b: up[len(up) - 1 - b].resnet for b in branch_ids}
        config: Any = unet.config
        self.latent_shape = (config.out_channels, *latent_size)
        self._further_channels = config.in_channels - config.out_channels  # inpainting's mask and picture: zeros

    def full(self, samples: Tensor, timestep: float, guidance_scale: float) -> Tensor:
        return torch.cat(
            [self._full(part, timestep, guidance_scale) for part in samples.split(self._variants(samples))]
        )

    def store(self, sample: Tensor, timestep: float, guidance_scale: float) -> tuple[Tensor, tuple[Feature, ...]]:
        found: dict[int, Feature] = {}

        def take(branch_id: int, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            channels = self._cuts[branch_id].feature_channels  # what was joined comes after it
            found[branch_id] = (arguments[0][:, :channels].clone(),)

        hooks = [module.register_forward_pre_hook(partial(take, b)) for b, module in self._consumers.items()]
        try:
            guided = self._full(sample[None], timestep, guidance_scale)[0]
        finally:
            for hook in hooks:
                hook.remove()
        return guided, tuple(found[branch_id] for branch_id in self.branch_ids)

    def reuse(
        self, sample: Tensor, timestep: float, guidance_scale: float, branch_id: int, features: Sequence[Feature]
    ) -> Tensor:
        shallow, size = self._cuts[branch_id].shallow, self._variants(sample[None])
        parts = [features[start : start + size] for start in range(0, len(features), size)]
        return torch.cat(
            [
                self._run(
                    shallow,
                    sample.expand(len(part), *sample.shape),
                    timestep,
                    guidance_scale,
                    cached_feature=torch.stack([feature[0] for feature in part]).flatten(0, 1),
                )
                for part in parts
            ]
        )

    def _full(self, samples: Tensor, timestep: float, guidance_scale: float) -> Tensor:
        return self._run(self._unet, samples, timestep, guidance_scale)

    def _variants(self, samples: Tensor) -> int:
        """How many variants of the batch go through the network at once."""
        rows = min(_MAX_ROWS, _LATENT_ELEMENTS // samples[0, 0].numel())
        return max(1, rows // (self._halves * self.images))

    @torch.no_grad()
    def _run(self, network: Any, samples: Tensor, timestep: float, guidance_scale: float, **cached: Tensor) -> Tensor:
        """One call for all variants: rows are ordered by variant, then half, then image."""
        variants = len(samples)
        rows = samples[:, None].expand(-1, self._halves, -1, -1, -1, -1).flatten(0, 2).to(self.device, self._dtype)
        inputs = {name: torch.cat([tensor] * variants) for name, tensor in self._conditioning.items()}
        inputs["timestep"] = torch.full((len(rows),), timestep, device=self.device)
        inputs["sample"] = functional.pad(rows, (0, 0, 0, 0, 0, self._further_channels))
        noise_pred: Tensor = call_unet(network, {**inputs, **cached})
        if not isinstance(noise_pred, Tensor):  # the U-Net itself returns one of diffusers' outputs
            noise_pred = noise_pred[0]
        return guide(noise_pred.unflatten(0, (variants, self._halves, self.images)).transpose(0, 1), guidance_scale)
