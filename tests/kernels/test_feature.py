"""store_feature: what is read again is what was stored, as near as a byte allows; of nothing stored comes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcache_kernels import reference
from fastcache_kernels.feature import empty_feature, store_feature
from fastcache_kernels.norm import concat_groupnorm_silu
from fastcache_kernels.values import QUANTISED, StoredFeature

STORED = pytest.mark.parametrize("stored", list(QUANTISED), ids=["int8", "e4m3"])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)


@STORED
@DTYPES
def test_quantised_values_are_the_nearest_there_are(
    dtype: torch.dtype, stored: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    feature = (3 * torch.randn(2, 6, 5, 7, generator=generator)).to(device, dtype)
    feature[:, :2] *= 100  # a scale of its own spares the others
    pool = empty_feature((2, 6, 5, 7), stored, groups=3, device=device)
    store_feature(feature, pool)
    groups = feature.double().unflatten(1, (3, 2))
    peak = groups.abs().amax((2, 3, 4), keepdim=True)
    error = (reference.restored(pool).double().unflatten(1, (3, 2)) - groups).abs()
    if stored == torch.int8:
        allowed = peak / 127 / 2
    else:  # three digits after the point, and below 2^-6 multiples of 2^-9
        allowed = torch.maximum(groups.abs() / 16, peak / 448 * 2**-10)
    assert (error <= 1.0001 * allowed + 1e-6 * peak).all()
    assert pool.scales is not None
    torch.testing.assert_close(pool.scales.double(), peak.flatten(1) / QUANTISED[stored], rtol=1e-6, atol=0)


def test_e4m3_as_torch_rounds_it(device: torch.device) -> None:
    """Every code, every tie between two of them, and what lies just beside the ties."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    up, down = (torch.nextafter(ties, torch.tensor(limit)) for limit in (448.0, 0.0))
    values = torch.cat([codes, ties, up, down])
    values = torch.cat([values, -values])
    feature = values.view(1, 1, 1, -1).to(device)
    pool = empty_feature((1, 1, 1, len(values)), torch.float8_e4m3fn, groups=1, device=device)
    store_feature(feature, pool)
    assert pool.scales is not None
    assert pool.scales.item() == 1
    assert torch.equal(pool.values.flatten().float().cpu(), values.to(torch.float8_e4m3fn).float())


@STORED
@settings(max_examples=10)
@given(data=st.data())
def test_kernel_and_meaning_agree(data: st.DataObject, stored: torch.dtype) -> None:
    groups, own = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    samples, height, width = (data.draw(st.integers(1, 7)) for _ in range(3))
    scale = data.draw(st.sampled_from([1e-6, 1.0, 1e4]))
    feature = scale * torch.randn(samples, groups * own, height, width, generator=torch.Generator().manual_seed(3))
    got, expected = (empty_feature((*feature.shape,), stored, groups=groups) for _ in range(2))
    store_feature(feature, got)
    reference.store_feature(feature, expected)
    assert torch.equal(got.values.float(), expected.values.float())
    assert got.scales is not None
    assert expected.scales is not None
    assert torch.equal(got.scales, expected.scales)


@STORED
def test_more_than_a_block(stored: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    feature = torch.randn(1, 2, 47, 47, generator=generator).to(device)
    feature[0, 1, 46, 46] = 40  # the last value of the last block sets the scale
    pool = empty_feature((1, 2, 47, 47), stored, groups=1, device=device)
    store_feature(feature, pool)
    assert pool.scales is not None
    torch.testing.assert_close(pool.scales.item(), 40 / QUANTISED[stored])
    assert reference.restored(pool)[0, 1, 46, 46].item() == pytest.approx(40)


@pytest.mark.parametrize("stored", [torch.float32, *QUANTISED], ids=["float32", "int8", "e4m3"])
def test_only_the_slots_asked_for_are_written(
    stored: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    feature = torch.randn(2, 4, 3, 5, generator=generator).to(device)
    groups = 2 if stored in QUANTISED else 0
    pool = empty_feature((5, 4, 3, 5), stored, groups=groups, device=device)
    slots = torch.tensor([4, 1], dtype=torch.int32, device=device)
    store_feature(feature, StoredFeature(pool.values, pool.scales, slots))
    everything = reference.restored(pool)
    torch.testing.assert_close(everything[[4, 1]], feature, rtol=0.07, atol=0.02)
    assert everything[[0, 2, 3]].isnan().all()


@STORED
def test_zeros_stay_zero(stored: torch.dtype, device: torch.device) -> None:
    pool = empty_feature((1, 2, 3, 3), stored, groups=1, device=device)
    store_feature(torch.zeros(1, 2, 3, 3, device=device), pool)
    assert (reference.restored(pool) == 0).all()


@STORED
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_no_picture(value: float, stored: torch.dtype, device: torch.device) -> None:
    feature = torch.ones(1, 4, 3, 3, device=device)
    feature[0, 3, 2, 2] = value
    pool = empty_feature((1, 4, 3, 3), stored, groups=2, device=device)
    store_feature(feature, pool)
    restored = reference.restored(pool)
    assert restored[:, 2:].isnan().all()
    assert (restored[:, :2] == 1).all()


@pytest.mark.parametrize("stored", [torch.float16, *QUANTISED], ids=["float16", "int8", "e4m3"])
def test_a_slot_that_was_never_stored_makes_no_picture(stored: torch.dtype, device: torch.device) -> None:
    pool = empty_feature((1, 4, 3, 3), stored, groups=2 if stored in QUANTISED else 0, device=device)
    skip, weight, bias = (
        torch.ones(*shape, dtype=torch.float16, device=device) for shape in ((1, 4, 3, 3), (8,), (8,))
    )
    assert concat_groupnorm_silu(pool, skip, weight, bias, 1).isnan().all()


@pytest.mark.parametrize(
    ("feature", "out", "expected"),
    [
        (torch.zeros(2, 4, 9), ((2, 4, 3, 3), torch.int8, 2), r"expected feature of shape \(N, C, H, W\)"),
        (torch.zeros(2, 4, 3, 4), ((2, 4, 3, 3), torch.int8, 2), r"expected feature .* \[2, 4, 3, 3\]"),
        (torch.zeros(3, 4, 3, 3), ((2, 4, 3, 3), torch.int8, 2), r"expected out .* \[3, 4, 3, 3\]"),
        (torch.zeros(2, 4, 3, 3), ((2, 4, 3, 3), torch.float16, 0), "expected out .* float32 .* got float16"),
        (torch.zeros(2, 4, 3, 3, dtype=torch.int8), ((2, 4, 3, 3), torch.int8, 2), "expected feature .* got int8"),
    ],
)
def test_features_that_do_not_fit(feature: torch.Tensor, out: Any, expected: str) -> None:
    shape, dtype, groups = out
    with pytest.raises(ValueError, match=expected) as caught:
        store_feature(feature, empty_feature(shape, dtype, groups=groups))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "groups"), [(torch.int8, 0), (torch.int8, 3), (torch.float16, 2), (torch.int32, 0), (torch.float64, 0)]
)
def test_pools_that_cannot_be(dtype: torch.dtype, groups: int) -> None:
    with pytest.raises(ValueError, match="expected a float dtype and no groups"):
        empty_feature((2, 4, 3, 3), dtype, groups=groups)
