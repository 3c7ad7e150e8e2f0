"""Generators -> the noise that diffusers would draw from them, into tensors that exist."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw(out: Tensor, generator: Generators) -> None:
    """Fill `out` with the noise diffusers' `randn_tensor` would draw: one generator for all, or one for each image.

    A generator of the CPU draws there, also for a GPU, so that a seed gives the same picture on both.
    """
    if generator is None or isinstance(generator, torch.Generator):
        _draw(out, generator)
    else:
        for image, own in zip(out, generator, strict=True):
            _draw(image, own)


def _draw(out: Tensor, generator: torch.Generator | None) -> None:
    if generator is None or generator.device.type == out.device.type:
        out.normal_(generator=generator)
    else:
        out.copy_(torch.randn(out.shape, generator=generator, device=generator.device))
