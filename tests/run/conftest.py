"""Engines of the bundled model for the tests of the run side, built once for all workers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import fastcache
from fastcache import Bundle

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
