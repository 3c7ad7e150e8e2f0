"""The operators as a compiler for a GPU sees them, on a machine without one: which kernels, and what each writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcache_kernels import ops

pytest.importorskip("triton", reason="needs triton; run: pip install triton")
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.codegen.wrapper import user_defined_triton_kernel_transitive_closure_source_code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime import driver

from fastcache_kernels import triton_norm

TARGET = GPUTarget("cuda", 90, 32)
MODEL = {"cached", "skip", "weight", "bias", "out", "joined"}


class AbsentGPU:
    """A driver that knows which GPU code is for, and no more: what torch asks to see which tensors a kernel writes."""

    def get_current_target(self) -> GPUTarget:
        return TARGET


@pytest.fixture(autouse=True)
def _absent_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(driver, "_active", AbsentGPU())


@torch.library.triton_op("fastcache_tests::launched", mutates_args=())
def launched(cached: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The launches that a GPU's tensors get, of whatever device."""
    return ops._launched(cached, skip, weight, bias, 2, 1e-5, True)


class Norm(nn.Module):
    def forward(self, *tensors: Tensor) -> Any:
        return launched(*tensors)


def test_what_the_kernels_write_is_known_and_nothing_else_is_copied() -> None:
    cached, skip = torch.empty(2, 5, 4, 6), torch.empty(2, 3, 4, 6).to(memory_format=torch.channels_last)
    parameters = torch.empty(8), torch.empty(8)
    with torch.no_grad():
        exported: Any = aot_export_module(Norm(), (cached, skip, *parameters), trace_joint=False)
    graph: torch.fx.Graph = exported[0].graph
    wrapped = [node for node in graph.nodes if "triton_kernel_wrapper_functional" in str(node.target)]
    kernels = [kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn for node in wrapped]
    assert [kernel.__name__ for kernel in kernels] == ["channel_statistics", "normalise"]
    assert [node.kwargs["tensors_to_clone"] for node in wrapped] == [["statistics"], ["out", "joined"]]
    assert [node.kwargs["grid"] for node in wrapped] == [[(8, 2, 1)], [(1, 8, 2)]]
    for node in wrapped:  # a tensor that is written and stands in two places would be written twice, once in vain
        places = list(node.kwargs["kwargs"].values())
        assert all(places.count(node.kwargs["kwargs"][name]) == 1 for name in node.kwargs["tensors_to_clone"])
    copied = [node.args[0] for node in graph.nodes if node.target is torch.ops.aten.clone.default]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    assert copied == [inputs[1]]  # the one that is not laid out as the kernels read it


def as_inductor_writes_it(kernel: Any, folder: Path) -> ModuleType:
    """A kernel, its helpers and its constants, as AOTInductor takes them out of their file."""
    source = user_defined_triton_kernel_transitive_closure_source_code(kernel)
    file = folder / f"{kernel.__name__}.py"
    file.write_text(f"import triton\nimport triton.language as tl\n\n@triton.jit\n{source}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["channel_statistics", "normalise"])
def test_kernels_compile_out_of_their_file(name: str, tmp_path: Path) -> None:
    """With an argument that is 1 as a constant, which is how inductor specialises them."""
    kernel = getattr(as_inductor_writes_it(getattr(triton_norm, name), tmp_path), name)
    constants = {"BLOCK": 512} | ({"joined_too": 1} if name == "normalise" else {})
    kinds = (
        dict.fromkeys(MODEL, "*fp16") | {"statistics": "*fp32", "eps": "fp32"} | dict.fromkeys(constants, "constexpr")
    )
    signature = {parameter.name: kinds.get(parameter.name, "i32") for parameter in kernel.params}
    compiled = compile(ASTSource(kernel, signature, constants), target=TARGET, options={"num_warps": 2})
    assert len(compiled.asm["cubin"]) > 0
