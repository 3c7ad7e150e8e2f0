"""Values of wrong types, ranges and shapes for every flag of every command: one line that names it, and an exit code.

Where a command would begin long work, it ends instead: what is tried is what comes before.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import fastcache
from fastcache import Bundle, CachePlan, FastCachePipeline
from fastcache.cli import app, main


def commands_of(group: Any, name: str = "") -> dict[str, Any]:
    """Every command by its words, those of groups among them."""
    found = {} if not name else {name: group}
    for word, command in getattr(group, "commands", {}).items():
        found |= commands_of(command, f"{name} {word}".strip())
    return found


COMMANDS = commands_of(typer.main.get_command(app))
FLAGS = [(name, each) for name, command in COMMANDS.items() for each in command.params if each.name != "help"]
VALUES = [
    *("", "-1", "0", "1", "0.5", "nan", "1e400", "9" * 30, "abc", "two\nlines", "nowhere/at/all", "/proc", "FILE"),
    *(",", "1:2", "2:1", "8x8", "draft", "ddim", "sigma", "cuda", "x" * 3000),
]
# With 1 every flag is given every value, which takes four minutes of one core.
SHARE = int(os.environ.get("FASTCACHE_TEST_SHARE", "6"))
LONG_WORK = (
    "compile.builder._run_worker",
    "bench.bench.run_bench",
    "bench.end_to_end.run_end_to_end",
    "bench.sweep.sweep",
    "bench.kernels.bench_kernels",
    "evaluate.evaluate.evaluate",
    "analysis.measure.analyse",
    "analysis.probes.probe",
    "planning.fitting.Fitting",
    "planning.planning.kept_calibration",
    "serve.http.server._serve",
    "serve.cluster.batch._ray",
)
_PROMPTS = "--prompts prompts.txt"
# By command, what it is asked for beside the flag that is tried; of several each.
BASES: dict[str, list[str]] = {
    "demo": ["--output demo"],
    "doctor": [""],
    "build-engines": ["--model MODEL --output out", "--recipe recipe.toml --output out"],
    "inspect": ["BUNDLE", "MODEL --branches"],
    "verify": ["BUNDLE"],
    "generate": ["--engines BUNDLE --prompt x --steps 1 --output x.png"],
    "bench": ["--engines BUNDLE --steps 2", "--model MODEL --steps 2", "--model MODEL --sweep", "--kernels"],
    "plan": [
        f"--engines BUNDLE --steps 4 --output p.json {wish}"
        for wish in ("--uniform 2", "--nonuniform 2", f"--refreshes 2 {_PROMPTS}", f"--budget 2 {_PROMPTS}")
    ],
    "evaluate": ["--engines BUNDLE --plan plan.json --prompts prompts.txt --output evaluation"],
    "analyze": ["--model MODEL --steps 2 --prompts prompts.txt --output analysis"],
    "serve": ["--engines BUNDLE --port 0"],
    "batch": ["--engines BUNDLE --prompts prompts.txt --output batch"],
    "models": ["--folder BUNDLE"],
    "models prune": ["--dry-run"],
    "export-triton": ["--engines BUNDLE --output triton"],
}


class Begun(BaseException):
    """The work has begun."""


Run = Callable[[list[str]], tuple[int | None, str]]


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Bundle) -> FastCachePipeline:
    return fastcache.load(tiny_bundle.path, threads=1)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_model: Path,
    pipe: FastCachePipeline,
) -> Run:
    """A command's exit code, none where long work began, and its standard error."""

    def begin(*_: Any, **__: Any) -> None:
        raise Begun

    for name in LONG_WORK:
        monkeypatch.setattr(f"fastcache.{name}", begin)
    monkeypatch.setattr("fastcache.pipeline.pipeline.FastCachePipeline", lambda _: pipe)  # loaded once
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def called(arguments: list[str]) -> tuple[int | None, str]:
        Path("plan.json").write_text(CachePlan.uniform(4, 2).to_json())
        Path("prompts.txt").write_text("a\nb\n")
        Path("recipe.toml").write_text(f"model = {json.dumps(str(tiny_model))}")
        monkeypatch.setattr(sys, "argv", ["fastcache", *arguments])
        try:
            main()
            code: int | None = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Begun:
            code = None
        return code, capsys.readouterr().err

    return called


def test_every_command_has_something_that_it_is_asked_for() -> None:
    assert BASES.keys() == COMMANDS.keys()


def filled(text: str, tiny_bundle: Bundle, tiny_model: Path) -> list[str]:
    known = {"BUNDLE": str(tiny_bundle.path), "MODEL": str(tiny_model)}
    return [known.get(word, word) for word in text.split()]


@pytest.mark.slow  # some 850 command lines
@pytest.mark.parametrize(("command", "flag"), FLAGS, ids=[f"{name} {flag.name}" for name, flag in FLAGS])
def test_any_value_is_taken_or_refused_in_one_line_that_names_it(
    command: str, flag: Any, run: Run, tiny_bundle: Bundle, tiny_model: Path
) -> None:
    first = zlib.crc32(f"{command} {flag.name}".encode()) % SHARE  # every flag has its own sixth of the values
    for base in BASES[command]:
        for value in VALUES[first::SHARE]:
            Path("a-file.txt").write_text("of something else")  # which a command may take for its output
            value = str(Path("a-file.txt").resolve()) if value == "FILE" else value
            arguments = with_flag([*command.split(), *filled(base, tiny_bundle, tiny_model)], flag, value)
            code, said = run(arguments)
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            shown = " ".join(arguments)[:200], said[:400]
            assert code in (None, 0, 2, 3, 4), shown
            assert len(errors) == (code not in (None, 0)), shown
            assert "Traceback" not in said, shown
            assert not errors or names(errors[0], flag, value), shown


def with_flag(arguments: list[str], flag: Any, value: str) -> list[str]:
    """The command line with one flag of another value, or one more."""
    if flag.param_type_name == "argument":
        at = next(i for i, word in enumerate(arguments) if i and not word.startswith("-"))
        return [*arguments[:at], *arguments[at + 1 :], "--", value]
    name = flag.opts[0]
    if name in arguments:
        at = arguments.index(name)
        arguments = [*arguments[:at], *arguments[at + (1 if flag.is_flag else 2) :]]
    if flag.nargs == 2:
        return [*arguments, name, value, "1"]
    return [*arguments, f"{name}={value}"]


def names(line: str, flag: Any, value: str) -> bool:
    """Whether a line names a flag, or else shows a value that only it can have."""
    plain = re.sub(r"[^a-z0-9]+", "_", line.lower())
    called = {re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") for name in (flag.name, *flag.opts)}
    if flag.name in ("folder", "engines", "refiner"):
        called.add("bundle")
    if flag.multiple or flag.name == "arms":
        called |= {name.removesuffix("s") for name in called}
    return any(name in plain for name in called) or (len(value) > 3 and value[:20] in line)
