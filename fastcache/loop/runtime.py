"""A checked bundle -> its engines, loaded, and the lane they are bound to.

Refuses a bundle of another machine or other versions. Knows engines and tensors; knows nothing about steps or prompts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

import fastcache_engines
from fastcache.bundle.bundle import Bundle
from fastcache.bundle.manifest import Manifest, Parity, Role
from fastcache.bundle.parity import measure_parity, trials
from fastcache.bundle.recipe import Size
from fastcache.cut.chain import ADJUSTMENT
from fastcache.errors import BackendUnavailable, BundleError
from fastcache.loop.drivers import Guidance
from fastcache.loop.drivers.cudagraph import CapturedRun, CudaRecorder
from fastcache.loop.lane import Lane, allocate
from fastcache.loop.noise import Generators
from fastcache.loop.plan import CachePlan
from fastcache.loop.steps import PlainRun, Run, Sampler, Scales
from fastcache_engines import INT8_TOLERANCE, Binding, Engine, LoadOptions, Workspace, let_go


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
    quantized = manifest.quantized
    if device == "cpu" and quantized is not None and quantized.weight_bits > fastcache_engines.int8_weight_bits():
        raise BackendUnavailable(
            "expected a processor with VNNI, which this bundle's 8-bit engines were built for, got one without; "
            "build it on this machine"
        )
    if targets != "any" and here not in [f"{device}-{target}" for target in targets.split("+")]:
        raise BackendUnavailable(
            f"expected a bundle for {here}, got one for {manifest.device}; build it on this machine"
        )


def measure_here(folder: Path, manifest: Manifest) -> Parity:
    """How far a checked bundle's engines are from the model and from each other, measured now.

    Raises: `BundleError` for engines that do not load, or do not take what the reference holds.
    """
    backend, options = fastcache_engines.backend(manifest.backend), LoadOptions(manifest.device_type, manifest.dtype)
    tried = trials(manifest.engines, manifest.passes, manifest.blocks)
    tolerance = None if manifest.quantized is None else INT8_TOLERANCE
    try:
        return measure_parity(backend, folder, tried, options, tolerance)
    except ValueError as error:
        raise _does_not_load(folder, error) from error


def _does_not_load(place: Path, error: ValueError) -> BundleError:
    """What a backend says of a file that is as it was built, or at least has the hash."""
    remedy = "" if "; build " in str(error) else "; build the bundle again"
    return BundleError(f"expected {place} to load, got: {error}{remedy}")


class Runtime:
    """The engines of a bundle, each loaded when it is first used, and one lane, kept between runs.

    `wrap` is given every engine that is loaded, and what it returns is used: a benchmark's clock, say.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        cuda_graph: bool = False,
        wrap: Callable[[Engine], Engine] | None = None,
    ) -> None:
        check_here(bundle.manifest)
        self._wrap = wrap
        self.bundle, self.manifest, self._threads = bundle, bundle.manifest, threads
        self.device = bundle.manifest.device_type
        if cuda_graph and self.device != "cuda":
            raise BackendUnavailable(
                f"expected a bundle for a GPU with cuda_graph, got one for {bundle.manifest.device}; load without it"
            )
        self._recorder = CudaRecorder() if cuda_graph else None
        self._workspace = Workspace(self.device)
        self._lane: Lane | None = None
        self._lane_key: tuple[object, ...] = ()
        self._engines: dict[Role, Engine] = {}
        # A binding of TensorRT's takes milliseconds to make and holds memory: those of the last few shapes are kept.
        self._bound = lru_cache(maxsize=8)(self._bind)
        roles = bundle.manifest.engines
        weakref.finalize(self, let_go, [bundle.manifest.identity_of(role) for role in roles])

    @cached_property
    def pass_engines(self) -> dict[str, Engine]:
        """The engines that the bundle's passes run, by name."""
        roles = dict.fromkeys(role for one in self.manifest.passes.values() for role in one.engines)
        return {role: self.engine(role) for role in roles}

    def engine(self, role: Role) -> Engine:
        """An engine, loaded when it is first asked for. Raises: `BundleError` for none, or one that does not load."""
        if role not in self._engines:
            engine = self._load(role)
            self._engines[role] = engine if self._wrap is None else self._wrap(engine)
        return self._engines[role]

    def _load(self, role: Role) -> Engine:
        path, entry = self.bundle.engine_path(role), self.manifest.engines[role]
        options = LoadOptions(
            self.device,
            entry.dtype,
            self._threads,
            self._workspace,
            inputs=entry.inputs,
            outputs=entry.outputs,
            identity=self.manifest.identity_of(role),
        )
        with self.bundle.reading():
            try:
                return fastcache_engines.backend(self.manifest.backend).load(path, options)
            except ValueError as error:
                raise _does_not_load(path, error) from error

    @torch.no_grad()
    def once(self, role: Role, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run an engine that runs once a picture, not once a step; its results, by name, are the caller's own.

        Raises: `BundleError` for an engine that the bundle lacks; `ValueError` for inputs that do not fit it.
        """
        self.bundle.engine_path(role)
        sizes = dict[str, int]()
        for spec in self.manifest.engines[role].inputs:
            sizes |= spec.sizes_in(inputs[spec.name].shape)
        binding, tensors = self._bound(role, tuple(sizes.items()))
        for name, value in inputs.items():
            if value.shape != tensors[name].shape:
                raise ValueError(f"expected {name} of shape {list(tensors[name].shape)}, got {list(value.shape)}")
            tensors[name].copy_(value)
        binding.run()
        return {spec.name: tensors[spec.name].clone() for spec in self.manifest.engines[role].outputs}

    def _bind(self, role: Role, sizes: tuple[tuple[str, int], ...]) -> tuple[Binding, dict[str, Tensor]]:
        engine, named = self.engine(role), dict(sizes)
        tensors = {spec.name: allocate(spec, named, self.device) for spec in (*engine.inputs, *engine.outputs)}
        return engine.bind(tensors), tensors

    def lane(self, *, images: int, guided: bool, size: Size | None = None, tokens: int | None = None) -> Lane:
        """The tensors for a run, those of the run before where they fit.

        Raises: `ValueError` for more or fewer images, another size or longer prompts than the bundle was built for, or
        guidance of a model that has nothing to guide by.
        """
        profile, model = self.manifest.profiles["batch"], self.manifest.model
        if guided and model.unconditional:
            raise ValueError(f"expected guided=False for {model.name}, which takes no conditioning, got guided=True")
        if not profile.min <= images <= profile.max:
            raise ValueError(
                f"expected {profile.min} to {profile.max} images at once, got {images}; "
                "build with --batch MIN:OPT:MAX for more"
            )
        size = size or self.manifest.sizes[0]
        sizes = {"height": size.height, "width": size.width}
        if (lengths := self.manifest.profiles.get("tokens")) is not None:
            tokens = sizes["tokens"] = tokens or lengths.opt
        self._check(size, tokens)
        key = (images, guided, size, tokens)
        if self._lane is None or self._lane_key != key:
            if self._lane is not None:
                self._lane.recorded.clear()  # they hold it, and it them
            self._lane_key, self._lane = (
                key,
                Lane(
                    self.pass_engines,
                    self.manifest.passes,
                    images=images,
                    halves=model.guided_rows if guided else 1,
                    channels=model.latent_channels,
                    device=self.device,
                    sizes=sizes,
                ),
            )
        return self._lane

    def keep_lane(self) -> Lane | None:
        """The lane of the last run, which is the caller's from now on: the next run gets another."""
        kept, self._lane = self._lane, None
        return kept

    def run(
        self,
        lane: Lane,
        sampler: Sampler,
        plan: CachePlan,
        guidance: Guidance,
        *,
        generator: Generators = None,
        conditioning_scales: Scales | None = None,
        whole: bool = False,
    ) -> Run:
        """A run on a lane, out of CUDA graphs where these were asked for; then `whole` yields its last step only.

        Raises: as `PlainRun` and `CapturedRun`.
        """
        # Neither guidance of three parts nor a step's scales and shifts of blocks are in a graph yet.
        if self._recorder is None or lane.halves == 3 or ADJUSTMENT in lane.tensors:
            return PlainRun(lane, sampler, plan, guidance, generator=generator, conditioning_scales=conditioning_scales)
        return CapturedRun(
            self._recorder,
            lane,
            sampler,
            plan,
            guidance,
            generator=generator,
            conditioning_scales=conditioning_scales,
            stepwise=not whole,
        )

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
