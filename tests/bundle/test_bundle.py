"""Invariant 6: a bundle opens only if every byte of it is the one that was built."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastcache import Bundle, BundleError
from fastcache.bundle.bundle import MANIFEST, check_files, open_bundle, publish, read_manifest, seal
from fastcache.files import write_whole
from fastcache_engines import choose

PROMISED = [
    "schema",
    "model",
    "weights_sha256",
    "branch_id",
    "cut",
    "backend",
    "dtype",
    "profiles",
    "versions",
    "device",
    "files",
    "height",
    "width",
    "components",
    "engines",
    "parity",
    "bundle_sha256",
]
OF_EACH_KIND = ["unet.weights", "full.onnx", "vae_decoder.weights", "tokenizer/tokenizer.json", "reference.safetensors"]


def refused(folder: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_the_manifest_holds_what_is_promised(tiny_bundle: Bundle) -> None:
    manifest = json.loads((tiny_bundle.path / MANIFEST).read_text())
    assert [name for name in PROMISED if name not in manifest] == []
    assert manifest["schema"] == "fastcache.bundle/4"
    assert (manifest["branch_id"], manifest["cut"], manifest["backend"]) == (0, "projected", choose("cpu", "fp32")[0])
    assert manifest["components"] == ["unet", "vae", "text"]
    assert (manifest["height"], manifest["width"], manifest["model"]["tokens"]) == (32, 32, 8)
    assert manifest["versions"].keys() >= {"fastcache", "torch", "diffusers", manifest["backend"]}
    assert {entry["name"] for entry in manifest["files"]} >= set(OF_EACH_KIND)
    assert all(entry.keys() == {"name", "bytes", "sha256"} for entry in manifest["files"])
    assert manifest["parity"]["full_vs_model"] < 1e-5
    assert manifest["parity"]["shallow_vs_full"] < 1e-5


def test_a_bundle_opens_wherever_it_lies_and_in_two_threads_at_once(tiny_bundle: Bundle, bundle_copy: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        opened = list(pool.map(open_bundle, [bundle_copy, str(bundle_copy)]))
    assert opened == [Bundle(bundle_copy, tiny_bundle.manifest)] * 2
    assert opened[0].engine_path("full") == bundle_copy / "full.onnx"


@pytest.mark.parametrize("name", OF_EACH_KIND)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit(bundle_copy: Path, name: str, where: str) -> None:
    content = bytearray((bundle_copy / name).read_bytes())
    content[{"first": 0, "middle": len(content) // 2, "last": -1}[where]] ^= 1
    (bundle_copy / name).write_bytes(content)
    assert refused(bundle_copy).startswith(f"{name} in ")


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_a_truncated_file(bundle_copy: Path, name: str) -> None:
    os.truncate(bundle_copy / name, 100)
    message = refused(bundle_copy)
    assert message.startswith(f"{name} in ")
    assert "has 100 bytes instead of" in message


def test_two_files_swapped(bundle_copy: Path) -> None:
    one, other, aside = bundle_copy / "full.onnx", bundle_copy / "shallow-0.onnx", bundle_copy.parent / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    assert refused(bundle_copy).startswith("full.onnx in ")


def test_a_missing_file(bundle_copy: Path) -> None:
    (bundle_copy / "unet.weights").unlink()
    assert refused(bundle_copy).startswith(f"unet.weights in {bundle_copy} is missing")


@pytest.mark.parametrize("name", ["extra.bin", "tokenizer/extra.json", ".hidden"])
def test_an_extra_file(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).write_bytes(b"")
    assert refused(bundle_copy).startswith(f"{name} in {bundle_copy} is not named in the manifest")


def test_a_link_to_the_same_bytes_outside(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / "unet.weights").rename(tmp_path / "outside")
    (bundle_copy / "unet.weights").symlink_to(tmp_path / "outside")
    assert refused(bundle_copy).startswith(f"unet.weights in {bundle_copy} is a link")


def test_a_linked_folder_of_the_same_files(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / "tokenizer").rename(tmp_path / "outside")
    (bundle_copy / "tokenizer").symlink_to(tmp_path / "outside")
    assert refused(bundle_copy).startswith(f"tokenizer in {bundle_copy} is a link")


def test_a_linked_manifest(bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / MANIFEST).rename(tmp_path / "outside")
    (bundle_copy / MANIFEST).symlink_to(tmp_path / "outside")
    assert MANIFEST in refused(bundle_copy)


def test_a_special_file(bundle_copy: Path) -> None:
    (bundle_copy / "unet.weights").unlink()
    os.mkfifo(bundle_copy / "unet.weights")  # reading it would wait for ever
    assert "unet.weights" in refused(bundle_copy)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.update(branch_id=1), "was changed after the build"),
        (lambda m: m["model"]["scheduler"].update(prediction_type="epsilon"), "was changed after the build"),
        (lambda m: m["files"].pop(), "was changed after the build"),
        (lambda m: m["parity"].update(full_vs_model=0.0), "was changed after the build"),
        (lambda m: m.update(schema="fastcache.bundle/2"), "schema"),
        (lambda m: m.update(height="tall"), "height"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m.pop("files"), "files"),
        (lambda m: m["files"][0].update(bytes=-1), "files.0.bytes"),
        (lambda m: m["parity"].update(tolerance=float("nan")), "parity.tolerance"),
        (lambda m: m["model"]["scheduler"].update(beta_end=float("inf")), "was changed after the build"),
    ],
)
def test_an_edited_manifest(bundle_copy: Path, change: Callable[[dict[str, Any]], object], expected: str) -> None:
    edit_manifest(bundle_copy, change)
    message = refused(bundle_copy)
    assert str(bundle_copy / MANIFEST) in message
    assert expected in message


@pytest.mark.parametrize("content", [b"", b"not JSON", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"schema": 1}'])
def test_a_manifest_that_is_none(bundle_copy: Path, content: bytes) -> None:
    (bundle_copy / MANIFEST).write_bytes(content)
    assert str(bundle_copy / MANIFEST) in refused(bundle_copy)


def test_a_huge_manifest_is_not_read(bundle_copy: Path) -> None:
    os.truncate(bundle_copy / MANIFEST, 2**40)  # sparse: reading it would need a TiB of memory
    assert f"got {2**40}" in refused(bundle_copy)


def test_an_engine_that_lies_outside(bundle_copy: Path) -> None:
    """Not even a manifest with a right hash can name a file that was not checked."""
    manifest = read_manifest(bundle_copy)
    engine = manifest.engines["full"].model_copy(update={"file": "../full.onnx"})
    changed = manifest.model_copy(update={"engines": manifest.engines | {"full": engine}})
    changed = changed.model_copy(update={"bundle_sha256": changed.digest()})
    (bundle_copy / MANIFEST).write_text(json.dumps(changed.to_json()))
    assert "'../full.onnx'" in refused(bundle_copy)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / MANIFEST).mkdir(parents=True)
    for path in (tmp_path / "missing", tmp_path / "file", tmp_path, tmp_path / "folder"):
        assert f"got '{path}'; build one with" in refused(path)


def test_an_engine_that_was_not_built(bundle_copy: Path) -> None:
    manifest = read_manifest(bundle_copy)
    only_unet = manifest.model_copy(update={"engines": {"full": manifest.engines["full"]}, "components": ("unet",)})
    with pytest.raises(BundleError, match=r"expected a vae_decoder engine in .*, got a bundle of unet; build it"):
        Bundle(bundle_copy, only_unet).engine_path("vae_decoder")


def test_all_wrong_files_are_listed(bundle_copy: Path) -> None:
    manifest = read_manifest(bundle_copy)
    (bundle_copy / "full.onnx").unlink()
    (bundle_copy / "extra").write_bytes(b"")
    problems = {check.name: check.problem for check in check_files(bundle_copy, manifest) if check.problem}
    assert problems == {"full.onnx": "is missing", "extra": "is not named in the manifest"}


def test_sealing_is_opening(bundle_copy: Path, tiny_bundle: Bundle) -> None:
    fields = tiny_bundle.manifest.to_json()
    (bundle_copy / MANIFEST).unlink()
    assert seal(bundle_copy, fields) == open_bundle(bundle_copy).manifest == tiny_bundle.manifest


def test_write_whole_leaves_the_old_content_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "file", b"old")

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=r"No space left"):
        write_whole(tmp_path / "file", b"new")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_publish_over_another(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    publish(tmp_path / "new", tmp_path / "old")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["old", "old/new"]
