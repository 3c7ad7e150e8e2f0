"""A server's log lines -> standard error, without ever waiting for whoever reads it.

A pipe that nobody reads is full after some hundred lines, and the thread that writes the next one stops for good.
"""

from __future__ import annotations

import logging
import os
import select

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
