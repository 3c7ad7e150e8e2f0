"""ONNX Runtime works on the caller's own tensors, and loads nothing from outside a graph's folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import TensorProto, helper

import fastcache_engines
from fastcache import Bundle
from fastcache_engines import (
    BackendUnavailable,
    BuildOptions,
    LoadOptions,
    TensorSpec,
    onnxruntime,
    onnxruntime_tensorrt,
)
from fastcache_engines.capturing import capture_lock
from fastcache_engines.inductor import compiler

SIZE = 512


def save_graph(folder: Path, *locations: str) -> Path:
    """y = x + w for x of shape (batch, 512); w lies at the first location, and is said to lie at the others."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[SIZE])
    if locations:
        weight.data_location = TensorProto.EXTERNAL
        for location in locations:
            weight.external_data.add(key="location", value=location)
    else:
        weight.raw_data = np.arange(SIZE, dtype=np.float32).tobytes()
    shape = ["batch", SIZE]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    folder.mkdir(exist_ok=True)
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    return folder / "graph.onnx"


def save_weights(file: Path) -> Path:
    file.write_bytes(np.arange(SIZE, dtype=np.float32).tobytes())
    return file


def test_what_a_graph_takes_and_gives(tmp_path: Path) -> None:
    engine = onnxruntime.load(save_graph(tmp_path))
    assert engine.inputs == (TensorSpec("x", "float32", ("batch", SIZE)),)
    assert engine.outputs == (TensorSpec("y", "float32", ("batch", SIZE)),)


def test_the_bound_tensors_are_the_ones_read_and_written(tmp_path: Path) -> None:
    x, y, unused = torch.zeros(2, SIZE), torch.full((2, SIZE), torch.nan), torch.full((1,), 7.0)
    places = x.data_ptr(), y.data_ptr()
    binding = onnxruntime.load(save_graph(tmp_path)).bind({"x": x, "y": y, "unused": unused})
    view = y.view(-1)
    for value in (0.0, 1.0, -2.5):
        x.fill_(value)  # no binding again: the next run reads what is there
        binding.run()
        assert torch.equal(view, (value + torch.arange(SIZE)).repeat(2))
    assert (x.data_ptr(), y.data_ptr()) == places
    assert unused.item() == 7


def test_a_binding_keeps_its_tensors_alive(tmp_path: Path) -> None:
    y = torch.empty(1, SIZE)
    binding = onnxruntime.load(save_graph(tmp_path)).bind({"x": torch.ones(1, SIZE), "y": y})
    noise = [torch.full((1, SIZE), 9.0) for _ in range(100)]  # would take over x's memory, were it freed
    binding.run()
    assert torch.equal(y[0], 1.0 + torch.arange(SIZE))
    assert len(noise) == 100


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"x": None}, "expected a tensor named 'x' to bind, got y"),
        ({"y": None}, "expected a tensor named 'y' to bind, got x"),
        ({"x": torch.zeros(2, SIZE, dtype=torch.float64)}, "expected 'x' to be contiguous float32 .*, got float64"),
        ({"x": torch.zeros(2, SIZE - 1)}, rf"expected 'x' .* got float32 \[2, {SIZE - 1}\]"),
        ({"x": torch.zeros(SIZE)}, rf"expected 'x' .* got float32 \[{SIZE}\]"),
        ({"x": torch.zeros(2, 2, SIZE)}, r"expected 'x' .* got float32 \[2, 2, "),
        ({"y": torch.zeros(3, SIZE)}, rf"expected 'y' .* got float32 \[3, {SIZE}\]"),  # batch is one number for all
        ({"x": torch.zeros(SIZE, 2).T}, "expected 'x' .* got non-contiguous float32"),
        ({"y": torch.zeros(2, 2 * SIZE)[:, ::2]}, "expected 'y' .* got non-contiguous float32"),
        ({"x": torch.zeros(2, SIZE, device="meta")}, "expected 'x' .* on cpu, got float32 .* on meta"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    engine = onnxruntime.load(save_graph(tmp_path))
    tensors = {"x": torch.zeros(2, SIZE), "y": torch.zeros(2, SIZE)} | change
    with pytest.raises(ValueError, match=expected) as caught:
        engine.bind({name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert "\n" not in str(caught.value)


def test_weights_beside_the_graph(tmp_path: Path) -> None:
    save_weights(tmp_path / "weights")
    y = torch.empty(1, SIZE)
    onnxruntime.load(save_graph(tmp_path, "weights")).bind({"x": torch.zeros(1, SIZE), "y": y}).run()
    assert torch.equal(y[0], torch.arange(SIZE, dtype=torch.float32))


@pytest.mark.parametrize("location", ["../outside", "inner/../../outside", "{absolute}", "link", "missing", "", ".."])
def test_weights_outside_are_refused(tmp_path: Path, location: str) -> None:
    outside = save_weights(tmp_path / "outside")
    folder = tmp_path / "graph"
    folder.mkdir()
    (folder / "inner").mkdir()
    (folder / "link").symlink_to(outside)
    location = location.format(absolute=outside)
    with pytest.raises(ValueError, match=r"expected the weights of graph.onnx in a file beside it, got ") as caught:
        onnxruntime.load(save_graph(folder, location))
    assert repr(location) in str(caught.value)


def test_of_two_places_both_are_looked_at(tmp_path: Path) -> None:
    save_weights(tmp_path / "outside")
    for locations in (("weights", "../outside"), ("../outside", "weights")):
        path = save_graph(tmp_path / "graph", *locations)
        save_weights(tmp_path / "graph" / "weights")
        with pytest.raises(ValueError, match=r"beside it, got '../outside'"):
            onnxruntime.load(path)


def test_tensors_inside_nodes_are_looked_at(tmp_path: Path) -> None:
    path = save_graph(tmp_path)
    model = onnx.load(path)
    hidden = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[SIZE], data_location=TensorProto.EXTERNAL)
    hidden.external_data.add(key="location", value="/etc/hostname")
    branch = helper.make_graph([helper.make_node("Constant", [], ["z"], value=hidden)], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["w"], ["z"], then_branch=branch, else_branch=branch))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"beside it, got '/etc/hostname'"):
        onnxruntime.load(path)


@pytest.mark.parametrize("content", [b"", b"garbage", bytes(range(256)) * 8])
def test_garbage_is_one_line_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "graph.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"graph\.onnx") as caught:
        onnxruntime.load(tmp_path / "graph.onnx")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.onnx"):
        onnxruntime.load(tmp_path / "none.onnx")


def test_a_graph_that_onnxruntime_refuses(tmp_path: Path) -> None:
    path = save_graph(tmp_path)
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot load graph\.onnx: .*NoSuchOperator"):
        onnxruntime.load(path)


def test_a_backend_of_another_name() -> None:
    with pytest.raises(BackendUnavailable, match=r"expected a backend of this version .*, got 'tvm'"):
        fastcache_engines.backend("tvm")


def test_without_onnxruntime_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cpu, gpu = (rf"pip install 'fastcache-diffusion\[{extra}\]'" for extra in ("cpu", "gpu"))
    with pytest.raises(BackendUnavailable, match=f"run: {cpu}, or for an NVIDIA GPU: {gpu}$"):
        onnxruntime.version()


def test_without_any_runtime_a_build_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name in ("onnxruntime", "openvino") else find(name)
    )
    monkeypatch.setattr(compiler, "missing", lambda device: "AOTInductor builds with a C++ compiler; install g++")
    with pytest.raises(BackendUnavailable) as caught:
        fastcache_engines.choose("cpu", "fp32")
    for remedy in (
        "pip install 'fastcache-diffusion[cpu]'",
        "pip install 'fastcache-diffusion[openvino]'",
        "install g++",
    ):
        assert remedy in str(caught.value)


def test_both_builds_of_it_in_one_environment_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip leaves them: two records of what is one folder."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        record = tmp_path / f"{name.replace('-', '_')}-1.31.1.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31.1\n")
        assert ("both installed" in onnxruntime.support("cpu").reason) == (name == "onnxruntime-gpu")
        monkeypatch.syspath_prepend(tmp_path)
    for device in ("cpu", "cuda"):
        reason = onnxruntime.support(device).reason
        assert "onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are both installed" in reason
        assert "pip uninstall -y onnxruntime onnxruntime-gpu" in reason


def run_apart(code: str, home: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_it_tells_its_makers_nothing(tmp_path: Path) -> None:
    """It would keep a device id and a queue of events in the user's cache folder, and send them."""
    path = save_graph(tmp_path / "graph")
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
    code = f"import pathlib; from fastcache_engines import onnxruntime; onnxruntime.load(pathlib.Path({str(path)!r}))"
    run_apart(code, tmp_path / "ours")
    assert list((tmp_path / "ours").rglob("*")) == []
    run_apart("import onnxruntime", tmp_path / "theirs")
    if not list((tmp_path / "theirs").rglob("*")):
        pytest.skip(f"onnxruntime {onnxruntime.version()} keeps nothing of itself: the test shows nothing")


def assigned(path: Path) -> Any:
    """What ONNX Runtime says of who runs what, here the CPU everything."""
    runtime = onnxruntime.library()
    settings = runtime.SessionOptions()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return session.get_provider_graph_assignment_info()


def test_sizes_may_be_computed_on_the_cpu_and_nothing_else(tmp_path: Path) -> None:
    sizes = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> sizes (float[batch, 6, h] x) => (float[a, b] y) <int64[1] one = {1},'
        "int64[1] end = {-1}> { all = Shape(x) first = Slice(all, one, end) s = Concat<axis=0>(end, first) "
        "y = Reshape(x, s) }"
    )
    work = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> work (float[batch, 4, h, w] x) => (float[batch, 4, a, b] y) '
        "<float[4] scales = {1, 1, 2, 2}> { z = Softmax(x) y = Resize(z, , scales) }"
    )
    for name, model in (("sizes", sizes), ("work", work)):
        onnx.save(model, tmp_path / f"{name}.onnx")
    onnxruntime.refuse_cpu_work("sizes.onnx", assigned(tmp_path / "sizes.onnx"))
    with pytest.raises(
        ValueError,
        match=r"^expected work\.onnx to run on the GPU, got Resize, Softmax on the CPU, .* -U onnxruntime-gpu",
    ):
        onnxruntime.refuse_cpu_work("work.onnx", assigned(tmp_path / "work.onnx"))


class Stream:
    cuda_stream = 77


def test_what_the_cuda_provider_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stream: Any = Stream()
    told = onnxruntime.cuda_settings(LoadOptions("cuda:3", "fp32"), stream)
    assert told == {"device_id": "3", "user_compute_stream": "77", "use_tf32": "0", "prefer_nhwc": "0"}
    monkeypatch.setenv("FASTCACHE_ORT_NHWC", "1")
    assert onnxruntime.cuda_settings(LoadOptions("cuda:0", "fp16"), stream)["prefer_nhwc"] == "1"


def test_the_run_that_captures_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime captures in a binding's first run, in a mode that fails at what other threads allocate."""
    alone: list[bool] = []

    def try_to_capture() -> None:
        alone.append(not capture_lock.acquire(blocking=False))
        if not alone[-1]:
            capture_lock.release()

    class Bound:
        bind_input = bind_output = None

    class Session:
        def io_binding(self) -> Any:
            return Bound()

        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            thread = threading.Thread(target=try_to_capture)
            thread.start()
            thread.join()

    class Waiting(Stream):
        device = torch.device("cuda", 0)

        def wait_stream(self, other: Any) -> None: ...

    class Engine:
        session, stream, inputs, outputs = Session(), Waiting(), (), ()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Waiting())
    engine: Any = Engine()
    binding = onnxruntime.OnnxRuntimeBinding(engine, {}, graph_id=1)
    binding.run()
    binding.run()
    assert alone == [True, False]


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name, **_: tmp_path / "cache" / name)


@pytest.mark.usefixtures("cache_folder")
def test_tensorrts_provider_is_told_every_size_beforehand(tmp_path: Path) -> None:
    """Another batch would otherwise be built anew, under the graphs that are captured."""
    path = save_graph(tmp_path / "graph")
    options = BuildOptions("cuda:0", "fp16", rows=(1, 2, 8))
    assert onnxruntime_tensorrt.build({"full": path}, path.parent, options) == {"full": "graph.onnx"}
    told = onnxruntime_tensorrt._settings(path)
    sizes = [told[f"trt_profile_{end}_shapes"] for end in ("min", "opt", "max")]
    assert sizes == [f"x:1x{SIZE}", f"x:2x{SIZE}", f"x:8x{SIZE}"]
    onnxruntime.load(path)  # still a graph


@pytest.mark.usefixtures("cache_folder")
def test_tensorrts_provider_and_further_free_sizes(tmp_path: Path) -> None:
    graph = "g (float[batch, tokens, 6] x, float[batch] t) => (float[batch, tokens, 6] y) { y = Identity(x) }"
    onnx.save(
        onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {graph}'), path := tmp_path / "full.onnx"
    )
    with pytest.raises(ValueError, match=r"^expected full\.onnx to say its inputs' sizes, .*; build it again$"):
        onnxruntime_tensorrt._settings(path)
    with pytest.raises(ValueError, match=r"^expected full\.onnx to have no free size .*, got x$"):
        onnxruntime_tensorrt.build({"full": path}, tmp_path, BuildOptions("cuda:0"))
    options = BuildOptions("cuda:0", rows=(1, 2, 4), shapes={"x": ((1, 6), (77, 6), (154, 6))})
    onnxruntime_tensorrt.build({"full": path}, tmp_path, options)
    told = onnxruntime_tensorrt._settings(path)
    assert told["trt_profile_min_shapes"] == "x:1x1x6,t:1"
    assert told["trt_profile_max_shapes"] == "x:4x154x6,t:4"


def test_full_and_shallow_share_one_feature_buffer(tiny_bundle: Bundle) -> None:
    """Invariants 2 and 5: the full engine's output buffer is the shallow engine's input buffer."""
    from safetensors.torch import load_file

    tensors = load_file(tiny_bundle.file("reference.safetensors"))
    expected = tensors["noise_pred"].clone()
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    full = onnxruntime.load(tiny_bundle.engine_path("full")).bind(tensors)
    shallow = onnxruntime.load(tiny_bundle.engine_path("shallow-0")).bind(tensors)
    scale = expected.abs().max().item()
    for _ in range(2):
        tensors["cached_feature"].fill_(torch.nan)
        full.run()
        torch.testing.assert_close(tensors["noise_pred"], expected, rtol=0, atol=1e-5 * scale)
        tensors["noise_pred"].fill_(torch.nan)
        shallow.run()
        torch.testing.assert_close(tensors["noise_pred"], expected, rtol=0, atol=1e-5 * scale)
    tensors["cached_feature"].neg_()  # a norm would undo a shift
    shallow.run()
    assert not torch.allclose(tensors["noise_pred"], expected, rtol=0, atol=1e-3 * scale)
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == places


def test_functions_that_double_are_not_let_in(tmp_path: Path) -> None:
    """26 functions that each call the next one twice are 2^26 nodes once inlined: ONNX Runtime hung on them."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    functions = [
        helper.make_function(
            "local",
            f"f{i}",
            ["x"],
            ["y"],
            [
                helper.make_node(f"f{i + 1}" if i < 25 else "Neg", ["x"], ["h"], domain="local" if i < 25 else ""),
                helper.make_node(f"f{i + 1}" if i < 25 else "Neg", ["h"], ["y"], domain="local" if i < 25 else ""),
            ],
            opsets,
        )
        for i in range(26)
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("f0", ["x"], ["y"], domain="local")], "graph", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    (tmp_path / "graph.onnx").write_bytes(model.SerializeToString())
    for name in ("onnxruntime", "openvino"):
        with pytest.raises(ValueError, match=r"expected a graph without functions in graph\.onnx, got 26"):
            fastcache_engines.backend(name).load(tmp_path / "graph.onnx")
