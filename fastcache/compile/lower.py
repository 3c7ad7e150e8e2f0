"""Modules as they were trained -> modules in the form and the dtype that engines run them in.

Knows layers and numbers; knows nothing about graphs or backends.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.nn import functional

from fastcache.cut.fused import fuse_first_norm
from fastcache.cut.partition import Cut
from fastcache_engines import DType, torch_dtype


def lower(cut: Cut, dtype: DType) -> None:
    """Bring a cut's layers to a dtype, in place; as `narrow`."""
    narrow(cut.full, dtype)
    narrow(cut.shallow, dtype)


def narrow(unet: nn.Module, dtype: DType) -> None:
    """Bring the layers of a pass, or of a chain, to a dtype, in place; the embeddings stay in float32.

    They are a thousandth of the work, and a timestep of 981 has no neighbour nearer than 4 in bfloat16.
    """
    for name, part in unet.named_children():
        part.to(torch.float32 if name == "embeddings" else torch_dtype(dtype))


def prepare(cuts: Iterable[Cut], dtype: DType | None, kernels: bool = False) -> None:
    """Bring the cuts of one U-Net to the form that engines run in and, where one is given, to a dtype; in place.

    With `kernels` the first norm above each cut becomes an operator of `fastcache_kernels`.
    """
    for cut in cuts:
        split_gates(cut.full)
        if kernels:
            fuse_first_norm(cut)
        if dtype is not None:
            lower(cut, dtype)


@contextmanager
def widened(*modules: nn.Module) -> Generator[None]:
    """Within this every layer computes in float32, its weights widened while it runs and no longer."""
    narrow: dict[nn.Parameter, Tensor] = {}

    def widen(layer: nn.Module, arguments: Any) -> None:
        for parameter in layer.parameters(recurse=False):
            narrow[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def restore(layer: nn.Module, arguments: Any, output: Any) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.data = narrow.pop(parameter)

    every = dict.fromkeys(layer for module in modules for layer in module.modules())
    layers = [x for x in every if any(p.dtype != torch.float32 for p in x.parameters(recurse=False))]
    hooks = [hook for x in layers for hook in (x.register_forward_pre_hook(widen), x.register_forward_hook(restore))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _SplitGEGLU(nn.Module):
    """diffusers' GEGLU with its one projection as two, so that nothing cuts a matrix in half at every step.

    On a CPU that cut, the gate's own pass and the product took 3% of SD1.5's full step in OpenVINO; the gate now joins
    its projection. Source: arXiv 2002.05202, equation 6.
    """

    def __init__(self, geglu: GEGLU) -> None:
        super().__init__()
        self.value, self.gate = (_linear(*halves) for halves in _halves(geglu.proj))

    def forward(self, h: Tensor) -> Tensor:
        return self.value(h) * functional.gelu(self.gate(h))


def _halves(linear: nn.Linear) -> list[tuple[Tensor, Tensor | None]]:
    weights = linear.weight.detach().chunk(2)
    bias: Any = linear.bias  # torch's stubs forget that it may be absent
    biases = (None, None) if bias is None else bias.detach().chunk(2)
    return list(zip(weights, biases, strict=True))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def split_gates(network: nn.Module) -> None:
    """Put `_SplitGEGLU` in place of every GEGLU of a network; of a cut's full pass, so of the U-Net it is made from."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is GEGLU:
                setattr(parent, name, _SplitGEGLU(child))


def largest_activation(module: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """The largest magnitude that any layer puts out for one dict of inputs: what a dtype must be able to hold."""
    largest = 0.0

    def note(layer: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, float(output.abs().max()))

    hooks = [layer.register_forward_hook(note) for layer in module.modules()]
    try:
        with torch.no_grad():
            module(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return largest
