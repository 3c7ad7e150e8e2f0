"""What a chain of pieces runs where some of what lies between them is given. Pure Python; knows names only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

ADJUSTMENT: Final = "scale_shift"  # by channel, what residuals are multiplied by, and what is added to them then

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
