"""What to run on a GPU that is at hand for a quarter of an hour: steps in order, each with a limit, and the commands.

The order is that of what later steps rest on. A rehearsal on the CPU runs the same steps on a small model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpu_task import Task
from pieces import Piece

import fastcache_engines
from fastcache_engines import BACKENDS, DType

WHOLE_S, CALL_S = 900, 600  # of a card's time, and of one command on it
PATIENCE = 20  # times as long may a step of a rehearsal take
START_S = 75  # of each call: the machine, the files, Python and its wheels
INTERVALS = (2, 3, 5)  # of the arms beside the quarter of an hour
SHOWN = (3, 5)  # and within it
SIZES = {"sd15": 512, "sdxl": 1024}
LOOP_ROUNDS = 40  # as tools/loop_overhead.py has it
FLOOR_MS = 46.0  # of SD1.5's multiply-adds at 512x512, 50 steps, N=3 on an H200's 790 TFLOP/s
MOST_FLOORS = 2.5
MOST_OVERHEAD_US = 15.0  # a step, out of one graph

KERNEL_TESTS = ("tests/kernels/test_guidance.py", "tests/kernels/test_norm.py", "tests/kernels/test_ops.py")
CAPTURE_TESTS = ("tests/loop/test_cudagraph.py", "tests/loop/test_noise.py")
INDUCTOR_TESTS = ("tests/engines/test_inductor_gpu.py",)


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, and a `small` one that draws whole pictures, on a device by a backend."""

    device: str = "cuda"
    model: str = "sd15"
    small: str = "demo"
    backend: str = "inductor"
    dtype: DType = "fp16"
    size: int = 512
    small_size: int = 64
    steps: int = 50
    repeats: int = 3

    @property
    def common(self) -> Task:
        return Task(
            "bench",
            self.model,
            self.size,
            steps=self.steps,
            repeats=self.repeats,
            dtype=self.dtype,
            device=self.device,
            backend=self.backend,
        )

    @property
    def name(self) -> str:
        return Path(self.model).name


def quarter_hour(subject: Subject) -> list[Piece]:
    """The steps of a quarter of an hour, in order; `limit_s` is each one's own."""
    common, engine = subject.common, f"{subject.backend}:{subject.dtype}"
    small = replace(common, model=subject.small, size=subject.small_size, steps=min(20, subject.steps))

    def tests(files: tuple[str, ...], chosen: str = "") -> Task:
        return Task("tests", device=subject.device, tests=files, chosen=chosen, keeps=False)

    def cached(kind: str, what: str) -> list[tuple[str, int, int]]:
        return [(f"{kind}:{what}", interval, 0) for interval in SHOWN]

    engines = [(f"engine:{engine}", 1, 0), *cached("engine+cache", engine)]
    graphs = [(f"engine+graph:{engine}", 1, 0), *cached("engine+cache+graph", engine)]
    name, dtype = subject.name, subject.dtype
    pieces = [
        _piece("versions", 25, Task("versions", device=subject.device)),
        _piece("kernels' tests", 60, tests(KERNEL_TESTS, "not any_shape")),
        _piece("capture tests", 50, tests(CAPTURE_TESTS, "not bundle")),
        _piece("inductor fp16 tests", 60, tests(INDUCTOR_TESTS, "fp16")),
        _piece("demo", 125, replace(small, kind="demo")),
        _piece("server", 40, replace(small, kind="server")),
        bench_piece(f"{name} torch", 35, common, cached("deepcache", dtype)),
        bench_piece(f"{name} compile", 60, common, [(f"compile:{dtype}", 1, 0)]),
        bench_piece(f"{name} {subject.backend}", 170, common, engines),
        bench_piece(f"{name} {subject.backend}+graph", 40, common, graphs),
        _piece(f"{name} fitted", 30, replace(common, kind="fitted")),
        _piece("loop", 20, replace(common, kind="loop", repeats=min(LOOP_ROUNDS, 10 * subject.repeats))),
        _piece("kernels", 30, replace(common, kind="kernels"), _without_gpu(subject.device)),
    ]
    patience = 1 if subject.device == "cuda" else PATIENCE
    return [replace(piece, limit_s=patience * (piece.limit_s or 0)) for piece in pieces]


def further(subject: Subject, models: Sequence[str]) -> list[Piece]:
    """What is worth a longer look: every backend, launched and as one graph, its channels last, and 8 bits."""
    order = fastcache_engines.preference(subject.device)[0]
    backends = [*order, *(name for name in BACKENDS if name not in order)]
    return [piece for model in models for piece in _further(subject, model, backends)]


def _further(subject: Subject, model: str, backends: Sequence[str]) -> Iterator[Piece]:
    common = replace(subject.common, model=model, size=SIZES.get(model, subject.size))
    dtype, name = subject.dtype, Path(model).name
    yield bench_piece(f"{name} torch, all", None, common, [(f"deepcache:{dtype}", n, 0) for n in INTERVALS])
    for backend in backends:
        captured = fastcache_engines.backend(backend).CAPABILITIES.captured
        for graph in ("", "+graph") if captured else ("",):
            cached = [(f"engine+cache{graph}:{backend}:{dtype}", n, 0) for n in INTERVALS]
            arms = [(f"engine{graph}:{backend}:{dtype}", 1, 0), *cached]
            yield bench_piece(f"{name} {backend}{graph}, all", None, common, arms)
    channels_last = replace(common, variables=(("FASTCACHE_ORT_NHWC", "1"),))
    arms = [("engine:onnxruntime:" + dtype, 1, 0), ("engine+cache:onnxruntime:" + dtype, 3, 0)]
    yield bench_piece(f"{name} onnxruntime, channels last", None, channels_last, arms)
    yield bench_piece(f"{name} 8 bits", None, common, [("engine::int8", 1, 0), ("engine+cache::int8", 3, 0)])


def _piece(name: str, limit_s: float | None, task: Task, obstacle: str | None = None) -> Piece:
    return Piece(name, task.to_json(), limit_s, obstacle)


def bench_piece(name: str, limit_s: float | None, common: Task, arms: Sequence[tuple[str, int, int]]) -> Piece:
    """A benchmark of some arms beside eager; none where not one of them can run."""
    task = replace(common, arms=((f"eager:{common.dtype}", 1, 0), *arms))
    lineup = task.lineup
    reasons = [lineup.skipped.get(arm) for arm in lineup.arms if arm.kind != "eager"]
    return _piece(name, limit_s, task, reasons[0] if all(reasons) else None)


def _without_gpu(device: str) -> str | None:
    return None if device == "cuda" else "the kernels run on a GPU only"


def calls(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The steps by the call that runs them: one that would begin too late waits for the next."""
    found: list[list[Piece]] = [[]]
    for piece in pieces:
        if seconds([*found[-1], piece]) > CALL_S - START_S:
            found.append([])
        found[-1].append(piece)
    return found


def seconds(pieces: Sequence[Piece]) -> float:
    """What steps take at most."""
    return sum(piece.limit_s or 0 for piece in pieces)


def check_command(commit: str, carried: str, left_s: float) -> str:
    """What a call runs on the card, in the checkout; results go to $OUT, or build/ where there is none."""
    return (
        f"python3 tools/gpu_check.py check --commit {commit} --minutes {left_s / 60 + 0.05:.2f} "
        f'--before {carried}/gpu-check.json --output "${{OUT:-build}}/gpu-check.json"'
    )


def targets(pieces: Mapping[str, Any]) -> list[str]:
    """What was aimed at, and what came: for the published model on a GPU alone."""
    timed = [found for found in pieces.values() if found.get("settings", {}).get("model") == "sd15" and "arms" in found]
    cached = [
        arm["loop_ms_p50"]
        for found in timed
        for arm in found["arms"]
        if arm["name"].startswith("engine+cache") and arm.get("cache_interval") == 3 and "skipped" not in arm
    ]
    one_graph = [row["run_us_one_graph"] for row in pieces.get("loop", {}).get("rows", []) if "run_us_one_graph" in row]
    told = list[str]()
    if cached:
        most, got = MOST_FLOORS * FLOOR_MS, min(cached)
        told.append(f"SD1.5 512x512, 50 steps, N=3: at most {most:.0f} ms wanted, got {got:.1f} ms")
    if one_graph:
        told.append(f"a step beside the U-Net: at most {MOST_OVERHEAD_US:.0f} us wanted, got {max(one_graph):.1f} us")
    return told
