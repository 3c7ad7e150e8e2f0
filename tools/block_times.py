"""What leaving blocks out gains in time, and what the chain of engines costs: python tools/block_times.py --help

Builds the U-Net as two engines and as a chain of blocks, and lets one call of each pass take turns: a round runs each
once, in an order that moves on, so that whatever else the machine does hits all alike. Ratios are the medians of the
rounds' own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fastcache
from fastcache import Bundle, FastCachePipeline
from fastcache.bench.machine import environment, load_average
from fastcache.compile.presets import PRESETS
from fastcache.console import print_table
from fastcache.cut.names import FULL, pattern_pass
from fastcache.files import write_json

REUSED = (0, 1 / 3, 2 / 3, 1)  # shares of the blocks


def main(
    model: Annotated[str, typer.Option(help="A preset, with random weights, or demo.")] = "sd15",
    size: Annotated[int, typer.Option(help="The image's side in pixels.")] = 256,
    backend: Annotated[str, typer.Option()] = "openvino",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 7,
    work: Annotated[Path, typer.Option(help="Where the bundles are kept.")] = Path("build/block-times"),
    output: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
) -> None:
    """Time a U-Net call in fp32, one image under guidance, by the share of its transformers that is reused.

    Example: python tools/block_times.py --model sd15 --size 256 --output build/block-times.json
    """
    load, calls, bundles = load_average(), dict[str, Callable[[], object]](), list[dict[str, Any]]()
    for name, blocks in (("engines", ()), ("chain", "transformer")):
        common: dict[str, Any] = {"backend": backend, "dtype": "fp32", "height": size, "width": size, "batch": "1:1:1"}
        bundle = fastcache.build_engines(
            model,
            work / f"{model}-{size}-{backend}-{name}",
            random_weights=model in PRESETS,
            components=["unet"],
            blocks=blocks,
            progress=lambda line: typer.echo(line, err=True),
            **common,
        )
        before = resident()
        own = calls_of(name, bundle)
        for call in own.values():
            call()
        calls |= own
        size_of = sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file())
        bundles.append({"bundle": name, "bytes": size_of, "resident_bytes": resident() - before})
    times = take_turns(calls, rounds)
    unit = times["engines full"]
    rows = [
        {"call": name, "times_full": round(statistics.median(a / b for a, b in zip(own, unit, strict=True)), 4)}
        for name, own in times.items()
    ]
    settings = {"model": model, "random_weights": model in PRESETS, "size": size, "backend": backend, "rounds": rounds}
    if output is not None:
        environs = environment(torch.get_num_threads()) | {"load_average_before": load}
        write_json(output, {"environment": environs, "settings": settings, "bundles": bundles, "calls": rows})
    shown = [[row["call"], f"{row['times_full']:.3f}", f"{1 / row['times_full']:.2f}"] for row in rows]
    print_table(f"{model} at {size}, {backend}, fp32", ["call", "time", "times as fast"], shown)
    for row in bundles:
        typer.echo(f"{row['bundle']}: {row['bytes'] / 1e9:.2f} GB on disk, {row['resident_bytes'] / 1e9:.2f} GB loaded")


def calls_of(name: str, bundle: Bundle) -> dict[str, Callable[[], object]]:
    """What runs each pass of a bundle once: FULL, shallow, and patterns with blocks left out, evenly spread."""
    lane = FastCachePipeline(bundle).runtime.lane(images=1, guided=True)
    count, passes = len(bundle.manifest.blocks), dict[str, str]()
    for share in REUSED if count else ():
        reused = round(share * count)
        runs = [block * reused // count == (block + 1) * reused // count for block in range(count)]
        passes[f"{reused} of {count} reused"] = pattern_pass(runs) if reused else FULL
    passes = passes or {"full": FULL}
    return {f"{name} {told}": lane.call(own) for told, own in (passes | {"shallow": "shallow-0"}).items()}


def take_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        for k in range(len(names)):
            name = names[(number + k) % len(names)]
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


def resident() -> int:
    """Of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    typer.run(main)
