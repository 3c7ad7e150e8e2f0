"""What a graph takes and gives, by name -> whether tensors, or another's word on it, fit.

Knows names, dtypes and sizes; knows nothing about engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output: its name, its torch dtype by name, and its shape, symbols for free sizes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def shape_at(self, sizes: Mapping[str, int]) -> list[int]:
        """The shape with its free sizes looked up by name; `height/8` is an eighth of `height`."""
        parts = [size if isinstance(size, int) else size.partition("/") for size in self.shape]
        return [part if isinstance(part, int) else sizes[part[0]] // int(part[2] or 1) for part in parts]

    def sizes_in(self, shape: Sequence[int]) -> dict[str, int]:
        """What the free sizes are in a tensor of this shape. Raises: `ValueError` for one of other axes."""
        named = [
            (size, own.partition("/")) for size, own in zip(shape, self.shape, strict=True) if isinstance(own, str)
        ]
        return {name: size * int(divisor or 1) for size, (name, _, divisor) in named}


def free_size(name: str, axis: int) -> str:
    """What a free size is called where the engine file does not keep its name: the batch, or one of its own."""
    return "batch" if axis == 0 else f"{name}[{axis}]"


def agreed(file: str, found: Sequence[TensorSpec], told: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """What a caller says of a file's tensors, where it says something: names of sizes that the file need not keep.

    Raises: `ValueError` where the file has other tensors.
    """
    if not told:
        return tuple(found)
    own = {spec.name: spec for spec in found}
    for spec in told:
        has = own.pop(spec.name, None)
        if has is None or not _alike(spec, has):
            raise ValueError(
                f"expected {file} to have {spec.name!r} of {spec.dtype} {list(spec.shape)}, got "
                f"{'none' if has is None else f'{has.dtype} {list(has.shape)}'}; build it again"
            )
    if own:
        names = ", ".join(spec.name for spec in told)
        raise ValueError(f"expected {file} to have {names}, got {', '.join(own)} besides; build it again")
    return tuple(told)


def _alike(one: TensorSpec, other: TensorSpec) -> bool:
    """Whether two descriptions may be of one tensor: sizes that both know are equal."""
    if one.dtype != other.dtype or len(one.shape) != len(other.shape):
        return False
    pairs = zip(one.shape, other.shape, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def check_tensors(specs: Sequence[TensorSpec], tensors: Mapping[str, Tensor], device: torch.device | str) -> None:
    """Raise `ValueError` unless `tensors` holds a contiguous tensor of the right kind for every spec.

    `device` may name one of several, as in `cuda:1`; then no other will do.
    """
    sizes: dict[str, int] = {}
    for spec in specs:
        tensor = tensors.get(spec.name)
        if tensor is None:
            raise ValueError(
                f"expected a tensor named {spec.name!r} to bind, got {', '.join(sorted(tensors)) or 'none'}"
            )
        fits = len(tensor.shape) == len(spec.shape) and all(
            size == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size))
            for size, wanted in zip(tensor.shape, spec.shape, strict=True)
        )
        dtype, place, contiguous = str(tensor.dtype).removeprefix("torch."), str(tensor.device), tensor.is_contiguous()
        there = str(device) in (place, tensor.device.type)
        if not fits or dtype != spec.dtype or not there or not contiguous:
            raise ValueError(
                f"expected {spec.name!r} to be contiguous {spec.dtype} {list(spec.shape)} on {device}, got "
                f"{'' if contiguous else 'non-contiguous '}{dtype} {list(tensor.shape)} on {place}"
            )
