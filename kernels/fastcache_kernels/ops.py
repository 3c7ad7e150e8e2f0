"""The norms before a resnet's first convolution as operators of torch: importing this defines them.

`torch.ops.fastcache.concat_groupnorm_silu`; `concat_groupnorm_silu_joined`, which gives the concat as well, for a
shortcut convolution; and `groupnorm_silu` for a single tensor. Eager PyTorch launches the kernels. `torch.export` keeps
the operators, and a compiler opens them up: on a GPU the Triton kernels become part of what it makes, so that an
AOTInductor package needs neither this file nor Triton to run; elsewhere it finds plain PyTorch operations.
Knows tensors and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.nn import functional

from fastcache_kernels import norm

_operator: Any = triton_op  # whose stubs say that it gives back the function, and not the operator
_EAGER = ("cpu", "cuda")


@_operator("fastcache::concat_groupnorm_silu", mutates_args=())
def concat_groupnorm_silu(
    cached: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> Tensor:
    """SiLU(GroupNorm(concat(cached, skip))). Shapes: as `fastcache_kernels.norm` says; other layouts are copied."""
    return _opened(cached, skip, weight, bias, num_groups, eps)[0]


@concat_groupnorm_silu.register_kernel(_EAGER)
def _(cached: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    return norm.concat_groupnorm_silu(cached.contiguous(), skip.contiguous(), weight, bias, num_groups, eps)


@_operator("fastcache::concat_groupnorm_silu_joined", mutates_args=())
def concat_groupnorm_silu_joined(
    cached: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """SiLU(GroupNorm(concat)) and the concat itself."""
    return _opened(cached, skip, weight, bias, num_groups, eps, joined_too=True)


@concat_groupnorm_silu_joined.register_kernel(_EAGER)
def _(cached: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    joined = skip.new_empty(skip.shape[0], cached.shape[1] + skip.shape[1], *skip.shape[2:])
    normed = norm.concat_groupnorm_silu(
        cached.contiguous(), skip.contiguous(), weight, bias, num_groups, eps, joined=joined
    )
    return normed, joined


@_operator("fastcache::groupnorm_silu", mutates_args=())
def groupnorm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    """SiLU(GroupNorm(x)): the same kernels with nothing cached. Shapes: `x` (N, C, H, W); `weight`, `bias` (C,)."""
    return _opened(None, x, weight, bias, num_groups, eps)[0]


@groupnorm_silu.register_kernel(_EAGER)
def _(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    nothing = x.new_empty(x.shape[0], 0, *x.shape[2:])
    return norm.concat_groupnorm_silu(nothing, x.contiguous(), weight, bias, num_groups, eps)


def _opened(
    cached: Tensor | None,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    joined_too: bool = False,
) -> tuple[Tensor, Tensor]:
    """The normalised concat, and the concat where it is asked for, as a compiler is to see them."""
    if skip.device.type == "cuda":
        return _launched(cached, skip, weight, bias, num_groups, eps, joined_too)
    both = skip if cached is None else torch.cat([cached, skip], 1)
    normed = functional.group_norm(both.float(), num_groups, weight.float(), bias.float(), eps)
    return functional.silu(normed).to(skip.dtype), both


def _launched(
    cached: Tensor | None, skip: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, joined_too: bool
) -> tuple[Tensor, Tensor]:
    """`norm.bind`'s launches in the form that a compiler can take in.

    No tensor that is written stands in two places: a compiler would give each place a copy, and keep the last.
    """
    from fastcache_kernels.triton_norm import channel_statistics, normalise

    skip = skip.contiguous()
    samples, skip_channels, height, width = skip.shape
    channels, plane = weight.shape[0], height * width
    out, statistics = (
        torch.empty(shape, dtype=dtype, device=skip.device)
        for shape, dtype in (
            ((samples, channels, height, width), skip.dtype),
            ((samples, channels, 2), torch.float32),
        )
    )
    joined = torch.empty_like(out) if joined_too else skip.new_empty(1)
    block, num_warps = norm.block_size(plane)
    read = {"cached": skip if cached is None else cached.contiguous(), "skip": skip, "statistics": statistics}
    sizes = {"cached_channels": channels - skip_channels, "skip_channels": skip_channels, "plane": plane}
    options = {"BLOCK": block, "num_warps": num_warps}
    wrap_triton(channel_statistics)[(channels, samples, 1)](**read, **sizes, **options)
    wrap_triton(normalise)[(-(-plane // block), channels, samples)](
        **read,
        weight=weight,
        bias=bias,
        out=out,
        joined=joined,
        **sizes,
        channels_per_group=channels // num_groups,
        eps=eps,
        joined_too=int(joined_too),
        **options,
    )
    return out, joined
