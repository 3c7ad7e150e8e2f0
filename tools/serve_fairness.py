"""How long short requests take beside a heavy client, against beside another short one, on a server that runs.

    python tools/serve_fairness.py http://127.0.0.1:8000 --requests 30

The heavy client asks for `--images` images of `--steps` steps, again and again. Prints one JSON document; exit code 1
where the median beside the heavy client is above 1.5 times that beside a light one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time

import httpx


def draw(client: httpx.Client, steps: int, images: int) -> float:
    start = time.monotonic()
    body = {"prompt": "a red circle", "num_inference_steps": steps, "n": images, "seed": 0}
    client.post("/v1/images/generations", json=body).raise_for_status()
    return time.monotonic() - start


def times_beside(url: str, requests: int, steps: int, images: int) -> list[float]:
    """The seconds of light requests, one after the other, beside a client that asks for so much."""
    over = threading.Event()

    def other() -> None:
        with httpx.Client(base_url=url, timeout=600) as client:
            while not over.is_set():
                draw(client, steps, images)

    beside = threading.Thread(target=other)
    beside.start()
    time.sleep(1.0)  # until it is drawn
    try:
        with httpx.Client(base_url=url, timeout=600) as client:
            return [draw(client, 4, 1) for _ in range(requests)]
    finally:
        over.set()
        beside.join()


def figures(seconds: list[float]) -> dict[str, float]:
    ranked = sorted(seconds)
    p99 = ranked[min(len(ranked) - 1, int(0.99 * len(ranked)))]
    return {"p50_ms": round(1e3 * statistics.median(ranked), 1), "p99_ms": round(1e3 * p99, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--images", type=int, default=8)
    given = parser.parse_args()
    with httpx.Client(base_url=given.url, timeout=600) as client:
        alone = [draw(client, 4, 1) for _ in range(given.requests)]
    light = times_beside(given.url, given.requests, 4, 1)
    heavy = times_beside(given.url, given.requests, given.steps, given.images)
    ratio = statistics.median(heavy) / statistics.median(light)
    report = {"alone": figures(alone), "beside_light": figures(light), "beside_heavy": figures(heavy)}
    print(json.dumps({**report, "ratio_p50": round(ratio, 2), "requests": given.requests}))
    return int(ratio > 1.5)


if __name__ == "__main__":
    sys.exit(main())
