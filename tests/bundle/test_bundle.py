"""Invariant 6: a bundle opens only if every byte of it is the one that was built."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fastcache
from fastcache import Bundle, BundleError
from fastcache.bundle.bundle import MANIFEST, check_files, open_bundle, publish, read_manifest, seal
from fastcache.bundle.manifest import digest_of
from fastcache.bundle.parity import relative_error
from fastcache.files import write_whole
from fastcache.health.facts import engine_facts
from fastcache.health.verify import verify_bundle
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
    assert manifest["schema"] == "fastcache.bundle/5"
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


def test_a_manifest_may_lack_a_field_that_is_newer(bundle_copy: Path, tiny_bundle: Bundle) -> None:
    """A field that says nothing where it is missing makes no bundle of before another version's."""
    document = json.loads((bundle_copy / MANIFEST).read_text())
    assert document["recipe"].pop("preview_vae") is None
    assert document.pop("vae_tile") is None
    document["bundle_sha256"] = digest_of(document)
    assert document["bundle_sha256"] != tiny_bundle.manifest.bundle_sha256
    (bundle_copy / MANIFEST).write_text(json.dumps(document))
    assert open_bundle(bundle_copy).manifest.bundle_sha256 == document["bundle_sha256"]
    edit_manifest(bundle_copy, lambda m: m.update(height="32"))
    assert "was changed after the build" in refused(bundle_copy)


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit a manifest and give it the hash that goes with it, as whoever forges a bundle would."""
    edit_manifest(folder, change)
    edit_manifest(folder, lambda m: m.update(bundle_sha256=digest_of(m)))


FORGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "engine outside": (lambda m: m["engines"]["full"].update(file="../full.onnx"), "'../full.onnx'"),
    "engine is a device": (lambda m: m["engines"]["full"].update(file="/dev/zero"), "'/dev/zero'"),
    "engine not listed": (lambda m: m["engines"]["full"].update(file="other.onnx"), "'other.onnx'"),
    "file outside": (lambda m: m["files"][0].update(name="../x"), "inside the bundle, got '../x'"),
    "file absolute": (lambda m: m["files"][0].update(name="/etc/passwd"), "inside the bundle, got '/etc/passwd'"),
    "file of Windows": (lambda m: m["files"][0].update(name="C:\\x"), "inside the bundle"),
    "file unclean": (lambda m: m["files"][0].update(name="tokenizer//x"), "inside the bundle"),
    "file unnamed": (lambda m: m["files"][0].update(name=""), "inside the bundle, got ''"),
    "file twice": (lambda m: m["files"].append(m["files"][0]), "each file once"),
    "no branches": (lambda m: m.update(branches=[]), "expected branches, each once and 0 first, got []"),
    "other branches": (lambda m: m.update(branches=[1]), "expected branches, each once and 0 first, got [1]"),
    "branches twice": (lambda m: m.update(branches=[0, 0]), "each once"),
    "no such branch": (lambda m: m.update(branches=[0, 9]), "expected branches from 0 to 3, got [0, 9]"),
    "no shallow engine": (lambda m: m["engines"].pop("shallow-0"), "engine for the pass shallow-0, got no shallow-0"),
    "no engines": (lambda m: m.update(engines={}), "an engine for the pass full, got no full"),
    "a pass of nothing": (lambda m: m["passes"]["full"].update(engines=[]), "for the pass full, got no engine"),
    "no passes": (lambda m: m.update(passes={}), "expected a pass full, got none"),
    "no shallow pass": (lambda m: m["passes"].pop("shallow-0"), "expected a pass shallow-0, got full"),
    "takes what is not": (lambda m: m["passes"]["shallow-0"].update(takes=["x"]), "what full stores, got x"),
    "full takes": (lambda m: m["passes"]["full"].update(takes=["cached_feature"]), "the pass full to take and store"),
    "no U-Net": (lambda m: m.update(components=["vae"]), "expected components with unet"),
    "no sizes": (lambda m: m.update(sizes=[]), "expected sizes with 32x32 first, got none"),
    "other sizes": (lambda m: m.update(height=64), "expected sizes with 32x64 first, got 32x32"),
    "no profiles": (lambda m: m.update(profiles={}), "expected profiles of batch, height and width"),
    "beyond the profile": (lambda m: m["profiles"]["height"].update(min=8, opt=8, max=8), "expected a height of 8:8:8"),
    "between latents": (
        lambda m: (m.update(sizes=[{"width": 32, "height": 34}], height=34), m["profiles"]["height"].update(max=34)),
        "in steps of 4, got 34",
    ),
    "no latents": (lambda m: m["model"].update(vae_scale_factor=0), "vae_scale_factor of 1 to 4096, got 0"),
    "huge latents": (lambda m: m["model"].update(latent_channels=10**9), "latent_channels of 1 to 4096"),
    "negative tokens": (lambda m: m["model"].update(tokens=-1), "expected 0 tokens or more, got -1"),
    "no tolerance": (lambda m: m["parity"].update(tolerance=0), "a tolerance above 0"),
    "huge tensor": (lambda m: m["engines"]["full"]["inputs"][0].update(shape=["batch", 10**12]), "got 1000000000000"),
    "empty tensor": (lambda m: m["engines"]["full"]["inputs"][0].update(shape=["batch", 0]), "got 0"),
    "divided by nothing": (lambda m: m["engines"]["full"]["inputs"][0].update(shape=["height/0"]), "got 'height/0'"),
    "unknown size": (lambda m: m["engines"]["full"]["inputs"][0].update(shape=["depth"]), "got 'depth'"),
    "no dtype": (lambda m: m["engines"]["full"]["inputs"][0].update(dtype="__class__"), "got '__class__'"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_manifest_is_refused_at_every_door(bundle_copy: Path, case: str) -> None:
    """Its hash is right, so only what it says can tell: before anything of it is followed."""
    change, expected = FORGED[case]
    reseal(bundle_copy, change)
    for door in (open_bundle, read_manifest, verify_bundle):
        with pytest.raises(BundleError, match=re.escape(expected)) as caught:
            door(bundle_copy)
        assert str(bundle_copy / MANIFEST) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["/dev/zero", "full.onnx"])
def test_inspecting_follows_no_link(bundle_copy: Path, target: str) -> None:
    (bundle_copy / "shallow-0.onnx").unlink()
    (bundle_copy / "shallow-0.onnx").symlink_to(target)
    facts = engine_facts(bundle_copy, read_manifest(bundle_copy))
    assert "expected shallow-0.onnx to be a plain file of" in facts["shallow-0"]["unknown"]
    assert "nodes" in facts["full"]


def drawn(pipe: Any) -> torch.Tensor:
    return pipe("a cat", num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0)).images


def test_what_was_checked_is_what_draws(bundle_copy: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Engines are loaded when they are first needed: another bundle published meanwhile must not draw as the first."""
    plain = fastcache.load(bundle_copy)
    expected = drawn(plain)
    early, late = fastcache.load(bundle_copy), fastcache.load(bundle_copy)
    drawn(early)
    shutil.copytree(tiny_bundle.path, tmp_path / "other")
    publish(tmp_path / "other", bundle_copy)
    assert torch.equal(drawn(early), expected)  # what is loaded goes on
    with pytest.raises(BundleError, match="the bundle was replaced meanwhile: load it again"):
        drawn(late)
    assert torch.equal(drawn(fastcache.load(bundle_copy)), expected)


def _touched(folder: Path) -> None:
    file = folder / "full.onnx"
    before = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        _touched,
        lambda folder: (folder / "full.onnx").unlink(),
        lambda folder: (folder / "a.weights").write_bytes(b""),
        lambda folder: shutil.rmtree(folder),
        lambda folder: shutil.copy(folder / "full.onnx", folder / "shallow-0.onnx"),
    ],
    ids=["written again", "gone", "added", "all gone", "exchanged"],
)
def test_any_change_after_opening_is_seen(bundle_copy: Path, change: Callable[[Path], object]) -> None:
    bundle = open_bundle(bundle_copy)
    with bundle.reading():
        pass
    change(bundle_copy)
    with pytest.raises(BundleError, match="as they were when it was opened"), bundle.reading():
        pytest.fail("must not be read")


def test_a_change_while_reading_is_seen(bundle_copy: Path) -> None:
    bundle = open_bundle(bundle_copy)
    with pytest.raises(BundleError, match=r"got another full\.onnx"), bundle.reading():
        _touched(bundle_copy)


def test_a_bundle_opens_while_others_take_its_place(bundle_copy: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Two bundles that differ in a file, published in turn as a builder does; one of 411 openings used to fail."""
    others = [Path(shutil.copytree(tiny_bundle.path, tmp_path / f"spare-{i}")) for i in range(2)]
    fields = tiny_bundle.manifest.to_json()
    (others[1] / "reference.safetensors").write_bytes(b"other")
    (others[1] / MANIFEST).unlink()
    seal(others[1], fields)
    known = {read_manifest(folder).bundle_sha256 for folder in others}
    over = threading.Event()

    def replace() -> None:
        count = 0
        while not over.is_set():
            count += 1
            temporary = bundle_copy.with_name(f".{bundle_copy.name}.{count}.tmp")
            shutil.copytree(others[count % 2], temporary)
            publish(temporary, bundle_copy)
            over.wait(0.02)  # a busy machine must be able to read a bundle between two swaps

    with ThreadPoolExecutor(1) as pool:
        replacing = pool.submit(replace)
        try:
            opened = [open_bundle(bundle_copy).manifest.bundle_sha256 for _ in range(100)]
        finally:
            over.set()
        replacing.result()
    assert set(opened) == known


def test_a_bundle_whose_builder_was_killed_between_two_renames(bundle_copy: Path) -> None:
    bundle_copy.rename(bundle_copy.with_name(".bundle.1.tmp.old"))
    assert f"got '{bundle_copy}'; build one with" in refused(bundle_copy)


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
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'file'}'"):
        write_whole(tmp_path / "file", b"new")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_file_that_cannot_be_written_is_named_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=rf"No such file or directory: '{tmp_path / 'no' / 'x.png'}'$"):
        write_whole(tmp_path / "no" / "x.png", b"new")


def test_publish_over_another(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    publish(tmp_path / "new", tmp_path / "old")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["old", "old/new"]


@pytest.mark.parametrize(
    ("got", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 1.0], [0.0, 0.0], float("inf")),
        ([float("nan"), 1.0], [1.0, 1.0], float("inf")),
        ([1.0, 1.0], [1.0, float("nan")], float("inf")),
        ([float("inf")], [float("inf")], float("inf")),
    ],
)
def test_an_error_is_a_number_or_infinite(got: list[float], expected: list[float], error: float) -> None:
    assert relative_error(torch.tensor(got), torch.tensor(expected)) == error
