"""Generations, edits, jobs in the background and streams at the same time: how fast, and what memory they leave.

`mixed` has 8 clients against one at a time; `models` draws with two bundles that do not both fit the memory limit.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import re
import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from serve_check_server import Server, client_of, served, wish

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
KINDS = ("generation", "edit", "job", "stream")
_RUN = 25  # requests for one model, before the other is asked for again


def picture_of(seed: int, mode: str = "RGB") -> str:
    """A picture of smooth colours, in base64."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((64, 64), Image.Resampling.BILINEAR).convert(mode).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def edit_of(k: int, *, most_steps: int = 12) -> dict[str, Any]:
    """The kth of many different edits, every other one under a mask."""
    body = {**wish(k, most_steps=most_steps), "image": picture_of(k), "strength": 0.6}
    return {**body, "mask": picture_of(k + 1, "L"), "sampler": "ddim"} if k % 2 else body


async def draw(client: httpx.AsyncClient, kind: str, k: int, **fields: Any) -> None:
    """One request of a kind, until its picture is there. Raises: `RuntimeError` for any other answer."""
    body = {**(edit_of(k) if kind == "edit" else wish(k)), **fields}
    if kind == "stream":
        async with client.stream("POST", GENERATE, json={**body, "stream": True, "partial_images": 2}) as answer:
            said = [line async for line in answer.aiter_lines()]
        if "event: image_generation.completed" not in said:
            raise RuntimeError(f"expected a stream that ends with a picture, got {answer.status_code}: {said[-3:]}")
        return
    answer = await client.post(EDIT if kind == "edit" else GENERATE, json={**body, "background": kind == "job"})
    if answer.status_code not in (200, 202):
        raise RuntimeError(f"expected a picture or a job, got {answer.status_code}: {answer.text}")
    while kind == "job":
        found = (await client.get(answer.headers["location"])).raise_for_status().json()
        if found["status"] == "done":
            return
        if found["status"] not in ("queued", "running"):
            raise RuntimeError(f"expected a job to be done, got {found['status']}: {found['error']}")
        await asyncio.sleep(0.02)


def mixed(engines: Path, requests: int, threads: int) -> dict[str, Any]:
    """8 clients at once against one at a time, in turns: the same requests of all kinds, engines and threads."""
    took: dict[int, dict[str, list[float]]] = {1: defaultdict(list), 8: defaultdict(list)}

    async def timed(server: Server, clients: int) -> float:
        numbers = iter(range(requests))

        async def worker(client: httpx.AsyncClient) -> None:
            for k in numbers:
                kind, start = KINDS[k % len(KINDS)], time.monotonic()
                await draw(client, kind, k // len(KINDS))
                took[clients][kind].append(time.monotonic() - start)

        async with client_of(server) as client:
            start = time.monotonic()
            await asyncio.gather(*(worker(client) for _ in range(clients)))
            return time.monotonic() - start

    with served(engines, "--threads", str(threads), "--max-batch", "8") as server:
        asyncio.run(timed(server, 8))  # every table made, every batch size bound
        for times in took.values():
            times.clear()
        rounds = [(asyncio.run(timed(server, 1)), asyncio.run(timed(server, 8))) for _ in range(3)]
    gains = [alone / together for alone, together in rounds]
    return {
        "threads": threads,
        "requests": requests,
        "images_per_s_one_at_a_time": round(requests / statistics.median(alone for alone, _ in rounds), 2),
        "images_per_s_8_clients": round(requests / statistics.median(together for _, together in rounds), 2),
        "gain": round(statistics.median(gains), 2),
        "gains": [round(gain, 2) for gain in gains],
        **{
            name: {kind: {"p50_s": _quantile(own, 0.5), "p99_s": _quantile(own, 0.99)} for kind, own in kinds.items()}
            for name, kinds in (("one_at_a_time", took[1]), ("eight_clients", took[8]))
        },
        "ok": True,
    }


def _quantile(times: list[float], q: float) -> float:
    return round(sorted(times)[min(len(times) - 1, int(q * len(times)))], 3)


def models(engines: Path, second: Path, count: int) -> dict[str, Any]:
    """Requests of all kinds for two bundles, of which one fits the limit: none fails, and memory is flat.

    They come in runs for a model, so that loads do not take all of the time. Memory is sampled at the end of each run,
    with one bundle loaded and nothing to do; the first fifth of the runs warms up.
    """
    with served(engines) as server:
        asyncio.run(_draw_all(server, range(len(KINDS)), None))
        one = server.metric("fastcache_models_bytes")
    limit = f"{1.5 * one / 2**20:.0f}MiB"
    failures, marks = Counter[str](), list[dict[str, Any]]()
    with served(f"one={engines}", "--engines", f"two={second}", "--memory-limit", limit) as server:
        start = time.monotonic()
        for first, model in zip(range(0, count, _RUN), itertools.cycle(("one", "two")), strict=False):
            failures += asyncio.run(_draw_all(server, range(first, min(count, first + _RUN)), model))
            server.idle()
            marks.append({"request": min(count, first + _RUN), "model": model, **server.footprint()})
        seconds = time.monotonic() - start
        loads = len(re.findall(r" serving (?:one|two), ", server.said()))
    settled = marks[len(marks) // 5 :]
    slope = _slope([mark["request"] for mark in settled], [mark["rss_mib"] for mark in settled])
    return {
        "count": count,
        "limit": limit,
        "loads": loads,
        "seconds": round(seconds, 1),
        "failures": dict(failures),
        "marks": marks,
        "slope_mib_per_1000_requests": None if slope is None else round(1000 * slope, 1),
        "ok": not failures and loads >= min(2, len(marks)) and (slope is None or 1000 * slope < 10),
    }


async def _draw_all(server: Server, numbers: range, model: str | None) -> Counter[str]:
    """These requests by four clients, and what went wrong."""
    failures, left = Counter[str](), iter(numbers)

    async def worker(client: httpx.AsyncClient) -> None:
        for k in left:
            try:
                await draw(client, KINDS[k % len(KINDS)], k // len(KINDS), model=model)
            except (httpx.HTTPError, RuntimeError) as error:
                failures[str(error).partition("\n")[0]] += 1

    async with client_of(server) as client:
        await asyncio.gather(*(worker(client) for _ in range(4)))
    return failures


def _slope(x: list[float], y: list[float]) -> float | None:
    """The least squares' slope; None of fewer than ten points, which say nothing."""
    return float(np.polyfit(x, y, 1)[0]) if len(x) >= 10 else None
