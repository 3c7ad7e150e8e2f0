"""Benchmarks: the arms' names and which of them run, real runs in their processes, the document, and the chart."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastcache_engines
from fastcache.bench import chart
from fastcache.bench.arms import Arm, BenchSettings, Defaults, parse_arm, parse_arms
from fastcache.bench.bench import ArmResult, _speedups, document, doubts, make_inputs, run_bench, summary
from fastcache.bench.eager import EagerParts
from fastcache.bench.lineup import Wishes, build_bundles, line_up, of_bundle, of_model
from fastcache.bench.loops import CallClock, EngineArms, Task, TimedRun, TorchArms
from fastcache.bench.machine import available_bytes, environment, parse_gpus
from fastcache.bench.work import empty_unet, geometry, unet_work
from fastcache.bench.workers import ArmFailed, Workers, _Worker
from fastcache.bundle.bundle import Bundle
from fastcache.cli import main
from fastcache.compile.models import find_model
from fastcache.errors import BackendUnavailable, PartitionError
from fastcache_engines import Support
from list_recorder import ListRecorder

COMMON: dict[str, Any] = {
    "cache_interval": 2,
    "steps": 4,
    "batch": 1,
    "sampler": "ddim",
    "warmup": 1,
    "repeats": 2,
    "threads": 2,
}
OTHERS = Defaults("openvino", "bf16", 5, 2)


def settings_for(model: object, **changes: Any) -> BenchSettings:
    common: dict[str, Any] = {"random_weights": False, "device": "cpu", "branch_id": 0, "dtype": "fp32"}
    return BenchSettings(**({"model": str(model), "height": 32, "width": 32} | common | COMMON | changes))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eager", ("eager", "torch", "fp32", 1, 2)),
        ("eager:bf16", ("eager", "torch", "bf16", 1, 2)),
        ("deepcache::bf16", ("deepcache", "torch", "bf16", 5, 2)),
        ("engine::fp16", ("engine", "openvino", "fp16", 1, 2)),
        ("deepcache:fp16", ("deepcache", "torch", "fp16", 5, 2)),
        ("compile", ("compile", "torch", "fp32", 1, 2)),
        ("engine", ("engine", "openvino", "bf16", 1, 2)),
        ("engine:fp32", ("engine", "openvino", "fp32", 1, 2)),
        ("engine+cache:onnxruntime", ("engine+cache", "onnxruntime", "bf16", 5, 2)),
        ("engine+cache:tensorrt-rtx:fp16", ("engine+cache", "tensorrt-rtx", "fp16", 5, 2)),
        ("engine:auto:fp16", ("engine", "auto", "fp16", 1, 2)),
        ("engine+graph:tensorrt:fp16", ("engine+graph", "tensorrt", "fp16", 1, 2)),
        ("engine+cache+graph", ("engine+cache+graph", "openvino", "bf16", 5, 2)),
    ],
)
def test_an_arm_is_what_its_name_says(name: str, expected: tuple[object, ...]) -> None:
    arm = parse_arm(name, OTHERS)
    assert (arm.name, arm.meaning) == (name, (*expected, ""))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("warp", "eager, deepcache, compile, engine, engine\\+cache"),
        ("", "KIND\\[:BACKEND\\]\\[:DTYPE\\]"),
        ("engine:speedy", "onnxruntime, openvino"),
        ("engine:fp16:onnxruntime", "left over"),
        ("engine:openvino:fp8", "fp32, fp16, bf16"),
        ("eager:openvino", "fp32, fp16, bf16"),
        ("eager:fp32:fp32", "left over"),
    ],
)
def test_another_name_is_refused_in_one_line(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        parse_arm(name, Defaults())
    assert "\n" not in str(error.value)


def test_arms_come_in_the_order_given_and_once() -> None:
    assert [arm.name for arm in parse_arms("engine, eager,engine", OTHERS)] == ["engine", "eager"]


def test_the_usual_arms_and_every_backend_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    found = line_up(None, Defaults(), "cpu")
    names = [arm.name for arm in found.arms]
    assert names[:7] == ["eager", "deepcache", "compile", "engine", "engine+cache", "eager:bf16", "deepcache:bf16"]
    automatic = found.arms[3]
    assert automatic.backend == fastcache_engines.choose("cpu", "fp32")[0]
    meanings = [arm.meaning for arm in found.arms]
    assert len(set(meanings)) == len(meanings)  # what auto picks is not named twice
    for name in fastcache_engines.BACKENDS:
        module = fastcache_engines.backend(name)
        support, own = module.support("cpu"), [arm for arm in found.arms if arm.backend == name]
        if support.can_build and support.can_run:
            assert {arm.dtype for arm in own} == set(module.CAPABILITIES.dtypes["cpu"]) - {"fp16"}
            assert {arm.kind for arm in own} == {"engine", "engine+cache"}
            assert not any(arm in found.skipped for arm in own)
        else:
            assert [(arm.name, found.skipped[arm]) for arm in own] == [(f"engine:{name}", support.reason)]


def test_without_fast_bf16_nothing_is_tried_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert {arm.dtype for arm in line_up(None, Defaults(), "cpu").arms} == {"fp32"}


def test_what_cannot_run_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    names = "deepcache,engine:tensorrt,engine+cache:onnxruntime:bf16,engine:auto:fp16,engine+cache+graph:inductor"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "DeepCache" else find_spec(name))
    found = line_up(names, Defaults(), "cpu")
    reasons = {arm.name: reason for arm, reason in found.skipped.items()}
    assert "fastcache-diffusion[bench]" in reasons["deepcache"]
    assert reasons["engine:tensorrt"] == fastcache_engines.backend("tensorrt").support("cpu").reason
    assert "bf16" in reasons["engine+cache:onnxruntime:bf16"]
    assert "no backend for fp16" in reasons["engine:auto:fp16"]
    assert reasons["engine+cache+graph:inductor"] == "a CUDA graph runs on a GPU only, not on cpu"


def test_a_bundle_brings_its_own_backend_and_refuses_another(tiny_bundle: Bundle) -> None:
    built = tiny_bundle.manifest
    settings, found, bundles = of_bundle(tiny_bundle.path, Wishes(), COMMON)
    assert [arm.name for arm in found.arms] == ["eager", "deepcache", "compile", "engine", "engine+cache"]
    assert {arm.bundle_key for arm in found.arms if arm.is_engine} == set(bundles)
    assert (settings.height, settings.dtype, settings.device) == (built.height, "fp32", "cpu")
    other = next(name for name in fastcache_engines.BACKENDS if name != built.backend)
    for wishes, says in (
        (Wishes(arms=f"engine:{other}"), "--model"),
        (Wishes(backend=other), f"--backend {built.backend}"),
        (Wishes(height=999), f"--height {built.height}"),
        (Wishes(dtype="bf16"), "--dtype fp32"),
        (Wishes(branch_id=3), "--branch-id 0"),
    ):
        with pytest.raises(ValueError, match=says):
            of_bundle(tiny_bundle.path, wishes, COMMON)


def test_a_graph_arm_draws_what_the_others_draw_and_times_the_loop_alone(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, found, _ = of_bundle(tiny_bundle.path, Wishes(arms="engine+cache,engine+cache+graph"), COMMON)
    plain, graph = found.arms
    assert found.skipped == {graph: "a CUDA graph runs on a GPU only, not on cpu"}
    inputs = make_inputs(find_model(settings.model), settings)
    arms = EngineArms(Task(settings, inputs, "fp32", str(tiny_bundle.path)), str(tiny_bundle.path))
    expected = arms(plain)
    monkeypatch.setattr(arms, "whole", True)
    monkeypatch.setattr(arms.pipe.runtime, "_recorder", ListRecorder(anything=True))
    times = arms(graph)
    torch.testing.assert_close(times.latents, expected.latents, rtol=1e-4, atol=1e-4)
    assert not times.call_ms
    result = summary(graph, [times])
    assert result.loop_ms_p50 is not None
    assert (result.full_step_ms_p50, result.shallow_step_ms_p50, result.overhead_ms_per_step) == (None, None, None)
    task = Task(replace(settings, guided_rows=3), inputs, "fp32", str(tiny_bundle.path), cuda_graph=True)
    with pytest.raises(ValueError, match="got three"):
        EngineArms(task, str(tiny_bundle.path))


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        (Wishes(height=33), "divisible by 4"),
        (Wishes(dtype="fp8"), "fp32, fp16, bf16, int8"),
        (Wishes(device="tpu"), "cpu or cuda"),
        (Wishes(backend="speedy"), "onnxruntime"),
        (Wishes(branch_id=4), "from 0 to 3"),
    ],
)
def test_a_wish_that_does_not_fit_the_model_is_refused(tiny_model: Path, wishes: Wishes, says: str) -> None:
    with pytest.raises((ValueError, PartitionError), match=says):
        of_model(str(tiny_model), False, wishes, COMMON)


def test_a_bundle_that_cannot_be_built_skips_its_own_arms_only(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is the build's own, here of a backend that said it could."""
    module = fastcache_engines.backend("tensorrt")
    monkeypatch.setattr(module, "support", lambda device: Support("1", True, True, "ready"))
    monkeypatch.setattr(module, "CAPABILITIES", replace(module.CAPABILITIES, dtypes={"cpu": ("fp32",)}))
    settings = settings_for(tiny_model)
    found = line_up("eager,engine:tensorrt,engine+cache:tensorrt", Defaults(), "cpu")
    assert not found.skipped
    bundles, found = build_bundles(found, settings, tmp_path, lambda _: None)
    assert not bundles
    assert {arm.name for arm in found.skipped} == {"engine:tensorrt", "engine+cache:tensorrt"}
    assert all(found.skipped.values())


ARMS = (
    "eager",
    "deepcache",
    "engine:onnxruntime",
    "engine+cache:onnxruntime",
    "engine+cache:openvino:bf16",
    "engine:tensorrt",
)


@pytest.fixture(scope="module")
def outcome(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `fastcache bench` leaves of a model that has no engines yet; `chart` is the file of its chart."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["--model", tiny_model, "--arms", ",".join(ARMS), "--cache-interval", 2, "--steps", 4, "--repeats", 2]
    arguments += ["--device", "cpu", "--json", folder / "new" / "bench.json", "--chart", folder / "chart.png"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(sys, "argv", ["fastcache", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return json.loads((folder / "new" / "bench.json").read_text()) | {"chart": folder / "chart.png"}


def ran(outcome: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["name"]: arm for arm in outcome["arms"] if "skipped" not in arm}


@pytest.mark.slow
def test_every_arm_has_its_figures_or_a_reason(outcome: dict[str, Any]) -> None:
    assert tuple(arm["name"] for arm in outcome["arms"]) == ARMS
    skipped = {arm["name"]: arm["skipped"] for arm in outcome["arms"] if "skipped" in arm}
    wanting = [name for name in ("openvino", "tensorrt") if not fastcache_engines.backend(name).support("cpu").can_run]
    assert {name: reason for name, reason in skipped.items() if name.split(":")[1] not in wanting} == {}
    assert skipped["engine:tensorrt"] == fastcache_engines.backend("tensorrt").support("cpu").reason
    arms = ran(outcome)
    for arm in arms.values():
        assert arm["loop_ms_p90"] >= arm["loop_ms_p50"] > arm["full_step_ms_p50"] > 0
        assert arm["overhead_ms_per_step"] > 0
        assert arm["peak_bytes"] > 2**26
        for name, reference in (("speedup_vs_eager", "eager"), ("speedup_vs_deepcache", "deepcache")):
            expected = pytest.approx(arms[reference]["loop_ms_p50"] / arm["loop_ms_p50"], abs=1e-3)
            assert arm[name] == expected
            assert arm[f"{name}_same_dtype"] == (None if arm["dtype"] == "bf16" else expected)
        cached = arm["name"].startswith(("deepcache", "engine+cache"))
        assert (arm["shallow_step_ms_p50"] is not None) == cached
        assert arm["cache_interval"] == (2 if cached else 1)
        assert (arm["build_s"] is not None) == arm["name"].startswith("engine")
        assert arm["backend"] == (arm["name"].split(":")[1] if arm["name"].startswith("engine") else "torch")
        assert arm["dtype"] == ("bf16" if arm["name"].endswith("bf16") else "fp32")


@pytest.mark.slow
def test_pictures_are_compared_with_eager_in_fp32(outcome: dict[str, Any]) -> None:
    psnr = {name: arm["psnr_db_vs_eager"] for name, arm in ran(outcome).items()}
    assert psnr["eager"] is None
    assert psnr["engine:onnxruntime"] > 80
    assert psnr["engine+cache:onnxruntime"] == pytest.approx(psnr["deepcache"], abs=0.5)
    errors = {name: arm["latents_error_vs_eager"] for name, arm in ran(outcome).items()}
    assert errors["engine:onnxruntime"] < 1e-4 < errors["deepcache"]
    assert all(arm["latents_finite"] for arm in ran(outcome).values())


@pytest.mark.slow
def test_the_document_says_under_which_conditions(outcome: dict[str, Any]) -> None:
    settings, versions = outcome["settings"], outcome["environment"]["versions"]
    assert settings["references"] == {"eager": "eager", "deepcache": "deepcache"}
    assert settings["reloads"] == 0
    assert (settings["steps"], settings["height"], settings["device"]) == (4, 32, "cpu")
    built = [(bundle["backend"], bundle["dtype"]) for bundle in settings["bundles"]]
    assert ("onnxruntime", "fp32") in built
    assert all(len(bundle["bundle_sha256"]) == 64 for bundle in settings["bundles"])
    supports = {name: fastcache_engines.backend(name).support("cpu") for name in fastcache_engines.BACKENDS}
    installed = {name for name, support in supports.items() if support.version is not None}
    assert outcome["environment"]["load_average_before"] >= 0
    assert installed | {"torch", "diffusers", "fastcache"} <= set(versions)


@pytest.mark.slow
def test_the_chart_is_a_picture_of_the_arms(outcome: dict[str, Any], tmp_path: Path) -> None:
    with Image.open(outcome["chart"]) as image:
        assert image.format == "PNG"
        assert image.width == 1500
        assert 400 < image.height < 900
        grey = {value for count, value in image.convert("L").getcolors(256) or () if count > 1500}
    assert len(grey) >= 5  # white, and a grey of its own for each kind of arm
    with pytest.raises(ValueError, match="eager"):
        chart.draw_chart(outcome | {"arms": [{"name": "engine", "skipped": "no"}]}, tmp_path / "none.png")


def test_a_chart_that_cannot_be_drawn_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chart.check_chartable("engine, eager:bf16")
    chart.check_chartable(None)
    with pytest.raises(ValueError, match="eager arm"):
        chart.check_chartable("engine,deepcache")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"fastcache-diffusion\[bench\]"):
        chart.check_chartable(None)


def test_no_arm_that_runs_is_an_error_with_the_reasons_in_the_result(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny_model), "--arms", "engine:tensorrt", "--device", "cpu", "--json", "-"]
    monkeypatch.setattr(sys, "argv", ["fastcache", "bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert stop.value.code == 3
    assert json.loads(captured.out)["arms"][0]["skipped"] in captured.err


def results_of(loop_ms: dict[str, list[float]]) -> dict[Arm, ArmResult]:
    latents = torch.zeros(1)
    arms = {parse_arm(name, Defaults()): times for name, times in loop_ms.items()}
    return {arm: summary(arm, [TimedRun(ms, (), (), latents) for ms in times]) for arm, times in arms.items()}


def test_like_is_compared_with_like_and_with_fp32() -> None:
    """A bf16 arm beside DeepCache in fp32 alone would be credited with what bf16 gains on its own."""
    results = results_of(
        {"eager": [12], "eager::bf16": [8], "deepcache": [6], "deepcache::bf16": [4], "engine+cache::bf16": [2]}
    )
    found = _speedups(list(results)[-1], results)
    assert (found["speedup_vs_eager"], found["speedup_vs_eager_same_dtype"]) == (6, 4)
    assert (found["speedup_vs_deepcache"], found["speedup_vs_deepcache_same_dtype"]) == (3, 2)
    alone = results_of({"eager::bf16": [8], "engine": [2]})
    found = _speedups(list(alone)[-1], alone)
    assert (found["speedup_vs_eager"], found["speedup_vs_eager_same_dtype"]) == (4, None)


def test_figures_of_a_busy_machine_or_of_unsteady_rounds_are_doubted() -> None:
    steady, unsteady = results_of({"eager": [10, 10.1, 10.2], "engine": [5, 5.1, 9]}).values()
    assert doubts([steady], 0.1, 2) == doubts([steady], None, 2) == []
    (busy,) = doubts([steady], 1.5, 2)
    assert "the load was 1.5 on 2 cores" in busy
    (spread,) = doubts([steady, unsteady], 0.0, 2)
    assert spread.endswith("marked (?): engine")
    assert (steady.to_json()["unsteady"], unsteady.to_json()["unsteady"]) == (False, True)


def test_pictures_are_decoded_as_diffusers_does_also_where_the_vae_shifts(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shifted"
    shutil.copytree(tiny_model, folder)
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift_factor": 0.5, "scaling_factor": 0.3}))
    model, latents = find_model(str(folder)), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    vae: Any = model.load_vae()
    with torch.no_grad():
        expected = (vae.decode(latents / 0.3 + 0.5).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(EagerParts(model, geometry(model)).decode(latents), expected)


def key_of(arm: Arm) -> str:
    return arm.dtype


@pytest.mark.slow
def test_what_does_not_fit_is_ended_and_loaded_again_and_what_fails_says_why(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory at all: processes take turns; an arm in one that comes back runs once untimed before it is timed."""
    asked, ask = list[str](), _Worker.ask
    monkeypatch.setattr(_Worker, "ask", lambda self, arm: (asked.append(arm.name), ask(self, arm))[1])
    settings = settings_for(tiny_model, steps=2)
    inputs = make_inputs(find_model(str(tiny_model)), settings)
    tasks = {dtype: Task(settings, inputs, dtype, weights_bytes=2**20) for dtype in ("fp32", "bf16")}
    eager, other, good = (parse_arm(name, Defaults()) for name in ("eager", "eager:bf16", "deepcache"))
    with Workers(tasks, key_of, available=lambda: 0) as workers:
        first: Any = workers.run(eager, timed=False)
        assert first.process_bytes >= first.peak_bytes > 2**26
        with pytest.raises(ArmFailed, match="ZeroDivisionError"):
            workers.run(replace(good, cache_interval=0), timed=False)
        assert torch.equal(first.latents, workers.run(eager, timed=True).latents)
        assert workers.reloads == 0

        in_bf16 = workers.run(other, timed=False).latents
        assert 1e-4 < (in_bf16 - first.latents).abs().max() / first.latents.abs().max() < 0.2
        assert workers.reloads == 0
        assert len(multiprocessing.active_children()) == 1
        asked.clear()
        again = workers.run(eager, timed=True)
        assert asked == ["eager", "eager"]
        assert workers.reloads == 1
        assert torch.equal(first.latents, again.latents)

        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(ArmFailed, match="its process ended"):
            workers.run(eager, timed=True)
    assert not multiprocessing.active_children()


def test_deepcache_does_not_undo_a_compilation(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same guards as inductor's, without its code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    settings = settings_for(tiny_model, steps=2)
    task = Task(settings, make_inputs(find_model(str(tiny_model)), settings), "fp32", None)
    arms, (compiled, deepcache) = TorchArms(task), parse_arms("compile,deepcache", Defaults())
    first = arms(compiled)
    arms(deepcache)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(arms(compiled).latents, first.latents)


@pytest.mark.slow
def test_torch_compile_draws_the_eager_picture(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles in a round that is not timed, also where no warm-up was asked for."""
    runs: list[tuple[str, bool]] = []
    run = Workers.run

    def noted(self: Workers, arm: Arm, *, timed: bool) -> TimedRun:
        runs.append((arm.name, timed))
        return run(self, arm, timed=timed)

    monkeypatch.setattr(Workers, "run", noted)
    settings, found = of_model(
        str(tiny_model), False, Wishes(arms="eager,deepcache,compile"), COMMON | {"warmup": 0, "repeats": 2}
    )
    measured = run_bench(settings, found, {}, lambda _: None)
    by_name = {result.name: result for result in measured.results}
    compiled: Any = by_name["compile"]
    assert compiled.skipped is None
    assert compiled.psnr_db_vs_eager > 80
    assert compiled.build_s is not None
    assert [timed for name, timed in runs if name == "compile"] == [False, True, True]


def test_multiply_adds_are_those_of_the_layers() -> None:
    """The shallow pass of SD1.5 at branch 0, by hand: convolutions, one transformer block, the head."""
    work = unet_work(find_model("sd15", random_weights=True), 512, 512)
    pixels, width, text = 64 * 64, 320, 77
    resnet = 9 * pixels * (2 * width * width + width * width) + pixels * 2 * width * width + 1280 * width
    attention = 2 * pixels * pixels * width + 2 * pixels * text * width
    linear = pixels * width * width * (2 + 4 + 2 + 12) + 2 * text * 768 * width
    ends = 9 * pixels * 4 * width * 2
    embedding = 320 * 1280 + 1280 * 1280
    assert work.shallow[0].total == resnet + attention + linear + ends + embedding
    assert work.full.total == pytest.approx(401.6e9, rel=1e-3)


def test_shapes_are_read_without_loading_weights(tiny_model: Path) -> None:
    own, sdxl = geometry(find_model(str(tiny_model))), geometry(find_model("sdxl", random_weights=True))
    assert (own.scale, own.height, own.width, own.tokens, own.time_ids) == (4, 32, 32, 8, None)
    assert (sdxl.scale, sdxl.height, sdxl.width, sdxl.tokens, sdxl.time_ids) == (8, 1024, 1024, 77, 6)
    assert sdxl.weights_bytes == pytest.approx(10.27e9, rel=1e-3)
    assert all(p.is_meta for p in empty_unet(find_model(str(tiny_model))).parameters())


def test_nvidia_smi_is_read_as_it_answers() -> None:
    line = "NVIDIA H100 80GB HBM3, 9.0, 570.86.15, 1980, 2619, 1980, 700.00, [N/A], 31"
    (gpu,) = parse_gpus(line + "\n")
    assert gpu == {
        "name": "NVIDIA H100 80GB HBM3",
        "compute_capability": "9.0",
        "driver": "570.86.15",
        "clock_sm_mhz": 1980.0,
        "clock_memory_mhz": 2619.0,
        "clock_sm_max_mhz": 1980.0,
        "power_limit_w": 700.0,
        "power_draw_w": None,
        "temperature_c": 31.0,
    }


def test_the_machine_is_described() -> None:
    found = environment(2)
    assert found["versions"]["onnxruntime"] == fastcache_engines.backend("onnxruntime").version()
    assert found["processor"]
    assert (available_bytes() or 0) > 2**20


@pytest.mark.gpu
def test_calls_on_a_gpu_are_timed_by_its_own_clock() -> None:
    clock, matrix = CallClock("cuda"), torch.randn(2048, 2048, device="cuda")

    def loop() -> torch.Tensor:
        for _ in range(3):
            clock.mark()
            torch.cuda._sleep(10_000_000)
            clock.mark()
        return matrix

    _, loop_ms = clock.time(loop)
    assert len(clock.call_ms()) == 3
    assert min(clock.call_ms()) > 10_000_000 / 4e6  # no GPU's clock has 4 GHz: what it slept is in its calls
    assert sum(clock.call_ms()) <= loop_ms


@pytest.mark.gpu
def test_torch_arms_run_on_a_gpu(tiny_model: Path) -> None:
    wishes = Wishes(arms="eager:fp16,deepcache:fp16", device="cuda")
    settings, found = of_model(str(tiny_model), False, wishes, COMMON)
    measured = run_bench(settings, found, {}, lambda _: None)
    assert all(result.skipped is None and result.peak_bytes for result in measured.results)
    assert document(settings, {}, measured)["environment"]["gpus"]["after"][0]["power_limit_w"] > 0


@pytest.mark.gpu
def test_a_loop_in_one_graph_draws_what_the_launches_draw(tmp_path: Path) -> None:
    wishes = Wishes(arms="eager,engine:inductor,engine+graph:inductor,engine+cache+graph:inductor", device="cuda")
    settings, found = of_model("demo", False, wishes, COMMON)
    bundles, found = build_bundles(found, settings, tmp_path, lambda _: None)
    results = {result.name: result for result in run_bench(settings, found, bundles, lambda _: None).results}
    assert all(result.skipped is None for result in results.values())
    launched, graph = results["engine:inductor"], results["engine+graph:inductor"]
    assert graph.latents_error_vs_eager == pytest.approx(launched.latents_error_vs_eager, abs=1e-3)
    assert graph.full_step_ms_p50 is None
    assert (results["engine+cache+graph:inductor"].latents_error_vs_eager or 0) > 0
