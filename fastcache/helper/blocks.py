"""A live U-Net -> its passes as a chain of pieces on its own submodules: patterns of blocks, and shallow passes too."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastcache.cut.names import BlockKind, branch_of, is_pattern, pattern_of
from fastcache.cut.pieces import BlockUNet, feature, partition_blocks
from fastcache.helper.features import Features
from fastcache.helper.passes import UNetCall
from fastcache.loop.adjustment import ScaleShift
from fastcache.loop.plan import Forecast

_KINDS: tuple[tuple[BlockKind, ...], ...] = (("transformer",), ("resnet",), ("transformer", "resnet"))


class EagerBlocks:
    """The passes named, patterns of blocks among them, by the scales and shifts of their plan.

    Raises: `PartitionError` for a U-Net that cannot be taken apart; `ValueError` for patterns of other blocks than it
    has, or scales and shifts of other channels.
    """

    def __init__(
        self, unet: nn.Module, names: Iterable[str], forecast: Forecast | None, scale_shift: ScaleShift | None
    ) -> None:
        self._unet, self._names = unet, list(names)
        self._features, self._scale_shift = Features(forecast), scale_shift
        self.refresh()

    def refresh(self) -> None:
        self._features.clear()
        patterns = [name for name in self._names if is_pattern(name)]
        branches = [branch for name in self._names if not is_pattern(name) and (branch := branch_of(name)) is not None]
        self._chain = _chain_of(self._unet, patterns, tuple(branches) or (0,))
        self._taken: dict[str, tuple[str, ...]] = {name: self._takes(name, branches) for name in self._names}
        if self._scale_shift is not None and self._scale_shift.channels != self._chain.channels:
            raise ValueError(
                f"expected a scale and shift for {self._chain.channels} channels, those of the U-Net's blocks, got "
                f"them for {self._scale_shift.channels}; make the plan for this model"
            )

    def _takes(self, name: str, branches: list[int]) -> tuple[str, ...]:
        runs = pattern_of(name, len(self._chain.blocks))
        if runs is None:
            return (feature(int(branch_of(name) or 0), branches[0]),)
        blocks = zip(self._chain.blocks, runs, strict=True)
        return tuple(given for block, run in blocks if not run for given in block.gives)

    def serves(self, name: str, halved: bool) -> bool:
        return all(self._features.serves(taken, halved) for taken in self._taken[name])

    def halve(self) -> bool:
        self._features.halve()
        return True

    def run(self, name: str, call: UNetCall) -> Tensor:
        at = self._features.at
        reuse = {taken: at(taken, call.step, call.halved, call.sigmas) for taken in self._taken[name]}
        adjusted = None
        if self._scale_shift is not None and reuse:
            sample: Tensor = call.arguments["sample"]
            row = torch.from_numpy(self._scale_shift.table[call.step].copy()).to(sample.device)
            adjusted = row.expand(len(sample), *row.shape)
        noise_pred, stored = self._chain(**call.arguments, reuse=reuse, scale_shift=adjusted)
        self._features.store(call.step, stored, call.halved)
        return noise_pred


def _chain_of(unet: nn.Module, patterns: list[str], branch_ids: tuple[int, ...]) -> BlockUNet:
    """The U-Net with those kinds of blocks that the patterns have as many of."""
    counts = list[str]()
    for kinds in _KINDS:
        chain = partition_blocks(unet, kinds, branch_ids)
        if all(pattern_of(name, len(chain.blocks)) for name in patterns):
            return chain
        counts.append(f"{len(chain.blocks)} ({' and '.join(kinds)})")
    raise ValueError(
        f"expected patterns of as many blocks as the U-Net has, {', '.join(counts)}, got {patterns[0]}; "
        "make the plan for this model"
    )
