"""The plain PyTorch meaning of every kernel: what a kernel computes, in the fewest lines that say it.

Knows tensors and nothing else. `guide`, `combine` and `duplicate` write to tensors the caller gives, so that these run
in a loop that allocates nothing (but for the statistics of a rescaled guidance); the others say what a kernel means.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastcache_kernels.values import StepTables


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


def guidance_step(
    noise_pred: Tensor,
    ring: Tensor,
    tables: StepTables,
    step: Tensor,
    model_input: Tensor,
    timestep: Tensor,
    *,
    rescale: float = 0.0,
    noise: Tensor | None = None,
) -> None:
    """Guidance, the sampler's update and the model's next input and timesteps; `GuidanceStep` says what each is.

    Reads the step's number, so it waits for a GPU.
    """
    i, calls = int(step), tables.ring_calls
    samples, channels = ring.shape[2:4]
    halves = noise_pred.float().unflatten(0, (-1, samples))
    own, following = ring[i % calls], (i + 1) % calls
    if len(halves) == 2:
        guide(halves[0], halves[1], float(tables.guidance[i]), rescale, own[1])
    else:
        own[1].copy_(halves[0])
    if noise is not None:
        own[2].copy_(noise[i])
    weights = tables.weights[i].flatten()
    # 0 * nan is nan: rows that count nothing may hold anything
    rows = ring.view(3 * calls, -1)[weights != 0]
    ring[following, 0] = (weights[weights != 0] @ rows).view_as(own[1])
    if i + 1 < tables.num_steps:
        target = model_input.unflatten(0, (-1, samples))[:, :, :channels]
        target.copy_(ring[following, 0] * tables.input_scales[i + 1])
        timestep.copy_(tables.timesteps[i + 1].expand_as(timestep))


def groupnorm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    """SiLU(GroupNorm(x)) in float32, rounded once at the end to the dtype of `x`."""
    normed = functional.group_norm(x.float(), num_groups, weight.float(), bias.float(), eps)
    return functional.silu(normed).to(x.dtype)
