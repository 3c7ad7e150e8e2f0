"""Two small modules that share their weights, as full and shallow U-Nets do, for tests of AOTInductor's packages."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastcache_engines import Program
from fastcache_engines.inductor.engine import InductorEngine

SIZE, LABELS, MOST = 8, 5, 16
WEIGHTS = "first.weights.safetensors"
TENSORS = dict[str, Tensor]


class Second(nn.Module):
    """A feature of `First` and a level -> an image."""

    def __init__(self) -> None:
        super().__init__()
        self.level, self.norm = nn.Linear(1, 32), nn.GroupNorm(4, 32)
        self.mix, self.out = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 4, 3, padding=1)
        self.register_buffer("bias", torch.linspace(-1, 1, 32))
        self.big = nn.Parameter(torch.randn(64, 1024) / 64)  # what most of the bytes are

    def forward(self, inputs: TENSORS) -> Tensor:
        level = self.level(inputs["level"][:, None].to(self.level.weight.dtype)) + self.bias + self.big.sum()
        h = nn.functional.silu(self.norm(inputs["feature"] + level[:, :, None, None]))
        h = self.mix(self.mix(h)) * torch.tensor([0.5, 1.5]).sum()  # a constant that the exporter lifts
        return self.out(h).float()


class First(nn.Module):
    """An image, a level and a label -> what `Second` gives, and the feature that it takes."""

    def __init__(self, second: Second) -> None:
        super().__init__()
        self.second, self.label, self.into = second, nn.Embedding(LABELS, 32), nn.Conv2d(4, 32, 3, padding=1)

    def forward(self, inputs: TENSORS) -> tuple[Tensor, Tensor]:
        image = inputs["image"].to(self.into.weight.dtype)
        feature = self.into(image) + self.label(inputs["label"])[:, :, None, None]
        return self.second({"feature": feature, "level": inputs["level"]}), feature


def first_module(seed: int = 0) -> First:
    torch.manual_seed(seed)
    return First(Second()).eval().requires_grad_(False)


def first_inputs(batch: int, device: str = "cpu") -> TENSORS:
    torch.manual_seed(batch)
    inputs = {
        "image": torch.randn(batch, 4, SIZE, SIZE),
        "unused": torch.randn(batch, 3),
        "level": torch.rand(batch),
        "label": torch.randint(LABELS, (batch,)),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def program(module: nn.Module, inputs: TENSORS, *outputs: str) -> Program:
    batch = torch.export.Dim("batch", min=1, max=MOST)
    shapes = {"inputs": {name: {0: batch} for name in inputs}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, (), {"inputs": inputs}, dynamic_shapes=shapes)
    return Program(exported, tuple(inputs), outputs)


def pair(module: First, dtype: torch.dtype = torch.float32) -> dict[str, Program]:
    """Programs of a module and of the part of it that it shares its weights with."""
    module.to(dtype)
    inputs = first_inputs(2)
    second = {"level": inputs["level"], "feature": torch.zeros(2, 32, SIZE, SIZE, dtype=dtype)}
    return {
        "first": program(module, inputs, "result", "feature"),
        "second": program(module.second, second, "result"),
    }


def empty_outputs(engine: InductorEngine, batch: int, device: str = "cpu") -> TENSORS:
    return {
        spec.name: torch.full((batch, *spec.shape[1:]), torch.nan, dtype=getattr(torch, spec.dtype), device=device)
        for spec in engine.outputs
    }


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def rewrite_package(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with safe_open(file, "pt") as source:
        metadata = source.metadata()
    package = json.loads(metadata["first"])
    change(package)
    tensors = load_file(file)
    file.unlink()
    save_file(tensors, file, metadata | {"first": json.dumps(package)})


def constants_of(engine: InductorEngine) -> TENSORS:
    """The constants that an engine's first package reads, in its memory."""
    name, loaded = next(iter(engine._loaded.items()))
    return loaded.weights.constants(engine._packages[name])
