"""docs/compatibility.md names everything there is; `tools/compatibility.py --check`, a quarter of an hour, runs it."""

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
