"""How fast a server is: 8 clients at once against one at a time, and one request against the pipeline itself.

Both on the same engines, machine and threads, taking turns. Both need a machine with nothing else to do.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
from serve_check_server import KINDS, PROMPTS, Server, client_of, served, wish

GENERATE = "/v1/images/generations"
LATENCY: dict[str, Any] = {"num_inference_steps": 30, "cache_interval": 3}
STAGES = ["full_step", "shallow_step", "encode", "decode"]

_pipes: list[Any] = []  # in the process that `_load` was called in


def throughput(engines: Path, requests: int, threads: int) -> dict[str, Any]:
    """8 clients at once against one at a time, in turns: the same mixed requests, engines and threads.

    What bounds it is told by the seconds of each stage: `gain_by_stage` is what a stage alone would give.
    """
    took: dict[int, list[float]] = {1: [], 8: []}

    async def timed(server: Server, clients: int) -> float:
        numbers = iter(range(requests))

        async def worker(client: httpx.AsyncClient) -> None:
            for k in numbers:
                start = time.monotonic()
                answer = await client.post(GENERATE, json=wish(k, most_steps=30))
                answer.raise_for_status()
                took[clients].append(time.monotonic() - start)

        async with client_of(server) as client:
            start = time.monotonic()
            await asyncio.gather(*(worker(client) for _ in range(clients)))
            return time.monotonic() - start

    def examined(server: Server, clients: int) -> dict[str, float]:
        before = server.figures()
        seconds = asyncio.run(timed(server, clients))
        grown = {name: value - before.get(name, 0) for name, value in server.figures().items()}
        stages = {stage: grown[f'fastcache_stage_seconds_sum{{stage="{stage}"}}'] for stage in STAGES}
        calls = {k: grown[f'unet_steps_total{{kind="{k}"}}'] / grown[f'unet_calls_total{{kind="{k}"}}'] for k in KINDS}
        return {"seconds": seconds, **stages, "rest": seconds - sum(stages.values()), **calls}

    with served(engines, "--threads", str(threads), "--max-batch", "8") as server:
        asyncio.run(timed(server, 8))  # every table made, every batch size bound
        for times in took.values():
            times.clear()
        rounds = [(examined(server, 1), examined(server, 8)) for _ in range(5)]

    def middle(arm: int, name: str) -> float:
        return statistics.median(pair[arm][name] for pair in rounds)

    def quantile(times: list[float], q: float) -> float:
        return round(sorted(times)[min(len(times) - 1, int(q * len(times)))], 3)

    gains = [alone["seconds"] / together["seconds"] for alone, together in rounds]
    parts = [*STAGES, "rest"]
    return {
        "threads": threads,
        "requests": requests,
        "images_per_s_one_at_a_time": round(requests / middle(0, "seconds"), 2),
        "images_per_s_8_clients": round(requests / middle(1, "seconds"), 2),
        "gain": round(statistics.median(gains), 2),
        "gains": [round(gain, 2) for gain in gains],
        "ms_per_image_one": {part: round(middle(0, part) / requests * 1e3, 1) for part in parts},
        "ms_per_image_eight": {part: round(middle(1, part) / requests * 1e3, 1) for part in parts},
        "gain_by_stage": {stage: round(middle(0, stage) / middle(1, stage), 2) for stage in STAGES},
        "images_per_call_eight": {kind: round(middle(1, kind), 2) for kind in KINDS},
        "p50_s": {"one": quantile(took[1], 0.5), "eight": quantile(took[8], 0.5)},
        "p99_s": {"one": quantile(took[1], 0.99), "eight": quantile(took[8], 0.99)},
        "ok": True,
    }


def _load(engines: Path, threads: int) -> None:
    import fastcache

    _pipes.append(fastcache.load(engines, threads=threads))


def _draw() -> None:
    import torch

    _pipes[0](PROMPTS[0], **LATENCY, generator=[torch.Generator().manual_seed(0)])


def latency(engines: Path, rounds: int, threads: int) -> dict[str, Any]:
    """One request at a time through the server against the pipeline, each in a process of its own, taking turns."""
    body = {"prompt": PROMPTS[0], **LATENCY, "seed": 0}
    spawned = ProcessPoolExecutor(1, get_context("spawn"), _load, (engines, threads))
    with (
        spawned as other,
        served(engines, "--threads", str(threads)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        calls: dict[str, Callable[[], object]] = {
            "pipeline": lambda: other.submit(_draw).result(),
            "server": lambda: client.post(GENERATE, json=body).raise_for_status(),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in [*calls.values()] * 2:
            call()
        before = server.figures()
        for _ in range(rounds):
            for name, call in calls.items():
                time.sleep(0.1)  # the other process's threads look for more work for a while after theirs
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e3)
        total = 'fastcache_stage_seconds_sum{stage="total"}'
        in_worker = (server.figures()[total] - before[total]) / rounds * 1e3
    ratio = statistics.median(a / b for a, b in zip(times["server"], times["pipeline"], strict=True))
    return {
        "rounds": rounds,
        **{f"{name}_ms_p50": round(statistics.median(ms), 1) for name, ms in times.items()},
        **{f"{name}_ms_mean": round(statistics.mean(ms), 1) for name, ms in times.items()},
        "worker_ms_mean": round(in_worker, 1),  # of the server's, without HTTP
        "server_to_pipeline": round(ratio, 3),
        "worker_to_pipeline": round(in_worker / statistics.mean(times["pipeline"]), 3),
        "ok": ratio < 1.1,
    }
