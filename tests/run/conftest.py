"""The bundled model for the tests of the run side: its engines, built once for all workers, and as a live pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import fastcache
from fastcache import Bundle
from fastcache.demo import MODEL_DIRECTORY

DemoBundle = Callable[[int], Bundle]


@pytest.fixture(scope="session")
def demo_bundle(_shared_folder: Path) -> DemoBundle:
    """The bundled model cut at a branch; only branch 0 comes with its text encoder and VAE."""

    @cache
    def build(branch_id: int) -> Bundle:
        components = None if branch_id == 0 else ("unet",)
        output = _shared_folder / f"demo-branch-{branch_id}"
        return fastcache.build_engines("demo", output=output, branch_id=branch_id, components=components)

    return build


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
