"""The norm before a resnet's first convolution as operators of torch: importing this defines them.

`torch.ops.fastcache.concat_groupnorm_silu_joined`, of a cached feature and a skip connection, gives the concat as well,
for a shortcut convolution: it lies in registers when it is normalised, so the same kernel writes it, where torch.cat
reads and writes it all again. `groupnorm_silu` is for a single tensor. `torch.export` keeps the operators, and a
compiler opens them up: on a GPU `triton_norm.py`'s kernels become part of what it makes, so that an AOTInductor package
needs neither this file nor Triton to run; elsewhere it finds plain PyTorch operations. Eager PyTorch runs the same.
Knows tensors and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from fastcache_kernels import reference
from fastcache_kernels.launch import has_triton
from fastcache_kernels.values import FLOATS, expect

_operator: Any = triton_op  # whose stubs say that it gives back the function, and not the operator
# (values a program, warps): 16 bytes a load and thread in half precision, one load or two in flight
_SMALL, _LARGE = (512, 2), (2048, 4)


@_operator("fastcache::concat_groupnorm_silu_joined", mutates_args=())
def concat_groupnorm_silu_joined(
    cached: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """SiLU(GroupNorm(concat(cached, skip))), and the concat itself.

    Shapes: `cached` (N, C1, H, W); `skip` (N, C2, H, W); `weight`, `bias` (C1 + C2,); both results
    (N, C1 + C2, H, W); all of one dtype. Other layouts than the usual one are copied.
    Source: arXiv 1803.08494 (GroupNorm).
    """
    if has_triton(skip.device):
        return _launched(cached, skip, weight, bias, num_groups, eps, joined_too=True)
    both = torch.cat([cached, skip], 1)
    return reference.groupnorm_silu(both, weight, bias, num_groups, eps), both


@_operator("fastcache::groupnorm_silu", mutates_args=())
def groupnorm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    """SiLU(GroupNorm(x)): the same kernels with nothing cached. Shapes: `x` (N, C, H, W); `weight`, `bias` (C,)."""
    if has_triton(x.device):
        return _launched(None, x, weight, bias, num_groups, eps, joined_too=False)[0]
    return reference.groupnorm_silu(x, weight, bias, num_groups, eps)


def _launched(
    cached: Tensor | None, skip: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, joined_too: bool
) -> tuple[Tensor, Tensor]:
    """The normalised concat, and the concat where it is asked for, by launches that a compiler can take in.

    No tensor that is written stands in two places: a compiler would give each place a copy, and keep the last.

    Raises: `ValueError` for tensors that do not fit, which the kernels would read past.
    """
    skip, cached = skip.contiguous(), None if cached is None else cached.contiguous()
    samples, skip_channels, height, width = skip.shape
    cached_channels, plane = 0 if cached is None else cached.shape[1], height * width
    channels, dtypes, device = cached_channels + skip_channels, (skip.dtype,), skip.device
    expect("skip", skip, skip.shape, FLOATS, device)
    if cached is not None:
        expect("cached", cached, (samples, cached_channels, height, width), dtypes, device)
    for name, parameter in (("weight", weight), ("bias", bias)):
        expect(name, parameter, (channels,), dtypes, device)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"expected num_groups to divide {channels} channels, got {num_groups}")
    from fastcache_kernels.triton_norm import channel_statistics, normalise

    out = torch.empty((samples, channels, height, width), dtype=skip.dtype, device=device)
    statistics = torch.empty((samples, channels, 2), dtype=torch.float32, device=device)
    joined = torch.empty_like(out) if joined_too else skip.new_empty(1)
    block, num_warps = _SMALL if plane <= _SMALL[0] else _LARGE
    read = {"cached": skip if cached is None else cached, "skip": skip, "statistics": statistics}
    sizes = {"cached_channels": cached_channels, "skip_channels": skip_channels, "plane": plane}
    options = {"BLOCK": block, "num_warps": num_warps}
    written = {"weight": weight, "bias": bias, "out": out, "joined": joined}
    switches = {"channels_per_group": channels // num_groups, "eps": eps, "joined_too": int(joined_too)}
    with torch.cuda.device_of(skip):  # Triton works on the current device, whatever its arguments'
        wrap_triton(channel_statistics)[(channels, samples, 1)](**read, **sizes, **options)
        grid = (-(-plane // block), channels, samples)
        wrap_triton(normalise)[grid](**read, **written, **sizes, **switches, **options)
    return out, joined
