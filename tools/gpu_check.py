"""What this machine's GPU makes of fastcache: python tools/gpu_check.py check

`check` runs the tests marked gpu, times the kernels and the loop without a U-Net, benchmarks SD1.5 at 512x512 and SDXL
at 1024x1024 in fp16 with random weights on every backend that runs there, launched step by step and as one CUDA graph.
`deepcache-table` measures the table of diffusers' page on DeepCache on any machine. Neither needs a network. Both work
in pieces (`pieces.py`) within --minutes, and the same command goes on where the last one stopped; delete the --output
file to begin anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import torch
import typer
from macs import MultiplyAdds, multiply_adds
from pieces import Board, Piece, end_with_parent, run_pieces

import fastcache_engines
from fastcache.bench.arms import Arm, BenchSettings, Defaults, parse_arm, parse_dtype
from fastcache.bench.bench import document, run_bench
from fastcache.bench.kernels import KernelResult, bench_kernels, kernel_table
from fastcache.bench.lineup import Lineup, build_bundles, line_up_arms
from fastcache.bench.machine import environment, gpus, load_average
from fastcache.console import figure, print_table
from fastcache.files import write_json
from fastcache_engines import BACKENDS, DType

ROOT = Path(__file__).resolve().parents[1]
LEAST_S = 30.0  # before anything is measured, Python, torch and diffusers are loaded twice
INTERVALS = (2, 3, 5)
LOOP_ROUNDS = 40  # as tools/loop_overhead.py has it
SIZES = {"sd15": 512, "sdxl": 1024}
CACHINGS = ((3, 0), (5, 0), (5, 1))  # the table's columns: cache interval I and branch B
# DeepCache's speed-ups on an RTX A5000 by size and batch, for each of CACHINGS; of whole pipelines, 50 steps, SD2.1.
# Source: diffusers' documentation, optimization/deepcache.
PUBLISHED = {
    (512, 8): (2.32, 3.18, 2.20),
    (512, 4): (2.33, 3.21, 2.24),
    (512, 1): (2.33, 3.24, 2.35),
    (768, 8): (2.29, 3.12, 2.05),
    (768, 4): (2.30, 3.13, 2.07),
    (768, 1): (2.33, 3.21, 2.12),
    (1024, 8): (2.24, 3.02, 1.92),
    (1024, 4): (2.25, 3.04, 1.91),
    (1024, 1): (2.28, 3.12, 1.93),
}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Minutes = Annotated[float, typer.Option(min=0.5, help="Stop after so long; the next call goes on from there.")]
Output = Annotated[Path, typer.Option(help="The JSON file, written after each piece.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed rounds.")]


@dataclass(frozen=True)
class Task:
    """What a piece does: the gpu tests, the kernels, the loop alone, or a benchmark.

    `arms` are names, each with cache interval and branch. `keeps` is whether its bundles stay in the cache folder
    for the next piece.
    """

    kind: str
    model: str = ""
    size: int = 0
    batch: int = 1
    steps: int = 50
    repeats: int = 3
    dtype: DType = "fp16"
    device: str = "cuda"
    arms: tuple[tuple[str, int, int], ...] = ()
    keeps: bool = True

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @property
    def settings(self) -> BenchSettings:
        return BenchSettings(
            model=self.model,
            random_weights=True,
            device=self.device,
            cache_interval=3,
            branch_id=0,
            steps=self.steps,
            height=self.size,
            width=self.size,
            batch=self.batch,
            sampler="ddim",
            dtype=self.dtype,
            warmup=1,
            repeats=self.repeats,
            threads=torch.get_num_threads(),
        )

    @property
    def lineup(self) -> Lineup:
        """The arms, called by their caching as well, for one benchmark has several kinds of it."""

        def make(name: str, interval: int, branch_id: int) -> Arm:
            told = f"{name} I={interval} B={branch_id}" if interval > 1 else name
            arm = parse_arm(name, Defaults(dtype=self.dtype))
            return replace(arm, name=told, cache_interval=interval, branch_id=branch_id)

        return line_up_arms([make(*arm) for arm in self.arms], self.device)


@app.command()
def check(
    minutes: Minutes = 9.5,
    output: Output = ROOT / "build" / "gpu-check.json",
    models: Annotated[str, typer.Option(help="By commas: sd15, sdxl.")] = "sd15,sdxl",
    steps: Steps = 50,
    repeats: Repeats = 3,
) -> None:
    """Run the gpu tests, and benchmark every backend on this machine's GPU.

    Example: python tools/gpu_check.py check --minutes 9.5 --output build/gpu-check.json
    """
    if not torch.cuda.is_available():
        say("error: expected a CUDA GPU that this build of PyTorch sees, got none; run this on a machine with one")
        raise typer.Exit(3)
    chosen = models.split(",")
    if unknown := [name for name in chosen if name not in SIZES]:
        raise typer.BadParameter(f"expected models out of {', '.join(SIZES)}, got {', '.join(unknown)}")
    board = new_board(output)
    run_pieces(Path(__file__), check_pieces(chosen, steps, repeats), board, minutes, LEAST_S, say)
    board.result["environment"]["gpus"]["after"] = gpus()
    board.save()
    show_check(board.result["pieces"])
    raise typer.Exit(4 if board.result["pieces"].get("gpu tests", {}).get("exit_code", 0) else 0)


@app.command()
def deepcache_table(
    minutes: Minutes = 9.5,
    output: Output = ROOT / "build" / "deepcache-table.json",
    sizes: Annotated[str, typer.Option(help="Image sides in pixels, by commas.")] = "512,768,1024",
    batches: Annotated[str, typer.Option(help="Images at once, by commas.")] = "8,4,1",
    steps: Steps = 50,
    repeats: Repeats = 3,
    model: Annotated[str, typer.Option(help="A preset, with random weights.")] = "sd21",
    backend: Annotated[str, typer.Option(help="The engines', or none for PyTorch alone.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp16 on a GPU and fp32 elsewhere if left out.")] = None,
) -> None:
    """Measure the table of diffusers' page on DeepCache here, with the ceilings that multiply-adds set beside it.

    Example: python tools/gpu_check.py deepcache-table --sizes 512 --batches 1 --steps 4 --repeats 1
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = parse_dtype(dtype or ("fp16" if device == "cuda" else "fp32"))
    cells = [(int(size), int(batch)) for size in sizes.split(",") for batch in batches.split(",")]
    tasks = {
        f"{model} {size} batch {batch}": table_task(model, size, batch, steps, repeats, backend, own, device)
        for size, batch in sorted(cells, key=lambda cell: cell[0] ** 2 * cell[1])
    }
    board = new_board(output)
    pieces = [Piece(name, task.to_json()) for name, task in tasks.items()]
    run_pieces(Path(__file__), pieces, board, minutes, LEAST_S, say)
    board.result["table"] = [
        row for name, task in tasks.items() for row in table_rows(task, board.result["pieces"][name])
    ]
    board.save()
    columns = ["size", "batch", "arm", "I", "B", "seconds", "x eager", "x uncached", "ceiling", "published"]
    ratios = ("speedup_vs_eager", "speedup_vs_uncached", "ceiling_vs_uncached", "published")
    rows = [
        [
            *(str(row[name]) for name in ("size", "batch", "arm", "cache_interval", "branch_id")),
            figure(row["seconds"], ".2f"),
            *(figure(row[name], ".2f", "x") for name in ratios),
        ]
        for row in board.result["table"]
    ]
    print_table(f"{model}, {steps} ddim steps under guidance, {own}, {device}", columns, rows)
    show_skipped({name: board.result["pieces"][name] for name in tasks})


@app.command(hidden=True)
def piece(description: str, answer: Path, folder: Path) -> None:
    """Do one piece of the commands above, and write its answer."""
    end_with_parent()
    values = json.loads(description)
    task = Task(**values | {"arms": tuple((name, interval, branch) for name, interval, branch in values["arms"])})
    os.environ["HF_HUB_OFFLINE"] = "1"
    bundles = platformdirs.user_cache_path("fastcache") / "engines" if task.keeps else folder / "engines"
    kinds = {
        "tests": run_tests,
        "kernels": run_kernels,
        "loop": run_loop,
        "bench": run_task,
    }
    found = kinds[task.kind](task, bundles)
    write_json(answer, found)


def check_pieces(models: Sequence[str], steps: int, repeats: int) -> list[Piece]:
    """All that `check` does, in the order of its worth; torch.compile takes long to compile and comes last."""
    order = fastcache_engines.preference("cuda")[0]
    backends = [*order, *(name for name in BACKENDS if name not in order)]
    pieces, slow = [Piece("gpu tests", Task("tests").to_json(), share=0.4)], list[Piece]()
    pieces.append(Piece("kernels", Task("kernels", repeats=repeats).to_json()))
    pieces.append(Piece("loop", Task("loop", steps=steps, repeats=LOOP_ROUNDS).to_json()))
    for model in models:
        common = Task("bench", model, SIZES[model], steps=steps, repeats=repeats)
        pieces.append(bench_piece("torch", common, [("deepcache:fp16", n, 0) for n in INTERVALS]))
        for name in backends:
            for graph in ("", "+graph") if fastcache_engines.backend(name).CAPABILITIES.captured else ("",):
                cached = [(f"engine+cache{graph}:{name}:fp16", n, 0) for n in INTERVALS]
                arms = [(f"engine{graph}:{name}:fp16", 1, 0), *cached]
                pieces.append(bench_piece(f"{name}{graph}", common, arms))
        slow.append(bench_piece("compile", common, [("compile:fp16", 1, 0)]))
    return pieces + slow


def bench_piece(name: str, common: Task, arms: Sequence[tuple[str, int, int]]) -> Piece:
    """A benchmark of some arms beside eager; none where not one of them can run."""
    task = replace(common, arms=(("eager:fp16", 1, 0), *arms))
    lineup = task.lineup
    reasons = [lineup.skipped.get(arm) for arm in lineup.arms if arm.kind != "eager"]
    return Piece(f"{common.model} {name}", task.to_json(), obstacle=reasons[0] if all(reasons) else None)


def table_task(
    model: str, size: int, batch: int, steps: int, repeats: int, backend: str, dtype: DType, device: str
) -> Task:
    """One row of the table: eager, and every caching by the DeepCache package and by engines."""
    arms = [(f"eager:{dtype}", 1, 0), *((f"deepcache:{dtype}", n, branch) for n, branch in CACHINGS)]
    if backend != "none":
        arms += [(f"engine:{backend}:{dtype}", 1, 0)]
        arms += [(f"engine+cache:{backend}:{dtype}", n, branch) for n, branch in CACHINGS]
    return Task("bench", model, size, batch, steps, repeats, dtype, device, tuple(arms), keeps=False)


def table_rows(task: Task, found: dict[str, Any]) -> list[dict[str, Any]]:
    """A piece's arms as rows of the table.

    Beside what was measured stand the ceiling that the multiply-adds set to caching on one backend, and the speed-up
    that was published for DeepCache.
    """
    work: dict[int, MultiplyAdds] = {b: multiply_adds(task.model, b, task.size, task.size) for _, b in CACHINGS}
    published = dict(zip(CACHINGS, PUBLISHED.get((task.size, task.batch), ()), strict=False))
    arms = [arm for arm in found.get("arms", []) if "skipped" not in arm]
    uncached = {arm["backend"]: arm["loop_ms_p50"] for arm in arms if arm["cache_interval"] == 1}

    def row(arm: dict[str, Any]) -> dict[str, Any]:
        kind, loop_ms = arm["name"].split(" ")[0].split(":")[0], arm["loop_ms_p50"]
        interval, branch = arm["cache_interval"], arm["branch_id"]
        own = uncached.get(arm["backend"])
        return {
            "size": task.size,
            "batch": task.batch,
            "arm": f"{kind}:{arm['backend']}" if kind.startswith("engine") else kind,
            "cache_interval": interval,
            "branch_id": branch,
            "seconds": loop_ms / 1e3,
            "speedup_vs_eager": arm["speedup_vs_eager"],
            "speedup_vs_uncached": round(own / loop_ms, 3) if own else None,
            "ceiling_vs_uncached": round(work[branch].ceiling(task.steps, interval), 3),
            "published": published.get((interval, branch)),
        }

    return [row(arm) for arm in arms]


def run_tests(task: Task, folder: Path) -> dict[str, Any]:
    """The tests marked gpu, one after the other, for they share the GPU."""
    del task, folder
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", str(ROOT / "tests")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    lines = (ran.stdout + ran.stderr).strip().splitlines()
    return {"exit_code": ran.returncode, "summary": lines[-1] if lines else "", "log": lines[-60:]}


def run_kernels(task: Task, folder: Path) -> dict[str, Any]:
    """Every kernel's times, as `fastcache bench --kernels --json` writes them."""
    del folder
    return bench_kernels(task.batch, task.dtype, task.repeats, 0, say)[0]


def run_loop(task: Task, folder: Path) -> dict[str, Any]:
    """What a step takes beside the U-Net, as `loop_overhead.py --json` writes it: here, diffusers', out of graphs."""
    del folder
    command = [sys.executable, str(ROOT / "tools" / "loop_overhead.py"), "--device", task.device, "--json"]
    command += ["--steps", str(task.steps), "--rounds", str(task.repeats)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if ran.returncode != 0:
        raise RuntimeError(f"loop_overhead.py ended with code {ran.returncode}: {ran.stderr.strip()[-500:]}")
    return json.loads(ran.stdout)


def run_task(task: Task, folder: Path) -> dict[str, Any]:
    """A benchmark's document, as `fastcache bench --json` writes it."""
    before = load_average()
    bundles, lineup = build_bundles(task.lineup, task.settings, folder, say)
    return document(task.settings, bundles, run_bench(task.settings, lineup, bundles, say), before)


def new_board(output: Path) -> Board:
    return Board(output, environment(torch.get_num_threads()) | {"gpus": {"before": gpus()}})


def say(message: str) -> None:
    typer.echo(message, err=True)


def show_check(pieces: dict[str, Any]) -> None:
    """The benchmarks as one table, the kernels, the loop, the tests' last line, and what was skipped."""
    keys = ("loop_ms_p50", "full_step_ms_p50", "shallow_step_ms_p50", "overhead_ms_per_step")
    rows = [
        [
            name.split(" ")[0],
            arm["name"],
            *(figure(arm[key], ".2f") for key in keys),
            figure(arm["speedup_vs_eager"], ".2f", "x"),
        ]
        for name, found in pieces.items()
        for arm in found.get("arms", [])
        if "skipped" not in arm
    ]
    print_table("fp16, milliseconds", ["model", "arm", "loop", "full", "shallow", "rest", "x eager"], rows)
    timed = pieces.get("kernels", {})
    if "kernels" in timed:
        print_table(*kernel_table(timed["settings"], [KernelResult(**row) for row in timed["kernels"]]))
    if rows := pieces.get("loop", {}).get("rows"):
        columns = [name for name in rows[0] if name != "steps"]
        told = [[str(row[name]).replace("_", " ") for name in columns] for row in rows]
        print_table("the loop alone, microseconds a step", [name.replace("_", " ") for name in columns], told)
    for name, found in pieces.items():
        if "summary" in found:
            typer.echo(f"{name}: {found['summary']}")
    show_skipped(pieces)


def show_skipped(pieces: dict[str, Any]) -> None:
    for name, found in pieces.items():
        if "skipped" in found:
            typer.echo(f"{name}: skipped, {found['skipped']}")
        for arm in found.get("arms", []):
            if "skipped" in arm:
                typer.echo(f"{name}, {arm['name']}: skipped, {arm['skipped']}")


if __name__ == "__main__":
    app()
