"""Kill a replica of a real Ray Serve application while clients draw, and say what they saw and for how long.

Example: .venv/bin/python tools/ray_check.py --engines engines/demo --json ray.json

For one replica and for two: `failed` are the answers that were not pictures, `back_s` the seconds from the kill to a
picture that was asked for right after it. More than one failed answer a kill, one that is not 503, or more than ten
seconds end with exit code 4.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

GENERATE = "/v1/images/generations"
BODY = {"prompt": "a small blue ring at the top", "num_inference_steps": 10, "cache_interval": 3, "seed": 0}


@dataclass
class Clients:
    """Clients that draw one picture after the other; the answers by their status."""

    url: str
    count: int
    answers: Counter[int] = field(default_factory=Counter)
    stop: threading.Event = field(default_factory=threading.Event)

    def draw(self) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self.stop.is_set():
                status = client.post(GENERATE, json=BODY).status_code
                self.answers[status] += 1
                if status != 200:
                    time.sleep(0.2)

    def until(self, drawn: int) -> None:
        while self.answers[200] < drawn:
            time.sleep(0.05)


@contextlib.contextmanager
def deployed(engines: Path, replicas: int) -> Generator[str]:
    """Ray Serve on this machine, and its address."""
    import ray
    from ray import serve

    from fastcache.serve.ray import application

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    # Else Ray itself kills replicas where other programs fill the machine.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    ray.init("local", num_cpus=replicas + 1, object_store_memory=200 * 2**20, include_dashboard=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application({"engines": engines, "min_replicas": replicas, "max_replicas": replicas}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def drawing() -> list[int]:
    """The processes that draw, of this program's own Ray."""
    children = list[int]()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if ":Generator" in "".join(process.cmdline()):
                children.append(process.pid)
    return children


def loaded(url: str) -> int:
    """How many replicas have their engines."""
    answer = httpx.get(f"{url}/health")
    return answer.json()["bundles"] if answer.status_code == 200 else 0


def kills(engines: Path, replicas: int, rounds: int, clients: int) -> dict[str, Any]:
    failed, back_s = list[dict[str, int]](), list[float]()
    with deployed(engines, replicas) as url, ThreadPoolExecutor(clients) as pool:
        for _ in range(rounds):
            while loaded(url) != replicas:
                time.sleep(0.2)
            seen = Clients(url, clients)
            workers = [pool.submit(seen.draw) for _ in range(clients)]
            seen.until(2 * clients)
            killed = time.monotonic()
            os.kill(drawing()[0], signal.SIGKILL)
            while httpx.post(url + GENERATE, json=BODY, timeout=120).status_code != 200:
                time.sleep(0.1)
            back_s.append(round(time.monotonic() - killed, 2))
            seen.stop.set()
            for worker in workers:
                worker.result()
            failed.append({str(status): count for status, count in seen.answers.items() if status != 200})
    ok = max(back_s) < 10 and all(set(one) <= {"503"} and sum(one.values()) <= 1 for one in failed)
    return {"replicas": replicas, "clients": clients, "back_s": back_s, "failed": failed, "ok": ok}


def main(
    engines: Annotated[Path, typer.Option(help="A bundle of the bundled model.")],
    rounds: Annotated[int, typer.Option(min=1, help="Kills for each number of replicas.")] = 3,
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Kill replicas and print what came of it."""
    results = list[dict[str, Any]]()
    for replicas in (1, 2):
        load = psutil.getloadavg()[0]
        found = kills(engines.resolve(), replicas, rounds, clients)
        results.append({**found, "load_before_and_after": [round(load, 1), round(psutil.getloadavg()[0], 1)]})
        typer.echo(json.dumps(results[-1]))
        if json_file is not None:
            json_file.write_text(json.dumps(results, indent=1) + "\n")
    if not all(found["ok"] for found in results):
        raise typer.Exit(4)


if __name__ == "__main__":
    typer.run(main)
