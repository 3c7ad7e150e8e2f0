"""The bundled model as a live pipeline, at half its size: a quarter of the work, and nothing else to see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from diffusers import StableDiffusionPipeline

from live_pipelines import NATIVE, load_pipe


@pytest.fixture(scope="session")
def loaded_pipe() -> StableDiffusionPipeline:
    return load_pipe()


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
    return load_pipe()


@pytest.fixture
def native_pipe() -> StableDiffusionPipeline:
    """Such a pipeline at the size that the bundled model's engines are built for."""
    return load_pipe(NATIVE)
