"""The process that builds may be begun ahead: it builds what it is then told, and never stays behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fastcache.compile import hired

BEGIN = "from fastcache.compile import hired; hired.begin(); pid = hired._begun[0][1].process.pid; print(pid)\n"
RESOLVE = """
from fastcache.compile.builder import resolve
from fastcache.bundle.recipe import recipe_from
resolve(recipe_from({"model": "demo", "backend": "onnxruntime"}))
"""
HIRE = "one = hired.hire(); print(one.process.pid); one.end()\n"


def run(script: str) -> list[int]:
    """The process ids that a program prints."""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    return [int(line) for line in ran.stdout.split()]


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process that another test has begun."""
    monkeypatch.setattr(hired, "_begun", [])


def test_what_was_begun_is_hired_once(clean: None) -> None:
    hired.begin()
    hired.begin()
    first, second = hired.hire(), hired.hire()
    assert first.process.pid != second.process.pid
    for one in (first, second):
        assert one.process.poll() is None
        one.end()
        assert is_gone(one.process.pid)


def test_one_that_was_begun_elsewhere_is_let_go(clean: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path of a recipe would mean another file to it."""
    hired.begin()
    ((_, begun),) = hired._begun
    monkeypatch.chdir(tmp_path)
    one = hired.hire()
    assert begun.process.returncode is not None
    assert psutil.Process(one.process.pid).cwd() == str(tmp_path)
    one.end()


def test_it_ends_without_an_order_when_its_parent_does() -> None:
    (pid,) = run(BEGIN)
    assert is_gone(pid)


@pytest.mark.slow
def test_what_a_command_does_before_it_builds_changes_nothing_for_it() -> None:
    begun, given = run(BEGIN + RESOLVE + HIRE)
    assert begun == given
    assert is_gone(begun)


@pytest.mark.slow
def test_it_ends_by_itself_where_its_input_closes(clean: None) -> None:
    one = hired.hire()
    out, _ = one.process.communicate(timeout=300)
    one.log.seek(0)
    assert (one.process.returncode, out, one.log.read()) == (0, b"", "")
    one.log.close()
