"""Where kernels come from: ahead of time, Triton or plain PyTorch; and nothing needs Triton to be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastcache_kernels import launch, ops
from fastcache_kernels.launch import GpuLibrary, KernelError
from fastcache_kernels.manifest import MANIFEST, source_hash

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what an import of a package that is not there comes to
import fastcache_kernels
assert not {"torch", "numpy"} & set(sys.modules)
from fastcache_kernels import manifest, aot
assert not {"torch", "numpy"} & set(sys.modules)
import torch
from fastcache_kernels import guidance, launch, ops, reference, values
x = torch.ones(1, 4, 3, 3)
print(ops.groupnorm_silu(x, torch.ones(4), torch.ones(4), 2, 1e-5).sum().item(), *launch.source())
"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What was found of this machine is found again, and once more afterwards."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    caches = (launch._found_library, launch._triton_version)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def test_nothing_but_the_kernels_themselves_needs_triton() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    total, which, *_ = result.stdout.split()
    assert float(total) == pytest.approx(36 * 0.7310586, rel=1e-4)  # 36 times silu(1)
    assert which == ("aot" if torch.cuda.is_available() and launch.source()[0] == "aot" else "reference")


def test_the_source_without_a_gpu(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr("torch.cuda.is_available", lambda: False)
    assert launch.source() == ("reference", "PyTorch finds no CUDA GPU: plain PyTorch operations are the kernels")


def test_the_source_in_the_interpreter(fresh: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    fresh.setattr("torch.cuda.is_available", lambda: False)
    fresh.setenv("TRITON_INTERPRET", "1")
    assert launch.source()[0] == "triton"


def test_the_source_with_a_gpu_and_no_ahead_of_time_kernels(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr("torch.cuda.is_available", lambda: True)
    fresh.setattr("fastcache_kernels.__path__", [str(tmp_path)])
    if launch._triton_version() is not None:
        which, why = launch.source()
        assert which == "triton"
        assert "install with FASTCACHE_AOT=1" in why
    launch._triton_version.cache_clear()
    fresh.setattr("importlib.util.find_spec", lambda name: None)
    which, why = launch.source()
    assert which == "reference"
    assert "pip install triton" in why


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (None, r"no aot\.json in fastcache_kernels; install with FASTCACHE_AOT=1"),
        ({"source_sha256": "0"}, "of other sources than those installed; install again"),
        ({"source_sha256": source_hash(), "library": "none.so"}, "do not load: .*none.so"),
        ({"source_sha256": source_hash(), "library": "garbage.so"}, "do not load: .*garbage.so"),
    ],
)
def test_folders_without_kernels_of_these_sources(manifest: object, expected: str, tmp_path: Path) -> None:
    (tmp_path / "garbage.so").write_bytes(b"garbage")
    if manifest is not None:
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(KernelError, match=expected) as caught:
        GpuLibrary(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="there are kernels for the CPU then")
def test_on_the_cpu_there_is_nothing_to_launch() -> None:
    assert launch.prepare("guidance_step", (1, 1, 1), {"noise_pred": torch.zeros(1)}, num_warps=4) is None


class FirstNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.shortcut = nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1)

    def forward(self, cached: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        normed, joined = torch.ops.fastcache.concat_groupnorm_silu_joined(
            cached, skip, self.norm.weight, self.norm.bias, 2, 1e-5
        )
        alone = torch.ops.fastcache.groupnorm_silu(joined, self.norm.weight, self.norm.bias, 2, 1e-5)
        return normed + alone, self.shortcut(joined)


def test_export_keeps_the_operators() -> None:
    module, batch = FirstNorm().eval(), torch.export.Dim("batch", min=1, max=16)
    inputs = torch.randn(2, 5, 4, 6), torch.randn(2, 3, 4, 6)
    with torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=({0: batch}, {0: batch}))
        targets = {str(node.target) for node in program.graph.nodes}
        others = torch.randn(3, 5, 4, 6), torch.randn(3, 3, 4, 6)
        for got, expected in zip(program.module()(*others), module(*others), strict=True):
            torch.testing.assert_close(got, expected)
    assert {"fastcache.groupnorm_silu.default", "fastcache.concat_groupnorm_silu_joined.default"} <= targets


@pytest.mark.parametrize(
    "operator",
    [ops.concat_groupnorm_silu_joined, ops.groupnorm_silu],
    ids=lambda op: op._name,
)
def test_operators_as_torch_wants_them(operator: torch.library.CustomOpDef) -> None:
    cached, skip = (torch.randn(2, 5, 4, 6), torch.randn(2, 3, 4, 6))
    tensors = (skip[:, :2],) if operator is ops.groupnorm_silu else (cached, skip)
    channels = sum(tensor.shape[1] for tensor in tensors)
    arguments = (*tensors, torch.randn(channels), torch.randn(channels), 2, 1e-5)
    torch.library.opcheck(
        operator, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )
