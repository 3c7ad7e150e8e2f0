"""The command line as a user meets it: real commands over a real (tiny) bundle, their output, files and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from fastcache import __version__
from fastcache.bundle.bundle import Bundle
from fastcache.cli import app, main
from fastcache.commands.options import check_writable
from fastcache.console import print_table
from fastcache.loop.plan import CachePlan
from fastcache_engines import BACKENDS, choose_with_dtype
from fastcache_kernels import cpu_step


@pytest.mark.parametrize(
    "name", ["", "demo", "doctor", "build-engines", "inspect", "verify", "generate", "bench", "plan", "evaluate"]
)
def test_every_command_has_help_with_an_example(command: Any, name: str) -> None:
    result = command(*([name] if name else []), "--help")
    assert result.code == 0
    assert "Usage" in result.out
    assert not name or "Example: fastcache" in result.out


def test_version(command: Any) -> None:
    assert command("--version").out.strip() == __version__


@pytest.mark.parametrize("flags", [("-h",), ("plan", "-h")])
def test_help_has_a_short_flag(command: Any, flags: tuple[str, ...]) -> None:
    assert "Usage" in command(*flags).out


def test_the_package_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "fastcache", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == __version__


def test_an_interrupted_command_says_so(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastcache.health.doctor.examine", interrupted)
    result = command("doctor")
    assert (result.code, result.out, result.err.strip()) == (130, "", "error: stopped")


def test_an_output_is_looked_at_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    check_writable(tmp_path / "a" / "b.png", tmp_path / "file", tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ValueError, match=r"expected a place that can be written, got .*file/below.png"):
        check_writable(tmp_path / "file" / "below.png")


def test_figures_stand_right_and_words_left(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", ["name", "ms", "why"], [["a", "1.0", "long words"], ["b", "10.0", "short"]])
    row = next(line for line in capsys.readouterr().out.splitlines() if "short" in line)
    assert [cell.rstrip() == cell[:-1] for cell in row.split("│")[2:4]] == [True, False]


def test_doctor_names_every_backend_and_what_auto_picks(command: Any) -> None:
    report = command("doctor", "--json").json
    rows = {(row["name"], row["device"]): row for row in report["backends"]}
    assert {name for name, _ in rows} == set(BACKENDS)
    assert rows["onnxruntime", "cpu"]["can_build"]
    assert rows["onnxruntime", "cpu"]["can_run"]
    assert all(row["reason"] and row["dtypes"] for row in rows.values())
    assert (report["auto"]["backend"], report["auto"]["dtype"]) == choose_with_dtype(report["auto"]["device"])[:2]
    assert report["auto"]["reason"]
    assert (report["cpu_loop"]["source"], report["cpu_loop"]["reason"]) == cpu_step.source()


def test_inspect_shows_the_manifest(command: Any, tiny_bundle: Bundle) -> None:
    shown = command("inspect", tiny_bundle.path, "--json").json
    facts = shown.pop("engine_facts")
    assert shown == json.loads((tiny_bundle.path / "manifest.json").read_text())
    assert set(facts) == set(shown["engines"])
    assert facts["full"]["nodes"] > facts["shallow-0"]["nodes"] > 10
    assert facts["full"]["operators"]["Conv"] > 0
    text = command("inspect", tiny_bundle.path)
    assert "cached_feature" in text.out
    assert shown["bundle_sha256"] in text.out


def test_inspect_shows_what_each_branch_costs(command: Any, tiny_bundle: Bundle, tiny_model: Path) -> None:
    built = command("inspect", tiny_bundle.path, "--branches", "--json").json["work"]
    manifest = tiny_bundle.manifest
    size = ("--height", manifest.height, "--width", manifest.width)
    assert command("inspect", tiny_model, "--branches", "--json", *size).json["work"] == built
    assert [row["branch_id"] for row in built] == [None, *range(manifest.num_branches)]
    assert "Multiply-adds of one U-Net call" in command("inspect", tiny_bundle.path).out

    preset = command("inspect", "ldm4g", "--branches", "--json").json
    assert (preset["model"], preset["height"], preset["width"]) == ("ldm4g", 256, 256)
    assert preset["work"][0]["multiply_adds_without_attention"] == pytest.approx(99.8e9, rel=1e-3)
    assert preset["work"][1]["multiply_adds"] == pytest.approx(4.42e9, rel=1e-3)
    assert "shallow 11" in command("inspect", "ldm4g", "--branches").out
    refused = command("inspect", "ldm4g", "--branches", "--height", 130)
    assert refused.code == 2
    assert "divisible by 4" in refused.err


def test_verify_passes_and_fails_with_its_exit_code(command: Any, tiny_bundle: Bundle, bundle_copy: Path) -> None:
    good = command("verify", tiny_bundle.path, "--json")
    assert good.code == 0
    assert good.json["ok"]
    assert good.json["full_vs_model"] <= good.json["tolerance"]
    assert good.json["shallow_vs_full"] <= good.json["tolerance"]

    weights = bundle_copy / "unet.weights"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    bad = command("verify", bundle_copy, "--json")
    assert bad.code == 4
    assert not bad.json["ok"]
    assert [f["name"] for f in bad.json["files"] if not f["ok"]] == ["unet.weights"]
    assert bad.json["full_vs_model"] is None
    assert "unet.weights" in bad.err


def test_generate_writes_pictures_that_say_how_they_were_made(
    command: Any, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    one = tmp_path / "one.png"
    common = ("generate", "--engines", tiny_bundle.path, "--prompt", "a red circle", "--steps", 4)
    assert command(*common, "--cache-interval", 2, "--seed", 3, "--output", one).out.strip() == str(one)
    with Image.open(one) as image:
        image.load()
        text = image.text
    assert text["prompt"] == "a red circle"
    assert text["seed"] == "3"
    assert text["bundle_sha256"] == tiny_bundle.manifest.bundle_sha256
    assert CachePlan.from_json(text["plan"]).refresh_steps == (0, 2)

    dotted = tmp_path / "guidance7.5"  # a folder, for all its dot
    assert command(*common, "--output", dotted).out.strip() == str(dotted / "00000.png")

    # More images than fit at once: the fourth seed's picture is the one that this seed gives alone.
    most = tiny_bundle.manifest.profiles["batch"].max
    many = command(
        *common, "--cache-interval", 2, "--num-images", most + 2, "--seed", 0, "--output", tmp_path / "many", "--json"
    ).json
    assert [image["seed"] for image in many["images"]] == list(range(most + 2))
    with Image.open(one) as alone, Image.open(many["images"][3]["path"]) as among:
        differences = [abs(a - b) for a, b in zip(alone.tobytes(), among.tobytes(), strict=True)]
    assert max(differences) <= 1


def test_a_plan_file_drives_generate_and_is_refused_elsewhere(
    command: Any, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    made = ("plan", "--engines", tiny_bundle.path, "--steps", 8, "--sampler", "heun", "--nonuniform", 4)
    shown = command(*made, "--output", plan, "--json").json
    assert shown["num_steps"] == 15  # Heun calls the U-Net twice for all but the last timestep
    assert shown["sampler"] == "heun"
    common = (
        "generate",
        "--engines",
        tiny_bundle.path,
        "--prompt",
        "x",
        "--plan",
        plan,
        "--output",
        tmp_path / "x.png",
    )
    drawn = command(*common, "--steps", 8, "--sampler", "heun", "--json")
    assert drawn.json["plan"] == shown
    assert command(*common, "--steps", 9, "--sampler", "heun").code == 2
    other = command(*common, "--steps", 15, "--sampler", "ddim")
    assert other.code == 2
    assert "heun" in other.err


BAD = [
    (("generate", "--prompt", "x"), 2, "--engines"),
    (("generate", "--engines", "BUNDLE", "--prompt", "x", "--output", "x.jpg"), 2, ".png"),
    (("generate", "--engines", "BUNDLE", "--prompt", "x", "--output", "x.png", "--num-images", 2), 2, "folder"),
    (("generate", "--engines", "BUNDLE", "--prompt", "x", "--output", "x.png", "--sampler", "nope"), 2, "dpm++_2m"),
    (("generate", "--engines", "BUNDLE", "--prompt", "x", "--output", "x.png", "--plan", "none.json"), 2, "none.json"),
    (("generate", "--engines", "BUNDLE", "--prompt", "x", "--output", "x.png", "--guidance-scale", "nan"), 2, "finite"),
    (("generate", "--engines", "BUNDLE", "--prompt", "x", "--output", "x.png", "--seed", 2**64), 2, "--seed"),
    (("generate", "--engines", "nowhere", "--prompt", "x", "--output", "x.png"), 2, "nowhere"),
    (("plan", "--engines", "BUNDLE", "--steps", 5, "--output", "p.json"), 2, "--uniform"),
    (("plan", "--engines", "BUNDLE", "--steps", 0, "--uniform", 2, "--output", "p.json"), 2, "steps"),
    (("build-engines", "--output", "e"), 2, "--model"),
    (("build-engines", "--model", "demo", "--output", "e", "--branch-id", 12), 2, "0 to 11"),
    (("build-engines", "--model", "demo", "--output", "e", "--backend", "tensorrt"), 3, "tensorrt"),
    (("build-engines", "--model", "demo", "--output", "e", "--device", "cuda"), 3, "cpu"),
    (("build-engines", "--model", "demo", "--output", "e", "--compute-capability", "8.9"), 2, "tensorrt-rtx"),
    (("build-engines", "--model", "no/such-model", "--output", "e"), 2, "no/such-model"),
    (("build-engines", "--model", "sd15", "--output", "e"), 2, "--random-weights"),
    (("build-engines", "--model", "./nonexistent", "--output", "e"), 2, "which is not there; give its path"),
    (("build-engines", "--model", __file__, "--output", "e"), 2, "from_single_file"),
    (("build-engines", "--model", "demo", "--output", "/proc/e"), 2, "/proc/e"),
    (("bench", "--arms", "engine,warp", "--engines", "BUNDLE"), 2, "warp"),
    (("bench", "--engines", "BUNDLE", "--height", 999), 2, "--height"),
    (("verify", "nowhere"), 2, "nowhere"),
    (("inspect", "nowhere"), 2, "nowhere"),
    (("bench", "--engines", "nowhere"), 2, "nowhere"),
    (("plan", "--engines", "BUNDLE", "--steps", 5, "--uniform", 2, "--output", "/proc/p.json"), 2, "/proc/p.json"),
    (("evaluate", "--engines", "BUNDLE", "--plan", "p.json", "--output", "/proc/e"), 2, "/proc/e"),
    (("generate", "--engines", "BUNDLE", "--prompt", "x", "--output", "/proc/x.png"), 2, "/proc/x.png"),
    (("generate", "--engines", "BUNDLE", "--prompt", "\udcff", "--output", "x.png"), 2, "UTF-8"),
    (("nonsense",), 2, "nonsense"),
]


@pytest.mark.parametrize(("arguments", "code", "says"), BAD, ids=[" ".join(map(str, a[0])) for a in BAD])
def test_bad_input_is_one_line_and_an_exit_code(
    command: Any,
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command(*(tiny_bundle.path if a == "BUNDLE" else a for a in arguments))
    errors = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert (result.code, len(errors)) == (code, 1), result.err
    assert says in errors[0]
    assert "Traceback" not in result.err
    assert result.out == ""


def test_a_traceback_only_with_debug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastcache", "verify", str(tmp_path), "--debug"])
    with pytest.raises(Exception, match="expected a bundle"):
        main()


@pytest.mark.slow
def test_bench_times_all_arms_side_by_side(command: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    arms = "eager,deepcache,engine,engine+cache"
    flags = ("--arms", arms, "--steps", 4, "--cache-interval", 2, "--repeats", 2, "--warmup", 0, "--json", file)
    result = command("bench", "--engines", tiny_bundle.path, *flags)
    assert result.code == 0, result.err
    document = json.loads(file.read_text())
    by_name = {arm["name"]: arm for arm in document["arms"]}
    assert list(by_name) == arms.split(",")
    assert document["environment"]["versions"]["fastcache"]
    for arm in by_name.values():
        assert "skipped" not in arm, arm
        assert arm["loop_ms_p50"] <= arm["loop_ms_p90"]
        assert arm["loop_ms_p50"] > arm["full_step_ms_p50"] > 0
    # Invariants 3 and 4, seen from here: no caching draws the eager picture, and both ways of caching the same one.
    assert by_name["engine"]["psnr_db_vs_eager"] > 50
    cached, package = (by_name[arm]["psnr_db_vs_eager"] for arm in ("engine+cache", "deepcache"))
    assert cached == pytest.approx(package, abs=0.5)
    assert cached < by_name["engine"]["psnr_db_vs_eager"]
    assert by_name["eager"]["shallow_step_ms_p50"] is None
    assert by_name["engine+cache"]["shallow_step_ms_p50"] > 0


def test_how_much_is_said(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints and progress as usual, none with -q at any place, and FASTCACHE_LOG before flags."""
    assert "next: fastcache build-engines" in command("doctor").err
    assert command("doctor", "-q").err == ""
    assert command("-q", "doctor").err == ""
    monkeypatch.setenv("FASTCACHE_LOG", "error")
    assert command("doctor").err == ""
    assert "next:" in command("doctor", "-v", "-v").err
    monkeypatch.setenv("FASTCACHE_LOG", "loud")
    refused = command("doctor")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "expected FASTCACHE_LOG out of error, warning, info, debug, got 'loud'" in refused.err


def test_shells_can_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        **os.environ,
        "_FASTCACHE_COMPLETE": "complete_bash",
        "COMP_WORDS": "fastcache mod",
        "COMP_CWORD": "1",
    }
    script = "import sys; sys.argv = ['fastcache']; from fastcache.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.split() == ["models"]


def test_every_flag_of_the_server_is_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: Any = typer.main.get_command(app)
    monkeypatch.setenv("FASTCACHE_HOST", "0.0.0.0")
    monkeypatch.setenv("FASTCACHE_MAX_BATCH", "3")
    monkeypatch.setenv("FASTCACHE_ENGINES", str(Path(__file__).parent))
    found = commands.commands["serve"].make_context("serve", ["--max-batch", "2"]).params
    assert (found["host"], found["max_batch"], found["port"]) == ("0.0.0.0", 2, 8000)  # a flag comes before a variable


def test_models_lists_and_prunes(command: Any, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: Any) -> None:
    cache = tmp_path / "cache" / "fastcache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "nothing in" in command("models").out
    shutil.copytree(tiny_bundle.path, cache / "engines" / "old")
    (cache / "calibrations").mkdir()
    (cache / "calibrations" / "a.json").write_text("{}")
    month_ago = time.time() - 31 * 24 * 3600
    for file in (cache / "engines" / "old").rglob("*"):
        os.utime(file, (month_ago, month_ago))

    found = command("models", "--json", "--folder", tiny_bundle.path.parent).json
    assert "sd15" in found["presets"]
    kept = {Path(one["path"]).name: one for one in found["kept"]}
    assert {"old", "calibrations", tiny_bundle.path.name} <= set(kept)
    assert (kept["old"]["backend"], kept["old"]["days_unused"]) == (tiny_bundle.manifest.backend, 31)
    assert kept["old"]["bytes"] == sum(file.bytes for file in tiny_bundle.manifest.files)
    assert "31 days ago" in command("models").out

    assert "could be freed" in command("models", "prune", "--dry-run").out
    assert (cache / "engines" / "old").is_dir()
    assert command("models", "prune", "--json").json["removed"] == [str(cache / "engines" / "old")]
    assert [path.name for path in sorted(cache.rglob("*"))] == ["calibrations", "a.json", "engines"]
    refused = command("models", "--folder", tmp_path / "none")
    assert (refused.code, "expected --folder to be a folder" in refused.err) == (2, True)
