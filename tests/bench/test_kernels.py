"""`bench --kernels`: its arms compute the same; its shapes, bytes and figures; and its line without a GPU."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastcache.bench.kernels import KernelResult, bench_kernels, kernel_cases, kernel_table, summarise
from fastcache.cli import app
from fastcache.errors import BackendUnavailable

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.mark.parametrize("branch_id", [0, 3])
def test_a_kernel_and_its_rival_compute_the_same(branch_id: int) -> None:
    cases = kernel_cases(1, "fp32", "cpu", branch_id, sizes=(128,))
    assert len({case.kernel for case in cases}) == (3 if branch_id == 0 else 2)  # branch 3 cannot be projected
    for case in cases:
        for got, expected in zip(case.run(), case.eager(), strict=True):
            assert expected.float().abs().sum() > 0
            torch.testing.assert_close(got.float(), expected.float(), rtol=1e-5, atol=1e-5)


def test_shapes_and_bytes_are_those_of_the_models() -> None:
    cases = {(case.kernel, case.models[0]): case for case in kernel_cases(2, "fp16", "cpu", sizes=(64, 128))}
    rows, values = 4, 320 * 16 * 16  # a guided pair for each image; a half of the norm of either model, at 128
    joined = cases["concat_groupnorm_silu", "sd15 128"]
    assert joined.models == ["sd15 128", "sdxl 128"]  # both have 320 channels at either side of their shallowest joint
    assert joined.shape == (rows, 640, 16, 16)
    parameters = 2 * 640 * 2
    assert (
        joined.num_bytes == 3 * rows * 2 * values * 2 + parameters
    )  # both halves read, the concat and its norm written
    fresh = cases["groupnorm_silu", "sd15 128"]
    assert fresh.num_bytes == 2 * rows * values * 2 + parameters // 2
    latents = 2 * 4 * 16 * 16
    guidance = cases["guidance_step", "sd15 128"]
    assert guidance.num_bytes == 2 * 2 * latents * 2 + 5 * 4 * latents + 4 * 4  # timesteps, four of four bytes
    assert len(cases) == 2 * 3


def test_figures_follow_from_the_medians() -> None:
    case = next(case for case in kernel_cases(1, "fp16", "cpu", sizes=(64,)) if case.kernel == "groupnorm_silu")
    times = {"kernel": [2.0, 4.0, 90.0], "eager": [8.0, 6.0, 10.0], "compile": [5.0, 6.0, 7.0], "copy": [3.0, 3.0, 1.0]}
    result = summarise(case, times)
    assert (result.kernel_us, result.eager_us, result.compile_us, result.copy_us) == (4.0, 8.0, 6.0, 3.0)
    assert (result.share_of_copy, result.speedup_vs_eager, result.speedup_vs_compile) == (0.75, 2.0, 1.5)
    assert math.isclose(result.gb_per_s, case.num_bytes / 4e-6 / 1e9, abs_tol=0.05)
    del times["compile"]
    lacking = summarise(case, times, "RuntimeError: no compiler")
    assert lacking.compile_us is lacking.speedup_vs_compile is None
    again = KernelResult(**json.loads(json.dumps(asdict(lacking))))  # as it is shown from a file
    title, columns, rows = kernel_table({"dtype": "fp16", "batch": 1, "branch_id": 0}, [result, again])
    assert "fp16, batch 1" in title
    assert [len(row) for row in rows] == [len(columns)] * 2
    assert rows[0][-3:] == ["75%", "2.00x", "1.50x"]
    assert rows[1][-3:] == ["75%", "2.00x", "-"]


@needs_no_gpu
def test_without_a_gpu_it_says_in_one_line_what_it_needs(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "--kernels", "--json", str(tmp_path / "kernels.json")])
    assert isinstance(result.exception, BackendUnavailable)  # exit code 3
    assert str(result.exception).startswith("expected a CUDA GPU that this build of PyTorch sees")
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "kernels.json").exists()


def test_kernels_are_timed_apart_from_arms() -> None:
    result = CliRunner().invoke(app, ["bench", "--kernels", "--model", "demo"])
    assert isinstance(result.exception, ValueError)
    assert "expected --kernels without" in str(result.exception)


@pytest.mark.gpu
def test_every_kernel_is_timed() -> None:
    document, rows = bench_kernels(1, "fp16", 1, 0, lambda message: None)
    assert {row.kernel for row in rows} >= {"concat_groupnorm_silu", "groupnorm_silu", "guidance_step"}
    assert len(document["kernels"]) == len(rows) == 6
    for row in rows:
        assert row.kernel_us > 0
        assert 0 < row.share_of_copy < 3
        assert (row.compile_us is None) == (row.compile_skipped is not None)
