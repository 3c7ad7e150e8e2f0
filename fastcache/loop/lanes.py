"""Lanes of one image each, out of step with each other -> the engine calls that they share.

An image alone runs on its own lane's rows. Images in company run on shared rows, which are filled from their lanes, or
where there are streams each on its own, at once. Knows nothing about plans, samplers, prompts or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fastcache.cut.chain import kept_name
from fastcache.loop.lane import Lane, Pass, Rows, in_turn, storage_bytes, tensors_of
from fastcache.loop.streams import Streams
from fastcache_engines import Binding, Engine


class Lanes:
    """`count` lanes of one size, guided images taking two rows each, and the rows that those in company share."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        passes: Mapping[str, Pass],
        *,
        count: int,
        channels: int,
        sizes: Mapping[str, int],
        device: str,
        streams: Streams | None = None,
    ) -> None:
        self._engines, self._passes, self._streams = engines, passes, streams
        self._sizes, self._device = dict(sizes), device
        self.lanes = [
            Lane(engines, passes, images=1, halves=2, channels=channels, device=device, sizes=sizes)
            for _ in range(count)
        ]
        self._place = lru_cache(maxsize=None)(self._make_place)
        self._binding = lru_cache(maxsize=None)(self._bind)
        self._apart = lru_cache(maxsize=None)(self._bind_apart)
        self._holds: dict[str, tuple[int, ...]] = {}  # what the shared rows hold, by when it was new

    @property
    def held_bytes(self) -> int:
        """What the tensors take now."""
        shared: dict[str, Tensor] = self.__dict__.get("_shared", {})
        return sum(lane.held_bytes for lane in self.lanes) + storage_bytes(shared.values())

    @property
    def most_bytes(self) -> int:
        """What they take at most: where every image's plan forecasts each of its features, in the highest order."""
        every = sum(lane.most_bytes for lane in self.lanes)
        alone = len(self.lanes) == 1 or self._streams is not None
        own = [t for lane in self.lanes for name, t in lane.tensors.items() if kept_name(name) is None]
        return every if alone else every + sum(tensor.nbytes for tensor in own)

    def rows(self, lanes: Sequence[int], guided: bool) -> list[Rows]:
        """Where these lanes' rows of an engine call lie, in order."""
        if len(lanes) == 1 or self._streams is not None:
            return [self.lanes[lane].rows(guided) for lane in lanes]
        return [self._place(j, guided) for j in range(len(lanes))]

    def run(self, name: str, lanes: Sequence[int], guided: bool) -> None:
        """One call of a pass for these lanes, or one each, with their samples and timesteps in their rows."""
        own = self._passes[name]
        if len(lanes) == 1:
            self.lanes[lanes[0]].call(name, guided)()
        elif self._streams is not None:
            self._streams.run([self._call_apart(own, guided, lane) for lane in lanes])
        else:
            self._gather((*self.lanes[0].conditioning, *own.takes), lanes, guided)
            self._gather_pictures(lanes, guided)
            in_turn([self._binding(role, guided, len(lanes)) for role in own.engines], own, self._shared)()
            self._scatter(own.stores, lanes, guided)
            return
        for lane in lanes:
            self.lanes[lane].touch(*own.stores)

    def bind(self) -> None:
        """Bind every pass for an image alone, guided and not, and for two: some backends compile for each shape."""
        for role in self._engines:
            for guided in (True, False):
                self.lanes[0].binding(role, guided)
                if self._streams is not None:
                    self._apart(role, guided, 0)
                elif len(self.lanes) > 1:
                    self._binding(role, guided, 2)

    @cached_property
    def _shared(self) -> dict[str, Tensor]:
        """The rows of lanes in company: (lanes, halves) of them from the start."""
        sizes = self._sizes | {"batch": 2 * len(self.lanes)}
        return tensors_of(self._engines, self._passes, sizes, self._device)

    def _gather(self, names: Sequence[str], lanes: Sequence[int], guided: bool) -> None:
        """Bring what the lanes hold to the shared rows, unless it is there from the call before."""
        for name in names:
            state = self._state(name, lanes, guided)
            if self._holds.get(name) != state:
                own = [self.lanes[lane].rows(guided).tensors[name] for lane in lanes]
                torch.cat(own, out=self._shared[name][: len(lanes) * len(own[0])])
                self._holds[name] = state

    def _gather_pictures(self, lanes: Sequence[int], guided: bool) -> None:
        """Bring the sample's channels beyond the latents, which a lane keeps for a whole run, to the shared rows."""
        shared, latents = self._shared["sample"], self.lanes[0].latent_shape[1]
        if shared.shape[1] > latents:
            own = torch.cat([self.lanes[lane].rows(guided).tensors["sample"][:, latents:] for lane in lanes])
            shared[: len(own), latents:].copy_(own)

    def _scatter(self, names: Sequence[str], lanes: Sequence[int], guided: bool) -> None:
        """Bring what a pass stored to the lanes. It stays in the shared rows as well."""
        for name in names:
            for place, lane in zip(self.rows(lanes, guided), lanes, strict=True):
                self.lanes[lane].rows(guided).tensors[name].copy_(place.tensors[name])
                self.lanes[lane].touch(name)
            self._holds[name] = self._state(name, lanes, guided)

    def _state(self, name: str, lanes: Sequence[int], guided: bool) -> tuple[int, ...]:
        return (guided, *(self.lanes[lane].changed[name] for lane in lanes))

    def _bind(self, role: str, guided: bool, images: int) -> Binding:
        return self._engines[role].bind({n: one[: images * (1 + guided)] for n, one in self._shared.items()})

    def _bind_apart(self, role: str, guided: bool, lane: int) -> Binding:
        if self._streams is None:
            raise ValueError("expected streams for images at once, got none")
        return self._streams.engines[role].bind(self.lanes[lane].rows(guided).tensors)

    def _call_apart(self, own: Pass, guided: bool, lane: int) -> Callable[[], object]:
        bindings = [self._apart(role, guided, lane) for role in own.engines]
        return in_turn(bindings, own, self.lanes[lane].rows(guided).tensors)

    def _make_place(self, which: int, guided: bool) -> Rows:
        halves = 1 + guided
        rows = {name: shared[which * halves : (which + 1) * halves] for name, shared in self._shared.items()}
        return Rows.of(rows, 1, self.lanes[0].latent_shape[1])
