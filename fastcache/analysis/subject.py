"""What a user calls a model, and prompts -> what an analysis runs on: U-Net, conditioning, size and noise schedule.

Knows where prompts come from when none are given; knows nothing about what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastcache.bench.eager import EagerParts
from fastcache.bench.work import empty_unet, geometry
from fastcache.compile.calibrate import PROMPTS
from fastcache.compile.models import SourceModel, find_model
from fastcache.demo.scenes import Scene, held_out_scenes
from fastcache.errors import BackendUnavailable


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
    def _parts(self) -> EagerParts:
        return EagerParts(self.source, geometry(self.source))

    def conditioning(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The U-Net's inputs beside sample and timestep. Shapes: 2P rows, unconditional first; none without any."""
        return self._parts.conditioning(prompts, self.height, self.width)

    def decode(self, latents: Tensor) -> Tensor:
        """Shapes: (N, C, h, w) as the sampler leaves them, to (N, 3, H, W) in [0, 1]."""
        return self._parts.decode(latents)


def find_subject(
    model: str,
    *,
    random_weights: bool = False,
    revision: str | None = None,
    height: int | None = None,
    width: int | None = None,
    prompts: Sequence[str] | None = None,
    num_prompts: int = 8,
    seeds: int = 1,
    device: str | None = None,
) -> Subject:
    """Load a model, with the prompts given or the first `num_prompts` of those kept for it.

    Without a `device` the U-Net goes to the GPU where there is one.

    Raises: `ValueError` for an unknown model, one of videos, a size that its latents cannot have, or a model
    with weights but no text encoder; `BackendUnavailable` for a GPU that is not there.
    """
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"expected --device cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("expected a CUDA device for --device cuda, torch sees none here; use --device cpu")
    source = find_model(model, random_weights=random_weights, revision=revision)
    source.require_pictures()
    _refuse_unprompted(source)
    shapes = geometry(source)
    size = shapes.size(height, width)
    scenes = None
    if source.name == "demo" and prompts is None:
        scenes = tuple(scene for scene in held_out_scenes(num_prompts) for _ in range(seeds))
        samples = tuple(scene.caption() for scene in scenes)
    else:
        samples = tuple(prompt for prompt in prompts or _prompts(source, num_prompts) for _ in range(seeds))
    unet: Any = source.load_unet()
    unet = unet.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Subject(source, unet, *size, shapes.scale, samples, scenes)


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


def _prompts(source: SourceModel, count: int) -> list[str]:
    if source.random_weights:
        return [f"random conditioning {k}" for k in range(count)]
    if count > len(PROMPTS):
        raise ValueError(
            f"expected at most {len(PROMPTS)} prompts of those kept for all models, got {count}; use --prompts"
        )
    return list(PROMPTS[:count])
