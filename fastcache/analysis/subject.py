"""What a user calls a model, and prompts -> what an analysis runs on: U-Net, conditioning, size and noise schedule.

Knows where prompts come from when none are given; knows nothing about what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from fastcache.bench.work import empty_unet, geometry
from fastcache.compile.models import TOKENIZERS, SourceModel, find_model
from fastcache.compile.passes import unet_inputs
from fastcache.demo.scenes import Scene, held_out_scenes
from fastcache.errors import BackendUnavailable

# For real models, from single things to scenes and styles.
PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a red bicycle leaning against a brick wall",
    "a portrait of an old fisherman, oil painting",
    "a bowl of fruit on a wooden table, morning light",
    "a city street at night in the rain, neon signs",
    "a fox in a snowy forest",
    "a mountain lake under a clear sky, wide angle",
    "a watercolour of a lighthouse on a cliff",
)
_TOKENS = 77  # CLIP's text length, for a preset without one


@dataclass(frozen=True)
class Subject:
    """A model to analyse, its U-Net loaded, at one image size, and the prompts to draw, sample k with seed k.

    `scenes` are what the prompts ask for, where that is known: of the bundled model's own prompts.
    """

    source: SourceModel
    unet: nn.Module
    height: int
    width: int
    scale: int
    prompts: tuple[str, ...]
    scenes: tuple[Scene, ...] | None = None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.height // self.scale, self.width // self.scale

    @cached_property
    def _pipeline(self) -> Any:
        """diffusers' own text-to-image pipeline, for how it encodes prompts."""
        parts: dict[str, Any] = {"unet": self.unet, "vae": None, "scheduler": None}
        for name in self.source.text_encoders:
            parts[name], parts[TOKENIZERS[name]] = self.source.load_text_encoder(name), self.source.load_tokenizer(name)
        if self.source.family == "sdxl":
            zeros: bool = self.source.settings.get("force_zeros_for_empty_prompt", True)
            return diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros)
        parts |= dict.fromkeys(("safety_checker", "feature_extractor"))
        return diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)

    @cached_property
    def vae(self) -> Any:
        return self.source.load_vae()

    def conditioning(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The U-Net's inputs beside sample and timestep, seeded random rows for random weights.

        Shapes: 2P rows, unconditional first; P rows for a model without any conditioning to guide with.
        """
        rows = 2 * len(prompts)
        if self.source.random_weights:
            inputs = unet_inputs(cast(UNet2DConditionModel, self.unet), rows, *self.latent_size, _TOKENS)
            return {name: tensor for name, tensor in inputs.items() if name not in ("sample", "timestep")}
        with torch.no_grad():
            positive, negative, *pooled = self._pipeline.encode_prompt(
                list(prompts), device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
            )
        inputs = {"encoder_hidden_states": torch.cat([negative, positive])}
        if pooled:
            sizes = [self.height, self.width, 0, 0, self.height, self.width]
            inputs["text_embeds"] = torch.cat([pooled[1], pooled[0]])
            inputs["time_ids"] = torch.tensor([sizes], dtype=torch.float32).repeat(rows, 1)
        return inputs

    def decode(self, latents: Tensor) -> Tensor:
        """Shapes: (N, C, h, w) as the sampler leaves them, to (N, 3, H, W) in [0, 1]."""
        config: Any = self.vae.config
        with torch.no_grad():
            images: Tensor = self.vae.decode(latents.cpu() / config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0, 1)


def find_subject(
    model: str,
    *,
    random_weights: bool = False,
    revision: str | None = None,
    height: int | None = None,
    width: int | None = None,
    prompts_file: Path | None = None,
    num_prompts: int = 8,
    seeds: int = 1,
    device: str | None = None,
) -> Subject:
    """Load a model, and read its prompts or take the first `num_prompts` of those kept for it.

    Without a `device` the U-Net goes to the GPU where there is one.

    Raises: `ValueError` for an unknown model, one of videos, a size that its latents cannot have, a model with weights
    but no text encoder, or a prompts file without prompts; `BackendUnavailable` for a GPU that is not there.
    """
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"expected --device cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("expected a CUDA device for --device cuda, torch sees none here; use --device cpu")
    source = find_model(model, random_weights=random_weights, revision=revision)
    source.require_pictures()
    _refuse_unprompted(source)
    shapes = geometry(source)
    sizes = shapes.size if height is None else height, shapes.size if width is None else width
    for size in sizes:
        if size < shapes.scale or size % shapes.scale:
            raise ValueError(f"expected a height and width in multiples of {shapes.scale} pixels, got {size}")
    own_scenes = source.name == "demo" and prompts_file is None
    scenes = tuple(scene for scene in held_out_scenes(num_prompts) for _ in range(seeds)) if own_scenes else None
    if scenes is not None:
        samples = tuple(scene.caption() for scene in scenes)
    else:
        samples = tuple(prompt for prompt in _prompts(source, prompts_file, num_prompts) for _ in range(seeds))
    unet: Any = source.load_unet()
    unet = unet.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Subject(source, unet, *sizes, shapes.scale, samples, scenes)


def _refuse_unprompted(source: SourceModel) -> None:
    """Trained weights are measured on real prompts only, and drawing from nothing else."""
    if source.random_weights:
        return
    if "text" not in source.components:
        have = ", ".join(source.components)
        raise ValueError(f"expected a model with its text encoder, got {source.name}, which has {have}")
    config: Any = empty_unet(source).config
    if config.in_channels != config.out_channels or source.settings.get("requires_aesthetics_score"):
        raise ValueError(f"expected a text-to-image model, got {source.name}, which draws from a picture")


def _prompts(source: SourceModel, file: Path | None, count: int) -> list[str]:
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"expected a file of prompts, one a line, got {file}: {error}") from None
        if not any(lines):
            raise ValueError(f"expected prompts in {file}, one a line, got none")
        return [line for line in lines if line]
    if source.random_weights:
        return [f"random conditioning {k}" for k in range(count)]
    if source.name == "demo":
        return [scene.caption() for scene in held_out_scenes(count)]
    if count > len(PROMPTS):
        raise ValueError(
            f"expected at most {len(PROMPTS)} prompts of those kept for all models, got {count}; use --prompts"
        )
    return list(PROMPTS[:count])
