"""A real server for the tests: uvicorn on a free port of this machine, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fastcache.serve.http.app import create_app
from fastcache.serve.http.limits import Limits
from fastcache.serve.http.server import Server, listen
from fastcache.serve.http.service import Service
from fastcache.serve.models.listed import Offer

# No test can tell a limit of steps by waiting, so the tiny model may take as many as its scheduler has.
LIMITS = Limits(max_batch=4, queue=64, max_steps=1000)
GENERATE = "/v1/images/generations"


@dataclass
class Running:
    """A server that runs, and a client that knows its address."""

    service: Service
    server: Server
    client: httpx.Client
    port: int
    _thread: threading.Thread

    def draw(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        body = {"prompt": "a", "num_inference_steps": 4, "seed": 0, **fields}
        return self.client.post(GENERATE, json=body, headers=headers)

    def metric(self, name: str) -> float:
        """The value of a metric, by its name with labels as Prometheus writes them."""
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " "))

    def until(self, true: Callable[[], bool]) -> None:
        """Wait for something that the server will do."""
        for _ in range(30_000):
            if true():
                return
            time.sleep(0.01)
        raise TimeoutError("it did not happen in 300 s")

    def end(self) -> None:
        self.server.end()
        self._thread.join()


@contextlib.contextmanager
def running(
    offer: Path | Offer,
    *,
    limits: Limits | None = None,
    wait: bool = True,
    **options: Any,
) -> Generator[Running]:
    service = Service(offer, limits, threads=1)
    server = Server(create_app(service, **options), service)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}", timeout=60, limits=httpx.Limits(max_connections=200)
    ) as client:
        served = Running(service, server, client, port, thread)
        try:
            if wait:
                served.until(lambda: client.get("/readyz").status_code == 200)
            yield served
        finally:
            served.end()


def schemathesis_command(port: int, examples: int, key: str) -> list[str]:
    """Examine a running server by so many examples an operation; nonzero where it does what it does not declare."""
    config = str(Path(__file__).with_name("schemathesis.toml"))
    options = ["--max-examples", str(examples), "--no-color", "--request-timeout", "120", "--seed", "1"]
    options += ["--header", f"Authorization: Bearer {key}", "--suppress-health-check", "all"]
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", config, "run"]
    return [*command, f"http://127.0.0.1:{port}/openapi.json", *options]
