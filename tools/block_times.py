"""What leaving blocks out gains in time, and what each way of it costs: python tools/block_times.py --help

Builds the U-Net as two engines and as a chain of blocks. Of the chain's graphs it makes one engine with every block in
an `If`, and one for a single pattern of blocks. One call of each pass takes turns: a round runs each once, in an order
that moves on, so that whatever else the machine does hits all alike. Ratios are the medians of the rounds' own.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import block_ways
import torch
import typer
from torch import Tensor

import fastcache
import fastcache_engines
from fastcache import Bundle, FastCachePipeline
from fastcache.bench.machine import environment, load_average
from fastcache.compile.presets import PRESETS
from fastcache.console import print_table
from fastcache.cut.names import FULL, pattern_pass
from fastcache.files import write_json
from fastcache.loop.lane import Lane
from fastcache_engines import LoadOptions

REUSED = (0, 1 / 3, 2 / 3, 1)  # shares of the blocks
WAYS = ("engines", "chain", "conditions", "pattern")
Calls = dict[str, Callable[[], object]]


def main(
    model: Annotated[str, typer.Option(help="A preset, with random weights, or demo.")] = "sd15",
    size: Annotated[int, typer.Option(help="The image's side in pixels.")] = 256,
    backend: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "openvino",
    ways: Annotated[str, typer.Option(help="What to time. All of it is in memory at once.")] = ",".join(WAYS),
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 7,
    work: Annotated[Path, typer.Option(help="Where the engines are kept.")] = Path("build/block-times"),
    output: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
) -> None:
    """Time a U-Net call in fp32, one image under guidance, by the share of its transformers that is reused.

    Example: python tools/block_times.py --model sd15 --size 256 --output build/block-times.json
    """
    if strange := set(ways.split(",")) - set(WAYS):
        raise typer.BadParameter(f"expected ways out of {', '.join(WAYS)}, got {', '.join(sorted(strange))}")
    load, calls, held = load_average(), Calls(), list[dict[str, Any]]()
    for way in ways.split(","):
        bundle = build(model, size, backend, work, blocks=way != "engines")
        folder = bundle.path if way in ("engines", "chain") else bundle.path.with_name(f"{bundle.path.name}-{way}")
        before = resident()
        own = calls_of(bundle) if folder == bundle.path else calls_of_one(bundle, way, folder)
        for call in own.values():
            call()
        calls |= {f"{way}, {told}": call for told, call in own.items()}
        held_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
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
        settings = {"model": model, "random_weights": model in PRESETS, "size": size, "backend": backend}
        environs = environment(torch.get_num_threads()) | {"load_average_before": load}
        write_json(
            output,
            {"environment": environs, "settings": settings | {"rounds": rounds}, "ways": held, "calls": rows},
        )
    shown = [[row["call"], f"{row['times_first']:.3f}", f"{1 / row['times_first']:.2f}"] for row in rows]
    print_table(f"{model} at {size}, {backend}, fp32", ["call", "time", "times as fast"], shown)
    for row in held:
        typer.echo(f"{row['way']}: {row['bytes'] / 1e9:.2f} GB on disk, {row['resident_bytes'] / 1e9:.2f} GB loaded")


def build(model: str, size: int, backend: str, work: Path, blocks: bool) -> Bundle:
    return fastcache.build_engines(
        model,
        work / f"{model}-{size}-{backend}-{'chain' if blocks else 'engines'}",
        random_weights=model in PRESETS,
        components=["unet"],
        blocks="transformer" if blocks else (),
        backend=backend,
        dtype="fp32",
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


def calls_of_one(bundle: Bundle, way: str, folder: Path) -> Calls:
    """The same of one engine made of a chain's graphs: for any pattern, or for two thirds reused alone."""
    lane, found, engine = lane_of(bundle), Calls(), None
    load, options = fastcache_engines.backend(bundle.manifest.backend).load, LoadOptions("cpu", "fp32")
    for share in (0, 2 / 3) if way == "conditions" else (2 / 3,):
        runs = evenly(share, len(bundle.manifest.blocks))
        engine = engine or load(one_graph(bundle, way, runs, folder), options)
        found[told(runs)] = engine.bind(lane.tensors | flags_of(bundle, lane.tensors, runs)).run
    return found


def one_graph(bundle: Bundle, way: str, runs: Sequence[bool], folder: Path) -> Path:
    """One graph of a chain's, beside a copy of their weights: ONNX Runtime takes no second link of a file."""
    manifest, graph = bundle.manifest, folder / f"{way}.onnx"
    files = {role: bundle.path / manifest.engines[role].file for role in manifest.chain}
    blocks = [file for role, file in files.items() if role.startswith("block-")]
    folder.mkdir(exist_ok=True)
    shutil.copyfile(bundle.path / "unet.weights", folder / "unet.weights")
    if way == "conditions":
        block_ways.with_conditions([*files.values()], blocks, graph)
    else:
        left_out = [file for file, run in zip(blocks, runs, strict=True) if not run]
        block_ways.without([*files.values()], left_out, graph)
    return graph


def flags_of(bundle: Bundle, tensors: Mapping[str, Tensor], runs: Sequence[bool]) -> dict[str, Tensor]:
    """What a graph with conditions takes besides: which blocks run, and the residuals of the others."""
    residuals = [block.residual for block in bundle.manifest.blocks]
    flags = {block_ways.RUN + one: torch.tensor([float(run)]) for one, run in zip(residuals, runs, strict=True)}
    return flags | {block_ways.KEPT + one: tensors[one].clone() for one in residuals}


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
