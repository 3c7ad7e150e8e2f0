"""A connection's bytes -> requests and answers, within bounds: for a head, for an unread answer, and in number.

uvicorn's HTTP/1.1 with what it leaves open. Knows connections; knows nothing about routes or images.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import Any, Final, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from fastcache.serve.http.errors import ApiError
from fastcache.serve.http.guard import HALF_CLOSED

_log = logging.getLogger("fastcache.serve")

_HEAD_TIMEOUT_S: Final = 10.0  # for a request's line and headers, and before the first one
_LOOK_S: Final = 1.0  # between two looks for answers that nobody reads
_SAY_AGAIN_S: Final = 60.0
_OWN_DESCRIPTORS: Final = 96  # engines, libraries, sockets of asyncio's own: a loaded server has about 40 open


def places(most: int) -> tuple[int, int]:
    """How many connections may be open and how many may wait to be accepted, at most `most` of the first.

    The process's limit of descriptors is raised as far as it may be. Beyond it `accept` fails, and asyncio tries again
    as often as connections wait, with a traceback each time: there must be descriptors left to accept and close.
    """
    limit = _raised_limit()
    if limit is None:
        return most, 128
    waiting = max(4, min(128, limit // 8))
    return max(4, min(most, limit - _OWN_DESCRIPTORS - 2 * waiting)), waiting


def _raised_limit() -> int | None:
    if os.name != "posix":
        return None
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return None if soft == resource.RLIM_INFINITY else soft


class Crowd:
    """The connections of a server, at most `most`: a new one takes the place of the one that has been idle longest."""

    def __init__(self, most: int, write_timeout_s: float, timeout_s: float) -> None:
        self.most, self.write_timeout_s, self.timeout_s = most, write_timeout_s, timeout_s
        self._open = set[Protocol]()
        self._idle = dict[Protocol, None]()  # in the order in which they became so
        self._said = -_SAY_AGAIN_S

    def enter(self, one: Protocol) -> bool:
        """Whether there is a place."""
        if len(self._open) >= self.most:
            self._say()
            longest = next(iter(self._idle), None)
            if longest is None:
                return False
            self.leave(longest)
            longest.transport.abort()
        self._open.add(one)
        self._idle[one] = None
        return True

    def leave(self, one: Protocol) -> None:
        self._open.discard(one)
        self._idle.pop(one, None)

    def rest(self, one: Protocol, *, idle: bool) -> None:
        """A connection has begun or ended to wait for a request."""
        self._idle.pop(one, None)
        if idle and one in self._open:
            self._idle[one] = None

    def _say(self) -> None:
        now = time.monotonic()
        if now - self._said >= _SAY_AGAIN_S:
            self._said = now
            _log.warning("%d connections are open, the most there may be: idle ones make room for new ones", self.most)

    async def cut_unread(self) -> None:
        """For as long as it runs, end connections whose client does not read its answer."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for one in list(self._open):
                one.cut_unread(self.write_timeout_s, self.timeout_s)


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, which waits only so long, and refuses a malformed request in JSON."""

    def __init__(self, *arguments: Any, crowd: Crowd, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._crowd = crowd
        self._waiting: asyncio.TimerHandle | None = None
        self._half_closed = False
        self._unread, self._unread_since, self._moved = 0, 0.0, 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._crowd.enter(self):
            error = ApiError(503, "the server has no connection free; ask again", code="too_busy", retry_after_s=5)
            self._refuse(error, b"Service Unavailable")
            return
        self._waiting = self.loop.call_later(_HEAD_TIMEOUT_S, self._too_slow)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_idle:
            self._stop_waiting()
            self._crowd.rest(self, idle=False)
        elif self._waiting is None:
            self._waiting = self.loop.call_later(_HEAD_TIMEOUT_S, self._too_slow)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open for the answer: a client may close its own side once it has asked.

        One that left altogether looks the same, so the routes are told that it did; what they answer then is sent.
        """
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        cycle.scope.setdefault("state", {})[HALF_CLOSED] = self._half_closed = True
        cycle.message_event.set()
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._half_closed:
            self.transport.close()
        self._crowd.rest(self, idle=self._is_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._crowd.leave(self)
        super().connection_lost(exc)

    def cut_unread(self, write_timeout_s: float, timeout_s: float) -> None:
        """End the connection if nothing of its answer was taken for so long, or not all of it for longer."""
        now, unread = self.loop.time(), self.transport.get_write_buffer_size()
        if not self._unread:
            self._unread_since = now
        if unread != self._unread:
            self._unread, self._moved = unread, now
        elif unread and (now - self._moved > write_timeout_s or now - self._unread_since > timeout_s):
            self.transport.abort()

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being answered."""
        cycle = cast("RequestResponseCycle | None", self.cycle)  # None before the first one
        return cycle is None or cycle.response_complete

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _too_slow(self) -> None:
        self._waiting = None
        if self._is_idle:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "expected a request of HTTP/1.1", code="invalid_request"), b"Bad Request")

    def _refuse(self, error: ApiError, reason: bytes) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        answer = error.response()
        answer.headers["connection"] = "close"
        head = h11.Response(status_code=error.status, headers=answer.raw_headers, reason=reason)
        for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
