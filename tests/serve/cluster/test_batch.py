"""`fastcache batch`: rows of a file, their seeds, what stands and what is left, and a job that is killed half way."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fastcache
from build_store import BuildStore
from fastcache import Bundle, CachePlan
from fastcache.cli import main
from fastcache.commands.options import read_prompts
from fastcache.serve.cluster.batch import INDEX, Artist
from fastcache.serve.cluster.lines import Model, models_of, read_rows
from fastcache.serve.cluster.rows import MAX_SEED, Shown, draw_rows, seed_of
from fastcache.serve.models.listed import Listed

MODELS = {"m": Model(Path("engines"), {}), "other": Model(Path("engines"), {})}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def picture_file(path: Path, size: tuple[int, int]) -> Path:
    Image.new("RGB", size, "red").save(path)
    return path


@given(st.text(min_size=1, max_size=40), st.integers(0, MAX_SEED))
def test_a_rows_seed_follows_the_documented_rule(row_id: str, seed: int) -> None:
    digest = hashlib.sha256(f"{seed}:{row_id}".encode(errors="surrogatepass")).hexdigest()
    assert seed_of(row_id, seed) == int(digest, 16) >> (256 - 63)


def test_rows_of_a_text_are_named_by_their_lines(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "p.txt", "a", "", "  b c "), 7, {"num_inference_steps": 4}, MODELS)
    assert [(row.id, row.prompt, row.num_inference_steps) for row in rows] == [("000001", "a", 4), ("000003", "b c", 4)]
    assert [row.seed for row in rows] == [seed_of("000001", 7), seed_of("000003", 7)]


def test_rows_of_json_have_fields_of_their_own(tmp_path: Path) -> None:
    plan = json.loads(CachePlan.uniform(4, 2).to_json())
    file = write(
        tmp_path / "p.jsonl",
        {"prompt": "a", "id": "x", "seed": 3},
        {"prompt": "b", "cache_interval": 2, "sampler": "euler"},
        {"prompt": "c", "plan": plan},
    )
    x, b, c = read_rows(file, 0, {"plan": plan, "sampler": "ddim"}, MODELS)
    assert (x.id, x.seed, x.plan) == ("x", 3, plan)
    assert (b.id, b.seed, b.plan, b.cache_interval, b.sampler) == ("000002", seed_of("000002", 0), None, 2, "euler")
    assert c.plan == plan
    (c,) = read_rows(write(tmp_path / "q.jsonl", {"prompt": "c", "plan": plan}), 0, {"cache_interval": 3}, MODELS)
    assert c.cache_interval is None


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ((), "without any"),
        (({"prompt": "a", "promt": "b"},), "line 1: promt: Extra inputs"),
        (({"prompt": "a"}, {"id": "b"}), "line 2: prompt: Field required"),
        (({"prompt": "a", "id": "../a"},), "line 1: id: "),
        (({"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}), "line 2: expected ids that differ, got x again"),
        (({"prompt": "a", "sampler": "magic"},), "line 1: sampler: .*got 'magic'"),
        (({"prompt": "a", "model": "magic"},), "line 1: model: expected one of m, other, got 'magic'"),
        (({"prompt": "a", "model": []},), r"line 1: model: expected one of m, other, got \[\]"),
        (({"prompt": "a", "quality": "low"},), "line 1: quality: .* with --plans for m, got 'low' and no plans"),
        (("{",), "line 1: Expecting"),
        (("[1]",), "line 1: expected a JSON object, got list"),
    ],
)
def test_a_bad_line_is_named(lines: tuple[object, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        read_rows(write(tmp_path / "p.jsonl", *lines), 0, {}, MODELS)


def test_a_worker_draws_what_the_pipeline_draws_and_nothing_twice(tiny_bundle: Bundle, tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", "a", "b", "c")
    rows = read_rows(file, 0, {"num_inference_steps": 4, "cache_interval": 2}, MODELS)
    artist = Artist({"m": str(tiny_bundle.path)}, str(tmp_path))
    batch = {"row": [row.model_dump_json() for row in rows]}
    assert artist(batch) == {"id": [row.id for row in rows], "error": ["", "", ""]}
    pipe = fastcache.load(tiny_bundle.path, threads=1)
    for row in rows:
        generator = torch.Generator().manual_seed(row.seed)
        alone = pipe([row.prompt], num_inference_steps=4, cache_interval=2, generator=[generator]).images[0]
        with Image.open(tmp_path / f"{row.id}.png") as drawn:
            assert drawn.info["seed"] == str(row.seed)
            assert np.abs(np.asarray(drawn).astype(int) - np.asarray(alone).astype(int)).max() <= 1
    times = {row.id: (tmp_path / f"{row.id}.png").stat().st_mtime_ns for row in rows}
    (tmp_path / "000002.png").unlink()
    artist(batch)
    changed = [name for name, then in times.items() if (tmp_path / f"{name}.png").stat().st_mtime_ns != then]
    assert changed == ["000002"]
    other = read_rows(file, 1, {"num_inference_steps": 4, "cache_interval": 2}, MODELS)
    with pytest.raises(ValueError, match=r"expected .*000001\.png to be drawn from this row"):
        artist({"row": [other[0].model_dump_json()]})


@pytest.mark.slow
def test_rows_are_drawn_with_the_models_that_they_name(
    tiny_bundle: Bundle, tiny_model: Path, builds: BuildStore, tmp_path: Path
) -> None:
    wide = builds.bundle(tiny_model, height=32, width=64)
    models = models_of([Listed(tiny_bundle.path), Listed(wide.path, "wide")])
    lines = [{"prompt": "a", "id": f"{name}-{k}", "model": name} for k in range(2) for name in ("tiny-model", "wide")]
    file = write(tmp_path / "p.jsonl", *lines, {"prompt": "a", "id": "first"})
    rows = read_rows(file, 0, {"num_inference_steps": 2}, models)
    assert rows[-1].model == "tiny-model"
    artist = Artist({name: str(model.engines) for name, model in models.items()}, str(tmp_path))
    assert set(artist({"row": [row.model_dump_json() for row in rows]})["error"]) == {""}
    for row in rows:
        with Image.open(tmp_path / f"{row.id}.png") as drawn:
            assert drawn.width == (64 if row.model == "wide" else 32)
    with pytest.raises(ValueError, match="expected models of different names"):
        models_of([Listed(tiny_bundle.path), Listed(tiny_bundle.path)])


def test_without_ray_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # what an import finds where it is not installed
    file = write(tmp_path / "p.txt", "a")
    arguments = ["batch", "--engines", tiny_bundle.path, "--prompts", file, "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["fastcache", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 3
    assert "pip install 'fastcache-diffusion[ray]'" in " ".join(capsys.readouterr().err.split())


def job(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastcache.cli", "batch", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_job_killed_half_way_goes_on_with_every_row_once(tiny_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'fastcache-diffusion[ray]'")
    good = [{"prompt": "abc"[: 1 + k % 3], "id": f"row-{k}"} for k in range(12)]
    bad = {"prompt": "a", "id": "bad", "sampler": "lcm", "num_inference_steps": 800}
    prompts, output = write(tmp_path / "p.jsonl", *good, bad), tmp_path / "out"
    common = ("--engines", tiny_bundle.path, "--prompts", prompts, "--output", output)
    common = (*common, "--steps", 200, "--cache-interval", 4, "--cpus", 1, "--json")
    killed = job(*common)
    while len(list(output.glob("*.png"))) < 4:
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    before = {file.name: file.stat().st_mtime_ns for file in output.glob("*.png")}
    assert len(before) < len(good)
    assert not (output / INDEX).exists()

    resumed = job(*common)
    out, err = resumed.communicate()
    assert resumed.returncode == 2, err  # the row that does not fit
    assert "1 did not; bad: " in " ".join(err.split())
    document: dict[str, Any] = json.loads(out)
    assert document["drawn"] + document["skipped"] == len(good)
    assert document["skipped"] >= len(before)
    assert {name: (output / name).stat().st_mtime_ns for name in before} == before
    entries = [json.loads(line) for line in (output / INDEX).read_text().splitlines()]
    assert entries == document["rows"]
    assert [entry["id"] for entry in entries] == [*(row["id"] for row in good), "bad"]
    names = sorted(file.name for file in output.iterdir() if file.suffix != ".tmp")  # what a killed worker began
    assert names == sorted([INDEX, *(f"{row['id']}.png" for row in good)])
    for entry in entries[:-1]:
        assert entry["seed"] == seed_of(entry["id"], 0)
        with Image.open(output / entry["file"]) as drawn:
            drawn.load()
            assert drawn.info["row_id"] == entry["id"]
            assert drawn.info["seed"] == str(entry["seed"])


def test_a_line_ends_where_the_file_says_so(tmp_path: Path) -> None:
    """U+2028 and U+0085 may stand in JSON as they are, a form feed in a prompt; a BOM is no part of one."""
    rows, prompts = tmp_path / "rows.jsonl", tmp_path / "prompts.txt"
    rows.write_text('{"id": "a", "prompt": "x\u2028y\u0085z"}\n', encoding="utf-8")
    prompts.write_bytes(b"\xef\xbb\xbfone\x0ctwo\r\nthree\n")
    assert [row.prompt for row in read_rows(rows, 0, {}, MODELS)] == ["x\u2028y\u0085z"]
    assert [row.prompt for row in read_rows(prompts, 0, {}, MODELS)] == ["one\x0ctwo", "three"]
    assert read_prompts(prompts) == ["one\x0ctwo", "three"]


def test_rows_may_be_edits_and_name_a_quality(tiny_bundle: Bundle, tmp_path: Path) -> None:
    from fastcache.serve.models.quality import read_plans
    from serve.models.test_quality import fitted

    for name, points in {"draft": (0, 6), "standard": (0, 4, 8), "fine": (0, 3, 6, 9)}.items():
        (tmp_path / f"{name}.json").write_text(fitted(tiny_bundle, points, 20.0).to_json())
    (tmp_path / "in").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "in" / "a.png")
    lines = [
        {"prompt": "a", "quality": "high", "seed": 1},
        {"prompt": "a", "image": "in/a.png", "strength": 0.5, "num_inference_steps": 4, "seed": 1},
    ]
    models = models_of([Listed(tiny_bundle.path)], [read_plans(tmp_path)])
    drawn, edited = read_rows(write(tmp_path / "rows.jsonl", *lines), 0, {"sampler": "euler"}, models)
    assert (drawn.sampler, drawn.plan and len(drawn.plan["passes"])) == (None, 4)
    pipe = fastcache.load(tiny_bundle.path, threads=1)
    outcomes = {outcome.row.id: outcome for outcome in draw_rows(pipe, [drawn, edited])}
    assert [outcome.error for outcome in outcomes.values()] == [None, None]
    picture = Image.open(tmp_path / "in" / "a.png")
    wanted = pipe("a", image=picture, strength=0.5, num_inference_steps=4, sampler="euler", seed=[1]).images[0]
    assert outcomes[edited.id].picture == wanted
    large = edited.model_copy(update={"image": Shown.of(picture_file(tmp_path / "in" / "large.png", (50, 40)))})
    named, other = large.model_copy(update={"size": "32x32"}), large.model_copy(update={"size": "48x48"})
    found = [next(draw_rows(pipe, [row])) for row in (large, named, other)]
    assert [outcome.picture and outcome.picture.size for outcome in found] == [(32, 32), (32, 32), None]
    assert found[2].error == "expected 32x32, what this bundle draws, or auto, got 48x48"
    before = edited.digest("")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "in" / "a.png")
    (_, changed) = read_rows(tmp_path / "rows.jsonl", 0, {"sampler": "euler"}, models)
    assert changed.digest("") != before
    for line, says in (
        ({"prompt": "a", "quality": "best"}, "quality"),
        ({"prompt": "a", "quality": ["low"]}, "quality: expected"),
        ({"prompt": "a", "quality": "low", "sampler": "ddim"}, "without sampler"),
        ({"prompt": "a", "image": "nowhere.png"}, "nowhere.png"),
        ({"prompt": "a", "image": 1}, "the path of a picture"),
    ):
        with pytest.raises(ValueError, match=says):
            read_rows(write(tmp_path / "rows.jsonl", line), 0, {}, models)
