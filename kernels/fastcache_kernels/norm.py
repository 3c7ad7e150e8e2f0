"""Cached feature and skip connection -> SiLU(GroupNorm(concat)), with the concat itself only where it is asked for.

Checks what it is given, chooses block sizes and launches `triton_norm.py`'s kernels; where no kernel can be launched it
computes the plain PyTorch meaning. Knows tensors and nothing else.

A resnet's shortcut convolution needs the concat as well. It lies in registers when it is normalised, so the same kernel
can write it: one write more, where torch.cat reads and writes it all again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcache_kernels import reference
from fastcache_kernels.launch import Argument, Launch, prepare
from fastcache_kernels.values import FLOATS, expect

# (values a program, warps): 16 bytes a load and thread in half precision, one load or two in flight
SMALL, LARGE = (512, 2), (2048, 4)


def concat_groupnorm_silu(
    cached: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    *,
    out: Tensor | None = None,
    joined: Tensor | None = None,
) -> Tensor:
    """SiLU(GroupNorm(concat(cached, skip))).

    Shapes: `cached` (N, C1, H, W), C1 0 where nothing is cached; `skip` (N, C2, H, W); `weight`, `bias` (C1 + C2,);
    `out` and, where the concat is wanted too, `joined` (N, C1 + C2, H, W); all of one dtype.

    Raises: `ValueError` for tensors that do not fit.
    Source: arXiv 1803.08494 (GroupNorm).
    """
    if out is None:
        out = torch.empty((skip.shape[0], weight.shape[0], *skip.shape[2:]), dtype=skip.dtype, device=skip.device)
    bind(cached, skip, weight, bias, num_groups, eps, out=out, joined=joined)()
    return out


def bind(
    cached: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    *,
    out: Tensor,
    joined: Tensor | None = None,
) -> Launch:
    """`concat_groupnorm_silu` on these very tensors: checked once, then launched as often as one likes.

    Raises: `ValueError` as `concat_groupnorm_silu`.
    """
    _check(cached, skip, num_groups, {"weight": weight, "bias": bias}, {"out": out, "joined": joined})
    samples, channels, height, width = out.shape
    plane = height * width
    block, num_warps = block_size(plane)
    read: dict[str, Argument] = {
        "cached": cached,
        "skip": skip,
        "statistics": torch.empty(samples, channels, 2, device=skip.device),
    }
    sizes: dict[str, Argument] = {"cached_channels": cached.shape[1], "skip_channels": skip.shape[1]}
    statistics = prepare(
        "channel_statistics",
        (channels, samples, 1),
        {**read, **sizes, "plane": plane},
        num_warps=num_warps,
        BLOCK=block,
    )
    written: dict[str, Argument] = {"out": out, "joined": out if joined is None else joined}
    switches: dict[str, Argument] = {"eps": float(eps), "joined_too": int(joined is not None)}
    normalise = prepare(
        "normalise",
        (-(-plane // block), channels, samples),
        {
            **read,
            "weight": weight,
            "bias": bias,
            **written,
            **sizes,
            "channels_per_group": channels // num_groups,
            "plane": plane,
            **switches,
        },
        num_warps=num_warps,
        BLOCK=block,
    )

    def launch() -> None:
        if statistics is None or normalise is None:
            reference.concat_groupnorm_silu(cached, skip, weight, bias, num_groups, eps, out=out, joined=joined)
        else:
            statistics()
            normalise()

    return launch


def _check(
    cached: Tensor, skip: Tensor, num_groups: int, parameters: dict[str, Tensor], written: dict[str, Tensor | None]
) -> None:
    if skip.ndim != 4 or skip.numel() == 0:
        raise ValueError(f"expected skip of shape (N, C, H, W), none of them 0, got {list(skip.shape)}")
    if cached.ndim != 4:
        raise ValueError(f"expected cached of shape (N, C, H, W), got {list(cached.shape)}")
    samples, skip_channels, *plane = skip.shape
    cached_channels, dtypes, device = cached.shape[1], (skip.dtype,), skip.device
    channels = cached_channels + skip_channels
    expect("skip", skip, skip.shape, FLOATS, device)
    expect("cached", cached, (samples, cached_channels, *plane), dtypes, device)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"expected num_groups to divide {cached_channels} + {skip_channels} channels, got {num_groups}"
        )
    for name, tensor in parameters.items():
        expect(name, tensor, (channels,), dtypes, device)
    for name, tensor in written.items():
        if tensor is not None:
            expect(name, tensor, (samples, channels, *plane), dtypes, device)


def block_size(plane: int) -> tuple[int, int]:
    """The values and the warps of a program, for images of so many pixels."""
    return SMALL if plane <= SMALL[0] else LARGE
