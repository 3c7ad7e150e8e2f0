"""Loading a package writes nothing outside its folder, and leaves no folder where it fails."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from fastcache_engines.inductor.packages import unpacking


def package(folder: Path, *names: str) -> Path:
    file = folder / "full.pt2"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("full/version", "full/archive_format", "full/data/aotinductor/model/x.cpp", *names):
            archive.writestr(name, "3")
    return file


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch unpacks packages."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def loaded_by_torch(file: Path) -> None:
    from torch._C import _aoti  # pyright: ignore[reportAttributeAccessIssue] (torch's stubs leave it out)

    with unpacking(file):
        _aoti.AOTIModelPackageLoader(str(file), "model", True, 1, -1)


@pytest.mark.parametrize("name", ["../escaped", "full/../../escaped", "/tmp/escaped", "full\\..\\escaped", ".."])
def test_entries_outside_are_refused_before_anything_is_unpacked(tmp_path: Path, temporary: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"expected entries of full\.pt2 inside it, got ") as caught:
        loaded_by_torch(package(tmp_path, name))
    assert "\n" not in str(caught.value)
    assert list(temporary.iterdir()) == []
    assert not list(tmp_path.rglob("escaped"))


def test_a_load_that_fails_leaves_nothing(tmp_path: Path, temporary: Path) -> None:
    """Of what others have there, it takes nothing."""
    (temporary / "aotinductor_other").mkdir()
    with pytest.raises(RuntimeError):
        loaded_by_torch(package(tmp_path))
    assert [path.name for path in temporary.iterdir()] == ["aotinductor_other"]


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x05\x06" + bytes(10)])
def test_what_is_no_archive(tmp_path: Path, temporary: Path, content: bytes) -> None:
    (tmp_path / "full.pt2").write_bytes(content)
    with pytest.raises(ValueError, match=r"full\.pt2 is not a readable package"):
        loaded_by_torch(tmp_path / "full.pt2")
