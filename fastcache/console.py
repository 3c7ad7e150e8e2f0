"""How the command line speaks: results on stdout, notes and progress on stderr, errors in one line with an exit code.

Knows nothing about what the commands do.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastcache.pace import Pace

notes = Console(stderr=True, highlight=False)
LEVELS: Final = {  # how much is said on stderr, as FASTCACHE_LOG has it
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}
_LOUDER: Final = {"-v": 1, "--verbose": 1, "-q": -1, "-qq": -2, "--quiet": -1}
GLOBAL_FLAGS: Final = ("--debug", *_LOUDER)  # which may stand at any place


class CheckFailed(Exception):
    """A check did not pass; the result itself is on stdout."""


def exit_code(error: Exception) -> int:
    """2 bad input, 3 this machine cannot, 4 a check failed, 5 a build failed; 1 is a bug."""
    from fastcache.errors import BackendUnavailable, BuildError, BundleError

    codes = {BackendUnavailable: 3, BundleError: 4, CheckFailed: 4, BuildError: 5, ValueError: 2, OSError: 2}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


def end(message: str, code: int) -> NoReturn:
    """Say in one line what went wrong, and leave."""
    if message:
        notes.print(f"[red]error:[/red] {escape(' '.join(message.split()))}", soft_wrap=True)
    raise SystemExit(code)


def debug_asked() -> bool:
    return "--debug" in sys.argv[1:]


def log_level() -> int:
    """How much to say, by FASTCACHE_LOG and then by -v and -q, a level each.

    Raises: `ValueError` for a level that there is not.
    """
    named = os.environ.get("FASTCACHE_LOG") or "info"
    if named not in LEVELS:
        raise ValueError(f"expected FASTCACHE_LOG out of {', '.join(LEVELS)}, got {named!r}; set one of these")
    levels = list(LEVELS.values())
    place = levels.index(LEVELS[named]) + sum(_LOUDER.get(argument, 0) for argument in sys.argv[1:])
    return levels[max(0, min(place, len(levels) - 1))]


def set_up(level: int) -> None:
    """Bring the process's warnings and logs to a level; other libraries' are for debugging only."""
    if level > logging.DEBUG:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # in the environment, so that workers inherit it
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # says three times that there is none
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
    else:
        logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
        logging.getLogger("fastcache").setLevel(logging.DEBUG)
    logging.disable(level - 1 if level > logging.INFO else logging.NOTSET)
    warnings.showwarning = _warn if level <= logging.WARNING else lambda *_, **__: None


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    notes.print(f"warning: {message}", markup=False, soft_wrap=True)


def told() -> bool:
    """Whether progress and hints are wanted."""
    return log_level() <= logging.INFO


def next_step(text: str) -> None:
    """What to type next, as a command's last line on stderr."""
    if told():
        notes.print(f"next: {text}", markup=False, soft_wrap=True)


@contextmanager
def progress(shares: Mapping[str, float] | None = None) -> Generator[Callable[[str], None]]:
    """A function that shows what is being done, and how long the rest takes where that can be told.

    One live line on a terminal, plain lines elsewhere. `shares` are of `Pace`.
    """
    pace = Pace(shares or {})
    if not told():
        yield lambda message: None
    elif notes.is_terminal:
        yield from _live(pace)
    else:
        yield lambda message: _line(pace, message)


def _line(pace: Pace, message: str) -> None:
    pace.hear(message)
    left = pace.left()
    notes.print(f"{message} ({left})" if left else message, soft_wrap=True, markup=False)


def _live(pace: Pace) -> Generator[Callable[[str], None]]:
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Left(ProgressColumn):
        """Counts down between two messages, too."""

        def render(self, task: Task) -> Text:
            return Text(pace.left())

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), Left()
    with Progress(*columns, console=notes, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def say(message: str) -> None:
            pace.hear(message)
            bar.update(task, description=escape(message), completed=pace.share or 0.0)
            bar.tasks[0].total = None if pace.share is None else 1.0

        yield say


def print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=1, allow_nan=False) + "\n")


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None
) -> None:
    """A table on stdout, or another console, as wide as the terminal, or 120 characters elsewhere; figures right."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        figures = all(row[i][:1].isdigit() or row[i][:1] in ("", "-") for row in rows)
        table.add_column(column, justify="right" if i and figures else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 120
    (console or Console(highlight=False, markup=False, width=width)).print(table)


def figure(number: float | None, form: str = ".1f", unit: str = "") -> str:
    """A number for a table, or a dash where there is none."""
    return "-" if number is None else f"{number:{form}}{unit}"
