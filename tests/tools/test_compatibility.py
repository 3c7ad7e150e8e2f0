"""docs/compatibility.md says what comes out of running it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.slow
def test_the_document_is_what_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    compatibility = importlib.import_module("compatibility")
    assert compatibility.differences(compatibility.document(tmp_path, lambda _: None)) == []
