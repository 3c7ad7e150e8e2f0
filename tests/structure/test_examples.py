"""Every script in examples/ runs, in a folder of its own beside one bundle, and leaves the pictures that it names."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest
from PIL import Image

from build_store import BuildStore

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


def test_the_page_lists_every_script() -> None:
    page = (EXAMPLES[0].parent / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[([\w.]+)\]", page, re.MULTILINE)) == [script.name for script in EXAMPLES]


def needs_engines(script: Path) -> bool:
    return "engines/demo" in script.read_text(encoding="utf-8")


RUNS = [pytest.param(script, id=script.stem, marks=[pytest.mark.slow] * needs_engines(script)) for script in EXAMPLES]


@pytest.mark.parametrize("script", RUNS)
def test_example_runs(
    script: Path,
    builds: BuildStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if needs_engines(script):
        shutil.copytree(builds.bundle("demo", dtype="auto").path, tmp_path / "engines" / "demo")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert said
    for name in re.findall(r"[\w-]+\.png", said):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[1] == 64
