"""A U-Net's arguments, by diffusers' names -> its noise prediction, through the two passes of a cut or two engines.

Each pair of passes keeps what its full pass cached. Knows nothing about runs, steps or plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastcache.bundle.bundle import REFERENCE, Bundle
from fastcache.bundle.parity import TOLERANCE, relative_error
from fastcache.cut.fused import fuse_first_norm
from fastcache.cut.partition import partition_branches
from fastcache.helper.arguments import Arguments
from fastcache.helper.features import Features
from fastcache.helper.network import NetworkWatch, fingerprint
from fastcache.loop.buffers import shape_of
from fastcache.loop.plan import FULL, Forecast
from fastcache.loop.runtime import Runtime
from fastcache_engines import Binding, Engine

_DTYPES: dict[torch.dtype, Any] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class UNetCall:
    """One call of a run: its step and the U-Net's arguments, `halved` to their conditional half where guidance is off.

    `sigmas` are the noise levels of the run's calls, where a forecast needs them.
    """

    step: int
    arguments: Arguments
    halved: bool = False
    sigmas: tuple[float, ...] | None = None


class Passes(Protocol):
    """The full and the shallow pass over one U-Net."""

    def refresh(self) -> None:
        """A run begins, or something changed: what is cached does not count, and the U-Net may have other parts."""
        ...

    def serves(self, branch_id: int, halved: bool) -> bool:
        """Whether what is cached at a branch is what a shallow pass needs."""
        ...

    def halve(self) -> bool:
        """Keep the conditional half of what is cached, for smaller calls from now on; False where that cannot be."""
        ...

    def full(self, call: UNetCall) -> Tensor:
        """The noise prediction of the whole U-Net, keeping what is cached."""
        ...

    def shallow(self, branch_id: int, call: UNetCall) -> Tensor:
        """The noise prediction out of what is cached at a branch; a deeper pass renews what is cached above it."""
        ...


class EagerPasses:
    """The cut's torch modules, on the U-Net's own submodules; with `kernels`, the first norm above it as an operator.

    Raises: `PartitionError` for a U-Net, or a branch id, that cannot be cut, or a layer that the operator does not fit.
    """

    def __init__(
        self, unet: nn.Module, branch_ids: tuple[int, ...], forecast: Forecast | None = None, kernels: bool = False
    ) -> None:
        self._unet, self._branch_ids, self._kernels = unet, branch_ids, kernels
        self._features = Features(forecast)
        self.refresh()

    def refresh(self) -> None:
        self._features.clear()
        self._cuts = partition_branches(self._unet, self._branch_ids)
        for cut in self._cuts.at.values() if self._kernels else ():
            fuse_first_norm(cut)

    def serves(self, branch_id: int, halved: bool) -> bool:
        return all(self._features.serves(name, halved) for name in self._cuts.at[branch_id].cached)

    def halve(self) -> bool:
        self._features.halve()
        return True

    def full(self, call: UNetCall) -> Tensor:
        noise_pred, *cached = self._cuts.full(**call.arguments)
        self._features.store(call.step, dict(zip(self._cuts.cached, cached, strict=True)), call.halved)
        return noise_pred

    def shallow(self, branch_id: int, call: UNetCall) -> Tensor:
        cut = self._cuts.at[branch_id]
        (name,) = cut.cached  # the plain cut's only one
        feature = self._features.at(name, call.step, call.halved, call.sigmas)
        result = cut.shallow(**call.arguments, cached_feature=feature)
        noise_pred, *refreshed = result if cut.refreshes else (result,)
        self._features.store(call.step, dict(zip(cut.refreshes, refreshed, strict=True)), call.halved)
        return noise_pred


class EnginePasses:
    """A bundle's engines, in place of the U-Net that they were built from.

    What the full engine caches stays in its buffer, which a shallow engine of as many rows shares; one of half the
    rows is given a copy. For a forecast, which reads several, each is kept apart.

    Raises: `ValueError` for a branch that the bundle lacks, or engines that do not compute what the U-Net does.
    """

    def __init__(
        self, unet: nn.Module, branch_ids: tuple[int, ...], bundle: Bundle, forecast: Forecast | None = None
    ) -> None:
        self._unet, self._runtime, self._manifest = unet, Runtime(bundle), bundle.manifest
        built = tuple(self._manifest.shallow_roles)
        if not set(branch_ids) <= set(built):
            raise ValueError(f"expected cache_branch_id in {built}, as the engines were built, got {branch_ids}")
        self._network, self._fingerprint = NetworkWatch(unet), fingerprint(unet)
        self._features, self._keeps = Features(forecast), forecast is not None
        engines: dict[int | None, Engine] = {FULL: self._runtime.full, **self._runtime.shallow_engines}
        self._engines, cached = engines, {spec.name for spec in engines[FULL].outputs} - {"noise_pred"}
        # What each engine takes of what is cached, and what it caches.
        self._taken = {branch: cached & {spec.name for spec in own.inputs} for branch, own in engines.items()}
        self._made = {branch: cached & {spec.name for spec in own.outputs} for branch, own in engines.items()}
        # One batch for guided steps, one for others, and some to spare for a pipeline that changes its size.
        self._bound = lru_cache(maxsize=4)(self._bind)
        self._check_model()

    def refresh(self) -> None:
        """Refuse another U-Net than the one that was checked, for what an engine computes does not change."""
        self._features.clear()
        change = self._network.change()
        if change is None and fingerprint(self._unet) != self._fingerprint:
            change = "weights or classes of its modules"
        if change is not None:
            raise ValueError(
                f"expected the U-Net as it was when the engines were enabled, got one with other {change}; build "
                "engines of it, use FastCacheHelper without engines, or disable() and enable() to have it checked again"
            )

    def serves(self, branch_id: int, halved: bool) -> bool:
        return all(self._features.serves(name, halved) for name in self._taken[branch_id])

    def halve(self) -> bool:
        self._features.halve()
        return True

    def full(self, call: UNetCall) -> Tensor:
        return self._run(FULL, call)

    def shallow(self, branch_id: int, call: UNetCall) -> Tensor:
        return self._run(branch_id, call)

    def _run(self, branch: int | None, call: UNetCall) -> Tensor:
        values = self._values(call.arguments)
        tensors, bindings = self._bound(self._sizes(values))
        for name, value in values.items():
            tensors[name].copy_(value)
        for name in self._taken[branch]:
            feature = self._features.at(name, call.step, call.halved, call.sigmas, out=tensors[name])
            if feature.data_ptr() != tensors[name].data_ptr():
                tensors[name].copy_(feature)
        bindings[branch].run()
        made = {name: tensors[name] for name in self._made[branch]}
        if self._keeps:
            made = {name: feature.clone() for name, feature in made.items()}
        self._features.store(call.step, made, call.halved)
        # A copy: without guidance, a multistep scheduler keeps the prediction itself over the next step.
        return tensors["noise_pred"].clone()

    def _values(self, arguments: Arguments) -> dict[str, Tensor]:
        """A call's arguments by the engines' names."""
        values = dict(arguments)
        values |= values.pop("added_cond_kwargs", {})
        wanted = {spec.name for spec in self._runtime.full.inputs}
        if others := sorted(values.keys() ^ wanted):
            raise ValueError(
                f"expected what the engines take ({', '.join(sorted(wanted))}), got a call that differs in "
                f"{', '.join(others)}; use FastCacheHelper without engines"
            )
        sample: Tensor = values["sample"]
        values["timestep"] = torch.as_tensor(values["timestep"], device=sample.device).expand(sample.shape[0])
        return values

    def _sizes(self, values: Mapping[str, Tensor]) -> tuple[tuple[str, int], ...]:
        """The free sizes of the engines' inputs, by name: `height/8` is an eighth of `height`."""
        sizes: dict[str, int] = {}
        for spec in self._runtime.full.inputs:
            shape = values[spec.name].shape
            free = [(i, *named.partition("/")) for i, named in enumerate(spec.shape) if isinstance(named, str)]
            if len(shape) == len(spec.shape):
                sizes |= {name: shape[i] * int(divisor or 1) for i, name, _, divisor in free}
            if list(shape) != shape_of(spec, sizes):
                raise ValueError(
                    f"expected {spec.name} of shape {list(spec.shape)}, as the engines were built for "
                    f"{', '.join(map(str, self._manifest.sizes))}, got {list(shape)}; build with --sizes for others"
                )
        self._check_sizes(sizes)
        return tuple(sizes.items())

    def _check_sizes(self, sizes: Mapping[str, int]) -> None:
        profiles, built = self._manifest.profiles, self._manifest.sizes
        rows, most = sizes["batch"], 2 * profiles["batch"].max  # a guided image takes two rows
        if not profiles["batch"].min <= rows <= most:
            raise ValueError(
                f"expected {profiles['batch'].min} to {most} rows, as the engines were built, got {rows}; build with "
                "--batch MIN:OPT:MAX for more"
            )
        wanted = sizes.get("width"), sizes.get("height")
        if None not in wanted and wanted not in [(size.width, size.height) for size in built]:
            raise ValueError(
                f"expected {', '.join(map(str, built))}, as the engines were built, got {wanted[0]}x{wanted[1]}; "
                "build with --sizes"
            )
        if "tokens" in sizes and not profiles["tokens"].min <= sizes["tokens"] <= profiles["tokens"].max:
            raise ValueError(
                f"expected {profiles['tokens'].min} to {profiles['tokens'].max} tokens, as the engines were built, "
                f"got {sizes['tokens']}; build with --max-tokens"
            )

    def _bind(self, sizes: tuple[tuple[str, int], ...]) -> tuple[dict[str, Tensor], dict[int | None, Binding]]:
        tensors = {
            spec.name: torch.zeros(
                shape_of(spec, dict(sizes)), dtype=getattr(torch, spec.dtype), device=self._runtime.device
            )
            for engine in self._engines.values()
            for spec in (*engine.inputs, *engine.outputs)
        }
        return tensors, {branch: engine.bind(tensors) for branch, engine in self._engines.items()}

    def _check_model(self) -> None:
        """One call of the U-Net on the bundle's reference input, which says whether the engines are its own."""
        unet: Any = self._unet
        stored = load_file(self._runtime.bundle.file(REFERENCE))
        inputs = {spec.name: stored[spec.name] for spec in self._manifest.engines["full"].inputs}
        inputs = {name: x.to(unet.device, unet.dtype if x.is_floating_point() else None) for name, x in inputs.items()}
        added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
        arguments = inputs | ({"added_cond_kwargs": added} if added else {})
        reason = f"got ones of {self._manifest.model.name}"
        tolerance = TOLERANCE[_DTYPES[unet.dtype]]
        try:
            with torch.no_grad():
                got = type(unet).forward(unet, **arguments, return_dict=False)[0].float().cpu()
            error = relative_error(got, stored["noise_pred"])
            if error <= tolerance:
                return
            reason += f" from which it differs by {error:.1e} (tolerance {tolerance:g})"
        except (RuntimeError, TypeError, ValueError) as misfit:  # sizes or conditioning of another architecture
            reason += f" whose inputs it does not take ({str(misfit).splitlines()[0]})"
        raise ValueError(
            f"expected engines of this pipeline's U-Net, {reason}; build them from its own weights, LoRA included"
        )
