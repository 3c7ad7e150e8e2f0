"""A server's log lines -> standard error, without ever waiting for whoever reads it.

A pipe that nobody reads is full after some hundred lines, and the thread that writes the next one stops for good.
"""

from __future__ import annotations

import json
import logging
import os
import select
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Final

REQUEST_ID: Final = ContextVar("request_id", default="")  # of the request that is being answered

_LONGEST_BYTES = 4096  # PIPE_BUF on Linux: what a pipe that can be written to takes at once


class Unblocked(logging.Handler):
    """Writes each line to a descriptor if it can be written at once, else drops it and says so with the next one."""

    def __init__(self, descriptor: int = 2) -> None:
        super().__init__()
        self._descriptor, self._dropped = descriptor, 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            said = f" [{self._dropped} lines before this were dropped]" if self._dropped else ""
            line = self.format(record).encode("utf-8", "backslashreplace")[: _LONGEST_BYTES - 100] + said.encode()
            if self._is_ready():
                os.write(self._descriptor, line + b"\n")
                self._dropped = 0
            else:
                self._dropped += 1
        except (OSError, ValueError):  # the reader is gone, or the descriptor is closed
            self._dropped += 1

    def _is_ready(self) -> bool:
        if os.name != "posix":
            return True  # select takes sockets only there
        waiting = select.poll()  # not select(), whose descriptors end at 1024
        waiting.register(self._descriptor, select.POLLOUT)
        return bool(waiting.poll(0))


class Lines(logging.Formatter):
    """A line of text: the time, the level, the request's name where there is one, and what is said."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(request)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        name = REQUEST_ID.get()
        record.request = f"{name} " if name else ""
        return super().format(record)


class JsonLines(logging.Formatter):
    """A line of JSON: `time` (UTC), `level`, `message`, `request_id` where there is one, `error` with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        said = {"time": when, "level": record.levelname.lower(), "message": record.getMessage()}
        if name := REQUEST_ID.get():
            said["request_id"] = name
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)[-2000:]
        return json.dumps(said)
