"""A model's own parts in PyTorch, around its U-Net: prompts -> what the U-Net is told, latents -> pictures.

As diffusers has it for real weights; for random ones there are seeded random rows. Knows nothing about steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import diffusers
import torch
from torch import Tensor

from fastcache.bench.work import Geometry, empty_unet
from fastcache.compile.components import VAEDecoder
from fastcache.compile.models import TOKENIZERS, SourceModel
from fastcache.compile.passes import unet_inputs
from fastcache.pipeline.prompts import Sizes


class EagerParts:
    """The text encoders and the VAE of a model, each loaded when it is first used."""

    def __init__(self, source: SourceModel, shapes: Geometry) -> None:
        self.source, self.shapes = source, shapes

    @cached_property
    def _pipeline(self) -> Any:
        """diffusers' own text-to-image pipeline, for how it encodes prompts."""
        parts: dict[str, Any] = dict.fromkeys(("unet", "vae", "scheduler", "text_encoder", "tokenizer"))
        for name in self.source.text_encoders:
            parts[name], parts[TOKENIZERS[name]] = self.source.load_text_encoder(name), self.source.load_tokenizer(name)
        if self.source.family == "sdxl":
            zeros: bool = self.source.settings.get("force_zeros_for_empty_prompt", True)
            return diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros)
        parts |= dict.fromkeys(("safety_checker", "feature_extractor"))
        return diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)

    @cached_property
    def _decoder(self) -> VAEDecoder:
        return VAEDecoder(self.source.load_vae())

    @torch.no_grad()
    def conditioning(self, prompts: Sequence[str], height: int, width: int) -> dict[str, Tensor]:
        """The U-Net's inputs beside sample and timestep.

        Shapes: 2P rows, unconditional first; none for a U-Net that takes no conditioning.
        """
        rows = 2 * len(prompts)
        if "text" not in self.source.components:
            latent = height // self.shapes.scale, width // self.shapes.scale
            told = unet_inputs(empty_unet(self.source), rows, *latent, self.shapes.tokens, self.shapes.time_ids or 0)
            return {name: tensor for name, tensor in told.items() if name not in ("sample", "timestep")}
        positive, negative, *pooled = self._pipeline.encode_prompt(
            list(prompts), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        inputs = {"encoder_hidden_states": torch.cat([negative, positive])}
        if pooled and self.shapes.time_ids is not None:
            inputs["text_embeds"] = torch.cat([pooled[1], pooled[0]])
            inputs["time_ids"] = Sizes().time_ids(
                (height, width), num_ids=self.shapes.time_ids, rows=rows, guided=True, from_image=False
            )
        return inputs

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Shapes: (N, C, h, w) as the sampler leaves them, to (N, 3, H, W) in [0, 1]."""
        return self._decoder({"latents": latents.cpu()})


def control_pattern(height: int, width: int) -> Tensor:
    """A picture for networks that one steers: white rings on black, as an edge detector leaves of a target.

    Shapes: returns (1, 3, height, width) in [0, 1].
    """
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    rings = (torch.cos(8 * torch.pi * torch.hypot(x, y)) > 0.8).float()
    return rings.expand(1, 3, height, width).clone()
