"""The name on the package index: hints, the version, and the other project that is called fastcache there."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fastcache.installed import require_alone
from fastcache_engines.extras import DISTRIBUTION, install

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_distribution_is_called_what_hints_say() -> None:
    assert PROJECT["name"] == DISTRIBUTION
    assert "version" in PROJECT["dynamic"]  # read from fastcache/__init__.py, which is all that says it
    assert install("serve") == "pip install 'fastcache-diffusion[serve]'"


def test_every_extra_that_is_named_anywhere_is_there() -> None:
    places = [
        ROOT / "README.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("fastcache/**/*.py"),
        *ROOT.glob("engines/**/*.py"),
    ]
    named = set[str]()
    for place in places:
        text = place.read_text(encoding="utf-8")
        assert "pip install 'fastcache[" not in text, place
        named |= set(re.findall(r"\binstall\([\"']([\w-]+)[\"']\)", text))
        for extras in re.findall(r"fastcache-diffusion\[([\w,-]+)\]", text):
            named |= set(extras.split(","))
    assert {"cpu", "openvino", "serve", "ray", "bench", "lora", "sign"} <= named
    assert named <= set(PROJECT["optional-dependencies"])


def test_beside_the_other_project_nothing_starts(tmp_path: Path) -> None:
    require_alone(tmp_path)
    (tmp_path / "_lrucache.cpython-311-x86_64-linux-gnu.so").touch()
    with pytest.raises(ImportError, match=r"the other project called fastcache .*; run: pip uninstall"):
        require_alone(tmp_path)


def test_the_command_says_so_in_one_line(tmp_path: Path) -> None:
    """In a folder as pip leaves it: the other project's files over those of this one."""
    package = tmp_path / "fastcache"
    package.mkdir()
    for place in (ROOT / "fastcache").iterdir():
        (package / place.name).symlink_to(place)
    (package / "__init__.py").unlink()
    (package / "__init__.py").write_text("__version__ = '1.1.0'\n")
    (package / "_lrucache.so").touch()
    (package / "installed.py").unlink()
    (package / "installed.py").write_text((ROOT / "fastcache" / "installed.py").read_text(encoding="utf-8"))
    script = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT / 'engines')!r}]\n"
        "sys.meta_path[:] = [one for one in sys.meta_path if 'Redirecting' not in type(one).__name__]\n"
        "sys.argv = ['fastcache', 'doctor']\nfrom fastcache.cli import main\nmain()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "the other project called fastcache" in result.stderr
