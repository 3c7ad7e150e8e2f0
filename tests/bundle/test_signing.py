"""A bundle that somebody signed: opened with that key only, and refused before anything of it is read."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import fastcache
from fastcache import BackendUnavailable, Bundle, BundleError, FastCacheHelper
from fastcache.bundle.bundle import MANIFEST, add_signature, open_bundle, read_manifest
from fastcache.bundle.manifest import Manifest
from fastcache.bundle.signing import SIGNATURE, signer

PEM = serialization.Encoding.PEM
Command = Callable[..., Any]


def write_private(file: Path, key: Any, encryption: Any = None) -> None:
    form = serialization.PrivateFormat.PKCS8
    file.write_bytes(key.private_bytes(PEM, form, encryption or serialization.NoEncryption()))


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """The two files that openssl makes: a private key, and its public half."""
    private, public, key = folder / f"{name}.pem", folder / f"{name}.pub.pem", ed25519.Ed25519PrivateKey.generate()
    write_private(private, key)
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "own")


@pytest.fixture
def signed(bundle_copy: Path, tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    add_signature(bundle_copy, signer(keys[0]), by_way_of=tmp_path)
    return bundle_copy


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_there_is_signed_and_not_built_again(
    tiny_model: Path, tiny_bundle: Bundle, bundle_copy: Path, keys: tuple[Path, Path]
) -> None:
    before, beside, said = names(bundle_copy), names(bundle_copy.parent), []
    private, public = keys
    for _ in range(2):
        fastcache.build_engines(tiny_model, dtype="fp32", output=bundle_copy, sign=private, progress=said.append)
    assert said == [f"{bundle_copy} is up to date"] * 2
    assert names(bundle_copy) == sorted([*before, SIGNATURE])
    assert names(bundle_copy.parent) == beside
    assert open_bundle(bundle_copy, public).trusted == public
    assert open_bundle(bundle_copy) == Bundle(bundle_copy, tiny_bundle.manifest)  # whoever has no key does as before


@pytest.mark.slow
def test_a_build_that_is_signed(tiny_model: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    out = tmp_path / "out"
    fastcache.build_engines(tiny_model, output=out, components=("unet",), sign=str(keys[0]))
    assert open_bundle(out, str(keys[1])).manifest.components == ("unet",)


def test_a_signature_that_cannot_be_written_leaves_nothing(
    tiny_model: Path, bundle_copy: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:3])
        raise OSError(28, "No space left on device", str(path))

    before = names(bundle_copy), names(bundle_copy.parent)
    monkeypatch.setattr("fastcache.bundle.bundle.write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        fastcache.build_engines(tiny_model, dtype="fp32", output=bundle_copy, sign=keys[0])
    assert (names(bundle_copy), names(bundle_copy.parent)) == before


def reseal(folder: Path) -> None:
    """Another manifest, whose own hash is right."""
    manifest = read_manifest(folder).model_copy(update={"build_seconds": 1.0})
    changed = manifest.model_copy(update={"bundle_sha256": manifest.digest()})
    (folder / MANIFEST).write_text(json.dumps(changed.to_json()))


def by_another(folder: Path) -> None:
    private, _ = write_keys(folder.parent, "another")
    add_signature(folder, signer(private), by_way_of=folder.parent)


def linked(folder: Path) -> None:
    (folder / SIGNATURE).rename(folder.parent / "aside")
    (folder / SIGNATURE).symlink_to(folder.parent / "aside")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "unsigned": (lambda folder: (folder / SIGNATURE).unlink(), "got no manifest.sig of 64 bytes"),
    "cut short": (lambda folder: os.truncate(folder / SIGNATURE, 63), "got no manifest.sig of 64 bytes"),
    "a link": (linked, "got no manifest.sig of 64 bytes"),
    "of another key": (by_another, "got another key's signature, or a manifest changed since"),
    "resealed": (reseal, "got another key's signature, or a manifest changed since"),
    "one space more": (
        lambda folder: (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes() + b" "),
        "got another key's signature, or a manifest changed since",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_the_key_has_not_signed_is_refused_before_it_is_read(
    signed: Path, keys: tuple[Path, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, reason = DAMAGES[name]
    damage(signed)
    monkeypatch.setattr(Manifest, "model_validate_json", lambda *_: pytest.fail("it was read"))
    with pytest.raises(BundleError, match=rf"^expected {signed} to be signed by the key of {keys[1]}, {reason}; .*$"):
        fastcache.load(signed, trusted=keys[1])


@pytest.mark.parametrize("name", ["cut short", "a link"])
def test_what_is_no_signature_is_an_unknown_file_without_a_key_too(signed: Path, name: str) -> None:
    DAMAGES[name][0](signed)
    with pytest.raises(BundleError, match=r"^manifest\.sig in "):
        open_bundle(signed)


def test_a_changed_file_under_a_right_signature(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "unet.weights").write_bytes(b"others")
    with pytest.raises(BundleError, match=r"^unet\.weights in .* has 6 bytes instead of"):
        open_bundle(signed, keys[1])


def test_every_door_refuses(signed: Path, keys: tuple[Path, Path], tmp_path: Path, command: Command) -> None:
    assert command("verify", signed, "--trusted-key", keys[1]).out.startswith(f"{signed}: ")
    reseal(signed)
    for door in (
        ("verify", signed, "--json"),
        ("generate", "--engines", signed, "--prompt", "a", "--output", tmp_path / "a.png"),
        ("serve", "--engines", signed, "--port", "0"),
    ):
        said = command(*door, "--trusted-key", keys[1])
        assert (said.code, said.out) == (4, "")
        assert f"error: expected {signed} to be signed by the key of {keys[1]}, got another key's" in said.err
    assert command("verify", signed).code == 0


def test_a_pipeline_keeps_its_key(signed: Path, keys: tuple[Path, Path]) -> None:
    kept = pickle.dumps(fastcache.load(signed, trusted=keys[1]))
    assert pickle.loads(kept).bundle.trusted == keys[1]
    reseal(signed)
    with pytest.raises(BundleError, match="to be signed by"):
        pickle.loads(kept)


def test_a_helper_takes_a_key(signed: Path, keys: tuple[Path, Path], tiny_model: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    FastCacheHelper(pipe, engines=signed, trusted=keys[1])
    for engines in (None, open_bundle(signed)):
        with pytest.raises(ValueError, match=r"^expected trusted with the folder of engines, got it without; "):
            FastCacheHelper(pipe, engines=engines, trusted=keys[1])
    reseal(signed)
    with pytest.raises(BundleError, match="to be signed by"):
        FastCacheHelper(pipe, engines=signed, trusted=keys[1])


def test_without_the_library(signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(BackendUnavailable, match=r"expected the package cryptography .*; run: pip install"):
        open_bundle(signed, keys[1])
    open_bundle(signed)


def test_files_that_hold_no_such_key(tiny_model: Path, signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    locked, other, text = (tmp_path / name for name in ("locked.pem", "other.pem", "a.txt"))
    write_private(locked, ed25519.Ed25519PrivateKey.generate(), serialization.BestAvailableEncryption(b"x"))
    write_private(other, ec.generate_private_key(ec.SECP256R1()))
    text.write_text("of something else")
    for file in (public, locked, other, text, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"^expected sign to be a PEM .* private key, got .*: .*; make one "):
            fastcache.build_engines(tiny_model, output=signed, sign=file)
    for file in (private, other, text, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"^expected trusted key to be .* public key, got .*: .*; make it "):
            fastcache.load(signed, trusted=file)
