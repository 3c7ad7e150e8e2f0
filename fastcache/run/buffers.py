"""A bundle's engines and a batch size -> every tensor the loop needs, allocated once, with the engines bound to them.

This is the one mutable object of the run side. What the full engine caches and what the shallow engine takes are the
same tensors, so what one writes the other reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastcache_engines import Binding, Engine, TensorSpec


class BufferPool:
    """Tensors for `batch` images, `halves` times each (2 under guidance), over at most `num_calls` U-Net calls.

    `history` has shape (3 * num_calls + 1, N * C * H * W), float32: the rows x_0, e_0, z_0, x_1, e_1, z_1, ... of
    `SamplerTable.recursion`, which `latents`, `guided` and `noise` hold in the shape of the latents. `tensors` holds
    the engines' inputs and outputs by name.
    """

    def __init__(
        self,
        full: Engine,
        shallow: Engine,
        *,
        batch: int,
        halves: int,
        num_calls: int,
        channels: int,
        device: str = "cpu",
    ) -> None:
        self.batch, self.halves, self.num_calls = batch, halves, num_calls
        specs = {s.name: s for e in (full, shallow) for s in (*e.inputs, *e.outputs)}
        self.tensors: dict[str, Tensor] = {
            name: _allocate(spec, batch * halves, device) for name, spec in specs.items()
        }
        self.cached = tuple(spec.name for spec in full.outputs if spec.name != "noise_pred")
        sample = self.tensors["sample"]
        self.latent_shape = (batch, channels, *sample.shape[2:])
        self.model_input = sample.view(halves, batch, *sample.shape[1:])[:, :, :channels]
        self.noise_pred = self.tensors["noise_pred"].chunk(halves)
        self.history = torch.zeros(3 * num_calls + 1, math.prod(self.latent_shape), device=device)
        shaped = self.history.view(-1, *self.latent_shape)
        self.latents, self.guided, self.noise = (shaped[kind::3].unbind() for kind in range(3))
        self.repeated = [x.expand(halves, *self.latent_shape) for x in self.latents]
        self.run = 0  # which run the buffers belong to, counted by set_inputs
        self.full: Binding = full.bind(self.tensors)
        self.shallow: Binding = shallow.bind(self.tensors)

    def set_inputs(self, values: Mapping[str, Tensor]) -> None:
        """Copy the conditioning of a new run into place, and spoil the cached feature of the run before it.

        The history needs no clearing: the loop reads only what its run wrote, and at weight 0 noise drawn earlier.

        Raises: `ValueError` for a missing or unknown input, or one of another shape.
        """
        own = {"sample", "timestep", "noise_pred", *self.cached}
        wanted = {name for name in self.tensors if name not in own}
        if wanted != set(values):
            raise ValueError(f"expected the inputs {', '.join(sorted(wanted))}, got {', '.join(sorted(values))}")
        for name, value in values.items():
            if value.shape != self.tensors[name].shape:
                raise ValueError(f"expected {name} of shape {list(self.tensors[name].shape)}, got {list(value.shape)}")
            self.tensors[name].copy_(value)
        self.run += 1
        # A feature of another run would make a wrong picture; one channel of nan makes none, whatever mixes channels.
        for name in self.cached:
            self.tensors[name][:, 0].fill_(torch.nan)


def _allocate(spec: TensorSpec, rows: int, device: str) -> Tensor:
    sizes = [size if isinstance(size, int) else rows for size in spec.shape]
    return torch.zeros(sizes, dtype=getattr(torch, spec.dtype), device=device)
