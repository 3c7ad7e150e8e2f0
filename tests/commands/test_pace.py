"""How far work is, and how long the rest takes, by messages at made-up times."""

from __future__ import annotations

import pytest

from fastcache.commands.options import BUILD_SHARES
from fastcache.pace import Pace, counted


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("round 2 of 5", (1, 5)),
        ("drawing pictures 9 to 16 of 32 with 3 plans", (8, 32)),
        ("searching: point 50 of 50, 8 routes", (49, 50)),
        ("3 of 5: 000003", (3, 5)),
        ("exporting full and shallow U-Nets, branch 0 of 12", None),
        ("loading demo", None),
    ],
)
def test_messages_that_count(message: str, found: tuple[int, int] | None) -> None:
    assert counted(message) == found


def test_the_rest_takes_as_long_as_what_was() -> None:
    pace = Pace()
    pace.hear("round 1 of 5", now=10)
    assert pace.left_s(10) is None
    pace.hear("round 2 of 5", now=20)
    assert pace.share == pytest.approx(0.2)
    assert pace.left_s(20) == pytest.approx(40)
    assert pace.left_s(25) == pytest.approx(35)  # between two messages it counts down
    assert pace.left_s(99) == 0


def test_other_work_begins_anew() -> None:
    pace = Pace()
    for part in range(1, 4):
        pace.hear(f"round {part} of 3", now=10.0 * part)
    pace.hear("drawing pictures 1 to 8 of 16", now=50)
    assert (pace.share, pace.left_s(50)) == (0, None)
    pace.hear("drawing pictures 9 to 16 of 16", now=54)
    assert pace.left_s(54) == pytest.approx(4)


def test_what_is_over_at_once_has_no_time_left() -> None:
    pace = Pace()
    pace.hear("1 of 9: a", now=0.0)
    pace.hear("2 of 9: b", now=0.1)
    assert pace.left_s(0.1) is None


def test_a_build_is_told_by_its_stages() -> None:
    pace = Pace(BUILD_SHARES)
    stages = ("starting: ...", "backend x: ...", "loading m", "exporting full and shallow U-Nets, branch 0 of 12")
    for now, message in enumerate(stages):
        pace.hear(message, now=10.0 * now)
    assert pace.share == BUILD_SHARES["exporting full"]
    assert pace.left_s(30) == pytest.approx(30 * (1 - 0.26) / 0.26)
    pace.hear("something that no list has", now=40)
    assert pace.share == BUILD_SHARES["exporting full"]
    assert list(BUILD_SHARES.values()) == sorted(BUILD_SHARES.values())
