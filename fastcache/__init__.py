"""fastcache: a diffusion U-Net as two engines, full and shallow, and a loop that switches between them.

The public names are loaded when they are first used, so that `import fastcache` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcache.bundle import Bundle
    from fastcache.compile.builder import build_engines
    from fastcache.cut.partition import Cut, partition_unet
    from fastcache.errors import BackendUnavailable, BuildError, BundleError, PartitionError
    from fastcache.recipe import Recipe
    from fastcache.run.helper import FastCacheHelper
    from fastcache.run.pipeline import FastCachePipeline, load
    from fastcache.run.plan import CachePlan, Forecast
    from fastcache.run.sampler import SamplerTable, compile_sampler

__version__ = "0.1.0"

_HOMES = {
    "BackendUnavailable": "fastcache.errors",
    "BuildError": "fastcache.errors",
    "Bundle": "fastcache.bundle",
    "BundleError": "fastcache.errors",
    "CachePlan": "fastcache.run.plan",
    "Cut": "fastcache.cut.partition",
    "FastCacheHelper": "fastcache.run.helper",
    "FastCachePipeline": "fastcache.run.pipeline",
    "Forecast": "fastcache.run.plan",
    "PartitionError": "fastcache.errors",
    "Recipe": "fastcache.recipe",
    "SamplerTable": "fastcache.run.sampler",
    "build_engines": "fastcache.compile.builder",
    "compile_sampler": "fastcache.run.sampler",
    "load": "fastcache.run.pipeline",
    "partition_unet": "fastcache.cut.partition",
}

__all__ = [
    "BackendUnavailable",
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
    "partition_unet",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastcache' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
