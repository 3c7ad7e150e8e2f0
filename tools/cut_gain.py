"""The projected cut beside the plain one, and how far they agree: python tools/cut_gain.py

Builds the shallow engines of both cuts with every backend that is named, gives them what the full pass computes at the
same step, and lets them take turns: a round runs each engine once, in an order that moves on, so that whatever else the
machine does hits all of them alike. The gain is the median of the rounds' own ratios. Beside the time that passes
stands the processor time of all threads, which other programs' turns are no part of.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

import fastcache_engines
from fastcache.bench.machine import environment, load_average
from fastcache.bundle.parity import relative_error
from fastcache.compile import export, graph_passes, lower, passes
from fastcache.compile.models import find_model
from fastcache.console import print_table
from fastcache.cut.partition import partition_unet
from fastcache.files import write_json
from fastcache_engines import Binding, BuildOptions, LoadOptions

CUTS = ("plain", "projected")
TOKENS = 77
Arm = tuple[str, str]  # a backend and a cut


class Times(NamedTuple):
    """What one run took in all, and of the processor."""

    wall_ms: float
    cpu_ms: float


def main(
    model: Annotated[str, typer.Option(help="A preset, with random weights.")] = "sd15",
    size: Annotated[int, typer.Option(help="The image's side in pixels.")] = 256,
    branch_id: Annotated[int, typer.Option(help="The skip connection to cut at.")] = 0,
    backends: Annotated[str, typer.Option(help="By commas.")] = "onnxruntime,openvino,inductor",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=2, help="Timed rounds.")] = 40,
    warmup: Annotated[int, typer.Option(min=1, help="Untimed rounds before them.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
) -> None:
    """Time the shallow step of both cuts in fp32, side by side, and compare what they compute.

    Example: python tools/cut_gain.py --model sd15 --size 256 --rounds 40 --output build/cut-gain.json
    """
    torch.set_num_threads(threads)
    load, arms = load_average(), [(name, cut) for name in backends.split(",") for cut in CUTS]
    with tempfile.TemporaryDirectory() as folder:
        files, inputs, expected = build_engines(model, size, branch_id, arms, Path(folder))
        bindings, outputs = bind_all(files, inputs, threads)
        times = take_turns(bindings, rounds, warmup)
    settings: dict[str, Any] = {"model": model, "random_weights": True, "height": size, "width": size}
    settings |= {"branch_id": branch_id, "rows": 2, "dtype": "fp32", "threads": threads, "rounds": rounds}
    document = {
        "environment": environment(threads) | {"load_average_before": load},
        "settings": settings,
        "backends": [compare(name, times, outputs, expected) for name in backends.split(",")],
    }
    if output is not None:
        write_json(output, document)
    show(document)


def build_engines(
    model: str, size: int, branch_id: int, arms: Sequence[Arm], folder: Path
) -> tuple[dict[Arm, Path], dict[str, export.Inputs], Tensor]:
    """Every shallow engine's file, each cut's inputs, and the noise prediction of the full pass in PyTorch."""
    unet = find_model(model, random_weights=True).load_unet()
    common = passes.unet_inputs(unet, 2, size // 8, size // 8, TOKENS)
    files: dict[Arm, Path] = {}
    inputs: dict[str, export.Inputs] = {}
    expected = torch.empty(0)
    for kind in CUTS:
        cut = partition_unet(unet, branch_id, kind)
        lower.split_gates(cut.full)
        with torch.no_grad():
            expected, *cached = passes.call_unet(cut.full, common)
        inputs[kind] = common | dict(zip(cut.cached, cached, strict=True))
        _, shallow = passes.exportable_unet(cut, common)
        for name in (name for name, of in arms if of == kind):
            files[name, kind] = build_engine(name, shallow, folder / f"{name}-{kind}")
    return files, inputs, expected


def build_engine(name: str, part: export.Exportable, folder: Path) -> Path:
    """One engine in a folder of its own, as a build makes it."""
    folder.mkdir()
    backend = fastcache_engines.backend(name)
    if backend.CAPABILITIES.source == "program":
        graph: Any = export.export_program(part)[0]
    else:
        graph = folder / f"{part.role}.onnx"
        exported, _ = export.export(part, graph_passes.translations(backend.CAPABILITIES, "fp32"))
        export.save_graphs([(graph.name, exported)], folder, "weights")
    return folder / backend.build({part.role: graph}, folder, BuildOptions(rows=(1, 2, 2)))[part.role]


def bind_all(
    files: Mapping[Arm, Path], inputs: Mapping[str, export.Inputs], threads: int
) -> tuple[dict[Arm, Binding], dict[Arm, Tensor]]:
    """Every engine on tensors of its own, and what each writes."""
    bindings: dict[Arm, Binding] = {}
    outputs: dict[Arm, Tensor] = {}
    for (name, kind), file in files.items():
        engine = fastcache_engines.backend(name).load(file, LoadOptions(threads=threads))
        own = {key: tensor.contiguous().clone() for key, tensor in inputs[kind].items()}
        output = torch.full_like(own["sample"], torch.nan)
        bindings[name, kind], outputs[name, kind] = engine.bind(own | {"noise_pred": output}), output
    return bindings, outputs


def take_turns(bindings: Mapping[Any, Binding], rounds: int, warmup: int) -> dict[Any, list[Times]]:
    """What each arm took in each round."""
    order, times = list(bindings), {arm: list[Times]() for arm in bindings}
    for number in range(-warmup, rounds):
        order.append(order.pop(0))
        for arm in order:
            start, busy = time.perf_counter(), time.process_time()
            bindings[arm].run()
            took = Times((time.perf_counter() - start) * 1e3, (time.process_time() - busy) * 1e3)
            if number >= 0:
                times[arm].append(took)
    return times


def compare(
    name: str, times: Mapping[Arm, Sequence[Times]], outputs: Mapping[Arm, Tensor], expected: Tensor
) -> dict[str, Any]:
    """One backend's medians and gains, and its largest differences over the largest value."""
    found: dict[str, Any] = {"name": name}
    for kind in Times._fields:
        plain, projected = ([getattr(took, kind) for took in times[name, cut]] for cut in CUTS)
        gains = [100 * (slow / fast - 1) for slow, fast in zip(plain, projected, strict=True)]
        low, _, high = statistics.quantiles(gains, n=4)
        found |= {
            f"plain_{kind}_p50": round(statistics.median(plain), 3),
            f"projected_{kind}_p50": round(statistics.median(projected), 3),
            f"faster_percent_{kind}_p50": round(statistics.median(gains), 2),
            f"faster_percent_{kind}_quartiles": [round(low, 2), round(high, 2)],
        }
    return found | {
        "projected_vs_plain": relative_error(outputs[name, "projected"], outputs[name, "plain"]),
        "plain_vs_full": relative_error(outputs[name, "plain"], expected),
        "projected_vs_full": relative_error(outputs[name, "projected"], expected),
    }


def show(document: Mapping[str, Any]) -> None:
    settings = document["settings"]
    print_table(
        f"shallow step of {settings['model']} {settings['width']}x{settings['height']}, branch {settings['branch_id']}"
        f", 2 rows, fp32, {settings['threads']} threads, {settings['rounds']} rounds",
        [
            "backend",
            "plain ms",
            "projected",
            "faster",
            "quartiles",
            "by processor time",
            "projected vs plain",
            "vs full",
        ],
        [
            [
                found["name"],
                f"{found['plain_wall_ms_p50']:.1f}",
                f"{found['projected_wall_ms_p50']:.1f}",
                f"{found['faster_percent_wall_ms_p50']:.1f}%",
                "{:.1f}% to {:.1f}%".format(*found["faster_percent_wall_ms_quartiles"]),
                f"{found['faster_percent_cpu_ms_p50']:.1f}%",
                f"{found['projected_vs_plain']:.1e}",
                f"{found['projected_vs_full']:.1e}",
            ]
            for found in document["backends"]
        ],
    )


if __name__ == "__main__":
    typer.run(main)
