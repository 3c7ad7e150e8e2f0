"""A bundle's folder -> a pipeline. What its engines compiled before is imported while Python imports PyTorch.

So nothing here imports PyTorch before that has begun.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastcache.bundle.bundle import open_bundle
from fastcache.bundle.manifest import Manifest
from fastcache_engines import begin_loading

if TYPE_CHECKING:
    from fastcache.pipeline.pipeline import FastCachePipeline
    from fastcache_engines.protocol import Engine

_NOT_AT_ONCE = {"vae_encoder", "image_encoder"}  # engines for pictures that go in


def load(
    path: str | os.PathLike[str],
    *,
    threads: int = 0,
    cuda_graph: bool = False,
    wrap: Callable[[Engine], Engine] | None = None,
    trusted: str | os.PathLike[str] | None = None,
) -> FastCachePipeline:
    """Open a bundle, every byte checked before anything is loaded. `threads` 0 means as many as torch uses.

    With `cuda_graph` a run on a GPU is one launch, or one a step where its steps are asked for. `wrap` is given every
    engine that is loaded, and what it returns is used: a benchmark's clock, say. `trusted` is a public key's file
    (PEM, Ed25519): a bundle that this key has not signed (`build_engines(..., sign=...)`) is refused.

    Raises: `BundleError` for a bundle that is damaged or for another machine or version; `BackendUnavailable`.
    """
    bundle = open_bundle(Path(path), trusted)
    begin(bundle.manifest)
    from fastcache.pipeline.pipeline import FastCachePipeline

    return FastCachePipeline(bundle, threads=threads, cuda_graph=cuda_graph, wrap=wrap)


def begin(manifest: Manifest) -> None:
    """Begin to load, in a thread, what a bundle's engines compiled in a process before.

    What no engine asks for is let go with the `Runtime` that has them.
    """
    begin_loading(manifest.identity_of(role) for role in manifest.engines if role not in _NOT_AT_ONCE)
