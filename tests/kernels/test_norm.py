"""The norm's operators against float64: dtypes, odd shapes, groups over the joint, what the launches refuse."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fastcache_kernels import launch, ops

CPU = torch.device("cpu")
# half a unit in the last place of the largest values, 4 or so, and float32's own error
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))


class Inputs:
    """Random tensors for one call; the cached half lies elsewhere than the skip connection, so groups mix both."""

    def __init__(
        self,
        cached: int,
        skip: int,
        groups: int,
        *,
        samples: int = 2,
        plane: tuple[int, int] = (5, 7),
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        mean: float = 2.0,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.cached = (normal(samples, cached, *plane) + mean).to(device, dtype)
        self.skip = (2 * normal(samples, skip, *plane)).to(device, dtype)
        self.weight = normal(cached + skip).to(device, dtype)
        self.bias = normal(cached + skip).to(device, dtype)
        self.groups = groups

    def both(self) -> tuple[Tensor, Tensor]:
        """What is normed, and the concat."""
        return ops.concat_groupnorm_silu_joined(self.cached, self.skip, self.weight, self.bias, self.groups, 1e-5)

    def run(self) -> Tensor:
        return self.both()[0]

    def expected(self) -> Tensor:
        """In float64, by torch."""
        both = torch.cat([self.cached.double(), self.skip.double()], 1)
        return functional.silu(functional.group_norm(both, self.groups, self.weight.double(), self.bias.double(), 1e-5))

    def close(self, got: Tensor, expected: Tensor) -> None:
        tolerance = TOLERANCE[self.skip.dtype]
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_what_runs_here_is_what_is_meant(device: torch.device) -> None:
    """With the interpreter or on a GPU it is the kernels that are tested, and not their PyTorch meaning."""
    assert launch.has_triton(device) == (os.environ.get("TRITON_INTERPRET") == "1" or device.type == "cuda")


@DTYPES
@pytest.mark.parametrize(
    ("cached", "skip", "groups"),
    [(2, 2, 2), (2, 4, 2), (3, 7, 5), (1, 3, 1), (3, 1, 4)],
    ids=["joint between groups", "joint within one", "joint within one of five", "one group", "a group a channel"],
)
def test_against_float64(cached: int, skip: int, groups: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs = Inputs(cached, skip, groups, dtype=dtype, device=device)
    inputs.close(inputs.run(), inputs.expected())


@pytest.mark.parametrize("plane", [(1, 2), (16, 32), (23, 23), (47, 47)], ids=["2", "512", "529", "2209"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_planes_of_less_than_a_block_and_of_more(
    plane: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    inputs = Inputs(3, 3, 2, samples=1, plane=plane, dtype=dtype, device=device)
    inputs.close(inputs.run(), inputs.expected())


@settings(max_examples=10)
@given(data=st.data())
def test_any_shape(device: torch.device, data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 4))
    channels = groups * data.draw(st.integers(1, 3))
    cached = data.draw(st.integers(1, channels - 1)) if channels > 1 else 0
    if cached == 0:
        groups, channels, cached = 1, 2, 1
    plane = data.draw(st.tuples(st.integers(1, 9), st.integers(2, 9)))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    samples = data.draw(st.integers(1, 2))
    inputs = Inputs(cached, channels - cached, groups, samples=samples, plane=plane, dtype=dtype, device=device)
    inputs.close(inputs.run(), inputs.expected())


def test_a_group_of_more_channels_than_are_read_at_once(device: torch.device) -> None:
    inputs = Inputs(60, 70, 1, samples=1, plane=(1, 2), device=device)
    inputs.close(inputs.run(), inputs.expected())


def test_a_mean_far_from_zero_costs_no_variance(device: torch.device) -> None:
    """The sum of squares less the square of the sum would be wrong by half the variance: 4096^2 * 2^-24 is 1."""
    inputs = Inputs(3, 3, 2, samples=1, plane=(23, 23), device=device, mean=4096.0)
    inputs.skip += 4096
    torch.testing.assert_close(inputs.run().double(), inputs.expected(), rtol=2e-3, atol=2e-3)


@DTYPES
def test_the_concat_comes_with_it(dtype: torch.dtype, device: torch.device) -> None:
    inputs = Inputs(5, 3, 2, dtype=dtype, device=device)
    normed, joined = inputs.both()
    inputs.close(normed, inputs.expected())
    assert torch.equal(joined, torch.cat([inputs.cached, inputs.skip], 1))
    inputs.skip = inputs.skip.contiguous(memory_format=torch.channels_last)
    inputs.close(inputs.run(), inputs.expected())


@DTYPES
def test_with_nothing_cached(dtype: torch.dtype, device: torch.device) -> None:
    inputs = Inputs(6, 3, 3, dtype=dtype, device=device)
    got = ops.groupnorm_silu(inputs.cached, inputs.weight[:6], inputs.bias[:6], 2, 1e-5)
    normed = functional.group_norm(
        inputs.cached.double(), 2, inputs.weight[:6].double(), inputs.bias[:6].double(), 1e-5
    )
    inputs.close(got, functional.silu(normed))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"skip": torch.zeros(2, 3, 5, 7, dtype=torch.float64)},
            "expected skip to be contiguous float32 or .* got float64",
        ),
        ({"cached": torch.zeros(2, 5, 5, 7, dtype=torch.float16)}, "expected cached .* float32 .* got float16"),
        ({"cached": torch.zeros(3, 5, 5, 7)}, r"expected cached .* \[2, 5, 5, 7\] .* got float32 \[3, 5, 5, 7\]"),
        ({"cached": torch.zeros(2, 5, 7, 5)}, r"expected cached .* \[2, 5, 5, 7\] .* got float32 \[2, 5, 7, 5\]"),
        ({"cached": torch.zeros(2, 5, 5, 7, device="meta")}, "expected cached .* on cpu, got .* on meta"),
        ({"num_groups": 3}, r"expected num_groups to divide 8 channels, got 3"),
        ({"num_groups": 0}, "got 0"),
        ({"weight": torch.zeros(7)}, r"expected weight .* \[8\] .* got float32 \[7\]"),
        ({"bias": torch.zeros(8, dtype=torch.float16)}, "expected bias .* got float16"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, Any], expected: str) -> None:
    """Kernels would read past them; PyTorch's operations refuse them by themselves."""
    inputs = Inputs(5, 3, 2)
    arguments = {
        "cached": inputs.cached,
        "skip": inputs.skip,
        "weight": inputs.weight,
        "bias": inputs.bias,
        "num_groups": 2,
    }
    with pytest.raises(ValueError, match=expected) as caught:
        ops._launched(**arguments | change, eps=1e-5, joined_too=True)
    assert "\n" not in str(caught.value)
