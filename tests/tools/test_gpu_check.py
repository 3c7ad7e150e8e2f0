"""tools/gpu_check.py: its pieces, what a kill leaves, and the table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastcache_engines

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PROGRAM = f"""
import json, pathlib, subprocess, sys, time
sys.path.insert(0, {str(TOOLS)!r})
from pieces import end_with_parent
end_with_parent()
description, answer = json.loads(sys.argv[2]), pathlib.Path(sys.argv[3])
if "sleep" in description:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path(description["sleep"]).write_text(str(child.pid))
    time.sleep(600)
if "fail" in description:
    sys.exit("no luck")
answer.write_text(json.dumps(dict(value=description["value"])))
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pieces() -> Any:
    return load("pieces")


@pytest.fixture(scope="module")
def gpu_check(pieces: Any) -> Any:
    del pieces
    load("macs")  # it imports both by these names
    return load("gpu_check")


def wait_for(condition: Callable[[], bool]) -> None:
    """Fail only where something would never happen."""
    give_up = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < give_up, "waited 300 s in vain"
        time.sleep(0.05)


def has_ended(pid: Path) -> bool:
    """Whether the process of the number in a file is gone, or only waits for someone to ask how it ended."""
    try:
        return "zombie" in Path(f"/proc/{pid.read_text()}/status").read_text()
    except OSError:
        return True


def run_all(pieces: Any, folder: Path, work: list[Any], minutes: float = 1.0) -> dict[str, Any]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    board = pieces.Board(folder / "board.json", {"commit": "abc"})
    pieces.run_pieces(program, work, board, minutes, 0.5, lambda _: None)
    return json.loads((folder / "board.json").read_text())["pieces"]


def test_pieces_are_done_once_and_what_failed_is_tried_again(pieces: Any, tmp_path: Path) -> None:
    work = [
        pieces.Piece("bad", {"fail": 1}),
        pieces.Piece("good", {"value": 1}),
        pieces.Piece("useless", {"value": 2}, obstacle="no such backend"),
    ]
    first = run_all(pieces, tmp_path, work)
    assert first["good"]["value"] == 1
    assert first["bad"]["skipped"] == "ended with code 1: no luck"
    assert first["useless"]["skipped"] == "no such backend"
    (tmp_path / "board.json").write_text(json.dumps({"pieces": first | {"good": first["good"] | {"value": "kept"}}}))
    again = run_all(pieces, tmp_path, work)
    assert again["good"]["value"] == "kept"
    assert again["bad"]["tries"] == 2
    changed = run_all(pieces, tmp_path, [pieces.Piece("good", {"value": 3})])
    assert changed["good"]["value"] == 3


def test_a_piece_ends_in_time_with_all_that_it_started(pieces: Any, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    work = [pieces.Piece("slow", {"sleep": str(pid)}, share=0.05), pieces.Piece("good", {"value": 1})]
    found = run_all(pieces, tmp_path, work)
    assert found["slow"]["skipped"] == "did not finish within 3 s"
    assert found["good"]["value"] == 1
    wait_for(lambda: has_ended(pid))


def test_a_piece_ends_with_the_program_that_started_it(pieces: Any, tmp_path: Path) -> None:
    """However that ends: here it is killed."""
    del pieces
    program, pid = tmp_path / "program.py", tmp_path / "pid"
    program.write_text(PROGRAM)
    starter = (
        "import sys; from pathlib import Path; import pieces; "
        f"piece = pieces.Piece('slow', {{'sleep': {str(pid)!r}}}); "
        f"pieces.in_own_process(Path({str(program)!r}), piece, 600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter], env=os.environ | {"PYTHONPATH": str(TOOLS)})
    wait_for(lambda: pid.is_file() and pid.read_text() != "")
    parent.kill()
    parent.wait()
    wait_for(lambda: has_ended(pid))


def test_what_there_is_no_time_for_is_left_for_the_next_call(pieces: Any, tmp_path: Path) -> None:
    work = [pieces.Piece("good", {"value": 1})]
    assert "run the same command again" in run_all(pieces, tmp_path, work, minutes=0.001)["good"]["skipped"]
    assert run_all(pieces, tmp_path, work)["good"]["value"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_check_says_in_one_line_that_there_is_no_gpu(gpu_check: Any, tmp_path: Path) -> None:
    result = CliRunner().invoke(gpu_check.app, ["check", "--output", str(tmp_path / "check.json")])
    assert result.exit_code == 3
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert "CUDA" in result.stderr
    assert not (tmp_path / "check.json").exists()


def test_check_covers_every_backend_and_interval(gpu_check: Any) -> None:
    work = gpu_check.check_pieces(["sd15", "sdxl"], 50, 3)
    names = [piece.name for piece in work]
    assert names[:3] == ["gpu tests", "kernels", "loop"]
    graphs = {"tensorrt", "tensorrt-rtx", "inductor"}
    assert len(set(names)) == len(names) == 3 + 2 * (2 + len(fastcache_engines.BACKENDS) + len(graphs))
    for piece in work[3:]:
        task = piece.description
        assert (task["size"], task["dtype"]) == ({"sd15": 512, "sdxl": 1024}[task["model"]], "fp16")
        backend, _, graph = piece.name.split(" ")[1].partition("+")
        if backend in fastcache_engines.BACKENDS:
            assert [interval for _, interval, _ in task["arms"]] == [1, 1, 2, 3, 5]
            assert all(bool(graph) == ("+graph" in name) for name, *_ in task["arms"][1:])
            assert not graph or backend in graphs
    if not torch.cuda.is_available():
        reasons = {piece.name: piece.obstacle for piece in work}
        assert reasons["sd15 tensorrt"] == fastcache_engines.backend("tensorrt").support("cuda").reason
        assert reasons["sd15 torch"] is None


@pytest.mark.slow
def test_the_loop_is_timed_without_a_unet(gpu_check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu_check.run_loop(gpu_check.Task("loop", steps=3, repeats=1, device="cpu"), tmp_path)
    assert len(found["rows"]) == 8
    assert all(row["run_us"] > 0 and row["run_us_diffusers"] > 0 for row in found["rows"])
    gpu_check.show_check({"loop": found})
    assert "microseconds a step" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="ended with code 2"):
        gpu_check.run_loop(gpu_check.Task("loop", device="tpu"), tmp_path)


def test_the_table_sets_ceilings_and_published_figures_beside_the_measured(gpu_check: Any) -> None:
    task = gpu_check.table_task("sd21", 512, 1, 50, 1, "onnxruntime", "fp32", "cpu")
    lineup = task.lineup
    assert not lineup.skipped
    assert len({arm.name for arm in lineup.arms}) == len(lineup.arms) == 8
    assert {arm.branch_id for arm in lineup.arms if arm.kind == "engine+cache"} == {0, 1}
    arms = [
        {
            "name": arm.name,
            "backend": arm.backend,
            "cache_interval": arm.cache_interval,
            "branch_id": arm.branch_id,
            "loop_ms_p50": 1e3 / arm.cache_interval / (2 if arm.is_engine else 1),
            "speedup_vs_eager": 1.0,
        }
        for arm in lineup.arms
    ]
    rows = gpu_check.table_rows(task, {"arms": [*arms, {"name": "compile", "skipped": "no compiler"}]})
    assert len(rows) == 8
    cached = {(r["cache_interval"], r["branch_id"]): r for r in rows if r["arm"].startswith("deepcache")}
    assert {key: row["published"] for key, row in cached.items()} == {(3, 0): 2.33, (5, 0): 3.24, (5, 1): 2.35}
    for row in cached.values():  # nobody's figure is above what the multiply-adds allow
        assert row["published"] < row["ceiling_vs_uncached"] < row["cache_interval"]
    for row in rows:
        assert row["speedup_vs_uncached"] == pytest.approx(row["cache_interval"], rel=1e-3)
        assert row["ceiling_vs_uncached"] == 1 or row["cache_interval"] > 1
