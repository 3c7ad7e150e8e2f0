"""A checked bundle -> its engines, loaded, and the buffers they are bound to.

Refuses a bundle of another machine or other versions. Knows engines and tensors; knows nothing about steps or prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import fastcache_engines
from fastcache.bundle import REFERENCE, Bundle, Manifest, Parity, Role
from fastcache.errors import BackendUnavailable, BundleError
from fastcache.parity import measure_parity
from fastcache.run.buffers import BufferPool
from fastcache_engines import Engine, LoadOptions, Workspace


def check_version(manifest: Manifest) -> None:
    """Refuse a bundle of graphs only, or of another version of its backend.

    Raises: `BackendUnavailable` for graphs, or a backend that is not installed; `BundleError` for versions.
    """
    if manifest.recipe.onnx_only:
        raise BackendUnavailable(
            f"expected engines, got ONNX graphs for {manifest.backend} only; build again without --onnx-only"
        )
    installed = fastcache_engines.backend(manifest.backend).version()
    built = manifest.versions.get(manifest.backend)
    if installed != built:
        raise BundleError(
            f"expected a bundle for {manifest.backend} {installed}, which is installed, got one for {built}; "
            "build it again"
        )


def check_here(manifest: Manifest) -> None:
    """Refuse a bundle that was built for another kind of machine or another version of its backend.

    Raises: as `check_version`; `BackendUnavailable` for another machine.
    """
    check_version(manifest)
    backend = fastcache_engines.backend(manifest.backend)
    device, (_, _, targets) = manifest.device_type, manifest.device.partition("-")
    support = backend.support(device)
    if not support.can_run:
        raise BackendUnavailable(f"{manifest.backend} engines cannot run here: {support.reason}")
    here = fastcache_engines.device_here(device)
    if targets != "any" and here not in [f"{device}-{target}" for target in targets.split("+")]:
        raise BackendUnavailable(
            f"expected a bundle for {here}, got one for {manifest.device}; build it on this machine"
        )


def measure_here(folder: Path, manifest: Manifest) -> Parity:
    """How far a checked bundle's engines are from the model and from each other, measured now."""
    backend, entries = fastcache_engines.backend(manifest.backend), manifest.engines
    full, shallow = (folder / entries[role].file for role in ("full", "shallow"))
    options = LoadOptions(manifest.device_type, entries["full"].dtype)
    return measure_parity(backend, full, shallow, folder / REFERENCE, options)


class Runtime:
    """The engines of a bundle, each loaded when it is first used, and one buffer pool, kept between runs."""

    def __init__(self, bundle: Bundle, *, threads: int = 0) -> None:
        check_here(bundle.manifest)
        self.bundle, self.manifest, self._threads = bundle, bundle.manifest, threads
        self.device = bundle.manifest.device_type
        self._workspace = Workspace(self.device)
        self._pool: BufferPool | None = None

    @cached_property
    def full(self) -> Engine:
        return self._load("full")

    @cached_property
    def shallow(self) -> Engine:
        return self._load("shallow")

    @cached_property
    def text_encoder(self) -> Engine:
        return self._load("text_encoder")

    @cached_property
    def vae_decoder(self) -> Engine:
        return self._load("vae_decoder")

    def _load(self, role: Role) -> Engine:
        path, entry = self.bundle.engine_path(role), self.manifest.engines[role]
        options = LoadOptions(self.device, entry.dtype, self._threads, self._workspace)
        return fastcache_engines.backend(self.manifest.backend).load(path, options)

    def pool(self, *, batch: int, guided: bool, num_calls: int) -> BufferPool:
        """The buffers for a run, those of the run before where they fit.

        Raises: `ValueError` for more or fewer images than the bundle was built for.
        """
        profile = self.manifest.profiles["batch"]
        if not profile.min <= batch <= profile.max:
            raise ValueError(
                f"expected {profile.min} to {profile.max} images at once, got {batch}; "
                "build with --batch MIN:OPT:MAX for more"
            )
        halves, pool = 1 + guided, self._pool
        if pool is None or (pool.batch, pool.halves) != (batch, halves) or pool.num_calls < num_calls:
            channels = self.manifest.model.latent_channels
            pool = BufferPool(
                self.full,
                self.shallow,
                batch=batch,
                halves=halves,
                num_calls=num_calls,
                channels=channels,
                device=self.device,
            )
            self._pool = pool
        return pool


def run_once(engine: Engine, inputs: Mapping[str, Tensor]) -> Tensor:
    """Run an engine of one output on fresh tensors; for what runs once a picture, not once a step."""
    rows = next(iter(inputs.values())).shape[0]
    (spec,) = engine.outputs
    sizes = [size if isinstance(size, int) else rows for size in spec.shape]
    output = torch.empty(sizes, dtype=getattr(torch, spec.dtype), device=next(iter(inputs.values())).device)
    engine.bind({**inputs, spec.name: output}).run()
    return output
