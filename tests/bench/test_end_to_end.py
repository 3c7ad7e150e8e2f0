"""Prompt to PNG in processes of their own: every part has its time, and together they are all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastcache import Bundle, CachePlan
from fastcache.bench import end_to_end
from fastcache.bench.arms import Defaults, parse_arm
from fastcache.bench.end_to_end import PARTS
from fastcache.bench.lineup import Lineup, by_plans


def test_a_model_without_all_its_parts_is_refused(command: Callable[..., Any]) -> None:
    said = command("bench", "--model", "ddpm256", "--random-weights", "--end-to-end", "--arms", "eager", "--steps", "1")
    assert said.code == 2
    assert "expected a model with unet, vae and text, and --batch 1, for --end-to-end" in said.err


def test_a_chart_is_refused(command: Callable[..., Any]) -> None:
    said = command("bench", "--model", "demo", "--end-to-end", "--chart", "speed.png")
    assert said.code == 2
    assert "expected --end-to-end without --chart" in said.err


def test_all_is_compared_with_eager_in_fp32_wherever_it_stands() -> None:
    arms = [parse_arm(name, Defaults()) for name in ("deepcache", "eager:bf16", "eager")]
    assert end_to_end._eager(arms) == arms[2]
    assert end_to_end._eager(arms[:2]) == arms[1]
    assert end_to_end._eager(arms[:1]) is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--plan", "swift.json"), "expected --plan only with --end-to-end"),
        (("--end-to-end", "--plan", "none.json"), "expected a plan file, got none.json"),
        (("--end-to-end", "--plan", "swift.json", "--arms", "eager"), "expected an arm engine+cache"),
    ],
)
def test_a_plan_that_nothing_would_draw_by_is_refused(
    flags: tuple[str, ...],
    expected: str,
    tiny_bundle: Bundle,
    command: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("swift.json").write_text(CachePlan.uniform(2, 2).to_json())
    said = command("bench", "--engines", tiny_bundle.path, *flags)
    assert said.code == 2
    assert expected in said.err


def test_cached_engines_draw_by_each_plan() -> None:
    arms = tuple(parse_arm(name, Defaults("openvino")) for name in ("eager", "deepcache", "engine", "engine+cache"))
    found = by_plans(Lineup(arms, {arms[3]: "no reason"}), [Path("plans/draft.json"), Path("fine.json")])
    assert found.arms[:3] == arms[:3]
    assert [(arm.name, arm.plan) for arm in found.arms[3:]] == [
        ("engine+cache draft", "plans/draft.json"),
        ("engine+cache fine", "fine.json"),
    ]
    assert found.skipped == dict.fromkeys(found.arms[3:], "no reason")


@pytest.mark.slow
def test_a_plan_stands_for_interval_and_steps(tiny_bundle: Bundle, command: Callable[..., Any], tmp_path: Path) -> None:
    """All nine steps in full are eager's picture; nine steps with one of them in full, or three, are not."""
    files = {name: tmp_path / f"{name}.json" for name in ("whole", "swift")}
    for name, plan in (("whole", CachePlan.uniform(9, 1)), ("swift", CachePlan.uniform(3, 1))):
        files[name].write_text(plan.to_json())
    asked = ("--arms", "eager,engine+cache", "--steps", 9, "--cache-interval", 9, "--warmup", 0, "--repeats", 1)
    plans = [part for file in files.values() for part in ("--plan", file)]
    said = command("bench", "--engines", tiny_bundle.path, "--end-to-end", *plans, *asked, "--json", "-")
    assert said.code == 0, said.err
    eager, whole, swift = said.json["arms"]
    assert eager["plan"] is None
    for name, row in (("whole", whole), ("swift", swift)):
        assert (row["name"], row["plan"], row["cache_interval"]) == (f"engine+cache {name}", str(files[name]), None)
    assert whole["psnr_db_vs_eager"] > 50 > swift["psnr_db_vs_eager"]


@pytest.mark.slow
def test_the_parts_add_up(tiny_bundle: Bundle, command: Callable[..., Any]) -> None:
    arms = "eager,deepcache,engine,engine+cache,compile:fp16"
    asked = ("--arms", arms, "--steps", 2, "--warmup", 0, "--repeats", 1, "--cache-interval", 2, "--json", "-")
    said = command("bench", "--engines", tiny_bundle.path, "--end-to-end", *asked)
    assert said.code == 0, said.err
    rows = said.json["arms"]
    assert [row["name"] for row in rows] == arms.split(",")
    for row in rows[:4]:
        assert row["total_ms"] == pytest.approx(sum(row[name] for name in PARTS), abs=0.1)
        assert all(row[name] > 0 for name in PARTS)
    assert rows[0]["psnr_db_vs_eager"] is None
    assert rows[2]["psnr_db_vs_eager"] > 50
    assert rows[3]["psnr_db_vs_eager"] == pytest.approx(rows[1]["psnr_db_vs_eager"], abs=0.5)
