"""tools/gpu_check.py: its pieces, what a kill leaves, and the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_check
import gpu_drawing
import gpu_plan as plan
import gpu_steps
import gpu_task
import pieces
import pytest
import torch
from typer.testing import CliRunner

import fastcache
import fastcache_engines

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PROGRAM = f"""
import json, pathlib, subprocess, sys, time
sys.path.insert(0, {str(TOOLS)!r})
from pieces import end_with_parent
end_with_parent()
description, answer = json.loads(sys.argv[2]), pathlib.Path(sys.argv[3])
if "sleep" in description:
    print("on the way", flush=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path(description["sleep"]).write_text(str(child.pid))
    time.sleep(600)
if "fail" in description:
    sys.exit("no luck")
answer.write_text(json.dumps(dict(value=description["value"])))
"""


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


def run_all(folder: Path, work: list[Any], minutes: float = 1.0, say: Callable[[str], object] = len) -> dict[str, Any]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    board = pieces.Board(folder / "board.json", {"commit": "abc"})
    pieces.run_pieces(program, work, board, minutes, 0.5, say)
    return json.loads((folder / "board.json").read_text())["pieces"]


def test_pieces_are_done_once_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    work = [
        pieces.Piece("bad", {"fail": 1}),
        pieces.Piece("good", {"value": 1}),
        pieces.Piece("useless", {"value": 2}, obstacle="no such backend"),
    ]
    first = run_all(tmp_path, work)
    assert first["good"]["value"] == 1
    assert first["bad"]["skipped"] == "ended with code 1: no luck"
    assert first["useless"]["skipped"] == "no such backend"
    (tmp_path / "board.json").write_text(json.dumps({"pieces": first | {"good": first["good"] | {"value": "kept"}}}))
    again = run_all(tmp_path, work)
    assert again["good"]["value"] == "kept"
    assert again["bad"]["tries"] == 2
    changed = run_all(tmp_path, [pieces.Piece("good", {"value": 3})])
    assert changed["good"]["value"] == 3


def test_a_piece_ends_in_time_with_all_that_it_started(tmp_path: Path) -> None:
    pid, said = tmp_path / "pid", list[str]()
    work = [pieces.Piece("slow", {"sleep": str(pid)}, limit_s=3), pieces.Piece("good", {"value": 1})]
    found = run_all(tmp_path, work, say=said.append)
    assert found["slow"]["skipped"] == "did not finish within 3 s"
    assert found["slow"]["log"] == ["on the way"]  # what it had to say by then is neither lost nor held back
    assert said[:2] == ["== slow (up to 3 s)", "on the way"]
    assert (tmp_path / "board.log").read_text() == "== slow\non the way\n== good\n"
    assert found["good"]["value"] == 1
    wait_for(lambda: has_ended(pid))


def test_a_piece_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    """However that ends: here it is killed."""
    program, pid = tmp_path / "program.py", tmp_path / "pid"
    program.write_text(PROGRAM)
    starter = (
        "import sys; from pathlib import Path; import pieces; "
        f"piece = pieces.Piece('slow', {{'sleep': {str(pid)!r}}}); "
        f"pieces.in_own_process(Path({str(program)!r}), piece, 600, Path({str(tmp_path / 'log')!r}), print)"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter], env=os.environ | {"PYTHONPATH": str(TOOLS)})
    wait_for(lambda: pid.is_file() and pid.read_text() != "")
    parent.kill()
    parent.wait()
    wait_for(lambda: has_ended(pid))


def test_what_there_is_no_time_for_is_left_for_the_next_call(tmp_path: Path) -> None:
    """And what comes after it, which may rest on it; but a piece that has a result is not done again."""
    work = [
        pieces.Piece("good", {"value": 1}),
        pieces.Piece("long", {"value": 2}, limit_s=90),
        pieces.Piece("short", {"value": 3}, limit_s=1),
    ]
    first = run_all(tmp_path, work)
    assert first["good"]["value"] == 1
    for name in ("long", "short"):
        assert "run the same command again" in first[name]["skipped"]
    again = run_all(tmp_path, work, minutes=4)
    assert [again[name]["value"] for name in ("good", "long", "short")] == [1, 2, 3]
    assert (tmp_path / "board.log").read_text().count("== good") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_check_says_in_one_line_that_there_is_no_gpu(tmp_path: Path) -> None:
    result = CliRunner().invoke(gpu_check.app, ["check", "--output", str(tmp_path / "check.json")])
    assert result.exit_code == 3
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert "CUDA" in result.stderr
    assert not (tmp_path / "check.json").exists()


def test_a_quarter_of_an_hour_holds_every_step_in_order() -> None:
    groups = plan.calls(plan.quarter_hour(plan.Subject()))
    order = ["versions", "kernels' tests", "capture tests", "inductor fp16 tests", "demo", "server", "sd15 torch"]
    order += ["sd15 compile", "sd15 inductor", "sd15 inductor+graph", "sd15 fitted", "loop", "kernels"]
    assert [piece.name for group in groups for piece in group] == order
    assert all((piece.limit_s or 0) >= 15 for group in groups for piece in group)
    assert all(plan.seconds(group) + plan.START_S <= plan.CALL_S == 600 for group in groups)
    assert sum(plan.seconds(group) + plan.START_S for group in groups) <= plan.WHOLE_S == 900
    for group in groups:
        for piece in group:
            task = piece.description
            assert all((TOOLS.parent / file).is_file() for file in task["tests"])
            if task["kind"] == "bench":
                assert (task["model"], task["size"], task["dtype"], task["steps"]) == ("sd15", 512, "fp16", 50)
    arms = [tuple(arm) for group in groups for piece in group for arm in piece.description["arms"]]
    assert {interval for name, interval, _ in arms if name.startswith("engine")} == {1, 3, 5}


def test_plan_prints_steps_and_commands_with_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "commit", lambda: "0123456789ab")
    said = CliRunner().invoke(gpu_check.app, ["plan"])
    assert said.exit_code == 0
    commands = [line for line in said.stdout.splitlines() if line.startswith("call ")]
    assert len(commands) == 2
    assert all("check --commit 0123456789ab --minutes " in line for line in commands)
    monkeypatch.setattr(gpu_check, "commit", lambda: None)  # as where the history did not travel
    refused = CliRunner().invoke(gpu_check.app, ["check", "--device", "cpu", "--output", "nowhere.json"])
    assert refused.exit_code == 2
    assert "expected --commit" in refused.stderr


def test_a_longer_look_covers_every_backend_and_interval() -> None:
    work = plan.further(plan.Subject(), ["sd15", "sdxl"])
    names = [piece.name for piece in work]
    graphs = {"tensorrt", "tensorrt-rtx", "inductor"}
    assert len(set(names)) == len(names) == 2 * (3 + len(fastcache_engines.BACKENDS) + len(graphs))
    for piece in work:
        task = piece.description
        assert (task["size"], task["dtype"]) == ({"sd15": 512, "sdxl": 1024}[task["model"]], "fp16")
        backend, _, graph = piece.name.split(" ")[1].rstrip(",").partition("+")
        if backend in fastcache_engines.BACKENDS and not task["variables"]:
            assert [interval for _, interval, _ in task["arms"]] == [1, 1, 2, 3, 5]
            assert all(bool(graph) == ("+graph" in name) for name, *_ in task["arms"][1:])
            assert not graph or backend in graphs
    (nhwc,) = (piece.description for piece in work if piece.name == "sd15 onnxruntime, channels last")
    assert nhwc["variables"] == [["FASTCACHE_ORT_NHWC", "1"]]
    if not torch.cuda.is_available():
        reasons = {piece.name: piece.obstacle for piece in work}
        assert reasons["sd15 tensorrt, all"] == fastcache_engines.backend("tensorrt").support("cuda").reason
        assert reasons["sd15 torch, all"] is None


def test_a_test_file_that_does_not_import_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\n@pytest.mark.gpu\ndef test_good(): ...\n\n@pytest.mark.gpu\ndef test_bad(): assert False\n"
        "\ndef test_of_a_cpu(): assert False\n"
    )
    files = tuple(str(tmp_path / f"test_{name}.py") for name in ("broken", "some"))
    task = gpu_task.Task("tests", device="cpu", tests=files)
    found = gpu_steps.run_step(task, tmp_path / "results")
    assert (found["exit_code"], found["passed"], found["left_out"]) == (1, 1, 0)
    assert [name.rpartition(".")[2] for name in found["failed"]] == ["test_bad"]
    assert len(found["errors"]) == 1
    assert gpu_check.has_failed(found, "cpu")
    ran = {"passed": 0, "failed": [], "errors": [], "left_out": 4}
    assert (gpu_check.has_failed(ran, "cpu"), gpu_check.has_failed(ran, "cuda")) == (False, True)


def test_what_is_aimed_at_stands_beside_what_came() -> None:
    arm = {"name": "engine+cache+graph:inductor:fp16 I=3 B=0", "cache_interval": 3, "loop_ms_p50": 80.0}
    found = {
        "sd15 inductor+graph": {"settings": {"model": "sd15"}, "arms": [arm, {"name": "engine", "skipped": "no"}]},
        "loop": {"rows": [{"run_us_one_graph": 9.0}, {"run_us_one_graph": 12.5}]},
        "versions": {},
    }
    assert plan.targets(found) == [
        "SD1.5 512x512, 50 steps, N=3: at most 115 ms wanted, got 80.0 ms",
        "a step beside the U-Net: at most 15 us wanted, got 12.5 us",
    ]
    assert plan.targets({"loop": {"skipped": "no time"}}) == []


@pytest.fixture
def tiny_whole(tiny_bundle: fastcache.Bundle, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The steps that draw, on a bundle that is there; and what they are told."""
    drawing = gpu_drawing
    monkeypatch.setattr(drawing, "bundle_of", lambda task, folder, whole: tiny_bundle)
    return drawing, gpu_task.Task("demo", device="cpu", steps=6, repeats=1)


@pytest.mark.filterwarnings("ignore:only the first")
@pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")
def test_a_loop_and_its_recording_are_compared(tiny_whole: Any, tmp_path: Path) -> None:
    drawing, task = tiny_whole
    found = drawing.run_demo(task, tmp_path)
    assert [loop["plan"] for loop in found["loops"]] == ["uniform", "fitted", "noise"]
    assert all(loop["graph_vs_launches"] < 1e-4 for loop in found["loops"])


def test_a_server_starts_draws_and_reloads(tiny_whole: Any, tmp_path: Path) -> None:
    drawing, task = tiny_whole
    assert set(drawing.run_server(task, tmp_path)) == {"start_s", "image_s", "image_beside_reload_s", "image_after_s"}


@pytest.mark.slow
def test_everything_short_of_the_card_is_rehearsed(tiny_model: Path, tmp_path: Path) -> None:
    """The same program with a small model on the CPU, stopped and gone on with, as on a card."""
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "check", "--device", "cpu", "--backend", "onnxruntime"]
    command += ["--model", str(tiny_model), "--small", str(tiny_model), "--size", "32", "--small-size", "32"]
    command += ["--steps", "6", "--repeats", "1", "--minutes", "600", "--commit", "0123456789ab"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    first, second = tmp_path / "first.json", tmp_path / "second.json"

    def run(*own: str) -> str:
        ran = subprocess.run([*command, *own], env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-4000:]
        return ran.stderr

    assert "== demo" in run("--output", str(first), "--only", "versions,demo")
    said = run("--output", str(second), "--before", str(first))
    assert "== server" in said
    assert "== demo" not in said
    result = json.loads(second.read_text())
    assert result["environment"]["commit"] == "0123456789ab"
    skipped = {name: found["skipped"] for name, found in result["pieces"].items() if "skipped" in found}
    assert all("GPU" in reason for reason in skipped.values())
    assert set(skipped) == {f"{tiny_model.name} onnxruntime+graph", "kernels"}
    assert all(found["commit"] == "0123456789ab" for found in result["pieces"].values())


@pytest.mark.slow
def test_the_loop_is_timed_without_a_unet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, steps = gpu_task.Task, gpu_steps
    found = steps.run_loop(task("loop", steps=3, repeats=1, device="cpu"), tmp_path)
    assert len(found["rows"]) == 8
    assert all(row["run_us"] > 0 and row["run_us_diffusers"] > 0 for row in found["rows"])
    gpu_check.show_check({"loop": found})
    assert "microseconds a step" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="ended with code 2"):
        steps.run_loop(task("loop", device="tpu"), tmp_path)
