"""tools/findings.py: its local search, what is drawn together, and the chart over times."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import findings
import findings_tables
from PIL import Image
from typer.testing import CliRunner

from fastcache import CachePlan


def test_local_search_improves_and_keeps_the_number() -> None:
    wanted = (0, 4, 5, 17)

    def score(steps: tuple[int, ...]) -> float:
        return float(sum(abs(a - b) for a, b in zip(steps, wanted, strict=True)))

    assert findings.local_search((0, 10, 12, 14), 20, score, moves=400) == wanted
    assert findings.local_search((0,), 20, lambda _: 0.0, moves=5) == (0,)
    assert findings.local_search((0, 1, 2), 3, lambda _: 0.0, moves=5) == (0, 1, 2)


def test_plans_of_three_dtypes_are_drawn_beside_each_other(tmp_path: Path) -> None:
    """Each with the engines that it was made for; without all of them the experiment is not there."""
    findings.write_plans(tmp_path / "plans.json", {f"{k}-{n}": CachePlan.all_full(3) for k, n in uniform_and_optimal()})
    for setting in findings.DTYPES.values():
        plans = {name: CachePlan.all_full(3) for name in ("fitted-7", "ddim-7", "euler-7")}
        findings.write_plans(tmp_path / f"{setting}.json", plans)
    found = findings.experiments(tmp_path)
    drawn = [(engines, [*plans]) for engines, plans in found["dtypes"].items()]
    assert drawn == [(dtype, ["fitted-7", "ddim-7"]) for dtype in ("fp32", "bf16", "int8")]
    assert [*found["fitted-int8"]] == ["int8"]
    (tmp_path / "fitted-int8.json").unlink()
    assert "dtypes" not in findings.experiments(tmp_path)
    refused = CliRunner().invoke(findings.app, ["draw", "--experiment", "dtypes", "--results", str(tmp_path)])
    assert refused.exit_code == 2
    assert "got 'dtypes'" in refused.stderr


def uniform_and_optimal() -> Iterable[tuple[str, int]]:
    return itertools.product(("uniform", "optimal"), findings.INTERVALS)


def test_a_chart_of_times_is_drawn(tmp_path: Path) -> None:
    psnr = {"value": 40.0, "low": 39.0, "high": 41.5}
    arms = ("fp32 uncached", "fp32 fitted-7", "fp32 fitted-10", "int8 ddim-7")
    rows = {name: {"means": {"psnr_db": psnr}, "loop_ms": 80.0 + k} for k, name in enumerate(arms)}
    findings_tables.draw_times(rows, 8, "two pictures", tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart:
        drawn = {colour for _, colour in chart.convert("RGB").getcolors(1 << 24) or ()}
    blue, orange, green = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E), (0x2C, 0xA0, 0x2C)
    assert {blue, orange} <= drawn  # a colour a dtype
    assert green not in drawn
