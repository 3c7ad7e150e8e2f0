"""A bundle's engines, a size and a number of slots -> the tensors of images in flight, allocated once, engines bound.

Each slot is one image's own: inputs, cached feature, the earlier ones that its plan's forecast takes, sampler history.
An image alone runs in its slot, to which the engines are bound; images in company run on shared rows, which are filled
from their slots, or where there are streams each in its own slot, at once. The one mutable object of the serving side.
Knows nothing about plans, prompts or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Final

import torch
from torch import Tensor

from fastcache.loop.buffers import shape_of
from fastcache.loop.features import extrapolate
from fastcache.loop.recursion import MAX_WINDOW
from fastcache.serve.engine.steps import Place
from fastcache.serve.engine.streams import Streams
from fastcache_engines import Binding, Engine, TensorSpec

_WRITTEN: Final = ("sample", "timestep", "noise_pred")
_MOST_KEPT: Final = 3  # features that a forecast of order 2 goes through
_ALIGNMENT_BYTES: Final = 256  # what CUDA aligns an allocation to, and compiled engines may count on


class Slots:
    """The tensors of `count` images in flight. `history[slot]` is for the rows that `Steps` keeps.

    `engines` are the full one (None) and the shallow ones by branch; `sizes` what else than the rows is free in their
    shapes. An image has two rows everywhere, conditional and unconditional; where guidance is off, the first one runs.
    """

    def __init__(
        self,
        engines: Mapping[int | None, Engine],
        *,
        count: int,
        channels: int,
        sizes: Mapping[str, int],
        device: str,
        streams: Streams | None = None,
    ) -> None:
        self.count, self.device, self._engines, self._streams = count, device, engines, streams
        self._specs = {s.name: s for engine in engines.values() for s in (*engine.inputs, *engine.outputs)}
        self._shapes = {name: shape_of(s, {**sizes, "batch": 1})[1:] for name, s in self._specs.items()}
        self.cached = tuple(spec.name for spec in engines[None].outputs if spec.name != "noise_pred")
        self.conditioning = tuple(n for n in self._specs if n not in (*_WRITTEN, *self.cached))
        self._takes = {branch: _others(engine.inputs) for branch, engine in engines.items()}
        self._stores = {branch: _others(engine.outputs) for branch, engine in engines.items()}
        self.own = {name: self._aligned(name) for name in self._specs}
        self.latent_shape = (1, channels, *self._shapes["sample"][1:])
        size = math.prod(self.latent_shape)
        self.history = torch.zeros(count, 3 * MAX_WINDOW + 1, size, device=device)
        self._bindings: dict[tuple[int | None, int, int, int], Binding] = {}
        self._apart = lru_cache(maxsize=None)(self._bind_apart)
        self._place = lru_cache(maxsize=None)(self._make_place)
        self._index = lru_cache(maxsize=256)(self._make_index)
        self._kept: dict[tuple[str, int], list[Tensor]] = {}  # earlier features, by name and slot
        self._holds: dict[str, tuple[int, ...]] = {}  # what the shared rows hold, by when it was new
        self._clock = 0
        self._changed: dict[tuple[str, int], int] = {}

    @property
    def held_bytes(self) -> int:
        """What the tensors take now."""
        shared: dict[str, Tensor] = self.__dict__.get("_shared", {})
        kept = [tensor for tensors in list(self._kept.values()) for tensor in tensors]
        tensors = [self.history, *self.own.values(), *shared.values(), *kept]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    @property
    def most_bytes(self) -> int:
        """What they take at most: where every image's plan forecasts each of its features, in the highest order."""
        own = {name: self.own[name][0].nbytes * self.count for name in self.own}
        shared = 0 if self.count == 1 or self._streams is not None else sum(own.values())
        fixed = [self.history, *self.own.values()]
        kept = _MOST_KEPT * sum(own[name] for name in self.cached)
        return sum(tensor.untyped_storage().nbytes() for tensor in fixed) + shared + kept

    @cached_property
    def _shared(self) -> dict[str, Tensor]:
        """The rows of images in company: (images, halves) of them from the start."""
        return {
            name: torch.zeros(2 * self.count, *self._shapes[name], dtype=_dtype(spec), device=self.device)
            for name, spec in self._specs.items()
        }

    def _aligned(self, name: str) -> Tensor:
        """Two rows a slot, contiguous, each slot where an allocation could start. Shapes: (count, 2, ...)."""
        dtype, shape = _dtype(self._specs[name]), (2, *self._shapes[name])
        unit = _ALIGNMENT_BYTES // dtype.itemsize
        stride = -(-math.prod(shape) // unit) * unit
        storage = torch.zeros(self.count, stride, dtype=dtype, device=self.device)
        return storage[:, : math.prod(shape)].unflatten(1, shape)

    def fill(self, slot: int, conditioning: Mapping[str, Tensor]) -> None:
        """Make a slot ready for a new image: its conditioning in, and nothing left of the image before it.

        Shapes: each conditioning (halves, ...), conditional first.

        Raises: `ValueError` for what the engines do not take.
        """
        if set(conditioning) != set(self.conditioning):
            raise ValueError(f"expected the inputs {', '.join(self.conditioning)}, got {', '.join(conditioning)}")
        for name, value in conditioning.items():
            rows = self.own[name][slot, : len(value)]
            if value.shape != rows.shape:
                raise ValueError(f"expected {name} of shape {list(rows.shape)}, got {list(value.shape)}")
            rows.copy_(value)
        for name in self.cached:
            self.own[name][slot].fill_(torch.nan)  # a feature of another image would make a wrong picture
        self.history[slot].zero_()  # weight 0 times what an earlier image left must be 0
        self._mark((*self.conditioning, *self.cached), [slot])

    def make_room(self, slot: int, features: Mapping[int, int]) -> None:
        """Room for so many earlier features of each branch, with nothing in it. It stays for the images to come."""
        for branch, count in features.items():
            for name in self._features(branch):
                kept = self._kept.setdefault((name, slot), [])
                kept += [torch.empty_like(self.own[name][slot]) for _ in range(count - len(kept))]
                for feature in kept:
                    feature.fill_(torch.nan)

    def keep(self, branch: int, slot: int, halves: int, place: int) -> None:
        """Copy a branch's feature, as the slot holds it, to one of its places."""
        for name in self._features(branch):
            self._kept[name, slot][place][:halves].copy_(self.own[name][slot, :halves])

    def make(self, branch: int, slot: int, halves: int, places: Sequence[int], weights: Sequence[float]) -> None:
        """Make a slot's feature the sum of those kept at these places, by their weights."""
        for name in self._features(branch):
            kept = self._kept[name, slot]
            extrapolate([kept[place][:halves] for place in places], weights, self.own[name][slot, :halves])
            self._mark([name], [slot])

    def _features(self, branch: int) -> list[str]:
        return [name for name in self._takes[branch] if name in self.cached]

    def places(self, slots: Sequence[int], halves: int) -> list[Place]:
        """Where these images' rows of an engine call lie, in order."""
        if len(slots) == 1 or self._streams is not None:
            return [self._place(halves, 0, slot) for slot in slots]
        return [self._place(halves, j, -1) for j in range(len(slots))]

    def run(self, branch: int | None, slots: Sequence[int], halves: int) -> None:
        """One engine call for these images, or one each, with their samples and timesteps in their places."""
        if len(slots) == 1:
            self._binding(branch, halves, 1, slots[0]).run()
            self._mark(self._stores[branch], slots)
        elif self._streams is not None:
            self._streams.run([self._apart(branch, halves, slot) for slot in slots])
        else:
            self._gather(self._takes[branch], slots, halves)
            self._binding(branch, halves, len(slots), -1).run()
            self._mark(self._stores[branch], slots)
            self._scatter(self._stores[branch], slots, halves)

    def _gather(self, names: Sequence[str], slots: Sequence[int], halves: int) -> None:
        """Bring what the slots hold to the shared rows, unless it is there from the call before."""
        for name in names:
            state = self._state(name, slots, halves)
            if self._holds.get(name) != state:
                rows = self._rows(name, len(slots), halves)
                torch.index_select(self.own[name][:, :halves], 0, self._index(tuple(slots)), out=rows)
                self._holds[name] = state

    def _scatter(self, names: Sequence[str], slots: Sequence[int], halves: int) -> None:
        """Bring what an engine stored to the slots. It stays in the shared rows as well."""
        for name in names:
            rows = self._rows(name, len(slots), halves)
            self.own[name][:, :halves].index_copy_(0, self._index(tuple(slots)), rows)
            self._holds[name] = self._state(name, slots, halves)

    def _rows(self, name: str, images: int, halves: int) -> Tensor:
        return self._shared[name][: images * halves].unflatten(0, (images, halves))

    def _state(self, name: str, slots: Sequence[int], halves: int) -> tuple[int, ...]:
        return (halves, *(self._changed.get((name, slot), 0) for slot in slots))

    def _mark(self, names: Sequence[str], slots: Sequence[int]) -> None:
        """Note that what these slots hold is new."""
        for name in names:
            for slot in slots:
                self._clock += 1
                self._changed[name, slot] = self._clock

    def _binding(self, branch: int | None, halves: int, images: int, slot: int) -> Binding:
        key = branch, halves, images, slot
        if key not in self._bindings:
            if images == 1:
                tensors = self._own_rows(halves, slot)
            else:
                tensors = {name: shared[: halves * images] for name, shared in self._shared.items()}
            self._bindings[key] = self._engines[branch].bind(tensors)
        return self._bindings[key]

    def _bind_apart(self, branch: int | None, halves: int, slot: int) -> Binding:
        if self._streams is None:
            raise ValueError("expected streams for images at once, got none")
        return self._streams.engines[branch].bind(self._own_rows(halves, slot))

    def _own_rows(self, halves: int, slot: int) -> dict[str, Tensor]:
        return {name: own[slot, :halves] for name, own in self.own.items()}

    def bind(self) -> None:
        """Bind every engine for an image alone, and then for two: some backends compile for what they are bound to."""
        for branch in self._engines:
            self._binding(branch, 2, 1, 0)
            if self._streams is not None:
                self._apart(branch, 2, 0)
            elif self.count > 1:
                self._binding(branch, 2, 2, -1)

    def _make_place(self, halves: int, which: int, slot: int) -> Place:
        if slot >= 0:
            of = {name: self.own[name][slot, :halves] for name in _WRITTEN}
        else:
            of = {name: self._shared[name][which * halves : (which + 1) * halves] for name in _WRITTEN}
        return Place(**of, parts=of["noise_pred"].split(1))

    def _make_index(self, slots: tuple[int, ...]) -> Tensor:
        return torch.tensor(slots, device=self.device)


def _others(specs: Sequence[TensorSpec]) -> list[str]:
    """The tensors that a loop does not write or read at every step."""
    return [spec.name for spec in specs if spec.name not in _WRITTEN]


def _dtype(spec: TensorSpec) -> torch.dtype:
    return getattr(torch, spec.dtype)
