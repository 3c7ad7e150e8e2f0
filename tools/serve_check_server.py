"""A real `fastcache serve` process and what can be asked of it, for the programs that examine one."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import httpx
import psutil

PROMPTS = ["a large red circle at the left on a white background", "a small blue ring at the top", "a green cross"]
KINDS = ["full", "shallow"]
SAMPLERS = ["ddim", "euler", "dpm++_2m", "unipc", "pndm", "euler_a"]


class Server:
    """A `fastcache serve` process of its own."""

    def __init__(self, engines: Path | str, *options: str) -> None:
        command = [sys.executable, "-m", "fastcache.cli", "serve", "--engines", str(engines), "--port", "0", *options]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (the process writes to it until it ends)
        self.process = subprocess.Popen(command, stderr=self._log)
        self.url = ""
        while not (found := re.search(r"listening on (\S+)", self.said())):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server did not start: {self.said()}")
            time.sleep(0.1)
        self.url = found[1]
        while httpx.get(f"{self.url}/readyz").status_code != 200:
            time.sleep(0.1)

    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def ended(self, job: str) -> float:
        """When a job ended, by the server's log, to the millisecond. Units: seconds of `time.time`."""
        found = re.search(rf"^(\S+ \S+),(\d+) INFO (?:\S+ )?job {job}: [a-z_]+$", self.said(), re.MULTILINE)
        if found is None:
            raise ValueError(f"expected the end of job {job} in the server's log, got none")
        return time.mktime(time.strptime(found[1], "%Y-%m-%d %H:%M:%S")) + int(found[2]) / 1e3

    def figures(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        parts = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in parts}

    def metric(self, name: str) -> float:
        return self.figures()[name]

    def steps(self) -> float:
        figures = self.figures()
        return sum(figures[f'unet_steps_total{{kind="{kind}"}}'] for kind in KINDS)

    def footprint(self) -> dict[str, float]:
        watched = psutil.Process(self.process.pid)
        rss_mib = round(watched.memory_info().rss / 2**20, 1)
        return {"rss_mib": rss_mib, "threads": watched.num_threads(), "descriptors": watched.num_fds()}

    def idle(self) -> None:
        while (health := httpx.get(f"{self.url}/health").json())["running"] + health["waiting"]:
            time.sleep(0.02)

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait()


@contextlib.contextmanager
def served(engines: Path | str, *options: str) -> Generator[Server]:
    server = Server(engines, *options)
    try:
        yield server
    finally:
        server.end()


@contextlib.asynccontextmanager
async def client_of(server: Server) -> AsyncGenerator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        yield client


def wish(k: int, *, most_steps: int = 12) -> dict[str, Any]:
    """The kth of many different requests: other steps, samplers, plans."""
    return {
        "prompt": PROMPTS[k % 3],
        "num_inference_steps": 4 + k % (most_steps - 3),
        "sampler": SAMPLERS[k % 6],
        "seed": k,
        "cache_interval": 1 + k % 4,
    }
