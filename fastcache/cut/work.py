"""A U-Net and what it is called with -> the multiply-adds of its full pass and of a shallow one at each branch.

Everything runs on torch's meta device: no weights are needed and nothing is computed. Knows nothing about steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastcache.cut.partition import FullUNet, partition_unet
from fastcache.cut.pieces import Block, BlockUNet

_LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Work:
    """The multiply-adds of one call for one sample: those of convolutions and linear layers, and those of attention.

    Attention is the product of queries with keys and that of weights with values; its linear layers are `layers`. The
    DeepCache paper's counter sees `layers` alone, for it hooks modules.
    """

    layers: int
    attention: int

    @property
    def total(self) -> int:
        return self.layers + self.attention


@dataclass(frozen=True)
class UNetWork:
    """The work of a U-Net's full pass, and of a shallow one by branch id."""

    full: Work
    shallow: tuple[Work, ...]


def uniform_cost(full: float, shallow: float, num_calls: int, interval: int) -> float:
    """What a U-Net call costs on average where every `interval`th is full and the others are shallow."""
    refreshes = -(-num_calls // interval)
    return (refreshes * full + (num_calls - refreshes) * shallow) / num_calls


def empty_unet(kind: type[Any], config: Mapping[str, Any]) -> Any:
    """A U-Net of a class and a configuration with no memory behind its weights."""
    with torch.device("meta"):
        unet = kind.from_config(dict(config))
    # Some parameters, SVD's mixing factors among them, are made where the context does not reach.
    return unet.eval().requires_grad_(False).to("meta")


def count_work(unet: nn.Module, call: Callable[[nn.Module], object]) -> UNetWork:
    """Count what a U-Net on the meta device does; `call` calls it, or its full pass, with meta tensors of one sample.

    Raises: `PartitionError` for a U-Net that cannot be cut.
    Source: `torch.utils.flop_counter`, which counts two operations for each multiply-add.
    """
    cut = partition_unet(unet)
    layers, total = _count_parts(cut.full, call)
    last = cut.num_branches - 1

    def work(parts: list[str]) -> Work:
        in_layers = sum(layers[part] for part in parts)
        return Work(in_layers, sum(total[part] for part in parts) - in_layers)

    def shallow(branch_id: int) -> Work:
        down = [f"down.{k}" for k in range(branch_id)]
        return work(["embeddings", "conv_in", "head", *down, *(f"up.{last - k}" for k in range(branch_id + 1))])

    return UNetWork(work(list(total)), tuple(shallow(branch_id) for branch_id in range(cut.num_branches)))


def count_blocks(chain: BlockUNet, call: Callable[[nn.Module], object]) -> tuple[int, ...]:
    """The multiply-adds of each block of a chain on the meta device, as `count_work` counts those of a pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(chain)
    found = counter.get_flop_counts()
    places = [index for index, piece in enumerate(chain.pieces) if isinstance(piece, Block)]
    return tuple(sum(found[f"{type(chain).__name__}.chain.{index}"].values()) // 2 for index in places)


def _count_parts(full: FullUNet, call: Callable[[nn.Module], object]) -> tuple[Counter[str], Counter[str]]:
    """What each part of a full pass does: in convolutions and linear layers, and in all."""
    layers: Counter[str] = Counter()

    def counting(part: str) -> Any:
        def note(layer: Any, arguments: Any, output: Tensor) -> None:
            layers[part] += output.numel() * layer.weight[0].numel()  # an output is a product with a row or a filter

        return note

    found = [(name, module) for name, module in full.named_modules() if isinstance(module, _LAYERS)]
    hooks = [module.register_forward_hook(counting(_part(name))) for name, module in found]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(full)
    finally:
        for hook in hooks:
            hook.remove()
    # By operator the two cannot be told apart: a linear layer of a transposed input is a `bmm`, as attention is.
    total: Counter[str] = Counter()
    for name, operations in counter.get_flop_counts().items():
        inner = name.removeprefix(f"{type(full).__name__}.")
        if inner != name and inner == _part(inner):
            total[inner] = sum(operations.values()) // 2
    return layers, total


def _part(name: str) -> str:
    """The part of a full pass that a module is in: `down.3`, `up.0`, `head`."""
    first, *others = name.split(".")
    return f"{first}.{others[0]}" if first in ("down", "up") and others else first
