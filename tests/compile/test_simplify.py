"""A simplified graph is the one that the exporter's own optimizer makes, which takes longer."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from torch import Tensor, nn

from fastcache.compile.simplify import simplify


class Roundabout(nn.Module):
    """What U-Nets do without need: turns and casts that cancel, sizes that are known, neutral numbers, padding."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(nn.functional.pad(x, (1, 1, 1, 1)))
        batch, channels, height, width = y.shape
        y = y.permute(0, 2, 3, 1).reshape(batch, height * width, channels).transpose(1, 2).transpose(1, 2)
        y = (y.to(torch.float32) * 1.0 + 0.0).unsqueeze(0).unsqueeze(0)
        scale = torch.tensor([2.0, 3.0]).prod() * torch.ones(channels)
        return y.reshape(batch, height, width, channels) * scale


def exported() -> ir.Model:
    torch.manual_seed(0)
    batch: Any = torch.export.Dim("batch", min=1, max=8)
    given = (torch.zeros(2, 4, 8, 8),)
    program = torch.onnx.export(
        Roundabout().eval(), given, dynamic_shapes=({0: batch},), dynamo=True, optimize=False, opset_version=20
    )
    assert program is not None
    return program.model


def content(model: ir.Model) -> list[object]:
    nodes = [
        (node.op_type, *(value and value.name for value in node.inputs), *map(str, node.attributes.values()))
        for node in model.graph
    ]
    weights = {name: value.const_value for name, value in model.graph.initializers.items()}
    return [nodes, {name: tensor.tobytes() for name, tensor in weights.items() if tensor is not None}]


def test_it_is_what_the_exporters_optimizer_makes() -> None:
    plain, ours, theirs = exported(), exported(), exported()
    simplify(ours)
    optimize_ir(theirs)
    assert content(ours) == content(theirs)
    assert len(ours.graph) < len(plain.graph) / 2
