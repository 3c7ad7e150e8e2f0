"""Who may ask: keys on every route but the probes, the Host and Origin of a browser, and how much may be sent."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastcache import Bundle
from fastcache.serve.http.guard import HALF_CLOSED, _replayed, is_loopback, read_keys
from fastcache.serve.http.limits import Limits
from fastcache.serve.http.server import serve
from serve.serving import GENERATE, Running, running

KEYS = ("the-first-key-of-two", "the-second-key-of-two")


@pytest.fixture(scope="module")
def keyed(tiny_bundle: Bundle) -> Iterator[Running]:
    keys = [hashlib.sha256(key.encode()).digest() for key in KEYS]
    with running(
        tiny_bundle.path,
        limits=Limits(max_batch=4, body_timeout_s=1, max_upload_bytes=128 * 1024),
        keys=keys,
        hosts=["127.0.0.1"],
    ) as served:
        yield served


def test_every_route_but_the_probes_needs_a_key(keyed: Running) -> None:
    asked = {"Authorization": f"Bearer {KEYS[1]}"}
    document = keyed.client.get("/openapi.json", headers=asked).json()
    routes = [(method, path) for path, methods in document["paths"].items() for method in methods]
    assert len(routes) == 10
    for method, path in [*routes, ("get", "/openapi.json"), ("get", "/nothing"), ("delete", "/livez/")]:
        refused = keyed.client.request(
            method, path.replace("{job_id}", "a").replace("{model_id}", "a"), json={} if method == "post" else None
        )
        if path in ("/livez", "/readyz"):
            assert refused.status_code == 200
            continue
        assert refused.status_code == 401, path
        assert refused.json()["error"]["type"] == "authentication_error"
        assert refused.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {KEYS[0]}", 200),
        (f"bearer {KEYS[1]}", 200),
        (f"Basic {KEYS[0]}", 401),
        (KEYS[0], 401),
        (f"Bearer {KEYS[0][:-1]}", 401),
        (f"Bearer {KEYS[0]}x", 401),
        ("Bearer", 401),
        ("Bearer é", 401),
        ("", 401),
    ],
)
def test_keys(header: str, status: int, keyed: Running) -> None:
    assert keyed.client.get("/v1/models", headers={"Authorization": header.encode()}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:80"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "127.0.0.1"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "127.0.0.1:7", "Origin": "http://127.0.0.1:7"}, 200),
        ({"Host": "127.0.0.1:7", "Origin": "http://127.0.0.1:8"}, 403),
        ({"Host": "127.0.0.1:7", "Origin": "file://127.0.0.1:7"}, 403),
    ],
)
def test_host_and_origin(headers: dict[str, str], status: int, keyed: Running) -> None:
    key = {"Authorization": f"Bearer {KEYS[0]}"}
    assert keyed.client.get("/v1/models", headers=key | headers).status_code == status
    assert keyed.client.get("/livez", headers=headers).status_code == status


def test_large_and_slow_bodies_are_not_waited_for(keyed: Running) -> None:
    key = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "application/json"}
    most = keyed.service.limits.max_body_bytes

    def post(content: Any, **headers: str) -> httpx.Response:
        return keyed.client.post(GENERATE, content=content, headers=key | headers)

    assert post(b" " * (most + 1)).status_code == 413
    assert post(iter([b" " * 50_000] * 5)).status_code == 413  # in chunks, of no length told
    assert keyed.client.get("/livez", headers={"X": "a" * 17_000}).status_code in (400, 431)

    def slow() -> Iterator[bytes]:
        for _ in range(40):
            time.sleep(0.1)
            yield b" "

    with contextlib.suppress(httpx.WriteError):  # it was refused before all was sent
        assert post(slow()).status_code == 408
    assert keyed.draw(headers=key).status_code == 200


def test_a_job_is_cancelled_by_the_key_that_asked_for_it(keyed: Running) -> None:
    own, other = ({"Authorization": f"Bearer {key}"} for key in KEYS)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(keyed.draw, headers=own, num_inference_steps=150, n=4, job_id="mine")
        keyed.until(lambda: keyed.service.desk.running > 0)
        refused = keyed.client.post("/v1/jobs/mine/cancel", headers=other)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "job_not_found")
        assert keyed.client.post("/v1/jobs/mine/cancel", headers=own).json()["status"] == "cancelled"
        assert job.result().status_code == 499
    assert keyed.client.post("/v1/jobs/mine/cancel", headers=other).status_code == 404
    assert keyed.client.post("/v1/jobs/mine/cancel", headers=own).status_code == 200


def test_a_refused_body_is_not_read(keyed: Running) -> None:
    """It has no end, and used to be read for ten seconds."""
    for headers in ("Host: evil.example", "Host: 127.0.0.1"):
        head = f"POST {GENERATE} HTTP/1.1\r\n{headers}\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
        answer = exchange(keyed, head.encode(), close=False)
        assert answer.startswith((b"HTTP/1.1 403", b"HTTP/1.1 401"))
        assert b"connection: close" in answer.lower()


def exchange(served: Running, request: bytes, *, close: bool) -> bytes:
    """What a connection is answered until the server ends it; `close` its sending side at once."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(request)
        if close:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_keys_that_others_may_write_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("\n".join(KEYS))
    for mode, refused, warned in (
        (0o600, False, False),
        (0o640, False, False),
        (0o644, False, True),
        (0o666, True, False),
    ):
        file.chmod(mode)
        caplog.clear()
        if refused:
            with pytest.raises(ValueError, match=r"that others cannot write, got .*; run: chmod 600"):
                read_keys(file)
        else:
            assert len(read_keys(file)) == 2
        assert ("every user of this machine can read" in caplog.text) == warned


def test_a_server_beyond_this_machine_needs_keys(tiny_bundle: Bundle, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "::", "example.org"):
        with pytest.raises(ValueError, match="expected --api-key-file to serve on"):
            serve(tiny_bundle.path, host=host)
    assert all(map(is_loopback, ("127.0.0.1", "127.0.0.9", "::1", "[::1]", "localhost")))
    for content in ("", "short", "long-enough-to-be-a-key\nshort"):
        (tmp_path / "keys").write_text(content)
        with pytest.raises(ValueError, match="one key a line"):
            read_keys(tmp_path / "keys")
    with pytest.raises(ValueError, match="a file of API keys"):
        read_keys(tmp_path / "missing")
    (tmp_path / "keys").write_text("\n".join(KEYS) + "\n")
    assert len(read_keys(tmp_path / "keys")) == 2


def test_one_that_closed_its_side_before_its_body_was_taken_has_left() -> None:
    async def receive() -> Any:
        raise AssertionError("nothing would wake it")

    replay = _replayed(b"body", receive, {HALF_CLOSED: True})
    assert asyncio.run(replay())["body"] == b"body"
    assert asyncio.run(replay()) == {"type": "http.disconnect"}
