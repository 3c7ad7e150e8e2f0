"""How the command line speaks: results on stdout, notes and progress on stderr, errors in one line with an exit code.

Knows nothing about what the commands do.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

notes = Console(stderr=True, highlight=False)


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


def quiet_libraries() -> None:
    """Other libraries' warnings and progress bars are not for a user of this one."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # in the environment, so that workers inherit it
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.showwarning = lambda message, *_, **__: notes.print(f"warning: {message}", markup=False, soft_wrap=True)


@contextmanager
def progress() -> Generator[Callable[[str], None]]:
    """A function that shows what is being done: one live line on a terminal, plain lines elsewhere."""
    if not notes.is_terminal:
        yield lambda message: notes.print(message, soft_wrap=True, markup=False)
        return
    with notes.status("starting") as status:
        yield lambda message: status.update(escape(message))


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
