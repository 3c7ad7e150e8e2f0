"""What computes the passes of a live pipeline's U-Net, in PyTorch or by engines, and what it is told of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastcache.helper.arguments import Arguments


@dataclass(frozen=True)
class UNetCall:
    """One call of a run: its step and the U-Net's arguments, `halved` to their conditional half where guidance is off.

    `sigmas` are the noise levels of the run's calls, where a forecast needs them.
    """

    step: int
    arguments: Arguments
    halved: bool = False
    sigmas: tuple[float, ...] | None = None


class PassRunner(Protocol):
    """The passes over one U-Net, by name, with the features that they store and take."""

    def refresh(self) -> None:
        """A run begins, or something changed: what is stored does not count, and the U-Net may have other parts."""
        ...

    def serves(self, name: str, halved: bool) -> bool:
        """Whether what is stored is what a pass takes."""
        ...

    def halve(self) -> bool:
        """Keep the conditional half of what is stored, for smaller calls from now on; False where that cannot be."""
        ...

    def run(self, name: str, call: UNetCall) -> Tensor:
        """A pass's noise prediction; what it stores is kept."""
        ...
