"""Connections that ask for nothing, read nothing, or close one side; and a server that nobody hears."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastcache import Bundle
from fastcache.serve.http.limits import Limits
from fastcache.serve.http.log import Unblocked
from serve.serving import GENERATE, Running, running

pytestmark = pytest.mark.skipif(os.name != "posix", reason="descriptors and signals of POSIX")


def posted(**fields: Any) -> bytes:
    body = json.dumps({"prompt": "a", "seed": 0, **fields}).encode()
    head = (
        f"POST {GENERATE} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@contextlib.contextmanager
def connected(port: int, count: int = 1, receive_bytes: int | None = None) -> Generator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        opened = list[socket.socket]()
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            if receive_bytes is not None:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            one.settimeout(60)
            one.connect(("127.0.0.1", port))
            opened.append(one)
        yield opened


def everything(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.fixture(scope="module")
def few(tiny_bundle: Bundle) -> Iterator[Running]:
    """A server for eight connections, which waits a second for a client that reads nothing."""
    limits = Limits(max_batch=4, max_steps=1000, max_connections=8, write_timeout_s=1)
    with running(tiny_bundle.path, limits=limits) as served:
        yield served


def test_idle_connections_make_room(few: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastcache.serve"), connected(few.port, 40):
        for _ in range(5):
            assert httpx.get(f"http://127.0.0.1:{few.port}/livez", timeout=20).status_code == 200
        assert len(few.server.server_state.connections) <= 8
    assert caplog.text.count("8 connections are open, the most there may be") == 1


def test_where_all_are_busy_a_new_one_is_told_to_come_again(few: Running) -> None:
    few.until(lambda: not few.server.server_state.connections)
    with connected(few.port, 8) as busy:
        for one in busy:
            one.sendall(posted(num_inference_steps=900, stream=True, stream_steps=True))
        for one in busy:
            assert one.recv(12) == b"HTTP/1.1 200"
        with connected(few.port) as (late,):
            answer = everything(late)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 5" in answer
        assert b"too_busy" in answer
    few.until(lambda: few.service.desk.outstanding == 0)
    assert httpx.get(f"http://127.0.0.1:{few.port}/livez").status_code == 200


def test_an_answer_that_nobody_reads_is_cut(few: Running) -> None:
    """Several megabytes of answers on one connection, more than the two ends hold for it."""
    request = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"
    with connected(few.port, receive_bytes=4096) as (deaf,):
        few.until(lambda: len(few.server.server_state.connections) >= 1)
        deaf.sendall(request * 400)
        few.until(lambda: not few.server.server_state.connections)
    assert httpx.get(f"http://127.0.0.1:{few.port}/livez").status_code == 200


def test_one_that_closes_its_own_side_is_answered(few: Running) -> None:
    with connected(few.port) as (asking,):
        asking.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        asking.shutdown(socket.SHUT_WR)
        assert everything(asking).startswith(b"HTTP/1.1 200")
    with connected(few.port) as (asking,):
        asking.sendall(posted(num_inference_steps=900))
        asking.shutdown(socket.SHUT_WR)
        answer = everything(asking)
    assert answer.startswith(b"HTTP/1.1 499")
    assert b"expected the connection open in both directions" in answer
    few.until(lambda: few.service.desk.outstanding == 0)


def test_a_stream_that_is_left_ends_in_silence(few: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), connected(few.port) as (asking,):
        asking.sendall(posted(num_inference_steps=900, stream=True, stream_steps=True))
        assert asking.recv(12) == b"HTTP/1.1 200"
        asking.shutdown(socket.SHUT_WR)
        everything(asking)
    few.until(lambda: few.service.desk.outstanding == 0)
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []


def test_time_counts_from_arrival(few: Running) -> None:
    """The request's last byte comes when its second is over."""
    request = posted(num_inference_steps=1, timeout=1)
    with connected(few.port) as (slow,):
        slow.sendall(request[:-1])
        time.sleep(1.5)
        slow.sendall(request[-1:])
        answer = http.client.HTTPResponse(slow)
        answer.begin()
        assert answer.status == 504
        assert b"job_late" in answer.read()


def test_what_is_prepared_for_one_that_left_is_dropped(few: Running) -> None:
    """Thirty new tables for clients that are gone: those that were not begun are never made."""
    assert few.service.served is not None
    made: Any = few.service.served.executor.schedule._tables
    before = made.cache_info().currsize
    for first in range(0, 30, 6):
        with connected(few.port, 6) as leaving:
            for k, one in enumerate(leaving):
                one.sendall(posted(num_inference_steps=300 + first + k, sampler="unipc"))
            few.until(lambda: few.service.desk.outstanding > 0)
        few.until(lambda: few.service.desk.outstanding == 0)
    assert few.draw(num_inference_steps=1).status_code == 200
    assert made.cache_info().currsize - before < 30


def started(process: subprocess.Popen[bytes]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(rb"listening on (\S+)", line):
            url = found[1].decode()
            while httpx.get(f"{url}/readyz").status_code != 200:
                time.sleep(0.05)
            return url
    raise RuntimeError("it ended before it listened")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sizes of pipes")
def test_few_descriptors_many_signals_and_nobody_who_reads_the_log(tiny_bundle: Bundle, tmp_path: Path) -> None:
    command = f"ulimit -n 256; exec {sys.executable} -m fastcache.cli serve --engines {tiny_bundle.path} --port 0"
    # Unbuffered, or Python reads ahead what is to fill the pipe.
    with subprocess.Popen(["bash", "-c", f"{command} --threads 1"], stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stderr is not None
        url = started(process)
        port = int(url.rpartition(":")[2])
        with connected(port, 400):
            assert httpx.get(f"{url}/livez", timeout=20).status_code == 200
        said = b""
        for _ in range(10):
            process.send_signal(signal.SIGHUP)
            time.sleep(0.05)
        while said.count(b"serving tiny-model") < 2:
            said += process.stderr.read(4096) or b""
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        with httpx.Client(base_url=url, timeout=60) as client:
            body = {"prompt": "a", "num_inference_steps": 1}
            assert {client.post(GENERATE, json=body).status_code for _ in range(60)} == {200}
        process.send_signal(signal.SIGTERM)
        said += process.stderr.read() or b""
        assert process.wait(timeout=120) == 0
    assert b"Traceback" not in said
    assert said.count(b"connections are open, the most there may be") == 1
    assert 2 <= said.count(b"loading every bundle again") < 10  # at once, and what may have changed since


def test_lines_that_cannot_be_written_are_counted() -> None:
    reading, writing = os.pipe()
    log, handler = logging.Logger("test"), Unblocked(writing)
    log.addHandler(handler)
    try:
        for number in range(2000):  # of 64 KiB at most, and each of a hundred bytes
            log.warning("%0100d", number)
        taken = os.read(reading, 1 << 20)
        log.warning("again")
        last = os.read(reading, 1 << 20).decode()
    finally:
        os.close(writing)
        os.close(reading)
    written = taken.count(b"\n")
    assert 100 < written < 2000
    assert last == f"again [{2000 - written} lines before this were dropped]\n"
    log.warning("the reader is gone")
