"""Builds that succeed, fail, are killed or meet: a bundle is in its place whole, or what was there before."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import psutil
import pytest
from safetensors import SafetensorError

import fastcache
from fastcache import BackendUnavailable, BuildError, Bundle, PartitionError, Recipe
from fastcache.bundle.bundle import open_bundle
from fastcache.compile import worker
from fastcache.compile.builder import _lines, resolve
from fastcache.compile.models import find_model
from fastcache.sampler.stored import TABLES

BUILD = """
import sys, fastcache
say = lambda message: print(message, flush=True)
bundle = fastcache.build_engines(sys.argv[1], output=sys.argv[2], components=("unet",), progress=say)
print(bundle.manifest.bundle_sha256)
"""
BUILD_ON_A_FULL_DISK = """
import resource, sys, fastcache
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    fastcache.build_engines(sys.argv[1], output=sys.argv[2], components=("unet",))
except fastcache.BuildError as error:
    print(error)
"""
FULL = "expected to write {}, got: No space left on device; make room there"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(script: str, model: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, str(model), str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def worker_of(pid: int) -> psutil.Process:
    (child,) = (p for p in psutil.Process(pid).children() if "fastcache.compile.worker" in p.cmdline())
    return child


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def wait_for(condition: Callable[[], bool]) -> None:
    """Fail only where something would never happen."""
    give_up = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_model` to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_nothing_is_built_twice(tiny_model: Path, tiny_bundle: Bundle, bundle_copy: Path) -> None:
    before, said = content(bundle_copy), []
    bundle = fastcache.build_engines(tiny_model, dtype="fp32", output=bundle_copy, progress=said.append)
    assert said == [f"{bundle_copy} is up to date"]
    assert bundle == Bundle(bundle_copy, tiny_bundle.manifest)
    assert content(bundle_copy) == before


def test_equal_weights_are_stored_once(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    lengths: dict[str, dict[int, int]] = {}
    for role in ("full", "shallow-0"):
        weights = onnx.load(tiny_bundle.engine_path(role), load_external_data=False).graph.initializer
        places = [
            {entry.key: int(entry.value) for entry in w.external_data if entry.key != "location"} for w in weights
        ]
        lengths[role] = {place["offset"]: place["length"] for place in places if place}
    assert lengths["shallow-0"].items() < lengths["full"].items()  # all that the shallow engine needs the full one has
    assert sum(lengths["shallow-0"].values()) <= manifest.duplicated_bytes
    end = max(offset + length for offset, length in lengths["full"].items())
    assert manifest.weights_bytes == end == tiny_bundle.file("unet.weights").stat().st_size


@pytest.mark.slow
def test_another_recipe_needs_force(tiny_model: Path, bundle_copy: Path) -> None:
    before = content(bundle_copy)
    recipe = Recipe(model=str(tiny_model), components=("unet",), dtype="fp32")
    with pytest.raises(ValueError, match=r"holds a bundle of another model, recipe or version; force \(--force\)"):
        fastcache.build_engines(recipe, output=bundle_copy, branch_id=1)
    assert content(bundle_copy) == before

    said: list[str] = []
    bundle = fastcache.build_engines(recipe, output=bundle_copy, branch_id=1, force=True, progress=said.append)
    assert "exporting full and shallow U-Nets, branch 1 of 4" in said
    assert bundle.manifest.branch_id == 1
    assert bundle.manifest.engines.keys() == {"full", "shallow-1"}
    assert bundle.manifest.parity.shallow_vs_full < 1e-5
    assert names(bundle_copy.parent) == ["bundle"]


@pytest.mark.slow
def test_a_damaged_bundle_is_rebuilt(tiny_model: Path, bundle_copy: Path, tiny_bundle: Bundle) -> None:
    (bundle_copy / "unet.weights").unlink()
    bundle = fastcache.build_engines(tiny_model, dtype="fp32", output=bundle_copy)
    # A build of the same recipe gives the same bytes, but for the tables, of which the store builds fewer.
    built, stored = ([f for f in one.manifest.files if f.name != TABLES] for one in (bundle, tiny_bundle))
    assert built == stored
    assert names(bundle_copy.parent) == ["bundle"]


def test_a_damaged_manifest_needs_force(tiny_model: Path, bundle_copy: Path) -> None:
    (bundle_copy / "manifest.json").write_text("{}")
    before = content(bundle_copy)
    with pytest.raises(ValueError, match=r"force the build \(--force\) to replace it"):
        fastcache.build_engines(tiny_model, dtype="fp32", output=bundle_copy)
    assert content(bundle_copy) == before


@pytest.mark.parametrize("force", [False, True])
def test_other_files_are_never_replaced(tiny_model: Path, tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("ten years")
    (tmp_path / "file").write_text("content")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"expected .*out to be free or a bundle, got a folder of other files"):
        fastcache.build_engines(tiny_model, output=tmp_path / "out", force=force)
    for output in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(
            ValueError, match=rf"expected a folder to build in, got {output}, but {tmp_path / 'file'} is a file"
        ):
            fastcache.build_engines(tiny_model, output=output, force=force)
    assert content(tmp_path) == before


def test_remains_of_a_killed_build_are_cleared_and_others_are_not(tiny_model: Path, bundle_copy: Path) -> None:
    """A build killed between the two moves of `publish` left the old bundle aside."""
    folder = bundle_copy.parent
    bundle_copy.rename(folder / ".bundle.123.tmp.old")
    for name in (".bundle.123.tmp", ".bundle.v2.123.tmp", ".bundle.notes.tmp"):
        (folder / name).mkdir()
    said: list[str] = []
    fastcache.build_engines(tiny_model, dtype="fp32", output=bundle_copy, progress=said.append)
    assert said == [f"{bundle_copy} is up to date"]
    assert names(folder) == [".bundle.notes.tmp", ".bundle.v2.123.tmp", "bundle"]


def test_an_output_behind_a_link(tiny_model: Path, bundle_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle_copy)
    bundle = fastcache.build_engines(tiny_model, dtype="fp32", output=tmp_path / "link")
    assert bundle.path == bundle_copy
    assert (tmp_path / "link").is_symlink()


def test_a_killed_worker_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    def kill(message: str) -> None:
        if message.startswith("exporting"):
            worker_of(os.getpid()).send_signal(signal.SIGKILL)

    with pytest.raises(BuildError, match=rf"ended with signal 9 .* nothing was left in {tmp_path}"):
        fastcache.build_engines(tiny_model, output=tmp_path / "out", components=("unet",), progress=kill)
    assert names(tmp_path) == []


def test_a_grandchild_that_holds_the_pipe_does_not_hold_the_builder() -> None:
    """A worker killed while it starts a process of its own leaves one that waits for ever, the pipe in its hands."""
    command = ["sh", "-c", "sleep 3600 & echo one; echo two"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as child:
        assert list(_lines(child)) == [b"one", b"two"]
        os.killpg(child.pid, signal.SIGKILL)


@pytest.mark.slow
def test_an_interrupted_build_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    workers: list[psutil.Process] = []

    def interrupt(message: str) -> None:
        if not message.startswith(("backend ", "dtype ")):  # said before the worker starts
            workers.append(worker_of(os.getpid()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastcache.build_engines(tiny_model, output=tmp_path / "a" / "b", components=("unet",), progress=interrupt)
    assert names(tmp_path) == []
    assert [has_ended(process) for process in workers] == [True]


@pytest.mark.slow
def test_a_killed_builder_and_two_at_once_after_it(tiny_model: Path, tmp_path: Path) -> None:
    with start(BUILD, tiny_model, tmp_path / "out") as builder:
        next(line for line in builder.stdout or () if line.startswith("exporting"))
        orphan = worker_of(builder.pid)
        builder.kill()
    wait_for(lambda: has_ended(orphan))
    assert names(tmp_path) == [f".out.{builder.pid}.tmp", ".out.lock"]

    builders = [start(BUILD, tiny_model, tmp_path / "out") for _ in range(2)]
    outputs = [builder.communicate() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], outputs
    said = [output.splitlines() for output, _ in outputs]
    assert sorted(len(lines) for lines in said)[0] == 2  # one of them found the other's: up to date, and the hash
    assert said[0][-1] == said[1][-1] == open_bundle(tmp_path / "out").manifest.bundle_sha256
    assert names(tmp_path) == ["out"]


@pytest.mark.slow
def test_a_full_disk(tiny_model: Path, tmp_path: Path) -> None:
    """The system refuses to write more than 8 KiB to a file, with the error of a file system that is full."""
    with start(BUILD_ON_A_FULL_DISK, tiny_model, tmp_path / "out") as builder:
        output, errors = builder.communicate()
    line = f"expected to write reference.safetensors in {tmp_path}, got: File too large; make room there\n"
    assert output == line, errors
    assert names(tmp_path) == []


def test_too_little_space_is_found_before_anything_is_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(BuildError, match=r"expected 0\.1 GiB free in .*, got 0\.0 GiB; make room there"):
        worker.build(resolve(Recipe(model=str(tiny_model))), tmp_path, lambda message: None)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "kind", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), "BuildError", f"^{FULL.format('the bundle in /place')}$"),
        (OSError(errno.ENOSPC, "full", "/place/.out.1.tmp/a"), "BuildError", f"^{FULL.format('a in /place')}$"),
        (OSError(errno.EDQUOT, "full", "/tmp/a"), "BuildError", "^expected to write /tmp/a, got: .*; make room there$"),
        (SafetensorError("I/O error: (os error 28)"), "BuildError", f"^{FULL.format('the bundle in /place')}$"),
        (OSError(errno.EACCES, "Permission denied"), "BuildError", "PermissionError: .*Permission denied"),
        (MemoryError(), "BuildError", "ran out of memory"),
        (RuntimeError("first\nsecond"), "BuildError", "RuntimeError: first$"),
        (RuntimeError(), "BuildError", "RuntimeError: no message"),
        (PartitionError("reason"), "PartitionError", "^reason$"),
        (BackendUnavailable("reason"), "BackendUnavailable", "^reason$"),
    ],
)
def test_what_a_worker_reports(error: Exception, kind: str, expected: str) -> None:
    got_kind, message = worker._explain(error, Path("/place"))
    assert got_kind == kind
    assert "\n" not in message
    with pytest.raises(RuntimeError, match=expected):
        raise RuntimeError(message)


def test_a_branch_out_of_range_crosses_the_process(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(PartitionError, match=r"expected a branch_id from 0 to 3 for this U-Net, got 99"):
        fastcache.build_engines(tiny_model, output=tmp_path / "out", branch_id=99)
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", [{"height": 33}, {"width": 30}])
def test_sizes_that_the_vae_cannot_make(tiny_model: Path, tmp_path: Path, size: dict[str, int]) -> None:
    (name,) = size
    with pytest.raises(ValueError, match=rf"expected a {name} divisible by 4 for .*, got {size[name]}"):
        worker.build(resolve(Recipe(model=str(tiny_model), **size)), tmp_path, lambda message: None)


def test_sizes_that_the_cut_cannot_take(tiny_model: Path, tmp_path: Path) -> None:
    recipe = Recipe(model=str(tiny_model), branch_id=3, height=36, components=("unet",))
    with pytest.raises(BuildError, match=r"expected latent sizes divisible by 2 at branch 3, got 9x8"):
        worker.build(resolve(recipe), tmp_path, lambda message: None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"batch": "4:2:8"}, "batch: expected MIN <= OPT <= MAX, got 4:2:8"),
        ({"branch_id": -1}, "branch_id: "),
        ({"components": ("vae",)}, "recipe: expected components with 'unet'"),
        ({"bunch": 1}, "bunch: "),
    ],
)
@pytest.mark.parametrize("as_recipe", [False, True])
def test_bad_fields(tiny_model: Path, tmp_path: Path, fields: dict[str, Any], expected: str, as_recipe: bool) -> None:
    model = Recipe(model=str(tiny_model)) if as_recipe else tiny_model
    with pytest.raises(ValueError, match=rf"^{expected}"):
        fastcache.build_engines(model, output=tmp_path / "out", **fields)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"backend": "openvino", "device": "cuda"}, "expected device cpu, which openvino runs on, got cuda"),
        ({"backend": "onnxruntime", "dtype": "fp16", "device": "cpu"}, "expected dtype fp32, which .*got fp16"),
        ({"dtype": "fp16", "device": "cpu"}, "no backend for fp16 on cpu: .*"),
        ({"backend": "inductor", "onnx_only": True}, "expected a backend that builds from ONNX .*got inductor"),
    ],
)
def test_what_cannot_be_built_here(tiny_model: Path, tmp_path: Path, fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(BackendUnavailable, match=expected):
        fastcache.build_engines(tiny_model, output=tmp_path / "out", **fields)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("backend", "asked", "expected"),
    [
        ("openvino", ("8.9",), "expected no compute capability, .* for the machine at hand, got 8.9; use tensorrt-rtx"),
        ("onnxruntime", ("8.6", "8.9"), r"got 8\.6, 8\.9; use tensorrt-rtx"),
        ("inductor", ("9.0",), "use tensorrt-rtx"),
        ("tensorrt-rtx", ("9.0",), r"expected compute capabilities that TensorRT-RTX builds for .*got 9\.0"),
    ],
)
def test_gpus_that_a_backend_does_not_build_for(
    tiny_model: Path, tmp_path: Path, backend: str, asked: tuple[str, ...], expected: str
) -> None:
    """Refused before anything is exported: the worker has not begun."""
    with pytest.raises(ValueError, match=expected):
        resolve(Recipe(model=str(tiny_model), backend=backend, compute_capability=asked))


@pytest.mark.parametrize(
    ("model", "fields", "expected"),
    [
        ("no/such-model", {}, "expected a model folder, a hub id that can be reached, or demo, got 'no/such-model'"),
        ("no such model", {}, "expected a model folder, a hub id"),
        ("sd15", {}, "sd15 is an architecture without weights: add --random-weights"),
        ("sd16", {"random_weights": True}, r"expected a preset with random weights \(sd15, .*, got 'sd16'"),
        ("sd15", {"random_weights": True, "components": ("unet", "vae")}, r"components of sd15 \(unet\), got vae"),
    ],
)
def test_models_that_are_not_there(tmp_path: Path, model: str, fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        fastcache.build_engines(model, output=tmp_path / "out", **fields)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def damaged_models() -> Iterator[tuple[str, Callable[[Path], object], str]]:
    def pickle_only(folder: Path) -> None:
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))

    yield "pickle", pickle_only, r"expected safetensors weights in .*unet, got pickled weights \(diffusion_pytorch_mo"
    for name, value, expected in (
        ("_class_name", "FluxPipeline", "expected a pipeline of .*, got FluxPipeline"),
        ("_class_name", ["StableDiffusionPipeline"], "expected a pipeline of .*, got "),
        ("unet", ["diffusers", "UNet3DConditionModel"], "unet of .* to be of class UNet2DConditionModel, got .*UNet3D"),
        ("unet", ["mine", "UNet2DConditionModel"], "unet of .* to be of class UNet2DConditionModel, got .*mine"),
        ("vae", "x", "vae of .* to be of class AutoencoderKL or AutoencoderTiny, got x"),
        ("text_encoder", ["transformers", "T5EncoderModel"], "text_encoder of .*, got .*T5EncoderModel"),
    ):
        yield f"{name}={value}", lambda f, n=name, v=value: edit_json(f / "model_index.json", **{n: v}), expected
    yield "list", lambda f: (f / "model_index.json").write_text("[]"), "expected a JSON object in .*model_index.json"
    yield "no JSON", lambda f: (f / "model_index.json").write_text("{"), "expected a JSON file .*model_index.json"
    yield "no index", lambda f: (f / "model_index.json").unlink(), r"expected a model folder .*model_index\.json"
    yield "no unet", lambda f: shutil.rmtree(f / "unet"), "expected a unet folder in "
    yield "no config", lambda f: (f / "unet" / "config.json").unlink(), "expected a config.json in .*unet"
    yield "no scheduler", lambda f: shutil.rmtree(f / "scheduler"), "expected a JSON file .*scheduler_config.json"


DAMAGED_MODELS = list(damaged_models())


@pytest.mark.parametrize(("damage", "expected"), [d[1:] for d in DAMAGED_MODELS], ids=[d[0] for d in DAMAGED_MODELS])
def test_damaged_models(model_copy: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(model_copy)
    with pytest.raises(ValueError, match=expected) as caught:
        resolve(Recipe(model=str(model_copy)))
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_load(model_copy: Path) -> None:
    os.truncate(model_copy / "unet" / "diffusion_pytorch_model.safetensors", 5000)
    with pytest.raises(ValueError, match=r"cannot load the unet of ") as caught:
        find_model(str(model_copy)).load_unet()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("component", "folder"), [("vae", "vae"), ("text", "text_encoder"), ("text", "tokenizer")])
def test_components_that_are_not_there(model_copy: Path, component: Any, folder: str) -> None:
    shutil.rmtree(model_copy / folder)
    assert component not in (resolve(Recipe(model=str(model_copy))).recipe.components or ())
    with pytest.raises(ValueError, match=rf"expected components of .* \(unet, .*\), got {component}$"):
        resolve(Recipe(model=str(model_copy), components=("unet", component)))


@pytest.mark.parametrize(
    "file",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_any_file_of_a_model_changes_the_key(model_copy: Path, file: str) -> None:
    recipe = Recipe(model=str(model_copy))
    key = resolve(recipe).key
    assert resolve(recipe).key == key
    with (model_copy / file).open("ab") as stream:
        stream.write(b"\n")
    assert resolve(recipe).key != key


def test_an_infinite_number_of_a_scheduler_is_left_to_diffusers(model_copy: Path) -> None:
    """DPM-Solver's saved configuration holds lambda_min_clipped = -Infinity, its default."""
    edit_json(model_copy / "scheduler" / "scheduler_config.json", lambda_min_clipped=float("-inf"), beta_end=0.5)
    scheduler = find_model(str(model_copy)).scheduler
    assert "lambda_min_clipped" not in scheduler
    assert scheduler["beta_end"] == 0.5
