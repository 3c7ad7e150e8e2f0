"""A diffusers U-Net and scheduler -> latents, for models that diffusers' text-to-image pipelines do not run.

Those are U-Nets without text, the refiner, and U-Nets that take more than latents. Knows nothing about engines.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastcache.compile.passes import call_unet


class PlainPipeline:
    """The denoising loop alone. DeepCacheSDHelper takes it for a pipeline, by its `unet` and its `scheduler`."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        self.unet, self.scheduler = unet, scheduler

    @torch.no_grad()
    def __call__(
        self,
        conditioning: Mapping[str, Tensor],
        latents: Tensor,
        num_inference_steps: int,
        guidance_scale: float,
        image_guidance_scale: float,
        generator: torch.Generator,
    ) -> Tensor:
        """The latents after the last step. What the U-Net takes beside the latents (a mask, a picture) is zeros.

        Shapes: `latents` (N, C, H, W) as drawn from a unit normal; `conditioning` the U-Net's inputs by name, of as
        many rows as guidance has parts for each image, in the order of `FastCachePipeline.start`.
        """
        step, scheduler = self.scheduler.step, self.scheduler
        drawing = {"generator": generator} if "generator" in inspect.signature(step).parameters else {}
        parts = max([1, *(len(rows) // len(latents) for rows in conditioning.values())])
        config: Any = self.unet.config
        further = config.in_channels - latents.shape[1]
        scheduler.set_timesteps(num_inference_steps)
        latents = latents * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            rows = scheduler.scale_model_input(latents, timestep).repeat(parts, 1, 1, 1)
            sample = functional.pad(rows, (0, 0, 0, 0, 0, further))
            noise_pred = call_unet(self.unet, {**conditioning, "sample": sample, "timestep": timestep}).sample
            guided = _guide(noise_pred.chunk(parts), guidance_scale, image_guidance_scale)
            latents = step(guided, timestep, latents, **drawing).prev_sample
        return latents


def _guide(parts: tuple[Tensor, ...], scale: float, image_scale: float) -> Tensor:
    """Source: arXiv 2207.12598, equation 6; of three parts arXiv 2211.09800, equation 3."""
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return parts[0] + scale * (parts[1] - parts[0])
    return parts[0] + image_scale * (parts[1] - parts[0]) + scale * (parts[2] - parts[1])
