"""Long work in pieces -> one JSON file that grows by a piece at a time, so that a kill loses one piece at most.

Each piece runs in a process of its own, `PROGRAM piece DESCRIPTION ANSWER FOLDER`, which begins with `end_with_parent`
and is ended with all that it has started when the time is up. What it prints is passed on at once, and kept in a log
beside the JSON file. Knows nothing about what the pieces do.
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
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcache.files import write_json

Say = Callable[[str], None]


@dataclass(frozen=True)
class Piece:
    """One thing to do. `description` is JSON, and with the commit it is what makes a result still the right one.

    `limit_s` is what the piece may take, all that is left where it is None; `obstacle` says why it need not be started.
    """

    name: str
    description: dict[str, Any]
    limit_s: float | None = None
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
    """Do what the board does not hold yet, in order, those that failed before last.

    Where there is no time left for a piece, it and all after it are left for the next call.
    """
    end, is_over = time.monotonic() + 60 * minutes, False
    board.file.parent.mkdir(parents=True, exist_ok=True)
    for piece in sorted((p for p in pieces if not board.is_done(p)), key=board.tries):
        left, tries = end - time.monotonic(), board.tries(piece)
        is_over = is_over or left < (piece.limit_s or least_s)
        if piece.obstacle is not None:
            board.put(piece, {"skipped": piece.obstacle})
        elif is_over:
            board.put(piece, {"skipped": "no time was left; run the same command again", "tries": tries})
        else:
            seconds = piece.limit_s or left
            say(f"== {piece.name} (up to {seconds:.0f} s)")
            start = time.monotonic()
            found = in_own_process(program, piece, seconds, board.file.with_suffix(".log"), say)
            found |= {"took_s": round(time.monotonic() - start, 1)}
            board.put(piece, found | ({"tries": tries + 1} if "skipped" in found else {}))
    board.save()


def in_own_process(program: Path, piece: Piece, seconds: float, log: Path, say: Say) -> dict[str, Any]:
    """The answer of a piece's process, or why there is none. Whatever is in its temporary folder goes with it."""
    with tempfile.TemporaryDirectory() as folder, log.open("ab", buffering=0) as kept:
        kept.write(f"== {piece.name}\n".encode())
        answer, lines = Path(folder) / "answer.json", deque[str](maxlen=20)
        command = [sys.executable, "-u", str(program), "piece", json.dumps(piece.description), str(answer), folder]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

        def follow() -> None:
            for line in child.stdout or ():
                kept.write(line)
                lines.append(line.decode(errors="replace").rstrip())
                say(lines[-1])

        reader = threading.Thread(target=follow, daemon=True)
        reader.start()
        try:
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"skipped": f"did not finish within {seconds:.0f} s", "log": lines_of(lines)}
        finally:
            end_session(child)
            reader.join(timeout=10)  # what left the session may still hold the other end
        if child.returncode != 0:
            last = lines_of(lines)
            return {"skipped": f"ended with code {child.returncode}: {last[-1] if last else ''}", "log": last}
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
    if child.stdin is not None:
        child.stdin.close()
    child.wait()


def lines_of(lines: Iterable[str]) -> list[str]:
    """Those that say something."""
    return [line for line in list(lines) if line]
