"""What every HTTP request passes before it reaches a route: who asks, from where, and how much of it there is.

A plain ASGI layer, so that it sees bodies as they arrive and a client that leaves. Knows nothing about images.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import stat
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Final

from fastcache.serve.http.errors import ApiError, internal
from fastcache.serve.http.limits import Limits
from fastcache.serve.http.log import REQUEST_ID
from fastcache.serve.http.metrics import Metrics
from fastcache.serve.http.tracing import traced

_log = logging.getLogger("fastcache.serve")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Keys of a request's `state`: when it began to arrive (`time.monotonic`), the digest of its API key, and whether its
# client will send no more, as one that left.
ARRIVED: Final = "arrived"
OWNER: Final = "owner"
HALF_CLOSED: Final = "half_closed"

PROBES: Final = frozenset({"/livez", "/readyz"})
_SHORTEST_KEY: Final = 16
_MOST_SIGNS: Final = 20_000  # of JSON's structure in a body with pictures: as many as a plan may need


def read_keys(path: Path, flag: str = "--api-key-file") -> tuple[bytes, ...]:
    """The digests of the API keys in a file, one a line. Raises: `ValueError` naming the file, never a key."""
    try:
        mode = path.stat().st_mode if os.name == "posix" else 0
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected {flag} to be a file of API keys, got {path}: {type(error).__name__}") from None
    if mode & stat.S_IWOTH:
        raise ValueError(f"expected {flag} to be a file that others cannot write, got {path}; run: chmod 600 {path}")
    if mode & stat.S_IROTH:
        _log.warning("every user of this machine can read the API keys in %s; run: chmod 600 %s", path, path)
    if not lines or any(len(line) < _SHORTEST_KEY for line in lines):
        raise ValueError(
            f"expected {flag} {path} to hold one key a line, of {_SHORTEST_KEY} characters or more; "
            "make one with: openssl rand -hex 32"
        )
    return tuple(hashlib.sha256(line.encode()).digest() for line in lines)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Refuses what no route should see: no key, a foreign Host or Origin, too large a head or body.

    `keys` are digests of API keys, none for an open server; `hosts` the names it may be asked by, None for any (only
    with keys: a page of another site that had its name point here has none). `open_paths` need no key, and what lies
    below `admin_path` one of the `admin_keys`, where there are any. Bodies for `upload_paths` may hold pictures.
    """

    def __init__(
        self,
        app: App,
        *,
        limits: Limits,
        metrics: Metrics,
        keys: Sequence[bytes] = (),
        hosts: Iterable[str] | None = None,
        open_paths: Iterable[str] = PROBES,
        admin_keys: Sequence[bytes] = (),
        admin_path: str = "/v1/admin/",
        upload_paths: Iterable[str] = (),
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._admin_keys, self._admin_path = tuple(admin_keys), admin_path
        self._keys = (*keys, *admin_keys) if keys else ()
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._open, self._uploads = frozenset(open_paths), frozenset(upload_paths)
        self._held_bytes = 0  # of bodies larger than others may be

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no web sockets here
        headers = {
            name: values[-1] for name in (b"traceparent", b"tracestate") if (values := _all(scope["headers"], name))
        }
        name, request_id = scope["method"], _request_id(scope["headers"])
        token = REQUEST_ID.set(request_id)
        try:
            with traced(name, {key.decode(): value for key, value in headers.items()}) as tell:
                sent = _Sent(send, request_id)
                await self._answer(scope, receive, sent)
                route = getattr(scope.get("route"), "path", "other")
                tell({"http.route": route, "http.response.status_code": sent.status or 499, "request.id": request_id})
        finally:
            REQUEST_ID.reset(token)

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, sent: _Sent) -> None:
        start, body = time.monotonic(), None
        state: dict[str, Any] = scope.setdefault("state", {})
        state[ARRIVED] = start
        try:
            # A replica asks for no key: the front that passed the request on has, and says whose it was.
            state[OWNER] = self._admit(scope) or state.get(OWNER)
            body = await self._read_body(receive, self._most_bytes(scope))
            if body is not None:
                _check_structure(scope, body, self._limits)
                await self._app(scope, _replayed(body, receive, state), sent)
                if state.get(HALF_CLOSED) and sent.status and not sent.complete:  # a stream, for one that left
                    await sent({"type": "http.response.body", "body": b""})
        except ApiError as error:
            self._metrics.rejected.labels(error.code).inc()
            answer = error.response()
            if body is None and _has_body(scope["headers"]):  # the rest of it will not be read
                answer.headers["connection"] = "close"
            await answer(scope, receive, sent)
        except Exception as error:
            # Only where it happened: an error's words may hold a prompt.
            where = "".join(traceback.format_tb(error.__traceback__))
            _log.error("%s in a request:\n%s", type(error).__name__, where)
            if not sent.status:
                await internal().response()(scope, receive, sent)
            elif not sent.complete:
                raise ConnectionAbortedError("the answer had begun") from None
        finally:
            self._held_bytes -= _excess(body, self._limits)
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(sent.status or 499)).inc()
            took = (time.monotonic() - start) * 1e3
            _log.debug("%s %s %s in %.1f ms", scope["method"], route, sent.status or "client left", took)

    def _admit(self, scope: MutableMapping[str, Any]) -> bytes | None:
        """The digest of the key that was given, if one is needed. Raises: `ApiError`, first what is cheapest to say."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if sum(len(name) + len(value) + 4 for name, value in headers) > self._limits.max_header_bytes:
            most = self._limits.max_header_bytes
            raise ApiError(431, f"expected at most {most} bytes of headers, got more", code="headers_too_large")
        self._check_host(_all(headers, b"host"))
        self._check_origin(_all(headers, b"origin"), _all(headers, b"host"))
        is_admins = bool(self._admin_keys) and scope["path"].startswith(self._admin_path)
        keys = self._admin_keys if is_admins else self._keys
        needed = bool(keys) and scope["path"] not in self._open
        owner = _check_key(_all(headers, b"authorization"), keys) if needed else None
        lengths = _all(headers, b"content-length")
        most = self._most_bytes(scope)
        if lengths and lengths[0].isdecimal() and int(lengths[0][:20]) > most:
            raise _too_large(most)
        return owner

    def _most_bytes(self, scope: MutableMapping[str, Any]) -> int:
        limits = self._limits
        return limits.max_upload_bytes if scope["path"] in self._uploads else limits.max_body_bytes

    async def _read_body(self, receive: Receive, most: int) -> bytes | None:
        """A request's whole body, or None of a client that left.

        Raises: `ApiError` for a body too large or too slow, or one too many of those with pictures.
        """
        body, counted = bytearray(), 0
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise _too_large(most)
                    excess = _excess(body, self._limits)
                    self._held_bytes, counted = self._held_bytes + excess - counted, excess
                    if self._held_bytes > self._limits.max_uploads_bytes:
                        message = "the server has as many pictures at hand as it can hold; ask again"
                        raise ApiError(503, message, code="too_busy", retry_after_s=5)
                    if not message.get("more_body", False):
                        counted = 0  # until it is answered
                        return bytes(body)
        except TimeoutError:
            seconds = self._limits.body_timeout_s
            raise ApiError(408, f"expected the body within {seconds:g} s", code="body_timeout") from None
        finally:
            self._held_bytes -= counted

    def _check_host(self, hosts: Sequence[str]) -> None:
        if len(hosts) != 1:
            raise ApiError(400, f"expected one Host header, got {len(hosts)}", code="invalid_host")
        if self._hosts is not None and _name(hosts[0]) not in self._hosts:
            raise ApiError(403, "expected a Host that this server is known by, got another", code="invalid_host")

    def _check_origin(self, origins: Sequence[str], hosts: Sequence[str]) -> None:
        """A browser says which site's page asks: only this server's own may."""
        for origin in origins:
            if origin.lower() not in {f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https")}:
                raise ApiError(403, "expected no Origin, or this server's own, got another", code="invalid_origin")


def _check_key(given: Sequence[str], keys: Sequence[bytes]) -> bytes:
    """The digest of the key that was given. Raises: `ApiError` for none of these."""
    scheme, _, key = (given[0] if len(given) == 1 else "").partition(" ")
    digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
    fits = [hmac.compare_digest(digest, own) for own in keys]  # all of them, so that time tells nothing
    if scheme.lower() != "bearer" or not any(fits):
        raise ApiError(401, "expected an API key: Authorization: Bearer KEY", code="invalid_api_key")
    return digest


class _Sent:
    """An answer on its way: its status once it has begun, and whether it is complete."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.status, self.complete = send, 0, False
        self._request_id = request_id.encode()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-content-type-options", b"nosniff"), (b"x-request-id", self._request_id)]
            message["headers"] = [*message.get("headers", ()), *own]
        await self._send(message)
        self.complete = message["type"] == "http.response.body" and not message.get("more_body", False)


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """What the caller calls the request, if logs can hold it; else a new name."""
    given = _all(headers, b"x-request-id")
    if len(given) == 1 and re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", given[0]):
        return given[0]
    return f"req-{secrets.token_hex(12)}"


def _excess(body: bytes | bytearray | None, limits: Limits) -> int:
    """How much larger a body is than one without pictures may be."""
    return max(0, len(body or b"") - limits.max_body_bytes)


def _replayed(body: bytes, receive: Receive, state: Mapping[str, Any]) -> Receive:
    """A `receive` that gives a body already read, and then what comes: that the client leaves, or sends no more."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        if messages:
            return messages.pop()
        # It may have closed its side before the body was taken: then nothing more would wake `receive`.
        message = None if state.get(HALF_CLOSED) else await receive()
        return {"type": "http.disconnect"} if message is None or state.get(HALF_CLOSED) else message

    return replay


def _has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    lengths = _all(headers, b"content-length")
    return bool(_all(headers, b"transfer-encoding")) or any(length != "0" for length in lengths)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"expected a body of at most {most} bytes, got more", code="body_too_large")


def _check_structure(scope: MutableMapping[str, Any], body: bytes, limits: Limits) -> None:
    """Refuse JSON that is large for anything but pictures: in base64 there are no brackets, and no commas.

    A list of a million lists would take a gigabyte to read. Raises: `ApiError`.
    """
    is_form = any(kind.lower().startswith("multipart/") for kind in _all(scope["headers"], b"content-type"))
    if is_form or len(body) <= limits.max_body_bytes:
        return
    if sum(body.count(sign) for sign in b",[{") > _MOST_SIGNS:
        raise _too_large(limits.max_body_bytes)


def _all(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in headers if key.lower() == name]


def _name(host: str) -> str:
    """A Host header without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdecimal() else host).lower()
