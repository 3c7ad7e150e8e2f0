"""The demo's pictures, rows and grid over the tiny bundle; the figures' own arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastcache.bench.demo import PROMPTS, report, run_demo
from fastcache.bundle.bundle import Bundle
from fastcache.evaluate.quality import psnr_db
from fastcache.pipeline.pipeline import FastCachePipeline


def test_rows_pictures_and_grid(tiny_bundle: Bundle, tmp_path: Path) -> None:
    pipe = FastCachePipeline(tiny_bundle)
    rows = run_demo(pipe, [2, 3], 6, tmp_path, lambda _: None, rounds=1)
    assert [row.interval for row in rows] == [1, 2, 3]
    assert rows[0].speedup_vs_uncached == 1
    assert rows[0].psnr_db is None
    assert all(row.psnr_db is not None and math.isfinite(row.psnr_db) for row in rows[1:])
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"grid.png"} | {f"{n}-{k}.png" for n in ("uncached", "N2", "N3") for k in range(len(PROMPTS))}
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 4 * 160
        assert grid.height > 3 * 160
    document = report(pipe, rows, 6)
    assert set(document["rows"][0]) == {"plan", "interval", "time_ms", "speedup_vs_uncached", "psnr_db"}
    assert document["engines"] == str(tiny_bundle.path)


def test_psnr() -> None:
    image = torch.zeros(1, 3, 4, 4)
    assert psnr_db(image, image) == math.inf
    assert psnr_db(image + 0.1, image) == pytest.approx(20.0, abs=1e-4)
