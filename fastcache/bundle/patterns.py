"""A bundle's named passes and its blocks -> every pass that it can run, patterns of blocks among them.

b blocks have 2^b patterns, so what one of them runs, takes and stores is worked out when it is asked for.
Knows names only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fastcache.cut.chain import run_order
from fastcache.cut.names import FULL, pattern_of

if TYPE_CHECKING:
    from fastcache.bundle.manifest import BlockEntry, EngineEntry, PassEntry


class Passes(Mapping[str, "PassEntry"]):
    """A bundle's passes by name. Iterating gives the named ones; a pattern of blocks is found by its name."""

    def __init__(
        self,
        named: Mapping[str, PassEntry],
        engines: Mapping[str, EngineEntry],
        chain: Sequence[str],
        blocks: Sequence[BlockEntry],
    ) -> None:
        self._named, self._engines, self._chain, self._blocks = named, engines, chain, blocks
        self._patterns: dict[str, PassEntry] = {}

    def __getitem__(self, name: str) -> PassEntry:
        if name in self._named:
            return self._named[name]
        if name not in self._patterns:
            pattern = pattern_of(name, len(self._blocks))
            if pattern is None or not pattern:
                raise KeyError(name)
            self._patterns[name] = self._entry(pattern)
        return self._patterns[name]

    def __contains__(self, name: object) -> bool:
        if name in self._named:
            return True
        blocks = len(self._blocks)
        return isinstance(name, str) and bool(blocks) and pattern_of(name, blocks) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def _entry(self, runs: Sequence[bool]) -> PassEntry:
        full = self._named[FULL]
        reused = tuple(block.residual for block, run in zip(self._blocks, runs, strict=True) if not run)
        left_out = sum(block.multiply_adds for block in self._blocks if block.residual in reused)
        return full.model_copy(
            update={
                "engines": chain_pass(self._engines, self._chain, reused) if self._chain else full.engines,
                "runs": () if self._chain else tuple(runs),
                "takes": reused,
                "stores": tuple(name for name in full.stores if name not in reused),
                "multiply_adds": full.multiply_adds - left_out,
            }
        )


def chain_pass(engines: Mapping[str, EngineEntry], chain: Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
    """The engines of a chain that `noise_pred` needs where some features are given, in turn."""
    links = [
        (role, [spec.name for spec in engines[role].inputs], [spec.name for spec in engines[role].outputs])
        for role in chain
    ]
    return tuple(run_order(links, given))
