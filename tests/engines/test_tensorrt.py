"""TensorRT's two libraries build: TensorRT-RTX for real wherever it is installed, with no GPU.

The data-centre library needs a GPU also to build. What its module does beyond the shared builder is run here with the
RTX library in its place, which has the same API.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import TensorProto

from fastcache import BackendUnavailable, partition_unet
from fastcache.compile.lower import lower
from fastcache_engines import BuildOptions, TensorSpec, tensorrt, tensorrt_rtx
from fastcache_engines.machine import Gpu
from fastcache_engines.tensorrt import builder, library
from fastcache_engines.tensorrt.library import Package
from tensorrt_graphs import TORCH, WIDTH, build_graph, built, cuda, few_layers, no_gpu, one_line, save_graph, save_unet

PORTABLE = ("8.0", "8.6", "8.9", "12.0", "12.1")
ALL = ("7.5", *PORTABLE)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or leaves anything in the user's own cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name, **_: folder / name)
    return folder / "fastcache"


@built
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@torch.no_grad()
def test_full_and_shallow_of_a_unet(dtype: Any, tmp_path: Path) -> None:
    """Both are built from one file of weights; what the facts say of them is what the exporter says."""
    cut = partition_unet(few_layers(), 0)
    lower(cut, dtype)
    specs, graphs = save_unet(cut, tmp_path)
    names = tensorrt_rtx.build(graphs, tmp_path, cuda(dtype=dtype, rows=(2, 2, 4)))
    assert names == {"full": "full.engine", "shallow-0": "shallow-0.engine"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        *names.values(),
        *(f"{name}.json" for name in names.values()),
    }
    full, shallow = (tensorrt_rtx.describe(tmp_path / name) for name in names.values())
    assert (full.inputs, full.outputs) == specs["full"]
    assert (shallow.inputs, shallow.outputs) == specs["shallow-0"]
    assert full.outputs[1] == shallow.inputs[-1]
    assert full.outputs[1].dtype == TORCH[dtype]
    assert full.layers > shallow.layers > 100
    assert full.rows == (2, 2, 4)
    assert (full.version, full.backend) == (tensorrt_rtx.version(), "tensorrt-rtx")


@built
@no_gpu
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((), PORTABLE),
        (("7.5",), ("7.5",)),
        (("8.9",), ("8.9",)),
        (("12.0", "8.6", "12.0"), ("12.0", "8.6")),
        (ALL, ALL),
    ],
)
def test_the_gpus_that_an_engine_is_for(asked: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path) -> None:
    engine = build_graph(tmp_path, cuda(dtype="fp16", compute_capability=asked), "fp16")
    facts = tensorrt_rtx.describe(engine)
    assert facts.compute_capabilities == expected
    # Where no capability is named, the library's code is for the oldest that it means; it says so in the engine.
    targets = "".join(f"sm{capability.replace('.', '')} " for capability in sorted(set(asked or ["8.0"]), key=float))
    assert f"accelerators={{{targets}}}".encode() in engine.read_bytes()


@built
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_types_of_the_graph_are_the_types_of_the_engine(dtype: Any, tmp_path: Path) -> None:
    facts = tensorrt_rtx.describe(build_graph(tmp_path, cuda(dtype=dtype), dtype))
    assert facts.inputs == (TensorSpec("x", TORCH[dtype], ("batch", WIDTH)),)
    assert facts.outputs == (TensorSpec("y", TORCH[dtype], ("batch", WIDTH)),)


@built
@pytest.mark.parametrize(("dtype", "tf32"), [("fp32", False), ("fp16", True)])
def test_what_the_builder_is_asked_for(dtype: Any, tf32: bool, tmp_path: Path) -> None:
    """Engines that a CUDA graph can hold; and fp32 means it, not TF32's 10 bits."""
    import tensorrt_rtx as trt

    configs: list[Any] = []

    @contextmanager
    def look(config: Any) -> Generator[None]:
        configs.append(
            (config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION), config.get_flag(trt.BuilderFlag.TF32))
        )
        yield

    package = Package("tensorrt-rtx", "tensorrt_rtx", "TensorRT-RTX")
    graph = save_graph(tmp_path, dtype=dtype)
    content, _ = builder.engine_from_onnx_path(package, graph, cuda(dtype=dtype), ("8.9",), look)
    assert configs == [(True, tf32)]
    assert f"tf32={int(tf32)}".encode() in bytes(content)


@built
@pytest.mark.parametrize("asked", [("9.0",), ("10.0", "9.0"), ("8.9", "9.0"), ("sm89",), ("",)])
def test_gpus_that_rtx_does_not_know(asked: tuple[str, ...], tmp_path: Path) -> None:
    graph = save_graph(tmp_path)
    with pytest.raises(
        ValueError, match=r"expected compute capabilities that TensorRT-RTX builds for \(7.5, 8.0, "
    ) as e:
        tensorrt_rtx.build({"full": graph}, tmp_path, cuda(compute_capability=asked))
    assert one_line(e).endswith(
        f"got {', '.join(c for c in asked if c != '8.9')}; use tensorrt or inductor on such a GPU"
    )
    assert graph.is_file()


@built
def test_the_gpu_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_rtx, "gpu", lambda device: Gpu("NVIDIA H100", "9.0"))
    with pytest.raises(
        BackendUnavailable, match=r"NVIDIA H100 is of compute capability 9.0, not 7.5, .*or 12.1; use t"
    ):
        build_graph(tmp_path, cuda())
    found = tensorrt_rtx.support("cuda")
    assert (found.can_build, found.can_run) == (True, False)
    assert found.reason.endswith("use tensorrt or inductor")
    assert tensorrt_rtx.describe(build_graph(tmp_path, cuda(compute_capability=("8.9",)))).compute_capabilities == (
        "8.9",
    )
    monkeypatch.setattr(tensorrt_rtx, "gpu", lambda device: Gpu("NVIDIA GeForce RTX 3090", "8.6"))
    assert tensorrt_rtx.describe(build_graph(tmp_path, cuda())).compute_capabilities == ("8.6",)
    assert tensorrt_rtx.support("cuda").can_run


@built
@pytest.mark.parametrize(("dtype", "reason"), [("fp32", "FP32 GEMM is not supported"), ("bf16", "datatypes: b16")])
def test_turing_multiplies_in_float16_only(dtype: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^TensorRT-RTX cannot build graph.onnx: ") as caught:
        build_graph(tmp_path, cuda(dtype=dtype, compute_capability=("7.5",)), dtype)
    assert reason in one_line(caught)


@built
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"op": "Det", "inputs": ["x"], "x": ["batch", 8, 8], "y": ["batch"]}, "operator Det (node the_node): UNSUPP"),
        ({"op": "NoSuchOperator"}, "operator NoSuchOperator (node the_node): INVALID_NODE"),
        ({"x": ["batch", 63]}, "operator MatMul (node the_node): INVALID_NODE"),
        ({"x_type": TensorProto.FLOAT16}, "must have same input types"),
        (
            {"x": ["batch", "n", WIDTH], "y": ["batch", "n", WIDTH]},
            "no free size but its inputs' first, got x [-1, -1, 64]",
        ),
        ({"y": ["batch", WIDTH], "op": "Identity", "inputs": []}, "graph.onnx"),
    ],
)
def test_graphs_that_do_not_build(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    graph = save_graph(tmp_path, change.pop("op", "MatMul"), **change)
    with pytest.raises(ValueError, match=r"graph\.onnx") as caught:
        tensorrt_rtx.build({"full": graph}, tmp_path, cuda())
    assert expected in one_line(caught)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.onnx", "weights"]


@built
@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x0a", bytes(range(256)) * 8])
def test_files_that_are_no_graphs(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"graph\.onnx") as caught:
        tensorrt_rtx.build({"full": tmp_path / "graph.onnx"}, tmp_path, cuda())
    one_line(caught)


@built
@pytest.mark.parametrize("location", ["../outside", "{absolute}", "link", "missing"])
def test_weights_outside_are_refused_before_anything_is_built(location: str, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(bytes(WIDTH * WIDTH * 4))
    good, bad = save_graph(tmp_path / "good"), tmp_path / "bad"
    graph = save_graph(bad, location=location.format(absolute=tmp_path / "outside"))
    (bad / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"expected the weights of graph.onnx in a file beside it, got "):
        tensorrt_rtx.build({"full": good, "shallow": graph}, tmp_path, cuda())
    assert good.is_file()
    assert not list(tmp_path.rglob("*.engine"))


@built
def test_another_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"expected device cuda, which TensorRT-RTX is for, got cpu"):
        build_graph(tmp_path, BuildOptions(device="cpu"))


@built
def test_progress_names_the_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "_PROGRESS_SECONDS", 0.0)
    lines: list[str] = []
    build_graph(tmp_path, cuda(progress=lines.append))
    assert lines[0] == f"TensorRT-RTX builds full.engine for compute capability {', '.join(PORTABLE)}"
    assert "graph: Optimizing graph" in lines
    assert any(line.startswith("graph: Building engine (1 of ") for line in lines)


@built
@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_what_progress_raises_ends_the_build(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builder, "_PROGRESS_SECONDS", 0.0)

    def tell(line: str) -> None:
        if "Building engine" in line:
            raise error

    with pytest.raises(error):
        build_graph(tmp_path, cuda(progress=tell))
    assert not list(tmp_path.glob("*.engine"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("backend", [tensorrt, tensorrt_rtx])
def test_a_cpu_is_none_of_its_devices(backend: Any) -> None:
    found = backend.support("cpu")
    assert (found.can_build, found.can_run) == (False, False)
    assert "use onnxruntime, openvino or inductor" in found.reason
    assert "cpu" not in backend.CAPABILITIES.dtypes


@pytest.mark.parametrize("backend", [tensorrt, tensorrt_rtx])
def test_without_the_library_it_says_what_to_install(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    expected = rf"is not installed; run: pip install 'fastcache-diffusion\[{backend.CAPABILITIES.name}\]'"
    for call in (backend.version, lambda: backend.build({}, Path(), cuda()), lambda: backend.load(Path("full.engine"))):
        with pytest.raises(BackendUnavailable, match=expected):
            call()
    found = backend.support("cuda")
    assert (found.version, found.can_build, found.can_run) == (None, False, False)
    assert "pip install" in found.reason


def test_bindings_without_their_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tensorrt, "version", Package("tensorrt", "half_installed", "TensorRT").version)
    found = tensorrt.support("cuda")
    assert found.reason.startswith("TensorRT is installed but does not load (libnvinfer.so.11: cannot open shared")
    assert "pip install 'fastcache-diffusion[tensorrt]'" in found.reason


def test_importing_the_backends_imports_no_library() -> None:
    check = "import fastcache_engines.tensorrt, fastcache_engines.tensorrt_rtx, sys; print(*sys.modules)"
    command = [sys.executable, "-c", check]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"tensorrt", "tensorrt_rtx", "onnx", "platformdirs"} & set(loaded)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data-centre module with the RTX library as its TensorRT, on a machine said to have a GPU."""
    package = Package("tensorrt", "tensorrt_rtx", "TensorRT")
    monkeypatch.setattr(tensorrt, "_PACKAGE", package)
    monkeypatch.setattr(tensorrt, "version", package.version)
    monkeypatch.setattr(tensorrt, "gpu", lambda device: Gpu("NVIDIA H200", "9.0"))


@built
@pytest.mark.usefixtures("stand_in")
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_the_data_centre_library_builds_for_the_gpu_at_hand(tmp_path: Path, cache_folder: Path) -> None:
    lines: list[str] = []
    tensorrt.build({"full": save_graph(tmp_path)}, tmp_path, cuda(progress=lines.append))
    facts = tensorrt.describe(tmp_path / "full.engine")
    assert (facts.backend, facts.compute_capabilities, facts.validity) == ("tensorrt", ("9.0",), "unchecked")
    (timed,) = (cache_folder / "tensorrt").iterdir()
    assert timed.suffix == ".cache"
    assert timed.stat().st_size
    assert lines == ["TensorRT builds full.engine for compute capability 9.0"]
    timed.write_bytes(b"garbage")
    tensorrt.build({"full": save_graph(tmp_path)}, tmp_path, cuda())
    assert timed.read_bytes() != b"garbage"
    assert tensorrt.support("cuda").can_build


@built
@pytest.mark.usefixtures("stand_in")
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, cache_folder: Path) -> None:
    cache_folder.parent.mkdir()
    cache_folder.write_text("a file where the folder should be")
    lines: list[str] = []
    tensorrt.build({"full": save_graph(tmp_path)}, tmp_path, cuda(progress=lines.append))
    assert (tmp_path / "full.engine").is_file()
    assert lines[-1].startswith("TensorRT's timing cache was not kept: ")


@built
@pytest.mark.usefixtures("stand_in")
def test_the_data_centre_library_takes_no_compute_capability(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected no compute capability, for this backend builds for the machine at hand, got 9"
    ):
        tensorrt.build({"full": save_graph(tmp_path)}, tmp_path, cuda(compute_capability=("9.0",)))


@built
@pytest.mark.usefixtures("stand_in")
def test_the_data_centre_library_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "gpu", lambda device: None)
    with pytest.raises(BackendUnavailable, match=r"and PyTorch finds none; use tensorrt-rtx to build without one"):
        tensorrt.build({"full": save_graph(tmp_path)}, tmp_path, cuda())
    found = tensorrt.support("cuda")
    assert (found.can_build, found.can_run) == (False, False)


def test_caches_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "some.cache"
    assert library.read_cache(path) == b""
    for content in (b"first", b"second"):
        library.write_cache(path, content)
        assert library.read_cache(path) == content
    assert list(path.parent.iterdir()) == [path]


def test_caches_are_kept_apart(cache_folder: Path) -> None:
    paths = {library.cache_path("a", *parts) for parts in (("1", "gpu"), ("2", "gpu"), ("1", "other"))}
    assert len(paths) == 3
    assert {path.parent for path in paths} == {cache_folder / "a"}
