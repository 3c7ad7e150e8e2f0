"""The plain PyTorch meaning of every kernel: what a kernel computes, in the fewest lines that say it.

Knows tensors and nothing else. Outputs go to tensors the caller gives, so that these run in a loop that allocates
nothing (but for the statistics of a rescaled guidance).
"""

from __future__ import annotations

import torch
from torch import Tensor


def guide(unconditional: Tensor, conditional: Tensor, guidance_scale: float, rescale: float, out: Tensor) -> None:
    """Classifier-free guidance.

    Shapes: all (N, C, H, W); `out` float32.
    Source: arXiv 2207.12598, equation 6; the rescaled form is arXiv 2305.08891, equations 15 and 16.
    """
    torch.lerp(unconditional, conditional, guidance_scale, out=out)
    if rescale > 0:
        axes = tuple(range(1, out.ndim))
        factor = conditional.std(axes, keepdim=True) / out.std(axes, keepdim=True)
        out.mul_(rescale * factor + (1 - rescale))


def combine(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """A sampler's update: the weighted sum of its history.

    Shapes: `rows` (R, E); `weights` (1, R); `out` (1, E), none of it in `rows`.
    """
    torch.mm(weights, rows, out=out)


def duplicate(latents: Tensor, scale: Tensor, out: Tensor) -> None:
    """The model's next input: the scaled latents, once for each half of a guided batch.

    `scale` is a tensor because torch would make one of a number, at every call.

    Shapes: `latents` and `out` (halves, N, C, H, W), the first expanded from (N, C, H, W); `scale` ().
    """
    torch.mul(latents, scale, out=out)
