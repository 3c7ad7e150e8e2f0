"""The plain PyTorch meaning of every kernel: what a kernel computes, in the fewest lines that say it.

Knows tensors and nothing else. `guide`, `combine` and `duplicate` write to tensors the caller gives, so that these run
in a loop that allocates nothing (but for the statistics of a rescaled guidance); the others say what a kernel means.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastcache_kernels.values import QUANTISED, Adjustment, Forecast, StepTables, StoredFeature


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


def restored(feature: StoredFeature) -> Tensor:
    """A stored feature as it was, but for what quantising it lost. Shapes: (N, C, H, W), float32."""
    where = slice(None) if feature.slots is None else feature.slots.long()
    values = feature.values[where].float()
    if feature.scales is None:
        return values
    scales = feature.scales[where].repeat_interleave(feature.channels_per_scale, 1)
    return values * scales[:, :, None, None]


def store_feature(feature: Tensor, out: StoredFeature) -> None:
    """A feature to its slots; in one byte a value, each group of channels over its greatest size.

    A group with a value that is not finite gets nan for its scale, so it is read as nan: never as a wrong number.
    """
    where = slice(None) if out.slots is None else out.slots.long()
    if out.scales is None:
        out.values[where] = feature
        return
    limit = QUANTISED[out.values.dtype]
    groups = feature.float().unflatten(1, (-1, out.channels_per_scale)).flatten(2)
    scales = groups.abs().amax(-1) / limit
    scales = torch.where(scales > 0, scales, 1.0) + (groups * 0).sum(-1)
    values = (groups / scales[:, :, None]).nan_to_num(0.0).clamp(-limit, limit)
    out.scales[where] = scales
    out.values[where] = (
        (values.round() if out.values.dtype == torch.int8 else values).to(out.values.dtype).view(feature.shape)
    )


def joined(cached: StoredFeature, skip: Tensor, adjust: Adjustment | None, forecast: Forecast | None) -> Tensor:
    """The cached feature, or its forecast, adjusted, beside the skip connection. Shapes: (N, C1 + C2, H, W)."""
    feature = restored(cached)
    if forecast is not None:
        feature = feature + forecast.weights[int(forecast.step)] * (feature - restored(forecast.previous))
    if adjust is not None:
        feature = feature * adjust.scale[:, :, None, None] + adjust.shift[:, :, None, None]
    return torch.cat([feature, skip.float()], 1)


def concat_groupnorm_silu(
    cached: StoredFeature,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    *,
    adjust: Adjustment | None = None,
    forecast: Forecast | None = None,
) -> Tensor:
    """SiLU(GroupNorm(concat)) in float32, rounded once at the end to the skip connection's dtype."""
    both = joined(cached, skip, adjust, forecast)
    normed = functional.group_norm(both, num_groups, weight.float(), bias.float(), eps)
    return functional.silu(normed).to(skip.dtype)
