"""What is compiled as it is loaded is kept for other processes, and taken only where it is surely what was kept."""

from __future__ import annotations

import multiprocessing
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from fastcache_engines import LoadOptions, compiled, openvino_kept

KEY = ("backend", "1.2.3", "graph")
OTHER = ("backend", "1.2.4", "graph")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where entries lie, in a cache folder of the test's own."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "caches" / name)
    return tmp_path / "caches" / "fastcache" / "compiled"


def entry(folder: Path) -> Path:
    """The only entry, or that of the graph: what is noted beside it is smaller."""
    return max(folder.glob("*.compiled"), key=lambda file: file.stat().st_size)


def test_what_was_kept_is_found_under_its_key_alone() -> None:
    assert compiled.kept(KEY) is None
    compiled.keep(KEY, b"code")
    assert compiled.kept(KEY) == b"code"
    assert compiled.kept(OTHER) is None
    compiled.drop(KEY)
    assert compiled.kept(KEY) is None


def test_nobody_else_can_write_there(folder: Path) -> None:
    compiled.keep(KEY, b"code")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry(folder).stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == [entry(folder).name]


@pytest.mark.parametrize("damage", ["changed", "cut", "empty", "longer", "digest"])
def test_a_damaged_entry_is_none_and_goes(folder: Path, damage: str) -> None:
    compiled.keep(KEY, b"code" * 100)
    file = entry(folder)
    whole = file.read_bytes()
    changed = {
        "changed": b"x" + whole[1:],
        "cut": whole[:-1],
        "empty": b"",
        "longer": whole + b"x",
        "digest": whole[:-1] + bytes([whole[-1] ^ 1]),
    }
    file.write_bytes(changed[damage])
    assert compiled.kept(KEY) is None
    assert not file.exists()


def test_an_entry_of_another_key_is_none(folder: Path) -> None:
    """Under a name that it was moved to."""
    compiled.keep(OTHER, b"code")
    other = entry(folder)
    compiled.keep(KEY, b"own")
    (file,) = set(folder.glob("*.compiled")) - {other}
    os.replace(other, file)
    assert compiled.kept(KEY) is None


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_is_no_cache(folder: Path, mode: int) -> None:
    compiled.keep(KEY, b"code")
    folder.chmod(mode)
    assert compiled.kept(KEY) is None
    compiled.keep(OTHER, b"code")
    assert len(list(folder.iterdir())) == 1


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
def test_a_file_that_others_can_write_or_a_link_is_no_entry(folder: Path, tmp_path: Path) -> None:
    compiled.keep(KEY, b"code")
    file = entry(folder)
    file.chmod(0o622)
    assert compiled.kept(KEY) is None
    file.chmod(0o600)
    os.replace(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert compiled.kept(KEY) is None


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
def test_another_users_folder_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.keep(KEY, b"code")
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    assert compiled.kept(KEY) is None


def test_a_place_that_cannot_be_written_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "caches").write_text("a file")
    compiled.keep(KEY, b"code")
    assert compiled.kept(KEY) is None


def test_what_was_used_the_longest_ago_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_BYTES", 300)
    for name in ("a", "b"):
        compiled.keep((name,), b"x" * 100)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert compiled.kept(("a",)) is not None  # and so used now
    compiled.keep(("c",), b"x" * 100)
    assert [compiled.kept((name,)) is not None for name in ("a", "b", "c")] == [True, False, True]


def test_more_than_all_entries_may_take_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would drive out all others, and go at once."""
    monkeypatch.setattr(compiled, "MOST_BYTES", 300)
    compiled.keep(KEY, b"x" * 100)
    compiled.keep(OTHER, b"x" * 301)
    assert compiled.kept(KEY) is not None
    assert compiled.kept(OTHER) is None


def test_what_is_written_to_an_entry_stays_in_the_process() -> None:
    compiled.keep(KEY, b"code")
    found = compiled.kept(KEY)
    assert found is not None
    found[:1] = b"m"
    assert compiled.kept(KEY) == b"code"


def _keep_often(folder: str, content: bytes, failures: multiprocessing.Queue[str]) -> None:
    import platformdirs

    platformdirs.user_cache_path = lambda name: Path(folder) / name
    for _ in range(50):
        compiled.keep(KEY, content)
        found = compiled.kept(KEY)
        if found is None or set(found) != {found[0]} or len(found) != 10**5:
            failures.put("torn")


def test_two_processes_at_once_leave_a_whole_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    failures: multiprocessing.Queue[str] = context.Queue()
    processes = [
        context.Process(target=_keep_often, args=(str(tmp_path / "caches"), letter * 10**5, failures))
        for letter in (b"a", b"b")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert failures.empty()
    assert compiled.kept(KEY) in (b"a" * 10**5, b"b" * 10**5)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """y = silu(x w), for any number of rows."""
    weights = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Sigmoid", ["h"], ["s"]),
        helper.make_node("Mul", ["h", "s"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 8]) for name in ("x", "y")]
    made = helper.make_graph(nodes, "g", values[:1], values[1:], [numpy_helper.from_array(weights, "w")])
    file = tmp_path / "graph.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    return file


@pytest.fixture
def rounded(graph: Path) -> Path:
    """The graph with its input in 8 bits."""
    model = onnx.load(graph)
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.02, np.float32), "scale"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), "zero"))
    model.graph.node[0].input[0] = "wide"
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["narrow"]))
    model.graph.node.insert(1, helper.make_node("DequantizeLinear", ["narrow", "scale", "zero"], ["wide"]))
    onnx.save(model, file := graph.with_name("rounded.onnx"))
    return file


def run(graph: Path, identity: str, rows: int = 2) -> torch.Tensor:
    from fastcache_engines import openvino

    engine = openvino.load(graph, LoadOptions(threads=1, identity=identity))
    tensors = {"x": torch.linspace(-2, 2, rows * 8).reshape(rows, 8), "y": torch.empty(rows, 8)}
    engine.bind(tensors).run()
    return tensors["y"]


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Which shapes OpenVINO compiled, one after the other."""
    openvino = pytest.importorskip("fastcache_engines.openvino")
    try:
        openvino.version()
    except openvino.BackendUnavailable as error:
        pytest.skip(str(error))
    seen, compile_ = list[object](), openvino.OpenVinoEngine._compile
    monkeypatch.setattr(
        openvino.OpenVinoEngine, "_compile", lambda self, shapes: (seen.append(shapes), compile_(self, shapes))[1]
    )
    return seen


def test_openvino_imports_what_it_compiled_before(graph: Path, folder: Path, compilations: list[object]) -> None:
    first = run(graph, "one")
    assert len(compilations) == 1
    assert len(list(folder.iterdir())) == 2  # the graph, and which one to begin with
    assert torch.equal(run(graph, "one"), first)
    assert len(compilations) == 1
    run(graph, "one", rows=3)
    run(graph, "another")
    assert len(compilations) == 3


def test_openvino_keeps_large_graphs_where_layers_have_8_bits(
    graph: Path, rounded: Path, folder: Path, compilations: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling a large one in float takes no more time than importing it."""
    monkeypatch.setattr("fastcache_engines.openvino._OWN_BYTES", 8)
    run(graph, "float")
    assert not folder.exists()
    first = run(rounded, "8 bits")
    assert torch.equal(run(rounded, "8 bits"), first)
    assert len(compilations) == 2
    assert torch.allclose(first, run(graph, ""), atol=0.2)


def test_what_was_used_last_is_imported_before_it_is_asked_for(graph: Path, compilations: list[object]) -> None:
    openvino_kept.begin(["one", "another"])
    assert not openvino_kept._begun
    first = run(graph, "one")
    openvino_kept.begin(["one", "another"])
    (begun,) = openvino_kept._begun.values()
    assert begun.result() is not None
    assert torch.equal(run(graph, "one"), first)
    assert not openvino_kept._begun
    assert len(compilations) == 1


def test_what_was_begun_in_vain_is_let_go(graph: Path, compilations: list[object]) -> None:
    run(graph, "one")
    openvino_kept.begin(["one"])
    assert run(graph, "one", rows=3).shape == (3, 8)
    assert not openvino_kept._begun
    assert len(compilations) == 2


def test_what_was_begun_and_is_damaged_is_compiled_anew(graph: Path, folder: Path, compilations: list[object]) -> None:
    first = run(graph, "one")
    entry(folder).write_bytes(b"x" * 100)
    openvino_kept.begin(["one"])
    assert torch.equal(run(graph, "one"), first)
    assert len(compilations) == 2


def test_opening_a_bundle_does_not_wait_for_torch() -> None:
    """Its engines are imported meanwhile."""
    said = "import sys, fastcache.pipeline.loading; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True).stdout == "False\n"


def test_openvino_keeps_nothing_of_what_has_no_identity(graph: Path, folder: Path, compilations: list[object]) -> None:
    run(graph, "")
    run(graph, "")
    assert len(compilations) == 2
    assert not folder.exists()


def test_openvino_compiles_anew_where_the_entry_is_damaged(
    graph: Path, folder: Path, compilations: list[object]
) -> None:
    first = run(graph, "one")
    whole = entry(folder).read_bytes()
    entry(folder).write_bytes(whole[: len(whole) // 2])
    assert torch.equal(run(graph, "one"), first)
    assert len(compilations) == 2
    run(graph, "one")
    assert len(compilations) == 2  # written anew


def test_openvino_compiles_anew_where_it_cannot_import(
    graph: Path, compilations: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = memoryview(bytearray(b"no blob"))
    monkeypatch.setattr(compiled, "kept", lambda key: None if "used first" in key else blob)
    first = run(graph, "one")
    assert len(compilations) == 1
    assert torch.equal(first, run(graph, ""))
