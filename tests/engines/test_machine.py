"""Names of devices and dtypes mean what they say, also on a machine that has none of them."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcache_engines import DTYPES, TOLERANCE, TensorSpec, check_tensors, dtype_of, torch_dtype
from fastcache_engines.machine import device_index, device_kind, ieee_float32, torch_device


def test_one_of_several_devices_by_its_name() -> None:
    assert [device_kind(name) for name in ("cpu", "cuda", "cuda:3")] == ["cpu", "cuda", "cuda"]
    assert [device_index(name) for name in ("cpu", "cuda:0", "cuda:3")] == [0, 0, 3]
    assert torch_device("cuda:3") == torch.device("cuda", 3)
    assert torch_device("cpu") == torch.device("cpu")


def test_a_device_without_a_number_is_the_one_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert torch_device("cuda") == torch.device("cuda", 2)


def test_tensors_of_another_of_several_devices() -> None:
    """With tensors that have a device's name only."""
    with FakeTensorMode():
        specs, tensors = [TensorSpec("x", "float32", ("batch",))], {"x": torch.zeros(2, device="cuda:1")}
    check_tensors(specs, tensors, "cuda")
    check_tensors(specs, tensors, torch.device("cuda", 1))
    with pytest.raises(ValueError, match=r"on cuda:0, got float32 \[2\] on cuda:1$"):
        check_tensors(specs, tensors, "cuda:0")


def test_dtypes_stand_in_one_place() -> None:
    assert [torch_dtype(name) for name in DTYPES] == [torch.float32, torch.float16, torch.bfloat16]
    assert [dtype_of(torch_dtype(name)) for name in DTYPES] == list(DTYPES)
    assert tuple(TOLERANCE) == DTYPES
    with pytest.raises(ValueError, match=r"^expected float32, float16 or bfloat16, got float64$"):
        dtype_of(torch.float64)


@pytest.mark.parametrize("before", [True, False])
def test_fp32_is_not_tf32_and_what_was_set_comes_back(before: bool) -> None:
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda.matmul
    switches = cudnn.conv, cudnn.rnn, cuda
    saved = cudnn.allow_tf32, cuda.allow_tf32
    try:
        cudnn.allow_tf32 = cuda.allow_tf32 = before
        precisions = [switch.fp32_precision for switch in switches]
        with ieee_float32():
            assert [switch.fp32_precision for switch in switches] == ["ieee"] * 3
            assert (cudnn.allow_tf32, cuda.allow_tf32) == (False, False)  # where Inductor asks
        assert [switch.fp32_precision for switch in switches] == precisions
        assert (cudnn.allow_tf32, cuda.allow_tf32) == (before, before)
    finally:
        cudnn.allow_tf32, cuda.allow_tf32 = saved
