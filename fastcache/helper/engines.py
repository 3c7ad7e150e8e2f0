"""A bundle -> its passes, computed by its engines in place of the U-Net that they were built from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastcache.bundle.bundle import REFERENCE, Bundle
from fastcache.bundle.parity import relative_error
from fastcache.cut.chain import ADJUSTMENT, RUNS
from fastcache.helper.arguments import Arguments
from fastcache.helper.features import Features
from fastcache.helper.network import NetworkWatch, fingerprint
from fastcache.helper.passes import UNetCall
from fastcache.loop.adjustment import ScaleShift
from fastcache.loop.features import check_channels
from fastcache.loop.lane import Lane, outer_inputs
from fastcache.loop.plan import Forecast
from fastcache.loop.runtime import Runtime
from fastcache_engines import TOLERANCE, dtype_of


class EnginePasses:
    """A bundle's passes.

    What a pass stores stays in its engine's buffer, which engines of as many rows share; one of half the rows is
    given a copy. For a forecast, which reads several, each is kept apart.

    Raises: `ValueError` for a pass that the bundle lacks, or engines that do not compute what the U-Net does.
    """

    def __init__(
        self,
        unet: nn.Module,
        names: Iterable[str],
        bundle: Bundle,
        forecast: Forecast | None = None,
        scale_shift: ScaleShift | None = None,
    ) -> None:
        self._unet, self._runtime, self._manifest = unet, Runtime(bundle), bundle.manifest
        self._passes, self._engines = self._manifest.passes, self._runtime.pass_engines
        if missing := [name for name in names if name not in self._passes]:
            raise ValueError(
                f"expected passes out of {', '.join(self._passes)}, as the engines were built, got "
                f"{', '.join(missing)}; set_params to one of theirs, or build with --branch-id"
            )
        outer = outer_inputs(self._engines, self._passes)
        self._inputs = {name: spec for name, spec in outer.items() if name not in (ADJUSTMENT, RUNS)}
        self._adjustments = None if scale_shift is None else torch.from_numpy(scale_shift.table.copy())
        if scale_shift is not None:
            check_channels(scale_shift, sum(block.channels for block in self._manifest.blocks))
        self._features, self._keeps = Features(forecast), forecast is not None
        # One batch for guided steps, one for others, and some to spare for a pipeline that changes its size.
        self._lane = lru_cache(maxsize=4)(self._make_lane)
        self._network, self._fingerprint = NetworkWatch(unet), fingerprint(unet)
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

    def serves(self, name: str, halved: bool) -> bool:
        return all(self._features.serves(feature, halved) for feature in self._passes[name].takes)

    def halve(self) -> bool:
        self._features.halve()
        return True

    def run(self, name: str, call: UNetCall) -> Tensor:
        values = self._values(call.arguments)
        lane = self._lane(self._sizes(values))
        tensors = lane.tensors
        for given, value in values.items():
            tensors[given].copy_(value)
        for taken in self._passes[name].takes:
            feature = self._features.at(taken, call.step, call.halved, call.sigmas, out=tensors[taken])
            if feature.data_ptr() != tensors[taken].data_ptr():
                tensors[taken].copy_(feature)
        if self._adjustments is not None:
            tensors[ADJUSTMENT].copy_(self._adjustments[call.step])
        lane.call(name)()
        made = {stored: tensors[stored] for stored in self._passes[name].stores}
        if self._keeps:
            made = {stored: feature.clone() for stored, feature in made.items()}
        self._features.store(call.step, made, call.halved)
        # A copy: without guidance, a multistep scheduler keeps the prediction itself over the next step.
        return tensors["noise_pred"].clone()

    def _values(self, arguments: Arguments) -> dict[str, Tensor]:
        """A call's arguments by the engines' names."""
        values = dict(arguments)
        values |= values.pop("added_cond_kwargs", {})
        wanted = {*self._inputs}
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
        for spec in self._inputs.values():
            shape = values[spec.name].shape
            if len(shape) == len(spec.shape):
                sizes |= spec.sizes_in(shape)
            if list(shape) != spec.shape_at(sizes):
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

    def _make_lane(self, sizes: tuple[tuple[str, int], ...]) -> Lane:
        """Tensors for calls of these sizes. Guidance is the pipeline's business: each row is an image of its own."""
        free, channels = dict(sizes), self._manifest.model.latent_channels
        return Lane(
            self._engines,
            self._passes,
            images=free.pop("batch"),
            halves=1,
            channels=channels,
            device=self._runtime.device,
            sizes=free,
        )

    def _check_model(self) -> None:
        """One call of the U-Net on the bundle's reference input, which says whether the engines are its own."""
        unet: Any = self._unet
        with self._runtime.bundle.reading():
            stored = load_file(self._runtime.bundle.file(REFERENCE))
        inputs = {name: stored[name] for name in self._inputs}
        inputs = {name: x.to(unet.device, unet.dtype if x.is_floating_point() else None) for name, x in inputs.items()}
        added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
        arguments = inputs | ({"added_cond_kwargs": added} if added else {})
        reason = f"got ones of {self._manifest.model.name}"
        tolerance = TOLERANCE[dtype_of(unet.dtype)]
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
