"""AOTInductor's packages on a GPU: graphs, one block of weights, one workspace."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastcache_engines import BuildOptions, LoadOptions, Workspace, inductor
from inductor_modules import (
    WEIGHTS,
    assert_close,
    constants_of,
    empty_outputs,
    first_inputs,
    first_module,
    pair,
    rewrite_package,
)


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def gpu_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """`first` and `second` for the GPU at hand, and the module that they are of."""
    folder, dtype = tmp_path_factory.mktemp("inductor-gpu"), request.param
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    inductor.build(pair(first_module(), torch_dtype), folder, BuildOptions(device="cuda", dtype=dtype))
    return folder, first_module().to(torch_dtype).cuda()


@pytest.mark.gpu
def test_graphs_on_a_gpu(gpu_folder: tuple[Path, Any]) -> None:
    """One workspace for both; bound while the inputs still hold nonsense; nothing is allocated once bound."""
    folder, module = gpu_folder
    options = LoadOptions(device="cuda", workspace=Workspace("cuda"))
    first, second = (inductor.load(folder / f"{role}.pt2", options) for role in ("first", "second"))
    tolerance = 2e-3 if first.outputs[1].dtype == "float32" else 3e-2  # convolutions in TF32, by torch's default
    inputs, outputs = first_inputs(3, "cuda"), empty_outputs(first, 3, "cuda")
    label = inputs["label"].clone()
    inputs["label"].fill_(2**40)
    again = torch.full_like(outputs["result"], torch.nan)
    bindings = first.bind(inputs | outputs), second.bind(inputs | outputs | {"result": again})
    assert outputs["result"].isnan().all()  # binding writes nothing
    inputs["label"].copy_(label)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(3):
        for binding in bindings:
            binding.run()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert_close(outputs["result"], module(inputs)[0], tolerance)
    assert_close(again, outputs["result"], tolerance)
    inputs["image"].neg_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for binding in reversed(bindings):  # the order of captures is not kept
            binding.run()
        bindings[0].run()
    torch.cuda.current_stream().wait_stream(side)
    assert_close(outputs["result"], module(inputs)[0], tolerance)


@pytest.mark.gpu
def test_a_loop_of_runs_can_be_captured_as_one_graph(gpu_folder: tuple[Path, Any]) -> None:
    folder, module = gpu_folder
    first, second = (inductor.load(folder / f"{role}.pt2", LoadOptions(device="cuda")) for role in ("first", "second"))
    inputs, outputs = first_inputs(2, "cuda"), empty_outputs(first, 2, "cuda")
    again = torch.full_like(outputs["result"], torch.nan)
    bindings = first.bind(inputs | outputs), second.bind(inputs | outputs | {"result": again})
    loop = torch.cuda.CUDAGraph()
    with torch.cuda.graph(loop):
        for binding in bindings:
            binding.run()
    inputs["image"].neg_()
    loop.replay()
    tolerance = 2e-3 if first.outputs[1].dtype == "float32" else 3e-2
    assert_close(outputs["result"], module(inputs)[0], tolerance)
    assert_close(again, outputs["result"], tolerance)


@pytest.mark.gpu
def test_weights_on_a_gpu_are_one_block_and_freed(gpu_folder: tuple[Path, Any]) -> None:
    folder, _ = gpu_folder
    gc.collect()
    before = torch.cuda.memory_allocated()
    size = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS).values())
    engines = [inductor.load(folder / f"{role}.pt2", LoadOptions(device="cuda")) for role in ("first", "second")]
    assert size <= torch.cuda.memory_allocated() - before < 1.2 * size
    weight = constants_of(engines[0])["into.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last) == (weight.dtype != torch.float32)
    del engines, weight
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_a_gpu_other_than_the_one_at_hand(gpu_folder: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = gpu_folder
    for file in folder.iterdir():
        os.link(file, tmp_path / file.name)
    rewrite_package(tmp_path / WEIGHTS, lambda package: package.update(compute_capability="1.0"))
    with pytest.raises(ValueError, match=r"^first\.pt2 was built for compute capability 1\.0, got "):
        inductor.load(tmp_path / "first.pt2", LoadOptions(device="cuda"))
    with pytest.raises(ValueError, match=r"^expected to build for the device at hand .*, got 1\.0; "):
        inductor.build({}, tmp_path, BuildOptions(device="cuda", compute_capability=("1.0",)))
