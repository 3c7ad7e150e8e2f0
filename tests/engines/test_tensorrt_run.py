"""TensorRT's engine files are described and refused without a GPU, and run where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcache import BackendUnavailable, partition_unet
from fastcache.bundle.parity import relative_error
from fastcache.compile import passes
from fastcache.compile.lower import lower
from fastcache_engines import LoadOptions, Workspace, tensorrt, tensorrt_rtx
from fastcache_engines.tensorrt.library import facts_path
from tensorrt_graphs import (
    WIDTH,
    build_graph,
    built,
    change_facts,
    cuda,
    few_layers,
    no_gpu,
    one_line,
    save_graph,
    save_unet,
)

FORGED_VERSION = "1.0.0.1"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or leaves anything in the user's own cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name, **_: folder / name)
    return folder / "fastcache"


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return build_graph(tmp_path, cuda())


@built
@no_gpu
def test_an_engine_without_a_driver(engine: Path) -> None:
    facts = tensorrt_rtx.describe(engine)
    assert (facts.validity, facts.reason) == (
        "unchecked",
        "its header is whole; there is no driver to check more",
    )
    with pytest.raises(BackendUnavailable, match=r"running them needs one, and PyTorch finds none"):
        tensorrt_rtx.load(engine, LoadOptions("cuda"))


def cut_off(content: bytes) -> bytes:
    return content[:40]


def overwritten(content: bytes) -> bytes:
    return b"garbage!" + content[8:]


@built
@pytest.mark.parametrize("damage", [cut_off, overwritten])
def test_a_damaged_header_is_found_without_a_gpu(damage: Callable[[bytes], bytes], engine: Path) -> None:
    engine.write_bytes(damage(engine.read_bytes()))
    facts = tensorrt_rtx.describe(engine)
    assert (facts.validity, facts.reason) == ("invalid", "MALFORMED_ENGINE")
    with pytest.raises(ValueError, match=r"full.engine does not load here: MALFORMED_ENGINE"):
        tensorrt_rtx.load(engine, LoadOptions("cuda"))


@built
def test_an_engine_of_another_version_or_library(engine: Path) -> None:
    change_facts(engine, version=FORGED_VERSION)
    expected = (
        f"built by tensorrt-rtx {FORGED_VERSION}, not by tensorrt-rtx {tensorrt_rtx.version()}, which is installed"
    )
    with pytest.raises(ValueError, match=expected):
        tensorrt_rtx.load(engine, LoadOptions("cuda"))
    change_facts(engine, version=tensorrt_rtx.version(), backend="tensorrt")
    assert tensorrt_rtx.describe(engine).validity == "invalid"


@built
@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"backend": "tensorrt-rtx"}', "nul\0", {"rows": [1, 2]}, {"inputs": [{}]}]
)
def test_facts_that_are_missing_or_damaged(content: Any, engine: Path) -> None:
    if content is None:
        facts_path(engine).unlink()
    elif isinstance(content, dict):
        change_facts(engine, **content)
    else:
        facts_path(engine).write_text(content)
    with pytest.raises(ValueError, match=r"expected the facts of full.engine in full.engine.json beside it, got ") as e:
        tensorrt_rtx.describe(engine)
    assert one_line(e).endswith("build it again")


@built
def test_an_engine_that_is_missing_or_empty(engine: Path) -> None:
    engine.write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected an engine in full.engine, got an empty file"):
        tensorrt_rtx.describe(engine)
    engine.unlink()
    with pytest.raises(ValueError, match=r"expected an engine in full.engine, got no such file"):
        tensorrt_rtx.load(engine, LoadOptions("cuda"))


@built
def test_the_runtimes_names_are_in_the_installed_library() -> None:
    """Running needs a driver; that every name it will ask for is there does not."""
    import tensorrt_rtx as trt

    names = {
        trt.Runtime: "deserialize_cuda_engine get_engine_validity engine_header_size",
        trt.ICudaEngine: "get_tensor_name num_io_tensors get_tensor_mode get_tensor_dtype get_tensor_shape "
        "get_tensor_profile_shape create_runtime_config create_execution_context",
        trt.IRuntimeConfig: "set_execution_context_allocation_strategy create_runtime_cache set_runtime_cache "
        "dynamic_shapes_kernel_specialization_strategy cuda_graph_strategy",
        trt.IRuntimeCache: "serialize deserialize",
        trt.IExecutionContext: "set_input_shape set_tensor_address update_device_memory_size_for_shapes "
        "set_device_memory execute_async_v3 is_stream_capturable",
        trt.ExecutionContextAllocationStrategy: "USER_MANAGED",
        trt.DynamicShapesKernelSpecializationStrategy: "EAGER",
        trt.CudaGraphStrategy: "DISABLED",
        trt.TensorIOMode: "INPUT OUTPUT",
    }
    missing = [
        f"{kind.__name__}.{name}" for kind, own in names.items() for name in own.split() if not hasattr(kind, name)
    ]
    assert not missing
    assert "runtime_config: " in trt.ICudaEngine.create_execution_context.__doc__


@pytest.fixture(params=[tensorrt, tensorrt_rtx], ids=lambda backend: backend.CAPABILITIES.name)
def running(request: pytest.FixtureRequest) -> Any:
    """A backend that can build and run on this machine."""
    found = request.param.support("cuda")
    if not (found.can_build and found.can_run):
        pytest.skip(found.reason)
    return request.param


@pytest.mark.gpu
def test_a_graph_on_the_gpu(running: Any, tmp_path: Path) -> None:
    running.build({"full": save_graph(tmp_path)}, tmp_path, cuda(rows=(1, 2, 4)))
    path = tmp_path / "full.engine"
    loaded, facts = running.load(path, LoadOptions("cuda")), running.describe(path)
    assert (loaded.inputs, loaded.outputs) == (facts.inputs, facts.outputs)
    for rows in (1, 2, 4):
        x, y = torch.zeros(rows, WIDTH, device="cuda"), torch.full((rows, WIDTH), torch.nan, device="cuda")
        binding = loaded.bind({"x": x, "y": y})
        for value in (1.0, -2.5):
            x.fill_(value)
            binding.run()
            assert torch.equal(y, torch.full_like(y, 2 * value))
    with pytest.raises(ValueError, match=r"expected 1 to 4 rows, which full.engine was built for, got 5"):
        loaded.bind({"x": torch.zeros(5, WIDTH, device="cuda"), "y": torch.zeros(5, WIDTH, device="cuda")})
    with pytest.raises(ValueError, match=r"expected 'x' to be contiguous float32"):
        loaded.bind({"x": torch.zeros(2, WIDTH), "y": y})


@pytest.mark.gpu
def test_a_damaged_engine_on_the_gpu(running: Any, tmp_path: Path) -> None:
    running.build({"full": save_graph(tmp_path)}, tmp_path, cuda())
    content = (tmp_path / "full.engine").read_bytes()
    (tmp_path / "full.engine").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"full\.engine") as caught:
        running.load(tmp_path / "full.engine", LoadOptions("cuda"))
    one_line(caught)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("fp16", 2e-2)])
@torch.no_grad()
def test_full_and_shallow_on_the_gpu(dtype: Any, tolerance: float, running: Any, tmp_path: Path) -> None:
    """Invariants 1, 2 and 5, one workspace for both, and again as one captured graph."""
    unet = few_layers()
    inputs = passes.unet_inputs(unet, 2, 8, 8, 7)
    expected = passes.call_unet(unet, inputs).sample.cuda()
    cut = partition_unet(unet, 0)
    lower(cut, dtype)
    specs, graphs = save_unet(cut, tmp_path)
    running.build(graphs, tmp_path, cuda(dtype=dtype, rows=(2, 2, 2)))
    options = LoadOptions("cuda", dtype, workspace=Workspace("cuda"))
    feature = specs["full"][1][1]
    tensors: dict[str, Tensor] = {name: tensor.cuda() for name, tensor in inputs.items()} | {
        "noise_pred": torch.zeros_like(expected),
        "cached_feature": torch.zeros(2, *feature.shape[1:], dtype=getattr(torch, feature.dtype), device="cuda"),
    }
    full, shallow = (running.load(tmp_path / f"{role}.engine", options).bind(tensors) for role in ("full", "shallow-0"))

    def check(run_full: Callable[[], None], run_shallow: Callable[[], None]) -> None:
        for run in (run_full, run_shallow):
            tensors["noise_pred"].fill_(torch.nan)
            run()
            assert relative_error(tensors["noise_pred"], expected) < tolerance

    check(full.run, shallow.run)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(3):
        full.run()
        shallow.run()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    captured: list[torch.cuda.CUDAGraph] = []
    for binding in (full, shallow):
        with torch.cuda.stream(torch.cuda.Stream()):
            assert binding.capturable()
        captured.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(captured[-1]):
            binding.run()
    check(captured[0].replay, captured[1].replay)


@pytest.mark.gpu
def test_compiled_kernels_are_kept(tmp_path: Path, cache_folder: Path) -> None:
    if not tensorrt_rtx.support("cuda").can_run:
        pytest.skip(tensorrt_rtx.support("cuda").reason)
    engine = build_graph(tmp_path, cuda())
    tensors = {name: torch.ones(2, WIDTH, device="cuda") for name in ("x", "y")}
    times: list[int] = []
    for _ in range(2):
        tensorrt_rtx.load(engine, LoadOptions("cuda")).bind(tensors).run()  # collected at once, and then written
        torch.cuda.synchronize()
        (kept,) = (cache_folder / "tensorrt-rtx").iterdir()
        assert kept.stat().st_size
        times.append(kept.stat().st_mtime_ns)
    assert times[0] == times[1]
