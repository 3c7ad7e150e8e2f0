"""The bundled model as a live pipeline."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fastcache.demo import MODEL_DIRECTORY


@pytest.fixture(scope="session")
def loaded_pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded_pipe: StableDiffusionPipeline) -> Iterator[StableDiffusionPipeline]:
    """The bundled model, and afterwards again as it was, whatever a helper left on its modules."""
    unet, scheduler = loaded_pipe.unet, loaded_pipe.scheduler
    yield loaded_pipe
    loaded_pipe.unet, loaded_pipe.scheduler = unet, scheduler
    for module in unet.modules():
        module.__dict__.pop("forward", None)


@pytest.fixture
def own_pipe() -> StableDiffusionPipeline:
    """A pipeline whose U-Net a test may change for good."""
    pipe = StableDiffusionPipeline.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
