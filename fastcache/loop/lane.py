"""A bundle's engines and a number of images -> a lane: every tensor that these images need, allocated once.

The images of a lane run in lockstep. A pipeline's run is one lane; a server has many, of one image each, out of step
(`lanes.py`). What the full pass stores and what a shallow one takes are the same tensors, so what one writes the other
reads; and steps without guidance run on the conditional half of them. Knows nothing about plans, samplers or prompts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from fastcache.cut.chain import ADJUSTMENT, RUNS, kept_in, kept_name, neutral
from fastcache.cut.names import FULL
from fastcache.sampler.recursion import MAX_WINDOW
from fastcache_engines import Binding, Engine, TensorSpec

MOST_KEPT: Final = 3  # features that a forecast of order 2 goes through
WRITTEN: Final = ("sample", "timestep", "noise_pred")  # what the loop writes or reads at every step
STEPWISE: Final = (*WRITTEN, ADJUSTMENT, RUNS)

_ALIGNMENT_BYTES: Final = 256  # what CUDA aligns an allocation to, and compiled engines may count on
_clock = itertools.count(1)


class Pass(Protocol):
    """What one U-Net call runs, as a bundle's manifest says it: engines, in turn, and the features that cross.

    `runs` says which blocks engines with conditions run; it is empty where they have none.
    """

    @property
    def engines(self) -> tuple[str, ...]: ...
    @property
    def takes(self) -> tuple[str, ...]: ...
    @property
    def stores(self) -> tuple[str, ...]: ...
    @property
    def runs(self) -> tuple[bool, ...]: ...


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of an engine call that are a lane's: `halves` times each image, the unconditional half first.

    Shapes: `model_input` (halves, N, C, ...), the sample's first channels; `noise_pred` one (N, C, ...) a half.
    """

    tensors: Mapping[str, Tensor]
    model_input: Tensor
    noise_pred: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], images: int, channels: int) -> Rows:
        """Rows out of an engine's tensors by name, `images` in each half."""
        sample, noise_pred = tensors["sample"], tensors["noise_pred"]
        halves = len(sample) // images
        model_input = sample.view(halves, images, *sample.shape[1:])[:, :, :channels]
        return cls(tensors, model_input, noise_pred.chunk(halves))


class Lane:
    """Tensors for `images` images in lockstep, `halves` times each (2 under guidance).

    `engines` are by name, and `passes` say which of them a U-Net call runs. `tensors` holds the engines' inputs and
    outputs by name, `sizes` what else than the batch is free in their shapes. `compared` (2 * N, C * H * W) is the
    conditional half of `noise_pred` and right behind it room for as much. `changed` says of each tensor but the
    written ones when it was last new.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        passes: Mapping[str, Pass],
        *,
        images: int,
        halves: int,
        channels: int,
        device: str = "cpu",
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.engines, self.passes, self.images, self.halves = engines, passes, images, halves
        self.device = torch.device(device)
        self.tensors = tensors_of(engines, passes, {"batch": images * halves, **(sizes or {})}, device)
        whole = self.tensors["noise_pred"]
        behind = torch.cat([whole, whole[:images]])
        self.tensors["noise_pred"], self.compared = behind[: len(whole)], behind[-2 * images :].flatten(1)
        self.features = passes[FULL].stores
        self.conditioning = tuple(name for name in outer_inputs(engines, passes) if name not in STEPWISE)
        self._adjust_nothing()
        self.latent_shape = (images, channels, *self.tensors["sample"].shape[2:])
        self.changed = dict.fromkeys((*self.conditioning, *self.features), 0)
        self.run = 0  # which run the tensors belong to, counted by set_inputs
        self.recorded: dict[Hashable, Any] = {}  # runs on these addresses that drivers/cudagraph.py keeps
        self._bindings: dict[tuple[str, bool], Binding] = {}
        self._ring = torch.empty(0, 3, *self.latent_shape, dtype=torch.float32, device=device)
        self._kept: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}
        self._rows = {True: Rows.of(self.tensors, images, channels)}

    @property
    def held_bytes(self) -> int:
        """What the tensors take now."""
        tensors = [self._ring, *self.tensors.values(), *self._kept.values(), *self._copies.values()]
        return storage_bytes(tensors)

    @property
    def most_bytes(self) -> int:
        """What they take at most with a named sampler, where a plan forecasts each feature in the highest order."""
        ring = MAX_WINDOW * 3 * math.prod(self.latent_shape) * self._ring.element_size()
        kept = MOST_KEPT * sum(self.tensors[name].nbytes for name in self.features)
        tensors = [*self.tensors.values(), *self._copies.values()]
        return ring + kept + storage_bytes(tensors)

    def rows(self, guided: bool = True) -> Rows:
        """What a step runs on; without guidance that is the conditional half, in the same memory."""
        guided = guided or self.halves == 1
        if guided not in self._rows:
            halved = {name: self._conditional(name) for name in self.tensors}
            self._rows[guided] = Rows.of(halved, self.images, self.latent_shape[1])
        return self._rows[guided]

    def call(self, name: str, guided: bool = True) -> Callable[[], object]:
        """A pass on `rows(guided)`, its engines bound when it is first asked for.

        Raises: `ValueError` for a pass that there is none of.
        """
        return in_turn(self.bindings(name, guided), self.passes[name], self.rows(guided).tensors)

    def bindings(self, name: str, guided: bool = True) -> list[Binding]:
        """The engines of a pass, bound to `rows(guided)`. Raises: as `call`."""
        if name not in self.passes:
            raise ValueError(f"expected a pass out of {', '.join(self.passes)}, got {name}")
        return [self.binding(role, guided) for role in self.passes[name].engines]

    def binding(self, role: str, guided: bool = True) -> Binding:
        """An engine, bound to `rows(guided)`."""
        key = role, guided or self.halves == 1
        if key not in self._bindings:
            self._bindings[key] = self.engines[role].bind(self.rows(guided).tensors)
        return self._bindings[key]

    def ring(self, calls: int) -> Tensor:
        """Room for a new run's last calls, call i in place i % calls: its latents, guided prediction and noise.

        Zeros, for what an earlier run left must count nothing at weight 0. Shapes: (calls, 3, N, C, ...), float32.
        """
        if len(self._ring) < calls:
            self._ring = self._ring.new_zeros(max(calls, MAX_WINDOW), *self._ring.shape[1:])
        return self._ring[:calls].zero_()

    def kept(self, name: str, count: int) -> Tensor:
        """Room for a feature as `count` steps stored it, with nothing in it. Shapes: (count, rows, ...)."""
        if name not in self._kept or len(self._kept[name]) < count:
            self._kept[name] = self.tensors[name].new_empty(count, *self.tensors[name].shape)
        self._kept[name].fill_(torch.nan)
        return self._kept[name][:count]

    def touch(self, *names: str) -> None:
        """Note that what these tensors hold is new."""
        for name in names:
            self.changed[name] = next(_clock)

    def set_inputs(self, values: Mapping[str, Tensor], guided: bool = True) -> None:
        """Begin a new run: its conditioning is put in place, that of `rows(guided)`, and the old features spoilt.

        Raises: `ValueError` for a missing or unknown input, or one of another shape.
        """
        if set(self.conditioning) != set(values):
            wanted = ", ".join(sorted(self.conditioning)) or "none"
            raise ValueError(f"expected the inputs {wanted}, got {', '.join(sorted(values)) or 'none'}")
        own = self.rows(guided).tensors
        for name, value in values.items():
            if value.shape != own[name].shape:
                raise ValueError(f"expected {name} of shape {list(own[name].shape)}, got {list(value.shape)}")
            own[name].copy_(value)
        if own is self.tensors:
            for name, half in self._copies.items():
                half.copy_(self.tensors[name][-self.images :])
        self._adjust_nothing()
        self.run += 1
        # A feature of another run would make a wrong picture; one channel of nan makes none, whatever mixes channels.
        for name in self.features:
            self.tensors[name][:, 0].fill_(torch.nan)
        self.touch(*self.changed)

    def _adjust_nothing(self) -> None:
        """Residuals of blocks that are reused count as they are, until a step says otherwise."""
        if (adjustment := self.tensors.get(ADJUSTMENT)) is not None:
            adjustment.copy_(neutral(*adjustment.shape[::2]))

    def _conditional(self, name: str) -> Tensor:
        """The last rows of a tensor in place; of a small one that lies badly a copy, which `set_inputs` renews.

        Raises: `ValueError` for one that is written in every step and lies badly.
        """
        half = self.tensors[name][-self.images :]
        if half.storage_offset() * half.element_size() % _ALIGNMENT_BYTES == 0:
            return half
        if name == "timestep":
            return half.clone()  # the loop fills it
        if name not in self.conditioning:
            if half.device.type == "cpu":
                return half
            raise ValueError(
                f"expected {name} of a multiple of {_ALIGNMENT_BYTES} bytes for steps without guidance, got "
                f"{list(half.shape)} of {half.element_size()} bytes each; use a plan that guides every step"
            )
        self._copies[name] = half.clone()
        return self._copies[name]


def in_turn(bindings: Sequence[Binding], own: Pass, tensors: Mapping[str, Tensor]) -> Callable[[], object]:
    """One call that runs a pass's engines, bound to these tensors, one after the other."""
    calls: list[Callable[[], object]] = [binding.run for binding in bindings]
    if own.runs:
        calls.insert(0, partial(tensors[RUNS].copy_, torch.tensor(own.runs).to(tensors[RUNS])))
    return calls[0] if len(calls) == 1 else lambda: [call() for call in calls]


def specs_of(engines: Mapping[str, Engine], passes: Mapping[str, Pass]) -> dict[str, TensorSpec]:
    """The inputs and outputs of all that passes run, by name."""
    roles = dict.fromkeys(role for one in passes.values() for role in one.engines)
    return {spec.name: spec for role in roles for spec in (*engines[role].inputs, *engines[role].outputs)}


def outer_inputs(engines: Mapping[str, Engine], passes: Mapping[str, Pass]) -> dict[str, TensorSpec]:
    """What the passes take that none of their engines gives, by name."""
    roles = dict.fromkeys(role for one in passes.values() for role in one.engines)
    given = {spec.name for role in roles for spec in engines[role].outputs}
    taken = [spec for role in roles for spec in engines[role].inputs if kept_name(spec.name) is None]
    return {spec.name: spec for spec in taken if spec.name not in given}


def tensors_of(
    engines: Mapping[str, Engine], passes: Mapping[str, Pass], sizes: Mapping[str, int], device: str
) -> dict[str, Tensor]:
    """Zeros for the inputs and outputs of all that passes run, by name; what is kept lies where it is given."""
    specs = specs_of(engines, passes)
    own = {name: allocate(spec, sizes, device) for name, spec in specs.items() if kept_name(name) is None}
    return own | kept_in(own, specs)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """What tensors take, those in the same memory once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def allocate(spec: TensorSpec, sizes: Mapping[str, int], device: str) -> Tensor:
    """Zeros for an input or output of an engine."""
    return torch.zeros(spec.shape_at(sizes), dtype=getattr(torch, spec.dtype), device=device)
