"""Cached feature and skip connection -> SiLU(GroupNorm(concat)), with the concat itself only where it is asked for.

Checks what it is given, chooses block sizes and launches `triton_norm.py`'s kernels; where no kernel can be launched it
computes the plain PyTorch meaning. Knows tensors and nothing else.

A resnet's shortcut convolution needs the concat as well. It lies in registers when it is normalised, so the same kernel
can write it: one write more, where torch.cat reads and writes it all again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcache_kernels import reference
from fastcache_kernels.launch import Argument, Launch, prepare
from fastcache_kernels.values import FLOATS, Adjustment, Forecast, StoredFeature, expect, expect_feature

# (values a program, warps): 16 bytes a load and thread in half precision, one load or two in flight
SMALL, LARGE = (512, 2), (2048, 4)


@dataclass(frozen=True)
class _Call:
    """A call's tensors, checked, with something in every place."""

    cached: StoredFeature
    skip: Tensor
    weight: Tensor
    bias: Tensor
    num_groups: int
    eps: float
    out: Tensor
    statistics: Tensor
    joined: Tensor | None
    adjust: Adjustment | None
    forecast: Forecast | None

    @property
    def channels(self) -> int:
        return self.out.shape[1]


def concat_groupnorm_silu(
    cached: Tensor | StoredFeature,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    *,
    out: Tensor | None = None,
    statistics: Tensor | None = None,
    cached_known: bool = False,
    joined: Tensor | None = None,
    adjust: Adjustment | None = None,
    forecast: Forecast | None = None,
) -> Tensor:
    """SiLU(GroupNorm(concat(cached, skip))). A cached feature may be forecast first, and then adjusted.

    Shapes: `cached` (N, C1, H, W) or a stored feature; `skip` (N, C2, H, W); `weight`, `bias` (C1 + C2,), in the skip
    connection's dtype; `out` and, where the concat is wanted too, `joined` (N, C1 + C2, H, W).
    `statistics` (N, C1 + C2, 2), float32, is left with each channel's mean and sum of squared deviations, as stored;
    with `cached_known` the cached half's are taken from there: they hold until the feature is stored anew.

    Raises: `ValueError` for tensors that do not fit, or a forecast's statistics taken for known.
    Source: arXiv 1803.08494 (GroupNorm); arXiv 2312.03209, section 3.3 (the adjustment).
    """
    shape = (skip.shape[0], weight.shape[0], *skip.shape[2:])
    if out is None:
        out = torch.empty(shape, dtype=skip.dtype, device=skip.device)
    bind(
        cached,
        skip,
        weight,
        bias,
        num_groups,
        eps,
        out=out,
        statistics=statistics,
        cached_known=cached_known,
        joined=joined,
        adjust=adjust,
        forecast=forecast,
    )()
    return out


def bind(
    cached: Tensor | StoredFeature,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    *,
    out: Tensor,
    statistics: Tensor | None = None,
    cached_known: bool = False,
    joined: Tensor | None = None,
    adjust: Adjustment | None = None,
    forecast: Forecast | None = None,
) -> Launch:
    """`concat_groupnorm_silu` on these very tensors: checked once, then launched as often as one likes.

    Raises: `ValueError` as `concat_groupnorm_silu`.
    """
    if isinstance(cached, Tensor):
        cached = StoredFeature(cached)
    if statistics is None:
        if cached_known:
            raise ValueError("expected the statistics that are known, got none; give statistics")
        statistics = torch.empty(skip.shape[0], weight.shape[0], 2, device=skip.device)
    call = _Call(cached, skip, weight, bias, num_groups, eps, out, statistics, joined, adjust, forecast)
    _check(call, cached_known)
    launches = _launches(call, call.cached.values.shape[1] if cached_known else 0)
    return launches or (lambda: _compute(call))


def _check(call: _Call, cached_known: bool) -> None:
    skip, device = call.skip, call.skip.device
    if skip.ndim != 4 or skip.numel() == 0:
        raise ValueError(f"expected skip of shape (N, C, H, W), none of them 0, got {list(skip.shape)}")
    samples, skip_channels, *plane = skip.shape
    expect("skip", skip, skip.shape, FLOATS, device)
    expect_feature("cached", call.cached, samples, skip.dtype, device)
    cached_channels = call.cached.values.shape[1]
    if call.cached.values.shape[2:] != skip.shape[2:]:
        raise ValueError(
            f"expected cached and skip of one height and width, got {list(call.cached.values.shape[2:])} and {plane}"
        )
    channels = cached_channels + skip_channels
    if call.num_groups < 1 or channels % call.num_groups:
        raise ValueError(
            f"expected num_groups to divide {cached_channels} + {skip_channels} channels, got {call.num_groups}"
        )
    expect("weight", call.weight, (channels,), (skip.dtype,), device)
    expect("bias", call.bias, (channels,), (skip.dtype,), device)
    expect("out", call.out, (samples, channels, *plane), (skip.dtype,), device)
    expect("statistics", call.statistics, (samples, channels, 2), (torch.float32,), device)
    if call.joined is not None:
        expect("joined", call.joined, call.out.shape, (skip.dtype,), device)
    if call.adjust is not None:
        for name, tensor in (("scale", call.adjust.scale), ("shift", call.adjust.shift)):
            expect(f"the adjustment's {name}", tensor, (samples, cached_channels), (torch.float32,), device)
    if call.forecast is not None:
        _check_forecast(call, call.forecast, cached_known)


def _check_forecast(call: _Call, forecast: Forecast, cached_known: bool) -> None:
    device = call.skip.device
    if cached_known:
        raise ValueError("expected no known statistics with a forecast, whose own change; leave cached_known out")
    own, previous = call.cached, forecast.previous
    expect("the forecast's previous", previous.values, own.values.shape, (own.values.dtype,), device)
    if (own.scales is None) != (previous.scales is None) or own.slots is not previous.slots:
        raise ValueError("expected a forecast from two features stored alike, in the same slots; store both alike")
    if own.scales is not None and previous.scales is not None:
        expect("the forecast's previous scales", previous.scales, own.scales.shape, (torch.float32,), device)
    expect("the forecast's weights", forecast.weights, (forecast.weights.numel(),), (torch.float32,), device)
    expect("the forecast's step", forecast.step, (1,), (torch.int32,), device)


def _launches(call: _Call, first: int) -> Launch | None:
    """Both kernels, the statistics from channel `first` on; None where they cannot be launched."""
    samples, _, height, width = call.skip.shape
    plane = height * width
    block, num_warps = block_size(plane)
    shared = _shared_arguments(call)
    sizes: dict[str, Argument] = {
        "cached_channels": call.cached.values.shape[1],
        "skip_channels": call.skip.shape[1],
        "channels_per_scale": call.cached.channels_per_scale,
    }
    switches: dict[str, Argument] = {
        "slotted": int(call.cached.slots is not None),
        "forecast": int(call.forecast is not None),
    }
    statistics = prepare(
        "channel_statistics",
        (call.channels - first, samples, 1),
        {**shared, "statistics": call.statistics, "first": first, **sizes, "plane": plane, **switches},
        num_warps=num_warps,
        BLOCK=block,
    )
    normalise = prepare(
        "normalise",
        (-(-plane // block), call.channels, samples),
        {
            **shared,
            "statistics": call.statistics,
            "scale": call.statistics if call.adjust is None else call.adjust.scale,
            "shift": call.statistics if call.adjust is None else call.adjust.shift,
            "weight": call.weight,
            "bias": call.bias,
            "out": call.out,
            "joined": call.out if call.joined is None else call.joined,
            **sizes,
            "channels_per_group": call.channels // call.num_groups,
            "plane": plane,
            "eps": float(call.eps),
            **switches,
            "adjusted": int(call.adjust is not None),
            "joined_too": int(call.joined is not None),
        },
        num_warps=num_warps,
        BLOCK=block,
    )
    if statistics is None or normalise is None:
        return None

    def launch() -> None:
        statistics()
        normalise()

    return launch


def _shared_arguments(call: _Call) -> dict[str, Argument]:
    """What both kernels begin with; in the place of what there is not, something of its dtype that is not read."""
    cached, forecast, integers = call.cached, call.forecast, call.statistics.view(torch.int32)
    previous = cached if forecast is None else forecast.previous
    return {
        "cached": as_bytes(cached.values),
        "scales": call.statistics if cached.scales is None else cached.scales,
        "previous": as_bytes(previous.values),
        "previous_scales": call.statistics if previous.scales is None else previous.scales,
        "slots": integers if cached.slots is None else cached.slots,
        "weights": call.statistics if forecast is None else forecast.weights,
        "step": integers if forecast is None else forecast.step,
        "skip": call.skip,
    }


def block_size(plane: int) -> tuple[int, int]:
    """The values and the warps of a program, for images of so many pixels."""
    return SMALL if plane <= SMALL[0] else LARGE


def as_bytes(values: Tensor) -> Tensor:
    """e4m3 as the bytes that kernels take it for; others as they are."""
    return values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values


def _compute(call: _Call) -> None:
    """What the kernels leave, by plain PyTorch operations."""
    stored = reference.joined(call.cached, call.skip, None, call.forecast).flatten(2)
    torch.stack([stored.mean(2), stored.var(2, correction=0) * stored.shape[2]], 2, out=call.statistics)
    call.out.copy_(
        reference.concat_groupnorm_silu(
            call.cached,
            call.skip,
            call.weight,
            call.bias,
            call.num_groups,
            call.eps,
            adjust=call.adjust,
            forecast=call.forecast,
        )
    )
    if call.joined is not None:
        call.joined.copy_(reference.joined(call.cached, call.skip, call.adjust, call.forecast))
