"""A cached feature -> its slots of a pool, as it is or in one byte a value.

Checks what it is given and launches `triton_feature.py`'s kernel; where no kernel can be launched it computes the plain
PyTorch meaning. Knows tensors and nothing else. `norm.py` reads what this stores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcache_kernels import reference
from fastcache_kernels.launch import prepare
from fastcache_kernels.norm import as_bytes
from fastcache_kernels.values import FLOATS, QUANTISED, StoredFeature, expect, expect_feature

BLOCK, NUM_WARPS = 2048, 4


def empty_feature(
    shape: tuple[int, int, int, int], dtype: torch.dtype, *, groups: int = 0, device: torch.device | str = "cpu"
) -> StoredFeature:
    """A pool of slots of shape (slots, C, H, W), filled with what is read as nan: no picture until one is stored.

    Raises: `ValueError` for a quantised dtype without groups, groups without one, or groups that do not divide C.
    """
    quantised = dtype in QUANTISED
    if (not quantised and dtype not in FLOATS) or quantised != (groups > 0) or (groups and shape[1] % groups):
        raise ValueError(
            f"expected a float dtype and no groups, or int8 or float8_e4m3fn and a number of groups that divides "
            f"{shape[1]} channels, got {dtype} and {groups}"
        )
    if not quantised:
        return StoredFeature(torch.full(shape, torch.nan, dtype=dtype, device=device))
    scales = torch.full((shape[0], groups), torch.nan, device=device)
    return StoredFeature(torch.zeros(shape, dtype=dtype, device=device), scales)


def store_feature(feature: Tensor, out: StoredFeature) -> None:
    """Store each sample's feature in its slot: sample n in `out.slots[n]`, or in slot n.

    Quantised, each group of channels of a sample is divided by its greatest size, rounded to nearest even.
    Shapes: `feature` (N, C, H, W); `out` as `StoredFeature` says.

    Raises: `ValueError` for tensors that do not fit.
    """
    if feature.ndim != 4 or feature.numel() == 0:
        raise ValueError(f"expected feature of shape (N, C, H, W), none of them 0, got {list(feature.shape)}")
    samples, _, height, width = feature.shape
    expect("feature", feature, (samples, *out.values.shape[1:]), FLOATS, feature.device)
    expect_feature("out", out, samples, feature.dtype, feature.device)
    if out.scales is None:
        reference.store_feature(feature, out)  # a copy, which torch makes as fast as the memory is
        return
    launch = prepare(
        "quantise",
        (out.scales.shape[1], samples, 1),
        {
            "feature": feature,
            "values": as_bytes(out.values),
            "scales": out.scales,
            "slots": out.scales.view(torch.int32) if out.slots is None else out.slots,
            "size": out.channels_per_scale * height * width,
            "slotted": int(out.slots is not None),
        },
        num_warps=NUM_WARPS,
        LIMIT=int(QUANTISED[out.values.dtype]),
        BLOCK=BLOCK,
    )
    if launch is None:
        reference.store_feature(feature, out)
    else:
        launch()
