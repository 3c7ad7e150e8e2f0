"""Prompt to PNG in processes of their own: every part has its time, and together they are all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastcache import Bundle
from fastcache.bench import end_to_end
from fastcache.bench.arms import Defaults, parse_arm
from fastcache.bench.end_to_end import PARTS


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
