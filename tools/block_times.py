"""What leaving blocks out gains in time, and what each way of it costs: python tools/block_times.py --help

Builds the U-Net as two engines and with blocks that may be left out. One call of each pass takes turns: a round runs
each once, in an order that moves on, so that whatever else the machine does hits all alike. Ratios are the medians of
the rounds' own.
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
from fastcache.loop.lane import Lane

REUSED = (0, 1 / 3, 2 / 3, 1)  # shares of the blocks
WAYS = ("engines", "blocks")
Calls = dict[str, Callable[[], object]]


def main(
    model: Annotated[str, typer.Option(help="A preset, with random weights, or demo.")] = "sd15",
    size: Annotated[int, typer.Option(help="The image's side in pixels.")] = 256,
    backend: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "openvino",
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 where the processor has it.")] = "fp32",
    ways: Annotated[str, typer.Option(help="What to time. All of it is in memory at once.")] = ",".join(WAYS),
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 7,
    work: Annotated[Path, typer.Option(help="Where the engines are kept.")] = Path("build/block-times"),
    output: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
) -> None:
    """Time a U-Net call, one image under guidance, by the share of its transformers that is reused.

    Example: python tools/block_times.py --model sd15 --size 256 --output build/block-times.json
    """
    if strange := set(ways.split(",")) - set(WAYS):
        raise typer.BadParameter(f"expected ways out of {', '.join(WAYS)}, got {', '.join(sorted(strange))}")
    load, calls, held = load_average(), Calls(), list[dict[str, Any]]()
    for way in ways.split(","):
        bundle = build(model, size, backend, dtype, work, blocks=way == "blocks")
        before = resident()
        own = calls_of(bundle)
        for call in own.values():
            call()
        calls |= {f"{way}, {told}": call for told, call in own.items()}
        held_bytes = sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file())
        held.append({"way": way, "bytes": held_bytes, "resident_bytes": resident() - before})
    times = take_turns(calls, rounds)
    first = next(iter(times))
    rows = [
        {
            "call": name,
            "times_first": round(statistics.median(a / b for a, b in zip(own, times[first], strict=True)), 4),
        }
        for name, own in times.items()
    ]
    if output is not None:
        settings = {
            "model": model,
            "random_weights": model in PRESETS,
            "size": size,
            "backend": backend,
            "dtype": dtype,
        }
        environs = environment(torch.get_num_threads()) | {"load_average_before": load}
        write_json(
            output,
            {"environment": environs, "settings": settings | {"rounds": rounds}, "ways": held, "calls": rows},
        )
    shown = [[row["call"], f"{row['times_first']:.3f}", f"{1 / row['times_first']:.2f}"] for row in rows]
    print_table(f"{model} at {size}, {backend}, {dtype}", ["call", "time", "times as fast"], shown)
    for row in held:
        typer.echo(f"{row['way']}: {row['bytes'] / 1e9:.2f} GB on disk, {row['resident_bytes'] / 1e9:.2f} GB loaded")


def build(model: str, size: int, backend: str, dtype: str, work: Path, blocks: bool) -> Bundle:
    return fastcache.build_engines(
        model,
        work / f"{model}-{size}-{backend}-{dtype}-{'blocks' if blocks else 'engines'}",
        random_weights=model in PRESETS,
        components=["unet"],
        blocks="transformer" if blocks else (),
        backend=backend,
        dtype=dtype,
        height=size,
        width=size,
        batch="1:1:1",
        progress=lambda line: typer.echo(line, err=True),
    )


def calls_of(bundle: Bundle) -> Calls:
    """What runs each pass of a bundle once: FULL, shallow, and patterns with blocks left out, evenly spread."""
    lane, count = lane_of(bundle), len(bundle.manifest.blocks)
    patterns = {told(which): pattern_pass(which) for which in (evenly(share, count) for share in REUSED[1:] if count)}
    passes = {told(evenly(0, count)): FULL, **patterns, "shallow": "shallow-0"}
    return {name: lane.call(own) for name, own in passes.items()}


def lane_of(bundle: Bundle) -> Lane:
    """Tensors for one image under guidance, with noise in place of latents and text."""
    lane = FastCachePipeline(bundle).runtime.lane(images=1, guided=True)
    for name in ("sample", *lane.conditioning):
        lane.tensors[name].normal_(generator=torch.Generator().manual_seed(0))
    return lane


def evenly(reused: float, blocks: int) -> tuple[bool, ...]:
    """Which blocks run where a share of them is reused."""
    count = round(reused * blocks)
    return tuple(block * count // blocks == (block + 1) * count // blocks for block in range(blocks))


def told(which: tuple[bool, ...]) -> str:
    return f"{which.count(False)} of {len(which)} reused" if which else "full"


def take_turns(calls: Calls, rounds: int) -> dict[str, list[float]]:
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
