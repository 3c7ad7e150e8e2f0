"""Load and fuzz a real `fastcache serve` process, and say how it fared: the long tests of the serving side.

Example: .venv/bin/python tools/serve_check.py --engines engines/demo --json serve.json

Each part starts a server of its own with the limits that it examines. The figures are of this machine; a part that does
not hold ends with exit code 4 after all have run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from serve.malformed import malformed_bodies  # pyright: ignore[reportMissingImports]
from serve.serving import GENERATE, schemathesis_command  # pyright: ignore[reportMissingImports]

PROMPTS = ["a large red circle at the left on a white background", "a small blue ring at the top", "a green cross"]
KINDS = ["full", "shallow"]
SAMPLERS = ["ddim", "euler", "dpm++_2m", "unipc", "pndm", "euler_a"]


class Server:
    """A `fastcache serve` process of its own."""

    def __init__(self, engines: Path, *options: str) -> None:
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
def served(engines: Path, *options: str) -> Generator[Server]:
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


def bursts(engines: Path, rounds: int) -> dict[str, Any]:
    """`--max-batch 1 --queue 8`, 100 at once: 9 accepted and 91 told to come again, every time."""

    async def burst(server: Server) -> Counter[int]:
        async with client_of(server) as client:
            body = {"prompt": PROMPTS[0], "num_inference_steps": 100, "cache_interval": 10}
            return Counter(
                [answer.status_code for answer in await gather(client.post(GENERATE, json=body) for _ in range(100))]
            )

    with served(engines, "--max-batch", "1", "--queue", "8") as server:
        results = []
        for _ in range(rounds):
            results.append(asyncio.run(burst(server)))
            server.idle()
    return {
        "rounds": rounds,
        "exact": sum(result == {200: 9, 429: 91} for result in results),
        "ok": all(r == {200: 9, 429: 91} for r in results),
    }


async def gather(coroutines: Any) -> list[Any]:
    return list(await asyncio.gather(*coroutines))


def disconnects(engines: Path, count: int) -> dict[str, Any]:
    """Clients that leave at random steps: the worker is free within a step, and the counter tells what ran."""
    rng, over = random.Random(0), list[float]()
    body = {"prompt": "a", "num_inference_steps": 60, "cache_interval": 3, "stream": True, "stream_steps": True}
    options = ["--max-batch", "1", "--threads", "1"]
    with served(engines, *options) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        before = server.steps()
        for _ in range(count):
            leave, start = rng.randint(0, 30), server.steps()
            with client.stream("POST", GENERATE, json=body) as response:
                for line in response.iter_lines():
                    if f'"step": {leave},' in line:
                        break
            server.idle()
            time.sleep(0.05)  # the step at hand
            over.append(server.steps() - start - (leave + 1))
        total = server.steps() - before
        drawn = client.post(GENERATE, json={"prompt": "a", "num_inference_steps": 5}).status_code
    return {
        "count": count,
        "steps_counted": total,
        "steps_after_leaving_most": max(over),
        "steps_after_leaving_mean": round(statistics.mean(over), 2),
        "next_served": drawn == 200,
        "ok": drawn == 200 and statistics.median(over) <= 1 and max(over) < 30,
    }


def cancels(engines: Path, count: int) -> dict[str, Any]:
    """Cancels at the boundary, around a job's end: never a neighbour's. Each job either was drawn or cancelled."""
    rng, hit, ended = random.Random(0), 0, Counter[str]()

    async def run(server: Server) -> None:
        nonlocal hit
        async with client_of(server) as client:
            expected = (await client.post(GENERATE, json={**wish(1), "seed": 1})).json()["data"][0]["b64_json"]
            for k in range(0, count, 4):
                names = [f"job-{k}-{j}" for j in range(4)]
                wait = rng.uniform(0.0, 0.6)
                neighbours = [
                    client.post(GENERATE, json={**wish(1), "seed": 1, "job_id": f"{name}-n"}) for name in names[:2]
                ]
                jobs = [client.post(GENERATE, json={**wish(1), "seed": 1, "job_id": name}) for name in names]

                async def cancel(name: str, wait: float = wait) -> None:
                    await asyncio.sleep(wait)
                    await client.post(f"/v1/jobs/{name}/cancel")
                    await client.post(f"/v1/jobs/{name}/cancel")

                answers = await gather([*neighbours, *jobs, *map(cancel, names)])
                hit += sum(answer.status_code != 200 for answer in answers[:2])
                ended.update(str(answer.status_code) for answer in answers[2:6])
                same = {answer.json()["data"][0]["b64_json"] for answer in answers[:6] if answer.status_code == 200}
                hit += not same <= {expected} and len(same) > 2  # rounding may differ with the company

    with served(engines, "--max-batch", "8", "--queue", "64") as server:
        asyncio.run(run(server))
    ok = hit == 0 and set(ended) <= {"200", "499"} and len(ended) == 2
    return {"count": count, "neighbours_hit": hit, "ended": dict(ended), "ok": ok}


def drains(engines: Path, rounds: int) -> dict[str, Any]:
    """SIGTERM with one running and five queued."""

    async def run(server: Server) -> Counter[int]:
        async with client_of(server) as client:
            body = {"prompt": "a", "num_inference_steps": 100, "cache_interval": 10}
            jobs = [asyncio.create_task(client.post(GENERATE, json=body)) for _ in range(6)]
            while (health := (await client.get("/health")).json())["running"] != 1 or health["waiting"] != 5:
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            return Counter([(await job).status_code for job in jobs])

    results = list[Any]()
    for _ in range(rounds):
        with served(engines, "--max-batch", "1", "--queue", "8") as server:
            results.append((dict(asyncio.run(run(server))), server.end()))
    return {"rounds": rounds, "results": results, "ok": all(result == ({200: 1, 503: 5}, 0) for result in results)}


def endurance(engines: Path, count: int) -> dict[str, Any]:
    """Many requests, 5% of them cancelled and 5% invalid: memory, threads and descriptors stay as they are."""
    rng, codes, marks = random.Random(0), Counter[int](), list[dict[str, float]]()

    async def one(client: httpx.AsyncClient, k: int) -> None:
        luck = rng.random()
        if luck < 0.05:
            codes[
                (
                    await client.post(GENERATE, content=rng.choice(BAD), headers={"Content-Type": "application/json"})
                ).status_code
            ] += 1
            return
        body = {"prompt": PROMPTS[k % 3], "num_inference_steps": 2 + k % 3, "cache_interval": 2, "seed": k}
        job = asyncio.create_task(client.post(GENERATE, json={**body, "job_id": f"e-{k}"}))
        if luck < 0.10:
            await asyncio.sleep(rng.uniform(0, 0.2))
            await client.post(f"/v1/jobs/e-{k}/cancel")
        codes[(await job).status_code] += 1

    async def run(server: Server) -> None:
        numbers = iter(range(count))

        async def worker(client: httpx.AsyncClient) -> None:
            for k in numbers:
                await one(client, k)
                if k % max(1, count // 10) == 0:
                    marks.append({"request": k, **server.footprint()})

        async with client_of(server) as client:
            await asyncio.gather(*(worker(client) for _ in range(8)))

    with served(engines, "--queue", "64") as server:
        start = time.monotonic()
        asyncio.run(run(server))
        seconds = time.monotonic() - start
        server.idle()
        marks.append({"request": count, **server.footprint()})
    settled = marks[len(marks) // 3 :]  # the first third warms up: allocators, tables, bindings of each batch size
    grown = {key: settled[-1][key] - settled[0][key] for key in ("rss_mib", "threads", "descriptors")}
    ok = (
        grown["rss_mib"] < 20
        and abs(grown["threads"]) <= 2
        and abs(grown["descriptors"]) <= 16
        and not set(codes) & {500, 503}
    )
    return {
        "count": count,
        "seconds": round(seconds, 1),
        "codes": dict(codes),
        "marks": marks,
        "grown": grown,
        "ok": ok,
    }


BAD = malformed_bodies()


def malformed(engines: Path, rounds: int) -> dict[str, Any]:
    """The corpus of malformed requests, again and again: all 4xx, memory flat, the next good one served."""
    codes, marks = Counter[int](), list[dict[str, float]]()
    with served(engines) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(rounds):
            for body in BAD:
                codes[
                    client.post(GENERATE, content=body, headers={"Content-Type": "application/json"}).status_code
                ] += 1
            marks.append(server.footprint())
        drawn = client.post(GENERATE, json={"prompt": "a", "num_inference_steps": 2}).status_code
    grown = marks[-1]["rss_mib"] - marks[len(marks) // 3]["rss_mib"]
    ok = all(400 <= code < 500 for code in codes) and drawn == 200 and grown < 10
    return {"requests": sum(codes.values()), "codes": dict(codes), "grown_mib": round(grown, 1), "ok": ok}


def swaps(engines: Path, rounds: int) -> dict[str, Any]:
    """SIGHUP again and again while clients draw: no request is lost, and no bundle stays."""
    codes, marks, stop = Counter[int](), list[dict[str, float]](), threading.Event()

    def draw(server: Server) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not stop.is_set():
                codes[client.post(GENERATE, json={"prompt": "a", "num_inference_steps": 6}).status_code] += 1

    with served(engines) as server, ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(draw, server) for _ in range(4)]
        for loaded in range(2, rounds + 2):
            server.process.send_signal(signal.SIGHUP)
            while server.said().count("INFO serving") < loaded:
                time.sleep(0.1)
            while httpx.get(f"{server.url}/health").json()["bundles"] > 1:
                time.sleep(0.1)
            marks.append(server.footprint())
        stop.set()
        for client in clients:
            client.result()
    grown = marks[-1]["rss_mib"] - marks[len(marks) // 2]["rss_mib"]
    ok = set(codes) == {200} and grown < 60
    return {"rounds": rounds, "codes": dict(codes), "marks": marks, "grown_mib": round(grown, 1), "ok": ok}


def fuzz(engines: Path, examples: int) -> dict[str, Any]:
    """schemathesis over the server's own OpenAPI document."""
    key = "a-key-for-this-check-only"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "keys").write_text(key)
        options = ["--max-steps", "2", "--queue", "64", "--api-key-file", f"{folder}/keys"]
        with served(engines, *options) as server:
            command = schemathesis_command(int(server.url.rpartition(":")[2]), examples, key)
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    cases = re.search(r"Test cases:\s*\n\s*(.+)", done.stdout)
    tail = "" if done.returncode == 0 else done.stdout[-3000:]
    return {"examples": examples, "cases": cases[1] if cases else "", "said": tail, "ok": done.returncode == 0}


STAGES = ["full_step", "shallow_step", "encode", "decode"]


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
        load = psutil.getloadavg()[0]
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
        "load_before_and_after": [round(load, 1), round(psutil.getloadavg()[0], 1)],
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


def latency(engines: Path, rounds: int, threads: int) -> dict[str, Any]:
    """One request at a time through the server against the pipeline in this process, taking turns."""
    import torch

    import fastcache

    pipe = fastcache.load(engines, threads=threads)
    body = {"prompt": PROMPTS[0], "num_inference_steps": 30, "cache_interval": 3, "seed": 0}

    def by_pipeline() -> None:
        pipe(
            PROMPTS[0],
            num_inference_steps=30,
            cache_interval=3,
            generator=[torch.Generator().manual_seed(0)],
        )

    with served(engines, "--threads", str(threads)) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        calls: dict[str, Callable[[], object]] = {
            "pipeline": by_pipeline,
            "server": lambda: client.post(GENERATE, json=body).raise_for_status(),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for k in range(rounds + 2):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if k >= 2:
                    times[name].append((time.perf_counter() - start) * 1e3)
        draw = 'fastcache_stage_seconds_{}{{stage="draw"}}'
        inside = server.metric(draw.format("sum")) / server.metric(draw.format("count")) * 1e3
    result = {f"{name}_ms_p50": round(statistics.median(ms), 1) for name, ms in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["server"], times["pipeline"], strict=True))
    return {
        "rounds": rounds,
        **result,
        "worker_ms_mean": round(inside, 1),
        "server_to_pipeline": round(ratio, 3),
        "ok": ratio < 1.1,
    }


def main(
    engines: Annotated[Path, typer.Option(help="A bundle of the bundled model; of up to 8 images for throughput.")],
    only: Annotated[str | None, typer.Option(help="Parts, by commas; all if left out.")] = None,
    scale: Annotated[float, typer.Option(help="Of all the counts; 1 is what the issue asks for.")] = 1.0,
    threads: Annotated[int, typer.Option(help="Of the engines in throughput and latency.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Run the load tests and print what came of each."""

    def times(count: int) -> int:
        return max(1, round(count * scale))

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "latency": lambda: latency(engines, times(30), threads),
        "throughput": lambda: throughput(engines, times(48), threads),
        "bursts": lambda: bursts(engines, times(20)),
        "disconnects": lambda: disconnects(engines, times(200)),
        "cancels": lambda: cancels(engines, times(1000)),
        "drains": lambda: drains(engines, times(3)),
        "malformed": lambda: malformed(engines, times(10)),
        "swaps": lambda: swaps(engines, times(10)),
        "endurance": lambda: endurance(engines, times(10_000)),
        "fuzz": lambda: fuzz(engines, times(1000)),
    }
    chosen = only.split(",") if only is not None else list(parts)
    if unknown := set(chosen) - set(parts):
        raise typer.BadParameter(f"expected parts out of {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    results: dict[str, Any] = {}
    for name in chosen:
        start = time.monotonic()
        results[name] = {**parts[name](), "took_s": round(time.monotonic() - start, 1)}
        typer.echo(f"{name}: {json.dumps(results[name])}")
        if json_file is not None:
            json_file.write_text(json.dumps(results, indent=1) + "\n")
    if not all(result["ok"] for result in results.values()):
        raise typer.Exit(4)


if __name__ == "__main__":
    typer.run(main)
