"""tools/gpu_carry.py: what a machine without a network lacks goes there in portions, and is whole again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gpu_carry as carry
import pytest


def test_what_is_carried_is_what_the_card_lacks() -> None:
    found = carry.missing(carry.WANTED)
    assert {"diffusers", "deepcache", "pydantic", "pydantic-core", "fastapi"} <= found.keys()
    assert not found.keys() & carry.ON_CARD
    assert "fastcache-diffusion" not in found  # the checkout is that
    everything = carry.missing(carry.WANTED, frozenset())
    assert everything.keys() > found.keys() | {"torch"}
    with pytest.raises(ValueError, match="expected no-such-package to be installed here"):
        carry.missing([*carry.WANTED, "no-such-package"])


def test_files_go_into_portions_and_are_whole_again(tmp_path: Path) -> None:
    files = {"a.whl": b"a" * 10, "b.whl": bytes(range(250)), "c.whl": b"c" * 15}
    (tmp_path / "wheels").mkdir()
    for name, content in files.items():
        (tmp_path / "wheels" / name).write_bytes(content)
    made = carry.pack(sorted((tmp_path / "wheels").iterdir()), tmp_path, 100)
    assert [place.name for place in made] == ["1", "2", "3"]
    for place in made:
        assert sum(part.stat().st_size for part in place.iterdir() if part.name != carry.LISTED) <= 100
    target = tmp_path / "there"
    said = [
        # as on the card, before anything is installed
        subprocess.run(
            [sys.executable, "-I", carry.__file__, str(place), str(target)], capture_output=True, text=True, check=True
        ).stdout.strip()
        for place in reversed(made)
    ]
    assert said == ["more portions are to come"] * 2 + ["3 files are whole"]
    assert {name: (target / name).read_bytes() for name in files} == files
    assert "pip install" in carry.bring_command(made[2], last=True)
    assert "pip install" not in carry.bring_command(made[0], last=False)


def test_a_file_that_was_damaged_on_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"wheel")
    (place,) = carry.pack([tmp_path / "a.whl"], tmp_path, 100)
    (part,) = (part for part in place.iterdir() if part.name != carry.LISTED)
    part.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"expected a\.whl as it was packed, got another"):
        carry.join(place, tmp_path / "there")
    assert not (tmp_path / "there" / "a.whl").exists()


def test_the_checkout_counts_and_leaves_room() -> None:
    checkout = carry.checkout_bytes(Path(carry.__file__).parents[1])
    assert Path(carry.__file__).stat().st_size < checkout < carry.MOST_BYTES
    with pytest.raises(ValueError, match="expected room beside the checkout, got -1 bytes"):
        carry.portions({"a": 1}, -1)
