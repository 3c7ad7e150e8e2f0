"""docs/compatibility.md says what comes out of running it; the whole takes a quarter of an hour, so a part is run."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def compatibility(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("compatibility")


def test_every_scheduler_callback_and_argument_of_diffusers_is_named(compatibility: Any) -> None:
    text = compatibility.DOCUMENT.read_text(encoding="utf-8")
    schedulers = [name for name in dir(diffusers) if re.fullmatch(r"(?!Flax)\w+Scheduler", name)]
    arguments = {name for kind in compatibility.CALLED for name in inspect.signature(kind.__call__).parameters}
    missing = {
        name
        for name in [*schedulers, *compatibility.OFFICIAL, *arguments - {"self", "kwargs"}]
        if f"`{name}`" not in text and f"`{name} " not in text
    }
    assert not missing
    assert len(schedulers) > 30


@pytest.mark.slow
def test_the_rows_of_the_schedulers_are_what_comes_out(compatibility: Any, tmp_path: Path) -> None:
    rows, _ = compatibility.schedulers(compatibility.Trials(tmp_path), lambda _: None)
    text = compatibility.DOCUMENT.read_text(encoding="utf-8")
    assert [row.markdown() for row in rows if row.markdown() not in text] == []
