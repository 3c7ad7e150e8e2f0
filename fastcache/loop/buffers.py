"""A bundle's engines and a batch size -> every tensor the loop needs, allocated once, with the engines bound to them.

This is the one mutable object of the run side. What the full engine caches and what a shallow engine takes are the
same tensors, so what one writes the other reads; and steps without guidance run on the conditional half of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastcache.loop.table import SamplerTable
from fastcache_engines import Binding, Engine, TensorSpec
from fastcache_kernels import reference as kernels

# What CUDA aligns an allocation to, and what kernels that were compiled for one may count on.
_ALIGNMENT_BYTES = 256
_LOOP_WRITES = ("sample", "noise_pred", "timestep")


@dataclass(frozen=True)
class Rows:
    """The tensors of the rows that a step runs on: `halves` times each image, or under no guidance once.

    Shapes: `model_input` (halves, N, C, ...), the sample's first channels; `noise_pred` one (N, C, ...) a half;
    `repeated[i]` the latents before step i, expanded to `model_input`.
    """

    tensors: Mapping[str, Tensor]
    model_input: Tensor
    noise_pred: tuple[Tensor, ...]
    repeated: tuple[Tensor, ...]


class BufferPool:
    """Tensors for `batch` images, `halves` times each (2 under guidance), over at most `num_calls` U-Net calls.

    `shallow` are the engines by their branch ids. `history` has shape (3 * num_calls + 1, N * C * H * W), float32: the
    rows x_0, e_0, z_0, x_1, e_1, z_1, ... of `SamplerTable.recursion`, which `latents`, `guided` and `noise` hold in
    the shape of the latents; a loop may take its first rows for a ring of the last calls'. `tensors` holds the engines'
    inputs and outputs by name, `sizes` what else than the batch is free in their shapes. `compared` (2 * N, C * H * W)
    is the conditional half of `noise_pred` and right behind it room for as much. `bindings` are those made so far, by
    branch (None: full) and whether all halves run.
    """

    def __init__(
        self,
        full: Engine,
        shallow: Mapping[int, Engine],
        *,
        batch: int,
        halves: int,
        num_calls: int,
        channels: int,
        device: str = "cpu",
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.batch, self.halves, self.num_calls = batch, halves, num_calls
        self.engines: dict[int | None, Engine] = {None: full, **shallow}
        specs = {s.name: s for e in self.engines.values() for s in (*e.inputs, *e.outputs)}
        self.tensors: dict[str, Tensor] = {
            name: _allocate(spec, {"batch": batch * halves, **(sizes or {})}, device) for name, spec in specs.items()
        }
        whole = self.tensors["noise_pred"]
        behind = torch.cat([whole, whole[:batch]])
        self.tensors["noise_pred"], self.compared = behind[: len(whole)], behind[-2 * batch :].flatten(1)
        self.cached = tuple(spec.name for spec in full.outputs if spec.name != "noise_pred")
        self.latent_shape = (batch, channels, *self.tensors["sample"].shape[2:])
        self.history = torch.zeros(3 * num_calls + 1, math.prod(self.latent_shape), device=device)
        shaped = self.history.view(-1, *self.latent_shape)
        self.latents, self.guided, self.noise = (shaped[kind::3].unbind() for kind in range(3))
        self.run = 0  # which run the buffers belong to, counted by set_inputs
        self.bindings: dict[tuple[int | None, bool], Binding] = {}
        self.recorded: dict[Hashable, Any] = {}  # runs on these addresses that capture.py keeps
        self._copies: dict[str, Tensor] = {}
        self._rows = {True: self._rows_of(self.tensors, halves)}
        self._updates: tuple[SamplerTable, list[Callable[[], None]]] | None = None

    @property
    def full(self) -> Binding:
        return self.binding(None)

    @property
    def shallow(self) -> Binding:
        """The binding of the first shallow engine."""
        return self.binding(list(self.engines)[1])

    def rows(self, guided: bool = True) -> Rows:
        """What a step runs on; without guidance that is the conditional half, in the same memory."""
        if self.halves == 1:
            guided = True
        if guided not in self._rows:
            self._rows[guided] = self._rows_of({name: self._conditional(name) for name in self.tensors}, 1)
        return self._rows[guided]

    def binding(self, branch: int | None, guided: bool = True) -> Binding:
        """The engine of a branch (None: full) on `rows(guided)`, bound when it is first asked for."""
        key = branch, guided or self.halves == 1
        if key not in self.bindings:
            self.bindings[key] = self.engines[branch].bind(self.rows(guided).tensors)
        return self.bindings[key]

    def taken(self, branch: int) -> tuple[str, ...]:
        """The names of the cached tensors that a branch's shallow engine takes."""
        return tuple(spec.name for spec in self.engines[branch].inputs if spec.name in self.cached)

    def updates(self, table: SamplerTable) -> list[Callable[[], None]]:
        """For each call, what turns its guided prediction and its noise into the next latents, every view made.

        Kept for the runs to come with the same table.
        """
        if self._updates is None or self._updates[0] is not table:
            self._updates = table, [self._update(table, call) for call in range(table.num_calls)]
        return self._updates[1]

    def set_inputs(self, values: Mapping[str, Tensor]) -> None:
        """Copy the conditioning of a new run into place, and spoil the cached feature of the run before it.

        The history needs no clearing: the loop reads only what its run wrote, and at weight 0 noise drawn earlier.

        Raises: `ValueError` for a missing or unknown input, or one of another shape.
        """
        own = {*_LOOP_WRITES, *self.cached}
        wanted = {name for name in self.tensors if name not in own}
        if wanted != set(values):
            raise ValueError(f"expected the inputs {', '.join(sorted(wanted))}, got {', '.join(sorted(values))}")
        for name, value in values.items():
            if value.shape != self.tensors[name].shape:
                raise ValueError(f"expected {name} of shape {list(self.tensors[name].shape)}, got {list(value.shape)}")
            self.tensors[name].copy_(value)
        for name, half in self._copies.items():
            half.copy_(self.tensors[name][-self.batch :])
        self.run += 1
        # A feature of another run would make a wrong picture; one channel of nan makes none, whatever mixes channels.
        for name in self.cached:
            self.tensors[name][:, 0].fill_(torch.nan)

    def _rows_of(self, tensors: Mapping[str, Tensor], halves: int) -> Rows:
        batch, channels = self.latent_shape[:2]
        sample, noise_pred = tensors["sample"], tensors["noise_pred"]
        return Rows(
            tensors,
            sample.view(halves, batch, *sample.shape[1:])[:, :, :channels],
            noise_pred.chunk(halves),
            tuple(x.expand(halves, *self.latent_shape) for x in self.latents),
        )

    def _conditional(self, name: str) -> Tensor:
        """The last rows of a tensor in place; of a small one that lies badly a copy, which `set_inputs` renews.

        Raises: `ValueError` for one that is written in every step and lies badly.
        """
        half = self.tensors[name][-self.batch :]
        if half.storage_offset() * half.element_size() % _ALIGNMENT_BYTES == 0:
            return half
        if name == "timestep":
            return half.clone()  # the loop fills it
        if name in (*_LOOP_WRITES, *self.cached):
            if half.device.type == "cpu":
                return half
            raise ValueError(
                f"expected {name} of a multiple of {_ALIGNMENT_BYTES} bytes for steps without guidance, got "
                f"{list(half.shape)} of {half.element_size()} bytes each; use a plan that guides every step"
            )
        self._copies[name] = half.clone()
        return self._copies[name]

    def _update(self, table: SamplerTable, call: int) -> Callable[[], None]:
        rule, end = table.recursion()[call], 3 * call + 3
        rows = self.history[3 * rule.first : end if table.draws_noise(call) else end - 1]  # its own noise comes last
        weights = table.weights[call][:, : len(rows)].to(rows.device)
        return partial(kernels.combine, rows, weights, self.history[end : end + 1])


def shape_of(spec: TensorSpec, sizes: Mapping[str, int]) -> list[int]:
    """A tensor's shape, its free sizes looked up by name; `height/8` is an eighth of `height`."""
    parts = [size if isinstance(size, int) else size.partition("/") for size in spec.shape]
    return [part if isinstance(part, int) else sizes[part[0]] // int(part[2] or 1) for part in parts]


def _allocate(spec: TensorSpec, sizes: Mapping[str, int], device: str) -> Tensor:
    return torch.zeros(shape_of(spec, sizes), dtype=getattr(torch, spec.dtype), device=device)
