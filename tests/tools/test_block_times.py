"""Which blocks are reused where a share of them is, by the tool that times it."""

from __future__ import annotations

import block_times


def test_reused_blocks_are_spread_evenly() -> None:
    assert block_times.evenly(0, 4) == (True,) * 4
    assert block_times.evenly(1 / 2, 4) == (True, False, True, False)
    assert block_times.evenly(1, 4) == (False,) * 4
