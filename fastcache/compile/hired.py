"""The process that builds a bundle, which may be started before it is known what to build.

It imports PyTorch and diffusers, for seconds, and so does its parent: `begin` lets both do so at once. Its order
(`worker.py`) is the first line of its standard input; it ends when that closes, however its parent ends.
Imports neither of the two itself.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import IO


@dataclass(frozen=True)
class Hired:
    """A process that waits for its order, and the file that its errors go to.

    A file: a pipe that nobody reads until the end would stop the process once it is full.
    """

    process: subprocess.Popen[bytes]
    log: IO[str]

    def end(self) -> None:
        """Kill it, with whatever it started, unless it has ended well."""
        with self.log, suppress(BrokenPipeError), self.process:
            if self.process.poll() != 0:
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class _Surroundings:
    """What a process was started in."""

    folder: str
    variables: dict[str, str]

    @classmethod
    def here(cls) -> _Surroundings:
        return cls(os.getcwd(), {"PYTHONPATH": "", **os.environ})

    def are_here(self) -> bool:
        """Whether they are this process's. What PyTorch and others set when they are imported is new, and no change."""
        return self.folder == os.getcwd() and self.variables.items() <= _Surroundings.here().variables.items()


_begun: list[tuple[_Surroundings, Hired]] = []


def begin() -> None:
    """Start the process for this one's next build. Without one it is killed at the end."""
    if not _begun:
        _begun.append((_Surroundings.here(), _start()))
        atexit.register(_let_go)


def hire() -> Hired:
    """The process that was begun, if it finds what a new one would, or a new one."""
    if _begun and _begun[0][0].are_here():
        return _begun.pop()[1]
    _let_go()
    return _start()


def _start() -> Hired:
    log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (`Hired.end` closes it)
    command = [sys.executable, "-P", "-m", "fastcache.compile.worker"]
    pipe = subprocess.PIPE
    return Hired(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, start_new_session=True), log)


def _let_go() -> None:
    while _begun:
        _begun.pop()[1].end()
