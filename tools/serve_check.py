"""Load and fuzz a real `fastcache serve` process, and say how it fared: the long tests of the serving side.

Example: .venv/bin/python tools/serve_check.py --engines engines/demo --json serve.json

Each part starts a server of its own with the limits that it examines. The figures are of this machine; a part that does
not hold ends with exit code 4 after all have run.
"""

from __future__ import annotations

import asyncio
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from serve_check_mixed import EDIT, KINDS, draw, edit_of, mixed, models
from serve_check_server import PROMPTS, Server, client_of, served, wish
from serve_check_speed import latency, throughput

from fastcache.bench.machine import environment
from fastcache.files import write_json

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from serve.malformed import malformed_bodies, malformed_edits  # pyright: ignore[reportMissingImports]
from serve.serving import GENERATE, schemathesis_command  # pyright: ignore[reportMissingImports]


def bursts(engines: Path, rounds: int) -> dict[str, Any]:
    """`--max-batch 1 --queue 8`, 100 at once: 9 accepted and 91 told to come again, every time."""

    async def burst(server: Server) -> Counter[int]:
        async with client_of(server) as client:
            body = {"prompt": PROMPTS[0], "num_inference_steps": 100, "cache_interval": 10}
            answers = await asyncio.gather(*(client.post(GENERATE, json=body) for _ in range(100)))
            return Counter(answer.status_code for answer in answers)

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


def disconnects(engines: Path, count: int, *, edits: bool = False) -> dict[str, Any]:
    """Clients that leave at random steps: the worker is free within a step, and the counter tells what ran.

    A step that was at hand when the server ended the job is told apart from those that ran before it knew: the time
    from the client's leaving to that is the machine's, and a shallow step takes a few milliseconds.
    """
    rng, rows = random.Random(0), list[dict[str, float]]()
    body = {**edit_of(0), "strength": 1.0} if edits else {"prompt": "a"}
    body |= {"num_inference_steps": 60, "cache_interval": 3, "stream": True, "stream_steps": True}
    route = EDIT if edits else GENERATE
    options = ["--max-batch", "1", "--threads", "1"]
    with served(engines, *options) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        before = server.steps()
        for k in range(count):
            leave, start, at_hand = rng.randint(0, 30), server.steps(), server.metric(AT_HAND)
            with client.stream("POST", route, json={**body, "job_id": f"d-{k}"}) as response:
                for line in response.iter_lines():
                    if f'"step": {leave},' in line:
                        break
                left = time.time()
            server.idle()
            time.sleep(0.05)  # the step at hand
            after, at_hand = server.steps() - start - (leave + 1), server.metric(AT_HAND) - at_hand
            rows.append({"after": after, "at_hand": at_hand, "left": left})
        total = server.steps() - before
        drawn = client.post(GENERATE, json={"prompt": "a", "num_inference_steps": 5}).status_code
        noticed_ms = [(server.ended(f"d-{k}") - row["left"]) * 1e3 for k, row in enumerate(rows)]
    most_at_hand = max(row["at_hand"] for row in rows)
    return {
        "count": count,
        "steps_counted": total,
        "steps_at_hand_at_the_jobs_end_most": most_at_hand,
        "steps_before_it_most": max(row["after"] - row["at_hand"] for row in rows),
        "steps_after_leaving_mean": round(statistics.mean(row["after"] for row in rows), 2),
        "noticed_ms": {"p50": round(statistics.median(noticed_ms), 1), "most": round(max(noticed_ms), 1)},
        "next_served": drawn == 200,
        "ok": drawn == 200 and most_at_hand <= 1 and statistics.median(row["after"] for row in rows) <= 1,
    }


AT_HAND = "unet_steps_abandoned_total"


def cancels(engines: Path, count: int) -> dict[str, Any]:
    """Cancels around a job's end: never a neighbour's. Each job either was drawn or cancelled.

    They come when from half to all of the time has passed that the neighbours took in the round before.
    """
    rng, hit, ended = random.Random(0), 0, Counter[str]()
    body = {**wish(1), "seed": 1}

    async def round_of(client: httpx.AsyncClient, names: list[str], took: float) -> list[httpx.Response]:
        async def cancel(name: str) -> None:
            await asyncio.sleep(took * rng.uniform(0.5, 1.0))
            for _ in range(2):
                await client.post(f"/v1/jobs/{name}/cancel")

        neighbours = [client.post(GENERATE, json=body) for _ in range(2)]
        jobs = [client.post(GENERATE, json={**body, "job_id": name}) for name in names]
        return (await asyncio.gather(*neighbours, *jobs, *map(cancel, names)))[: 2 + len(names)]

    async def run(server: Server) -> None:
        nonlocal hit
        async with client_of(server) as client:
            expected = picture_of(await client.post(GENERATE, json=body))
            took = 0.5
            for k in range(0, count, 4):
                answers = await round_of(client, [f"job-{k}-{j}" for j in range(4)], took)
                took = max(answer.elapsed.total_seconds() for answer in answers[:2])
                hit += sum(answer.status_code != 200 for answer in answers[:2])
                ended.update(str(answer.status_code) for answer in answers[2:])
                same = {picture_of(answer) for answer in answers if answer.status_code == 200}
                hit += not same <= {expected} and len(same) > 2  # rounding may differ with the company

    with served(engines, "--max-batch", "8", "--queue", "64") as server:
        asyncio.run(run(server))
    ok = hit == 0 and set(ended) == {"200", "499"}
    return {"count": count, "neighbours_hit": hit, "ended": dict(ended), "ok": ok}


def picture_of(answer: httpx.Response) -> str:
    return answer.json()["data"][0]["b64_json"]


def drains(engines: Path, rounds: int) -> dict[str, Any]:
    """SIGTERM with one running and five queued, generations and edits."""

    async def run(server: Server) -> Counter[int]:
        async with client_of(server) as client:
            steps = {"num_inference_steps": 100, "cache_interval": 10}
            edit = {**edit_of(0), "strength": 1.0, **steps}
            asked = [(EDIT, edit), (GENERATE, {"prompt": "a", **steps})] * 3
            jobs = [asyncio.create_task(client.post(route, json=body)) for route, body in asked]
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


def malformed(engines: Path, rounds: int, *, edits: bool = False) -> dict[str, Any]:
    """The corpus of malformed requests, again and again: all 4xx, memory flat, the next good one served."""
    route, corpus = (EDIT, malformed_edits()) if edits else (GENERATE, [("application/json", body) for body in BAD])
    codes, marks = Counter[int](), list[dict[str, float]]()
    with served(engines) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(rounds):
            for kind, body in corpus:
                codes[client.post(route, content=body, headers={"Content-Type": kind}).status_code] += 1
            marks.append(server.footprint())
        drawn = client.post(GENERATE, json={"prompt": "a", "num_inference_steps": 2}).status_code
    grown = marks[-1]["rss_mib"] - marks[len(marks) // 3]["rss_mib"]
    ok = all(400 <= code < 500 for code in codes) and drawn == 200 and grown < 10
    return {"requests": sum(codes.values()), "codes": dict(codes), "grown_mib": round(grown, 1), "ok": ok}


def swaps(engines: Path, rounds: int) -> dict[str, Any]:
    """SIGHUP again and again while clients draw: no request is lost, and no bundle stays."""
    drawn, marks, stop = Counter[str](), list[dict[str, float]](), threading.Event()

    async def client_of_kind(server: Server, kind: str) -> None:
        async with client_of(server) as client:
            while not stop.is_set():
                await draw(client, kind, 0, num_inference_steps=6)
                drawn[kind] += 1

    with served(engines) as server, ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(lambda kind=kind: asyncio.run(client_of_kind(server, kind))) for kind in KINDS]
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
    ok = set(drawn) == set(KINDS) and grown < 60  # one that fails raises
    return {"rounds": rounds, "drawn": dict(drawn), "marks": marks, "grown_mib": round(grown, 1), "ok": ok}


def fuzz(engines: Path, examples: int) -> dict[str, Any]:
    """schemathesis over the server's own OpenAPI document."""
    key = "a-key-for-this-check-only"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "keys").write_text(key)
        options = ["--max-steps", "2", "--queue", "64"]
        options += ["--api-key-file", f"{folder}/keys", "--admin-key-file", f"{folder}/keys"]
        with served(engines, *options) as server:
            command = schemathesis_command(int(server.url.rpartition(":")[2]), examples, key)
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    cases = re.search(r"Test cases:\s*\n\s*(.+)", done.stdout)
    tail = "" if done.returncode == 0 else done.stdout[-3000:]
    return {"examples": examples, "cases": cases[1] if cases else "", "said": tail, "ok": done.returncode == 0}


def main(
    engines: Annotated[Path, typer.Option(help="A bundle of the bundled model; of up to 8 images for throughput.")],
    second: Annotated[
        Path | None, typer.Option(help="Another bundle for `models`; the same under another name if left out.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Parts, by commas; all if left out.")] = None,
    leave_out: Annotated[str, typer.Option(help="Parts not to run, by commas.")] = "",
    scale: Annotated[float, typer.Option(help="Of all the counts, which are those of a whole check at 1.")] = 1.0,
    threads: Annotated[int, typer.Option(help="Of the engines in throughput, mixed and latency.")] = 2,
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
        "disconnects-edits": lambda: disconnects(engines, times(200), edits=True),
        "drains": lambda: drains(engines, times(3)),
        "malformed": lambda: malformed(engines, times(10)),
        "malformed-edits": lambda: malformed(engines, times(10), edits=True),
        "swaps": lambda: swaps(engines, times(10)),
        "mixed": lambda: mixed(engines, times(96), threads),
        "models": lambda: models(engines, second or engines, times(2000)),
        "endurance": lambda: endurance(engines, times(10_000)),
        "fuzz": lambda: fuzz(engines, times(1000)),
    }
    named, left_out = only.split(",") if only is not None else list(parts), leave_out.split(",") if leave_out else []
    if unknown := {*named, *left_out} - set(parts):
        raise typer.BadParameter(f"expected parts out of {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    results: dict[str, Any] = {"environment": {**environment(threads), "engines": engines.name, "scale": scale}}
    for name in [part for part in named if part not in left_out]:
        start, load = time.monotonic(), psutil.getloadavg()[0]
        found = parts[name]()
        loads = [round(load, 1), round(psutil.getloadavg()[0], 1)]
        results[name] = {**found, "took_s": round(time.monotonic() - start, 1), "load_before_and_after": loads}
        typer.echo(f"{name}: {json.dumps(results[name])}")
        if json_file is not None:
            write_json(json_file, results)
    if not all(result.get("ok", True) for result in results.values()):
        raise typer.Exit(4)


if __name__ == "__main__":
    typer.run(main)
