"""The kernels as operators of torch, so that `torch.export` and `torch.compile` keep them: importing this defines them.

`torch.ops.fastcache.concat_groupnorm_silu` and `concat_groupnorm_silu_joined`, which gives the concat as well, for a
shortcut convolution. Knows tensors and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcache_kernels import norm


@torch.library.custom_op("fastcache::concat_groupnorm_silu", mutates_args=())
def concat_groupnorm_silu(
    cached: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> Tensor:
    """SiLU(GroupNorm(concat(cached, skip))). Shapes: as `fastcache_kernels.norm` says; other layouts are copied."""
    return norm.concat_groupnorm_silu(cached.contiguous(), skip.contiguous(), weight, bias, num_groups, eps)


@concat_groupnorm_silu.register_fake
def _(cached: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    return _empty_like_concat(cached, skip)


@torch.library.custom_op("fastcache::concat_groupnorm_silu_joined", mutates_args=())
def concat_groupnorm_silu_joined(
    cached: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """SiLU(GroupNorm(concat)) and the concat itself."""
    joined = _empty_like_concat(cached, skip)
    normed = norm.concat_groupnorm_silu(
        cached.contiguous(), skip.contiguous(), weight, bias, num_groups, eps, joined=joined
    )
    return normed, joined


@concat_groupnorm_silu_joined.register_fake
def _(cached: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    return _empty_like_concat(cached, skip), _empty_like_concat(cached, skip)


def _empty_like_concat(cached: Tensor, skip: Tensor) -> Tensor:
    return skip.new_empty(skip.shape[0], cached.shape[1] + skip.shape[1], *skip.shape[2:])
