"""A checked bundle -> its engines, loaded, and the buffers they are bound to.

Refuses a bundle of another machine or other versions. Knows engines and tensors; knows nothing about steps or prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

import fastcache_engines
from fastcache.bundle.bundle import REFERENCE, Bundle
from fastcache.bundle.manifest import Manifest, Parity, Role
from fastcache.bundle.parity import measure_parity
from fastcache.bundle.recipe import Size
from fastcache.errors import BackendUnavailable, BundleError
from fastcache.loop.between import ScheduledSampler
from fastcache.loop.buffers import BufferPool, shape_of
from fastcache.loop.denoise import DenoiseOptions, Step, denoise
from fastcache.loop.drivers.cudagraph import CudaRecorder, denoise_captured
from fastcache.loop.plan import CachePlan
from fastcache.loop.table import SamplerTable
from fastcache_engines import Binding, Engine, LoadOptions, Workspace


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
    full, *shallow = (folder / entries[role].file for role in ("full", *manifest.shallow_roles.values()))
    options = LoadOptions(manifest.device_type, entries["full"].dtype)
    return measure_parity(backend, full, shallow, folder / REFERENCE, options)


class Runtime:
    """The engines of a bundle, each loaded when it is first used, and one buffer pool, kept between runs."""

    def __init__(self, bundle: Bundle, *, threads: int = 0, cuda_graph: bool = False) -> None:
        check_here(bundle.manifest)
        self.bundle, self.manifest, self._threads = bundle, bundle.manifest, threads
        self.device = bundle.manifest.device_type
        if cuda_graph and self.device != "cuda":
            raise BackendUnavailable(
                f"expected a bundle for a GPU with cuda_graph, got one for {bundle.manifest.device}; load without it"
            )
        self._recorder = CudaRecorder() if cuda_graph else None
        self._workspace = Workspace(self.device)
        self._pool: BufferPool | None = None
        self._pool_key: tuple[object, ...] = ()
        self._engines: dict[Role, Engine] = {}
        # A binding of TensorRT's takes milliseconds to make and holds memory: those of the last few shapes are kept.
        self._bound = lru_cache(maxsize=8)(self._bind)

    @cached_property
    def full(self) -> Engine:
        return self._load("full")

    @cached_property
    def shallow(self) -> Engine:
        """The primary branch's shallow engine."""
        return self._load("shallow")

    @cached_property
    def shallow_engines(self) -> dict[int, Engine]:
        """The shallow engines by their branch ids, the primary one first."""
        roles = self.manifest.shallow_roles.items()
        return {branch: self.shallow if role == "shallow" else self._load(role) for branch, role in roles}

    def _load(self, role: Role) -> Engine:
        path, entry = self.bundle.engine_path(role), self.manifest.engines[role]
        options = LoadOptions(self.device, entry.dtype, self._threads, self._workspace)
        engine = fastcache_engines.backend(self.manifest.backend).load(path, options)
        engine.inputs, engine.outputs = entry.inputs, entry.outputs  # an engine's file need not keep its sizes' names
        return engine

    @torch.no_grad()
    def once(self, role: Role, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run an engine that runs once a picture, not once a step; its results, by name, are the caller's own.

        Raises: `BundleError` for an engine that the bundle lacks; `ValueError` for inputs that do not fit it.
        """
        self.bundle.engine_path(role)
        sizes = dict[str, int]()
        for spec in self.manifest.engines[role].inputs:
            for size, named in zip(inputs[spec.name].shape, spec.shape, strict=True):
                if isinstance(named, str):
                    name, _, divisor = named.partition("/")
                    sizes[name] = size * int(divisor or 1)
        binding, tensors = self._bound(role, tuple(sizes.items()))
        for name, value in inputs.items():
            if value.shape != tensors[name].shape:
                raise ValueError(f"expected {name} of shape {list(tensors[name].shape)}, got {list(value.shape)}")
            tensors[name].copy_(value)
        binding.run()
        return {spec.name: tensors[spec.name].clone() for spec in self.manifest.engines[role].outputs}

    def _bind(self, role: Role, sizes: tuple[tuple[str, int], ...]) -> tuple[Binding, dict[str, Tensor]]:
        engine, named = self._engines.get(role) or self._engines.setdefault(role, self._load(role)), dict(sizes)
        tensors = {
            spec.name: torch.zeros(shape_of(spec, named), dtype=getattr(torch, spec.dtype), device=self.device)
            for spec in (*engine.inputs, *engine.outputs)
        }
        return engine.bind(tensors), tensors

    def pool(
        self, *, batch: int, guided: bool, num_calls: int, size: Size | None = None, tokens: int | None = None
    ) -> BufferPool:
        """The buffers for a run, those of the run before where they fit.

        Raises: `ValueError` for more or fewer images, another size or longer prompts than the bundle was built for, or
        guidance of a model that has nothing to guide by.
        """
        profile, model = self.manifest.profiles["batch"], self.manifest.model
        if guided and model.unconditional:
            raise ValueError(f"expected guided=False for {model.name}, which takes no conditioning, got guided=True")
        if not profile.min <= batch <= profile.max:
            raise ValueError(
                f"expected {profile.min} to {profile.max} images at once, got {batch}; "
                "build with --batch MIN:OPT:MAX for more"
            )
        size = size or self.manifest.sizes[0]
        sizes = {"height": size.height, "width": size.width}
        if (lengths := self.manifest.profiles.get("tokens")) is not None:
            tokens = sizes["tokens"] = tokens or lengths.opt
        self._check(size, tokens)
        key = (batch, guided, size, tokens)
        halves, pool = model.guided_rows if guided else 1, self._pool
        if pool is None or self._pool_key != key or pool.num_calls < num_calls:
            pool = BufferPool(
                self.full,
                self.shallow_engines,
                batch=batch,
                halves=halves,
                num_calls=num_calls,
                channels=model.latent_channels,
                device=self.device,
                sizes=sizes,
            )
            if self._pool is not None:
                self._pool.recorded.clear()  # they hold it, and it them
            self._pool, self._pool_key = pool, key
        return pool

    def denoise(
        self,
        pool: BufferPool,
        sampler: SamplerTable | ScheduledSampler,
        plan: CachePlan,
        *,
        whole: bool = False,
        image_guidance_scale: float | None = None,
        **options: Unpack[DenoiseOptions],
    ) -> Iterator[Step]:
        """The steps of a run, out of CUDA graphs where these were asked for; then `whole` yields the last one only.

        Raises: as `denoise` and `denoise_captured`.
        """
        if image_guidance_scale is not None:  # guidance of three parts is in no graph yet
            return denoise(pool, sampler, plan, image_guidance_scale=image_guidance_scale, **options)
        if self._recorder is None:
            return denoise(pool, sampler, plan, **options)
        return denoise_captured(self._recorder, pool, sampler, plan, stepwise=not whole, **options)

    def _check(self, size: Size, tokens: int | None) -> None:
        sizes, lengths = self.manifest.sizes, self.manifest.profiles.get("tokens")
        if size not in sizes:
            one = "the size" if len(sizes) == 1 else "one of the sizes"
            raise ValueError(
                f"expected {', '.join(map(str, sizes))}, {one} this bundle was built for, got {size}; "
                "build another with --sizes"
            )
        if lengths is not None and tokens is not None and not lengths.min <= tokens <= lengths.max:
            span = lengths.min if lengths.min == lengths.max else f"{lengths.min} to {lengths.max}"
            raise ValueError(
                f"expected prompts of {span} tokens, got {tokens}; build with --max-tokens for longer ones"
            )
