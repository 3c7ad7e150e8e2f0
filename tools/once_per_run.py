"""What every step computes anew though it is the same in every run: python tools/once_per_run.py

Two parts of a pass depend on neither the sample nor the cached feature: the time embedding with its projection into
every resnet, and the text's keys and values in every cross-attention. Each is built as an engine of its own and takes
turns with the whole step; its share of the step's processor time is the most that a table, or keys and values made
once, could save.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cut_gain import TOKENS, build_engine, take_turns
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import fastcache_engines
from fastcache.bench.machine import environment, load_average
from fastcache.bench.work import empty_unet
from fastcache.compile import export, lower, passes
from fastcache.compile.models import find_model
from fastcache.console import print_table
from fastcache.cut.partition import partition_unet
from fastcache.files import write_json
from fastcache_engines import Binding, LoadOptions, TensorSpec

PARTS = ("time", "text")


class TimePart(nn.Module):
    """Timesteps -> the time embedding as every resnet of a pass takes it."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        resnets: list[Any] = [module for module in unet.modules() if hasattr(module, "time_emb_proj")]
        self.embeddings = unet.embeddings
        self.projections = nn.ModuleList(r.time_emb_proj for r in resnets if r.time_emb_proj is not None)

    def forward(self, inputs: export.Inputs) -> tuple[Tensor, ...]:
        _, signals = self.embeddings(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])
        return tuple(project(functional.silu(signals.temb)) for project in self.projections)


class TextPart(nn.Module):
    """Text -> the keys and values of every cross-attention of a pass."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        attentions: list[Any] = [module for name, module in unet.named_modules() if name.endswith("attn2")]
        self.projections = nn.ModuleList(project for a in attentions for project in (a.to_k, a.to_v))

    def forward(self, inputs: export.Inputs) -> tuple[Tensor, ...]:
        return tuple(project(inputs["encoder_hidden_states"]) for project in self.projections)


def main(
    model: Annotated[str, typer.Option(help="A preset, with random weights.")] = "sd15",
    size: Annotated[int, typer.Option(help="The image's side in pixels.")] = 256,
    passes: Annotated[str, typer.Option(help="By commas: shallow, full. The full one takes 8 GB.")] = "shallow,full",
    backends: Annotated[str, typer.Option(help="By commas.")] = "onnxruntime,openvino",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[
        int, typer.Option(min=2, help="Timed rounds of a shallow step; a fifth of them of a full one.")
    ] = 40,
    output: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
) -> None:
    """Measure, in fp32 at branch 0, which share of a step the parts take that need not be computed in every step.

    Example: python tools/once_per_run.py --passes shallow --rounds 40 --output build/once-per-run.json
    """
    torch.set_num_threads(threads)
    load, found = load_average(), list[dict[str, Any]]()
    for name in passes.split(","):
        for backend in backends.split(","):
            turns = rounds if name == "shallow" else max(3, rounds // 5)
            found += measure(model, size, name, backend, threads, turns)
    settings: dict[str, Any] = {"model": model, "random_weights": True, "height": size, "width": size, "branch_id": 0}
    settings |= {"rows": 2, "dtype": "fp32", "threads": threads, "rounds": rounds}
    document = {"environment": environment(threads) | {"load_average_before": load}, "settings": settings}
    document["parts"] = found
    if output is not None:
        write_json(output, document)
    columns = [
        "pass",
        "backend",
        "part",
        "tensors",
        "of multiply-adds",
        "of processor time",
        "quartiles",
        "ms",
        "step ms",
    ]
    print_table(f"{model} {size}x{size}, 2 rows, fp32, {threads} threads", columns, [row(part) for part in found])


def measure(model: str, size: int, name: str, backend: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Both parts of one pass on one backend, beside the pass itself."""
    modules, inputs, work = make_modules(model, size, name)
    with tempfile.TemporaryDirectory() as folder:
        files = {key: build_engine(backend, part, Path(folder) / key) for key, part in modules.items()}
        outputs = {key: part.outputs for key, part in modules.items()}
        modules.clear()  # the engines have weights of their own
        bindings = {key: bind(backend, file, inputs, threads) for key, file in files.items()}
        times = take_turns(bindings, rounds, 1)
    step = [took.cpu_ms for took in times["step"]]
    found: list[dict[str, Any]] = []
    for key in PARTS:
        own = [took.cpu_ms for took in times[key]]
        shares = [100 * part / whole for part, whole in zip(own, step, strict=True)]
        low, _, high = statistics.quantiles(shares, n=4)
        found.append(
            {
                "pass": name,
                "backend": backend,
                "part": key,
                "tensors": len(outputs[key]),
                "multiply_adds_percent": round(100 * work[key] / work["step"], 3),
                "cpu_percent_p50": round(statistics.median(shares), 3),
                "cpu_percent_quartiles": [round(low, 3), round(high, 3)],
                "cpu_ms_p50": round(statistics.median(own), 3),
                "step_cpu_ms_p50": round(statistics.median(step), 3),
            }
        )
    return found


def make_modules(
    model: str, size: int, name: str
) -> tuple[dict[str, export.Exportable], export.Inputs, dict[str, int]]:
    """The pass and its two parts, with weights for no more than they hold; their inputs, and their multiply-adds."""
    unet = empty_unet(find_model(model, random_weights=True))
    cut = partition_unet(unet, 0, "auto")
    lower.split_gates(cut.full)
    inputs = passes.unet_inputs(unet, 2, size // 8, size // 8, TOKENS)
    own = {"full": cut.full, "shallow": cut.shallow}[name]
    step = next(part for part in passes.exportable_unet(cut, inputs) if part.role == name)
    parts: dict[str, export.Exportable] = {"step": step}
    for key, module in (("time", TimePart(own)), ("text", TextPart(own))):
        names = tuple(f"{key}_{i}" for i in range(len(module.projections)))
        parts[key] = export.Exportable(step.role, module, inputs, names)
    work = {key: multiply_adds(part) for key, part in parts.items()}
    own.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.normal_(0, 0.02)
    return parts, step.inputs, work


def multiply_adds(part: export.Exportable) -> int:
    """On torch's meta device, on which attention is counted too."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        part.module({name: tensor.to("meta") for name, tensor in part.inputs.items()})
    return counter.get_total_flops() // 2


def bind(backend: str, file: Path, inputs: Mapping[str, Tensor], threads: int) -> Binding:
    """An engine on tensors of its own; what it does not share with the step, it writes."""
    engine = fastcache_engines.backend(backend).load(file, LoadOptions(threads=threads))
    own = {spec.name: inputs[spec.name].clone() for spec in engine.inputs}
    return engine.bind(own | {spec.name: torch.empty(sizes(spec)) for spec in engine.outputs})


def sizes(spec: TensorSpec) -> Sequence[int]:
    return [size if isinstance(size, int) else 2 for size in spec.shape]


def row(part: Mapping[str, Any]) -> list[str]:
    low, high = part["cpu_percent_quartiles"]
    return [
        *(str(part[key]) for key in ("pass", "backend", "part", "tensors")),
        f"{part['multiply_adds_percent']:.2f}%",
        f"{part['cpu_percent_p50']:.2f}%",
        f"{low:.2f}% to {high:.2f}%",
        f"{part['cpu_ms_p50']:.1f}",
        f"{part['step_cpu_ms_p50']:.0f}",
    ]


if __name__ == "__main__":
    typer.run(main)
