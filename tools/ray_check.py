"""Lose replicas and machines of a real Ray Serve application, let it grow and shrink, and say what clients saw.

Example: .venv/bin/python tools/ray_check.py --engines engines/demo --json ray.json

`replica` kills one of one and of two; `node` kills all processes of the second of two nodes, which both run on this
machine, and starts another; `autoscaling` has load come and go. `failed` are the answers that were not pictures,
`back_s` the seconds from the kill to a picture that was asked for right after it, `longest_s` the longest answer,
`shares` the full steps of each replica before the kill. More than one failed answer a kill (of a node: more than were
in flight), one that is not 503 with Retry-After, a replica that is missed for more than ten seconds, or any failed
answer while it grows and shrinks end with exit code 4.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

from fastcache.bench.machine import environment
from fastcache.files import write_json

GENERATE = "/v1/images/generations"
BODY = {"prompt": "a small blue ring at the top", "num_inference_steps": 10, "cache_interval": 3, "seed": 0}
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
# The guide's: Ray takes a node for dead after 3 s, and after 15 s if left alone.
WATCHFUL = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}


@dataclass
class Clients:
    """Clients that draw one picture after the other; the answers by their status, and the longest wait for one."""

    url: str
    count: int
    answers: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)

    def draw(self) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self.stop.is_set():
                start = time.monotonic()
                answer = client.post(GENERATE, json=BODY)
                self.longest_s = max(self.longest_s, time.monotonic() - start)
                again = "" if answer.status_code == 200 or "retry-after" in answer.headers else " without Retry-After"
                self.answers[f"{answer.status_code}{again}"] += 1
                if answer.status_code != 200:
                    time.sleep(0.2)

    @contextlib.contextmanager
    def drawing(self) -> Generator[None]:
        with ThreadPoolExecutor(self.count) as pool:
            workers = [pool.submit(self.draw) for _ in range(self.count)]
            try:
                yield
            finally:
                self.stop.set()
            for worker in workers:
                worker.result()

    @property
    def failed(self) -> dict[str, int]:
        return {status: count for status, count in self.answers.items() if status != "200"}


@contextlib.contextmanager
def deployed(settings: dict[str, Any], connect: Callable[[], object]) -> Generator[str]:
    """Ray Serve behind one address of this machine, on what `connect` connects to."""
    import ray
    from ray import serve

    from fastcache.serve.cluster.ray import application

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    # Else Ray itself kills replicas where other programs fill the machine.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    connect()
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(settings))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@contextlib.contextmanager
def deployed_here(settings: dict[str, Any], cpus: int) -> Generator[str]:
    import ray

    options: Any = {"num_cpus": cpus, "object_store_memory": 200 * 2**20, "include_dashboard": False}
    with deployed(settings, lambda: ray.init("local", **options)) as url:
        yield url


def processes_of(process: psutil.Process, name: str = "") -> list[psutil.Process]:
    """All that it started, directly or not, of those whose command has `name` in it."""
    found = list[psutil.Process]()
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in "".join(child.cmdline()):
                found.append(child)
    return found


def loaded(url: str) -> int:
    """How many replicas have their engines."""
    answer = httpx.get(f"{url}/health", timeout=60)
    return answer.json()["bundles"] if answer.status_code == 200 else 0


def until(url: str, replicas: int) -> float:
    """Wait until so many replicas are loaded. Units: returns seconds."""
    start = time.monotonic()
    while loaded(url) != replicas:
        time.sleep(0.2)
    return round(time.monotonic() - start, 1)


def shares(url: str) -> list[float]:
    """The full U-Net steps that each replica has run."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sorted(float(line.rpartition(" ")[2]) for line in lines if line.startswith('unet_steps_total{kind="full"'))


@dataclass
class Loss:
    """What came of a kill: what the clients saw, when there was a picture again, and who had drawn before it."""

    clients: Clients
    back_s: float
    shares: list[float]

    def told(self) -> dict[str, Any]:
        longest_s = round(self.clients.longest_s, 1)
        return {"failed": self.clients.failed, "back_s": self.back_s, "longest_s": longest_s, "shares": self.shares}

    def is_ok(self, most: int) -> bool:
        return set(self.clients.failed) <= {"503"} and sum(self.clients.failed.values()) <= most


def lose(url: str, clients: int, victims: Callable[[], list[psutil.Process]]) -> Loss:
    """Kill processes while clients draw."""
    seen = Clients(url, clients)
    with seen.drawing():
        while seen.answers["200"] < 4 * clients:
            time.sleep(0.05)
        drawn, dying = shares(url), victims()
        killed = time.monotonic()
        for process in dying:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        while httpx.post(url + GENERATE, json=BODY, timeout=120).status_code != 200:
            time.sleep(0.1)
        back_s = time.monotonic() - killed
    return Loss(seen, round(back_s, 2), drawn)


def replica(engines: Path, replicas: int, rounds: int, clients: int) -> dict[str, Any]:
    """Kill one replica of so many, again and again."""
    losses = list[Loss]()
    settings = {"engines": engines, "min_replicas": replicas, "max_replicas": replicas}
    with deployed_here(settings, replicas + 1) as url:
        for _ in range(rounds):
            until(url, replicas)
            losses.append(lose(url, clients, lambda: processes_of(psutil.Process(), ":Generator")[:1]))
    ok = all(loss.is_ok(1) and loss.back_s < 10 for loss in losses)
    return {"replicas": replicas, "clients": clients, "kills": [loss.told() for loss in losses], "ok": ok}


def node(engines: Path, rounds: int, clients: int) -> dict[str, Any]:
    """Kill a whole node of two, each of which draws and has a front, and start another in its place."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.update(WATCHFUL)
    cluster: Any = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    settings = {"engines": engines, "min_replicas": 2, "max_replicas": 2, "front_replicas": 2, "cpus": 0.8}
    losses, whole_s = list[Loss](), list[float]()
    try:
        second: Any = cluster.add_node(**NODE)
        with deployed({**settings, "max_batch": 2}, lambda: ray.init(cluster.address)) as url:
            for _ in range(rounds):
                until(url, 2)
                raylet = psutil.Process(second.all_processes["raylet"][0].process.pid)
                losses.append(lose(url, clients, lambda raylet=raylet: [raylet, *processes_of(raylet)]))
                cluster.remove_node(second, allow_graceful=False)
                second = cluster.add_node(**NODE)
                whole_s.append(until(url, 2))
    finally:
        cluster.shutdown()
    ok = all(loss.is_ok(clients + 1) and min(loss.shares) > 0 and len(loss.shares) == 2 for loss in losses)
    kills = [{**loss.told(), "both_nodes_again_s": whole} for loss, whole in zip(losses, whole_s, strict=True)]
    return {"nodes": 2, "clients": clients, "health_check": WATCHFUL, "kills": kills, "ok": ok}


def autoscaling(engines: Path, clients: int) -> dict[str, Any]:
    """From one replica to two while clients draw, and back to one while a single one goes on."""
    settings = {"engines": engines, "min_replicas": 1, "max_replicas": 2, "max_batch": 2}
    with deployed_here({**settings, "upscale_delay_s": 2, "downscale_delay_s": 5}, 3) as url:
        until(url, 1)
        many, one = Clients(url, clients), Clients(url, 1)
        with one.drawing():
            with many.drawing():
                up_s = until(url, 2)
                before = many.answers["200"]
                while many.answers["200"] < before + 4 * clients or min(shares(url)) == 0:
                    time.sleep(0.2)
                drawn = shares(url)
            down_s = until(url, 1)
            before = one.answers["200"]
            while one.answers["200"] < before + 4:
                time.sleep(0.2)
    failed = {"many": many.failed, "one": one.failed}
    ok = not many.failed and not one.failed
    answers = many.answers["200"] + one.answers["200"]
    return {
        "clients": clients,
        "up_s": up_s,
        "down_s": down_s,
        "shares": drawn,
        "drawn": answers,
        "failed": failed,
        "ok": ok,
    }


def main(
    engines: Annotated[Path, typer.Option(help="A bundle of the bundled model.")],
    only: Annotated[str, typer.Option(help="Parts, by commas.")] = "replica,node,autoscaling",
    rounds: Annotated[int, typer.Option(min=1, help="Kills of each kind.")] = 3,
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Run the parts and print what came of each."""
    folder = engines.resolve()
    parts: dict[str, list[Callable[[], dict[str, Any]]]] = {
        "replica": [lambda: replica(folder, 1, rounds, clients), lambda: replica(folder, 2, rounds, clients)],
        "node": [lambda: node(folder, rounds, clients)],
        "autoscaling": [lambda: autoscaling(folder, clients)],
    }
    if unknown := set(only.split(",")) - set(parts):
        raise typer.BadParameter(f"expected parts out of {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    results: dict[str, Any] = {"environment": environment(1)}
    for name in only.split(","):
        found = results[name] = list[dict[str, Any]]()
        for part in parts[name]:
            load = psutil.getloadavg()[0]
            found.append({**part(), "load_before_and_after": [round(load, 1), round(psutil.getloadavg()[0], 1)]})
            typer.echo(f"{name}: {json.dumps(found[-1])}")
            if json_file is not None:
                write_json(json_file, results)
    if not all(found["ok"] for name in only.split(",") for found in results[name]):
        raise typer.Exit(4)


if __name__ == "__main__":
    typer.run(main)
