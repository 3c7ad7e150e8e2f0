"""`bench --sweep`: the table's arms, ceilings and published figures, its flags, and a whole one of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastcache.bench.arms import BenchSettings
from fastcache.bench.bench import ArmResult
from fastcache.bench.lineup import line_up_arms
from fastcache.bench.sweep import arms_of, rows_of
from fastcache.cli import main

SETTINGS = BenchSettings("sd21", True, "cpu", 3, 0, 50, 512, 512, 1, "ddim", "fp32", 1, 1, 2)


def test_the_table_sets_ceilings_and_published_figures_beside_the_measured() -> None:
    arms = line_up_arms(arms_of(SETTINGS, "onnxruntime"), "cpu").arms
    assert len({arm.name for arm in arms}) == len(arms) == 8
    results = [
        ArmResult(
            arm.name,
            arm.backend,
            arm.dtype,
            arm.cache_interval,
            arm.branch_id,
            loop_ms_p50=1e3 / arm.cache_interval / (2 if arm.is_engine else 1),
            speedup_vs_eager=1.0,
        )
        for arm in arms
    ]
    *rows, skipped = rows_of(SETTINGS, [*results, ArmResult("engine:openvino", skipped="not installed")])
    assert skipped == {"size": 512, "batch": 1, "arm": "engine:openvino", "skipped": "not installed"}
    cached = {(r["cache_interval"], r["branch_id"]): r for r in rows if r["arm"].startswith("deepcache")}
    assert {key: row["published"] for key, row in cached.items()} == {(3, 0): 2.33, (5, 0): 3.24, (5, 1): 2.35}
    for row in cached.values():  # nobody's figure is above what the multiply-adds allow
        assert row["published"] < row["ceiling_vs_uncached"] < row["cache_interval"]
    for row in rows:
        assert row["speedup_vs_uncached"] == pytest.approx(row["cache_interval"], rel=1e-3)
        assert row["ceiling_vs_uncached"] == 1 or row["cache_interval"] > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model demo --batch 2", "expected --sweep without --batch, got both; leave one out"),
        ("--engines .", "expected --sweep without --engines, got both; leave one out"),
        ("", "expected --sweep with --model, for its sizes are built one after another, got none"),
        ("--model demo --sizes 64,x", "expected --sizes as whole numbers from 1 to 8192 by commas"),
        ("--model demo --sizes 64,63", "expected a height and width divisible by 4, got (63, 63)"),
        ("--model demo --kernels", "expected --kernels without --model, got both; leave one out"),
        ("--model demo --batches 0", "expected --batches as whole numbers from 1 to 8192 by commas"),
    ],
)
def test_what_a_sweep_says_itself(
    flags: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fastcache", "bench", "--sweep", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_sizes_are_those_of_a_sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["fastcache", "bench", "--model", "demo", "--sizes", "64"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "expected --sizes only with --sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_of_a_tiny_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"bench --sweep --model {tiny_model} --sizes 32 --batches 1,2 --steps 3 --repeats 1 --backend onnxruntime"
    monkeypatch.setattr("sys.argv", ["fastcache", *words.split(), "--json", str(tmp_path / "table.json")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (None, 0)
    table = json.loads((tmp_path / "table.json").read_text())["table"]
    assert [(row["size"], row["batch"]) for row in table] == [(32, batch) for batch in (1, 2) for _ in range(8)]
    assert all(row["loop_ms_p50"] > 0 for row in table)
    assert "at most" in capsys.readouterr().out
