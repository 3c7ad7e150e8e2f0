"""What a U-Net of blocks runs where some of what lies between its pieces is given. Pure Python; knows names only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

ADJUSTMENT: Final = "scale_shift"  # by channel, what residuals are multiplied by, and what is added to them then
RUNS: Final = "runs"  # 1 for each block that an engine with conditions runs, 0 for the others; in every row the same
_KEPT: Final = "kept."

P = TypeVar("P")


def run_order(pieces: Iterable[tuple[P, Sequence[str], Sequence[str]]], given: Sequence[str]) -> list[P]:
    """Of pieces, each with what it takes and gives, in turn, those that `noise_pred` needs where values are given."""
    needed, found = {"noise_pred"}, list[P]()
    for piece, takes, gives in reversed([*pieces]):
        if needed.intersection(gives):
            found.append(piece)
            needed = needed.difference(gives) | set(takes).difference(given)
    return found[::-1]


def neutral(rows: int, channels: int) -> Tensor:
    """A scale and a shift that change nothing. Shapes: (rows, 2, channels)."""
    import torch

    return torch.tensor([1.0, 0.0])[None, :, None].repeat(rows, 1, channels)


def residual(block: int) -> str:
    """The name of what a block adds to its input."""
    return f"residual_{block}"


def kept(name: str) -> str:
    """By what name an engine with conditions takes a residual, to reuse it."""
    return f"{_KEPT}{name}"


def kept_name(name: str) -> str | None:
    """The residual that is taken by a name; None for an input that is none."""
    return name.removeprefix(_KEPT) if name.startswith(_KEPT) else None


def kept_in(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """For each of the names by which residuals are taken the tensor that they are given in: there they stay."""
    return {name: tensors[residual] for name in names if (residual := kept_name(name)) is not None}
