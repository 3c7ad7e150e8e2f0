"""What cuts and their passes are called: a full or shallow pass <-> its name. Pure Python; knows nothing else."""

from __future__ import annotations

import re
from typing import Final, Literal

from fastcache.expect import at_least, expected

CutKind = Literal["plain", "projected"]
CutWish = Literal["auto", "plain", "projected"]  # `auto` is projected where that is possible

FULL: Final = "full"  # the pass that runs the whole U-Net and stores every feature

_SHALLOW: Final = re.compile(r"shallow-(0|[1-9][0-9]*)")


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
