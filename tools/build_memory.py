"""A build of engines -> how long each of its stages took, and the most memory that all its processes held in each.

    python tools/build_memory.py sdxl --output /tmp/sdxl --figures tools/results/DATE-sdxl-build.json

What holds memory is sampled from outside, ten times a second: the resident pages of the command and of whatever it
starts (a page that two of them share counts twice), and of these the anonymous ones, which no file stands behind.
"""

from __future__ import annotations

import queue
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import psutil
import typer

from fastcache.bench.machine import environment, load_average
from fastcache.files import write_json

_INTERVAL_S = 0.1


@dataclass
class Stage:
    """What the command said it was doing, from then until it said something else."""

    name: str
    start_s: float
    peaks: dict[str, int] = field(default_factory=lambda: {"resident_bytes": 0, "anonymous_bytes": 0})

    def note(self, held: dict[str, int]) -> None:
        self.peaks = {name: max(value, held[name]) for name, value in self.peaks.items()}


def held_by(process: psutil.Process) -> dict[str, int]:
    """The memory of a process and all below it."""
    total = {"resident_bytes": 0, "anonymous_bytes": 0}
    for member in (process, *process.children(recursive=True)):
        try:
            memory: Any = member.memory_info()
        except psutil.Error:  # it ended meanwhile
            continue
        total["resident_bytes"] += memory.rss
        total["anonymous_bytes"] += memory.rss - memory.shared
    return total


def watch(command: list[str], least_free_bytes: int) -> tuple[list[Stage], float, int]:
    """Run a command: its stages, its wall time in seconds, and its exit code (negative where it was ended here)."""
    lines: queue.Queue[str] = queue.Queue()
    start, stages = time.monotonic(), [Stage("start", 0.0)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        threading.Thread(target=_forward, args=(child.stderr, lines), daemon=True).start()
        process = psutil.Process(child.pid)
        while child.poll() is None:
            while not lines.empty():
                stages.append(Stage(lines.get(), round(time.monotonic() - start, 1)))
                typer.echo(f"{stages[-1].start_s:8.1f} s  {stages[-1].name}", err=True)
            stages[-1].note(held_by(process))
            if psutil.virtual_memory().available < least_free_bytes:
                typer.echo("too little memory is left on this machine: the command is ended", err=True)
                child.terminate()
            time.sleep(_INTERVAL_S)
        return stages, round(time.monotonic() - start, 1), child.returncode


def _forward(stream: IO[str] | None, lines: queue.Queue[str]) -> None:
    for line in stream or ():
        lines.put(line.strip())


def _rows(stages: list[Stage], end_s: float) -> list[dict[str, Any]]:
    ends = [*(stage.start_s for stage in stages[1:]), end_s]
    return [
        {"stage": stage.name, "seconds": round(end - stage.start_s, 1), **stage.peaks}
        for stage, end in zip(stages, ends, strict=True)
    ]


def main(
    model: str,
    output: Annotated[Path, typer.Option(help="Where the bundle goes; it stays there.")],
    figures: Annotated[Path, typer.Option(help="The JSON file to write.")],
    backend: str = "tensorrt-rtx",
    dtype: str = "fp16",
    least_free_gb: Annotated[float, typer.Option(help="End the build where this machine has less left.")] = 1.0,
) -> None:
    """Build a preset's engines with random weights, and write down the memory and the time that it took."""
    program = shutil.which("fastcache", path=str(Path(sys.executable).parent)) or "fastcache"
    options = ["--model", model, "--random-weights", "--backend", backend, "--dtype", dtype, "--output", str(output)]
    found = environment(threads=1) | {"load_average_before": load_average()}
    stages, wall_s, code = watch([program, "build-engines", *options, "--force"], int(least_free_gb * 1e9))
    if code:
        raise typer.BadParameter(f"expected the build to end well, got exit code {code}: {stages[-1].name}")
    rows = _rows(stages, wall_s)
    document = {
        "environment": found,
        "settings": {"model": model, "random_weights": True, "backend": backend, "dtype": dtype},
        "wall_s": wall_s,
        "peak_resident_bytes": max(row["resident_bytes"] for row in rows),
        "peak_anonymous_bytes": max(row["anonymous_bytes"] for row in rows),
        "bundle_bytes": sum(file.stat().st_size for file in output.rglob("*") if file.is_file()),
        "stages": rows,
    }
    write_json(figures, document)


if __name__ == "__main__":
    typer.run(main)
