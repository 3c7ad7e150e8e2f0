"""fastcache: a diffusion U-Net as two engines, full and shallow, and a loop that switches between them.

The public names are loaded when they are first used, so that `import fastcache` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcache.bundle.bundle import Bundle
    from fastcache.bundle.recipe import Recipe
    from fastcache.compile.builder import build_engines
    from fastcache.cut.partition import Cut, partition_unet
    from fastcache.cut.pieces import BlockUNet, partition_blocks
    from fastcache.errors import BackendUnavailable, BuildError, BundleError, PartitionError
    from fastcache.helper.helper import FastCacheHelper
    from fastcache.loop.plan import CachePlan, Forecast
    from fastcache.pipeline.loading import load
    from fastcache.pipeline.pipeline import FastCachePipeline
    from fastcache.sampler.table import SamplerTable, compile_sampler

__version__ = "0.1.0"

_HOMES = {
    "BackendUnavailable": "fastcache.errors",
    "BlockUNet": "fastcache.cut.pieces",
    "BuildError": "fastcache.errors",
    "Bundle": "fastcache.bundle.bundle",
    "BundleError": "fastcache.errors",
    "CachePlan": "fastcache.loop.plan",
    "Cut": "fastcache.cut.partition",
    "FastCacheHelper": "fastcache.helper.helper",
    "FastCachePipeline": "fastcache.pipeline.pipeline",
    "Forecast": "fastcache.loop.plan",
    "PartitionError": "fastcache.errors",
    "Recipe": "fastcache.bundle.recipe",
    "SamplerTable": "fastcache.sampler.table",
    "build_engines": "fastcache.compile.builder",
    "compile_sampler": "fastcache.sampler.table",
    "load": "fastcache.pipeline.loading",
    "partition_blocks": "fastcache.cut.pieces",
    "partition_unet": "fastcache.cut.partition",
}

__all__ = [
    "BackendUnavailable",
    "BlockUNet",
    "BuildError",
    "Bundle",
    "BundleError",
    "CachePlan",
    "Cut",
    "FastCacheHelper",
    "FastCachePipeline",
    "Forecast",
    "PartitionError",
    "Recipe",
    "SamplerTable",
    "__version__",
    "build_engines",
    "compile_sampler",
    "load",
    "partition_blocks",
    "partition_unet",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastcache' has no attribute {name!r}")
    importlib.import_module("fastcache.installed").require_alone()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
