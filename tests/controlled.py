"""Pictures, texts and pipelines for tests of networks that a picture steers: the same for diffusers and fastcache."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastcache.cli import main
from fastcache.sampler.scheduler import make_scheduler
from tiny_model import TEXT_WIDTH, TOKENS

STEPS = 8
# As diffusers' older pipelines set it, and fastcache for all: others take the file's timesteps, one less.
SCHEDULER = {"steps_offset": 1}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int, rows: int = 1) -> Tensor:
    return torch.rand(rows, 3, 32, 32, generator=seeded(seed))


def pil(seed: int, size: int = 48) -> Image.Image:
    pixels = (torch.rand(size, size, 3, generator=seeded(seed)) * 255).byte().numpy()
    return Image.fromarray(pixels)


def command(*arguments: object, patch: pytest.MonkeyPatch, code: int = 0) -> None:
    """`fastcache` with arguments, which is to end with an exit code."""
    patch.setattr(sys, "argv", ["fastcache", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code or 0) == code


def live(kind: Any, model: Path, **modules: Any) -> Any:
    """A pipeline of diffusers, by its class."""
    loaded = kind.from_pretrained(model, dtype=torch.float32, **modules)
    loaded.scheduler = make_scheduler("ddim", {**loaded.scheduler.config, **SCHEDULER})
    loaded.set_progress_bar_config(disable=True)
    return loaded


def texts(rows: int = 1) -> dict[str, Any]:
    generator = seeded(11)
    wanted, unwanted = (torch.randn(rows, TOKENS, TEXT_WIDTH, generator=generator) for _ in range(2))
    return {"prompt_embeds": wanted, "negative_prompt_embeds": unwanted}


def latents(pipeline: Any, *, seeds: Sequence[int] = (0,), **arguments: Any) -> Tensor:
    """What either pipeline draws."""
    generators = [seeded(seed) for seed in seeds]
    given = {"num_inference_steps": STEPS, "output_type": "latent", **texts(), **arguments}
    return pipeline(generator=generators if len(seeds) > 1 else generators[0], **given).images
