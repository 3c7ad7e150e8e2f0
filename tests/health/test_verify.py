"""`fastcache verify` beyond a flipped byte: graphs without engines, engines of another machine, and wrong ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import fastcache
from build_store import BuildStore
from fastcache import BackendUnavailable, BundleError
from fastcache.bundle.bundle import MANIFEST, Bundle, read_manifest
from fastcache.bundle.manifest import FileEntry
from fastcache.files import sha256_of
from fastcache.health.facts import engine_facts
from fastcache.health.verify import verify_bundle


def sign(folder: Path) -> None:
    """Make the manifest agree with the files as they are now, as whoever forges a bundle would."""
    manifest = read_manifest(folder)
    files = tuple(
        FileEntry(name=f.name, bytes=os.path.getsize(folder / f.name), sha256=sha256_of(folder / f.name))
        for f in manifest.files
    )
    manifest = manifest.model_copy(update={"files": files})
    write(folder, manifest.model_copy(update={"bundle_sha256": manifest.digest()}).to_json())


def write(folder: Path, manifest: dict[str, object]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def graphs(tiny_model: Path, builds: BuildStore) -> Bundle:
    return builds.bundle(tiny_model, backend="tensorrt", onnx_only=True, components=("unet",))


@pytest.mark.slow
def test_graphs_are_checked_by_their_hashes_and_not_run(graphs: Bundle) -> None:
    """The library that would build engines from them is not needed, so the manifest names no version of it."""
    assert "tensorrt" not in graphs.manifest.versions
    found = verify_bundle(graphs.path)
    assert found.problems == []
    assert found.parity is None
    assert found.not_run is not None
    assert "ONNX graphs only" in found.not_run
    assert found.to_json()["ok"]
    assert {"full", "shallow-0"} == set(engine_facts(graphs.path, graphs.manifest))
    with pytest.raises(BackendUnavailable, match="expected engines, got ONNX graphs for tensorrt only"):
        fastcache.load(graphs.path)


@pytest.mark.slow
def test_engines_of_another_machine_are_read_as_far_as_they_can_be(
    tiny_model: Path, builds: BuildStore, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    fields = {"backend": "tensorrt-rtx", "dtype": "fp16", "components": ("unet",), "compute_capability": ("8.9",)}
    folder = Path(shutil.copytree(builds.bundle(tiny_model, **fields).path, tmp_path / "rtx"))
    found = verify_bundle(folder)
    assert found.problems == []
    assert found.not_run

    engine = folder / read_manifest(folder).engines["shallow-0"].file
    engine.write_bytes(b"no engine" * 100)
    sign(folder)
    assert any("shallow-0" in problem and "valid" in problem for problem in verify_bundle(folder).problems)

    manifest = read_manifest(folder)
    older = manifest.model_copy(update={"versions": manifest.versions | {"tensorrt-rtx": "1.0"}})
    write(folder, older.model_copy(update={"bundle_sha256": older.digest()}).to_json())
    with pytest.raises(BundleError, match=r"got one for 1\.0; build it again"):
        verify_bundle(folder)


def test_an_engine_that_does_not_load(bundle_copy: Path) -> None:
    """Whoever wrote it gave it the hash that fits: a bundle's fault, not that of whoever verifies or draws."""
    (bundle_copy / "full.onnx").write_bytes(b"no graph" * 100)
    sign(bundle_copy)
    for door in (verify_bundle, lambda folder: fastcache.load(folder).runtime.engine("full")):
        with pytest.raises(
            BundleError, match=r"^expected \S*bundle\S* to load, got: .*full\.onnx.*; build the bundle again$"
        ):
            door(bundle_copy)


def test_engines_that_compute_something_else(bundle_copy: Path) -> None:
    """Hashes say that a bundle is what was signed; the reference says whether it computes what the model does."""
    weights = bundle_copy / "unet.weights"
    values = np.fromfile(weights, np.float32)
    values[len(values) // 2 :] *= 1.5
    values.tofile(weights)
    sign(bundle_copy)
    (problem,) = verify_bundle(bundle_copy).problems
    assert problem.startswith("expected errors up to 0.001, got ")
