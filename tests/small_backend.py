"""A backend in one file, as a newcomer would write it: programs of torch.export, run by eager PyTorch on a CPU.

Tests register it by its one line, `BACKENDS["small"] = "small_backend"`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcache_engines.protocol import BuildOptions, Capabilities, LoadOptions, Program, Support
from fastcache_engines.registry import refuse_evaluate, refuse_targets
from fastcache_engines.tensors import TensorSpec, agreed, check_tensors

CAPABILITIES = Capabilities(name="small", source="program", dtypes={"cpu": ("fp32", "bf16")}, concurrent=("cpu",))

check_targets, evaluate = refuse_targets, refuse_evaluate


def version() -> str:
    return torch.__version__


def support(device: str) -> Support:
    here = device == "cpu"
    return Support(version(), here, here, "ready, on the CPU" if here else "runs on a CPU only; use inductor")


def build(graphs: Mapping[str, Program], folder: Path, options: BuildOptions) -> dict[str, str]:
    for role, program in graphs.items():
        exported: Any = program.exported
        given = exported.example_inputs[1]["inputs"]
        values = {node.name: node.meta["val"] for node in exported.graph.nodes if "val" in node.meta}
        made = zip(program.outputs, exported.graph_signature.user_outputs, strict=True)
        told = {
            "inputs": json.dumps([_spec(name, given[name]) for name in program.inputs]),
            "outputs": json.dumps([_spec(name, values[of]) for name, of in made]),
        }
        torch.export.save(exported, folder / f"{role}.pt2", extra_files=told)
    return {role: f"{role}.pt2" for role in graphs}


def _spec(name: str, value: Tensor) -> list[Any]:
    return [name, str(value.dtype).removeprefix("torch."), ["batch", *value.shape[1:]]]


def _read(told: str) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in json.loads(told))


@dataclass(frozen=True)
class Facts:
    bytes: int


def describe(path: Path) -> Facts:
    return Facts(path.stat().st_size)


def load(path: Path, options: LoadOptions = LoadOptions()) -> SmallEngine:
    told = {"inputs": "", "outputs": ""}
    module = torch.export.load(path, extra_files=told).module(check_guards=False)
    inputs, outputs = (agreed(path.name, _read(told[side]), getattr(options, side)) for side in told)
    return SmallEngine(module, inputs, outputs)


@dataclass
class SmallEngine:
    module: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def bind(self, tensors: Mapping[str, Tensor]) -> SmallBinding:
        check_tensors((*self.inputs, *self.outputs), tensors, "cpu")
        return SmallBinding(self, dict(tensors))


@dataclass
class SmallBinding:
    engine: SmallEngine
    tensors: dict[str, Tensor]

    def capturable(self) -> bool:
        return False

    @torch.no_grad()
    def run(self) -> None:
        found = self.engine.module(inputs={spec.name: self.tensors[spec.name] for spec in self.engine.inputs})
        for spec, value in zip(self.engine.outputs, found if isinstance(found, tuple) else (found,), strict=True):
            self.tensors[spec.name].copy_(value)
