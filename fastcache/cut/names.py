"""What cuts and their passes are called: a full or shallow pass, or a pattern of blocks <-> its name. Pure Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Literal

from fastcache.expect import at_least, expected

CutKind = Literal["plain", "projected"]
CutWish = Literal["auto", "plain", "projected"]  # `auto` is projected where that is possible
BlockKind = Literal["transformer", "resnet"]  # whose residual branch may be reused

FULL: Final = "full"  # the pass that runs the whole U-Net and stores every feature

_SHALLOW: Final = re.compile(r"shallow-(0|[1-9][0-9]*)")
_PATTERN: Final = re.compile(r"blocks-([01]+)")


def shallow_pass(branch_id: int) -> str:
    """The name of the pass that runs what lies above the cut at a branch id. Raises: `ValueError` for no branch id."""
    return f"shallow-{at_least(0, branch_id=branch_id)}"


def branch_of(name: str) -> int | None:
    """The branch id of a shallow pass, None of the full one.

    Raises: `ValueError` for a pass that is neither.
    """
    if name == FULL:
        return None
    found = _SHALLOW.fullmatch(name)
    if found is None:
        raise expected("a full or shallow pass", name, "ask for the passes by their names")
    return int(found[1])


def pattern_pass(runs: Sequence[bool]) -> str:
    """The name of the pass that runs these blocks, in the order of the U-Net, and reuses the residual of the others."""
    return FULL if all(runs) else "blocks-" + "".join("1" if one else "0" for one in runs)


def is_pattern(name: str) -> bool:
    """Whether a pass is a pattern of blocks, all of which goes down the whole U-Net."""
    return _PATTERN.fullmatch(name) is not None


def pattern_of(name: str, blocks: int) -> tuple[bool, ...] | None:
    """Which of a U-Net's blocks a pass runs, by its name; None of a pass that is no pattern of so many blocks."""
    if name == FULL:
        return (True,) * blocks
    found = _PATTERN.fullmatch(name)
    return tuple(one == "1" for one in found[1]) if found is not None and len(found[1]) == blocks else None
