"""Long work in pieces -> one JSON file that grows by a piece at a time, so that a kill loses one piece at most.

Each piece runs in a process of its own, `PROGRAM piece DESCRIPTION ANSWER FOLDER`, which begins with `end_with_parent`
and is ended with all that it has started when the time is up. Knows nothing about what the pieces do.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcache.files import write_json

Say = Callable[[str], None]


@dataclass(frozen=True)
class Piece:
    """One thing to do. `description` is JSON, and with the commit it is what makes a result still the right one.

    `share` is how much of the whole time the piece may take; `obstacle` says why it need not be started.
    """

    name: str
    description: dict[str, Any]
    share: float = 1.0
    obstacle: str | None = None


class Board:
    """The results so far, by name of the piece, and the file they are in."""

    def __init__(self, file: Path, environment: dict[str, Any]) -> None:
        self.file, self._commit = file, environment.get("commit")
        self.result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"pieces": {}}
        self.result["environment"] = environment

    def is_done(self, piece: Piece) -> bool:
        """Whether there is a result for just this piece, of this commit."""
        found = self.result["pieces"].get(piece.name, {"skipped": ""})
        return "skipped" not in found and (found["piece"], found["commit"]) == (piece.description, self._commit)

    def tries(self, piece: Piece) -> int:
        """How often the piece was started in vain."""
        return self.result["pieces"].get(piece.name, {}).get("tries", 0)

    def put(self, piece: Piece, found: dict[str, Any]) -> None:
        self.result["pieces"][piece.name] = found | {"piece": piece.description, "commit": self._commit}
        self.save()

    def save(self) -> None:
        write_json(self.file, self.result)


def run_pieces(program: Path, pieces: Sequence[Piece], board: Board, minutes: float, least_s: float, say: Say) -> None:
    """Do what the board does not hold yet, in order, those that failed before last."""
    end = time.monotonic() + 60 * minutes
    for piece in sorted((p for p in pieces if not board.is_done(p)), key=board.tries):
        seconds, tries = min(end - time.monotonic(), 60 * minutes * piece.share), board.tries(piece)
        if piece.obstacle is not None:
            board.put(piece, {"skipped": piece.obstacle})
        elif seconds < least_s:
            board.put(piece, {"skipped": "no time was left; run the same command again", "tries": tries})
        else:
            say(f"{piece.name} (up to {seconds:.0f} s)")
            start = time.monotonic()
            found = in_own_process(program, piece, seconds)
            found |= {"took_s": round(time.monotonic() - start, 1)}
            board.put(piece, found | ({"tries": tries + 1} if "skipped" in found else {}))
    board.save()


def in_own_process(program: Path, piece: Piece, seconds: float) -> dict[str, Any]:
    """The answer of a piece's process, or why there is none. Whatever is in its temporary folder goes with it."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        command = [sys.executable, str(program), "piece", json.dumps(piece.description), str(answer), folder]
        with log.open("wb") as stream:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=stream, stderr=stream, start_new_session=True
            )
            try:
                child.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                return {"skipped": f"did not finish within {seconds:.0f} s", "log": last_lines(log)}
            finally:
                end_session(child)
        if child.returncode != 0:
            lines = last_lines(log)
            return {"skipped": f"ended with code {child.returncode}: {lines[-1] if lines else ''}", "log": lines}
        return json.loads(answer.read_text(encoding="utf-8"))


def end_with_parent() -> None:
    """Let this process, and all of its session, end when the one that started it does, however that ended."""

    def wait() -> None:
        while os.read(0, 4096):  # until the other end is gone
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def end_session(child: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and whatever of its session is still running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


def last_lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-20:]
