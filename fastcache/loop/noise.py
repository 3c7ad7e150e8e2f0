"""Generators -> the noise that diffusers would draw from them, into tensors that exist."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw(out: Tensor, generator: Generators) -> None:
    """Fill `out` with the noise diffusers' `randn_tensor` would draw: one generator for all, or one for each image.

    A generator of the CPU draws there, also for a GPU, so that a seed gives the same picture on both. The GPU's step is
    not waited for: the numbers lie in pinned memory, from where the GPU takes them when it comes to them.
    """
    if generator is None or isinstance(generator, torch.Generator):
        _draw(out, generator)
    else:
        for image, own in zip(out, generator, strict=True):
            _draw(image, own)


def _draw(out: Tensor, generator: torch.Generator | None) -> None:
    if generator is None or generator.device.type == out.device.type:
        out.normal_(generator=generator)
        return
    # Torch's allocator of pinned memory gives it out again only once the copies from it are done.
    drawn = torch.empty(out.shape, device=generator.device, pin_memory=out.is_cuda)
    out.copy_(drawn.normal_(generator=generator), non_blocking=out.is_cuda)
