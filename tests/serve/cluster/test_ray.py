"""The application on Ray Serve, started on this machine: the same answers, full queues, and replicas that die."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import fastcache
from build_store import BuildStore
from fastcache import Bundle
from fastcache.serve.cluster.answers import Answer, merged
from fastcache.serve.http.metrics import CONTENT_TYPE, Metrics
from serve.http.test_edits import EDIT, file, pixels
from serve.models.test_quality import fitted

GENERATE = "/v1/images/generations"
KEYS = ("the-first-of-the-keys", "the-second-of-the-keys")
SETTINGS = {"min_replicas": 2, "max_replicas": 2, "max_batch": 2, "queue": 4, "max_steps": 1000, "cpus": 0.5}


def said(name: str, status: int, body: Any) -> Answer:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    start = {"type": "http.response.start", "status": status, "headers": []}
    return name, [start, {"type": "http.response.body", "body": text}]


def test_replicas_answer_as_one() -> None:
    job, unknown = {"id": "a", "status": "cancelled"}, {"error": {}}
    answers = [said("r1", 404, unknown), said("r2", 200, job), said("r3", 503, unknown)]
    assert merged("/v1/jobs/a/cancel", answers) == answers[1][1]
    assert merged("/v1/jobs/a/cancel", [answers[2], answers[0]]) == answers[0][1]
    assert merged("/metrics", [answers[2]]) == answers[2][1]
    health: dict[str, Any] = {
        "status": "ready",
        "model": "m",
        "running": 1,
        "waiting": 2,
        "bundles": 1,
        "max_batch": 4,
        "queue": 8,
    }
    health["loaded"] = ["m"]
    loading = {
        **health,
        "status": "loading",
        "model": None,
        "loaded": [],
        "running": 0,
        "waiting": 0,
        "max_batch": None,
    }
    _, body = merged("/health", [said("r1", 200, loading), said("r2", 200, health), said("r3", 200, health)])
    total = {"running": 2, "waiting": 4, "bundles": 3, "max_batch": 8, "queue": 24}
    assert json.loads(body["body"]) == {**health, **total}


def test_figures_of_replicas_stand_beside_each_other() -> None:
    figures = Metrics()
    figures.steps.labels("full").inc(3)
    figures.stages.labels("decode").observe(0.1)
    start, body = merged("/metrics", [said("r1", 200, figures.text()), said("r2", 200, figures.text())])
    assert (b"content-type", CONTENT_TYPE.encode()) in start["headers"]
    lines = body["body"].decode().splitlines()
    for replica in ("r1", "r2"):
        assert f'unet_steps_total{{kind="full",replica="{replica}"}} 3.0' in lines
        assert f'fastcache_stage_seconds_count{{replica="{replica}",stage="decode"}} 1.0' in lines
    assert lines.count("# TYPE unet_steps_total counter") == 1


def test_settings_are_checked(tiny_bundle: Bundle) -> None:
    pytest.importorskip("ray.serve", reason="needs Ray: pip install 'fastcache-diffusion[ray]'")
    from fastcache.serve.cluster.ray import application

    for wrong, says in (
        ({"max_replica": 2}, "max_replica"),
        ({"min_replicas": 3, "max_replicas": 2}, "expected max_replicas of 3 or more, got 2"),
        ({"queue": 0}, "queue"),
        ({"upscale_delay_s": -1}, "upscale_delay_s"),
        ({"memory_limit": "much"}, "expected a memory limit"),
        ({"engines": [str(tiny_bundle.path)] * 2}, "expected models of different names"),
        ({"engines": "nowhere"}, "expected --engines to be a bundle's folder"),
        ({"plans": "nowhere"}, "expected --plans to be a folder"),
    ):
        with pytest.raises(ValueError, match=says):
            application({"engines": tiny_bundle.path, **wrong})


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, builds: BuildStore) -> Bundle:
    """The tiny model at a size where a step takes tens of milliseconds, so that a job lasts until others have begun."""
    return builds.bundle(tiny_model, height=128, width=128)


@pytest.fixture(scope="module")
def cluster(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Ray Serve with two replicas of the tiny model under two names, and a client."""
    folder = tmp_path_factory.mktemp("ray")
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'fastcache-diffusion[ray]'")
    serve: Any = pytest.importorskip("ray.serve", reason="needs Ray: pip install 'fastcache-diffusion[ray]'")
    from fastcache.serve.cluster.ray import application

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init("local", num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        plans, keys = folder / "plans", folder / "keys"
        plans.mkdir()
        for name, points in {"draft": (0, 6), "standard": (0, 4, 8), "fine": (0, 3, 6, 9)}.items():
            (plans / f"{name}.json").write_text(fitted(bundle, points, 25.5).to_json())
        keys.write_text("\n".join(KEYS))
        args = {"engines": [str(bundle.path), f"two={bundle.path}"], "plans": plans, "api_key_file": keys}
        serve.run(application({**args, "allowed_hosts": ["a.example"], **SETTINGS}), name="fastcache")
        own = {"Authorization": f"Bearer {KEYS[0]}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, headers=own) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


def until(true: Any) -> None:
    for _ in range(1200):
        if true():
            return
        time.sleep(0.1)
    raise TimeoutError("it did not happen in 120 s")


def replicas() -> list[int]:
    """The processes that draw, of this test's own Ray."""
    found = list[int]()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # Ray's own come and go
            if ":Generator" in "".join(process.cmdline()):
                found.append(process.pid)
    return found


def kill_replicas(cluster: httpx.Client) -> None:
    killed = replicas()
    assert len(killed) == 2
    for process in killed:
        os.kill(process, signal.SIGKILL)


def running(cluster: httpx.Client) -> int:
    answer = cluster.get("/health")
    return answer.json()["running"] if answer.status_code == 200 else 0


@pytest.mark.slow
def test_the_same_application_answers(cluster: httpx.Client, bundle: Bundle) -> None:
    body = {"prompt": "abc", "seed": 5, "num_inference_steps": 4, "cache_interval": 2}
    answer = cluster.post(GENERATE, json=body)
    assert answer.status_code == 200
    with Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))) as got:
        drawn = np.asarray(got).astype(int)
    generator = torch.Generator().manual_seed(5)
    pipe = fastcache.load(bundle.path, threads=1)
    alone = pipe(["abc"], num_inference_steps=4, cache_interval=2, generator=[generator]).images[0]
    assert np.abs(drawn - np.asarray(alone).astype(int)).max() <= 1

    assert cluster.get("/livez").status_code == cluster.get("/readyz").status_code == 200
    assert cluster.get("/health").json()["max_batch"] == 2 * SETTINGS["max_batch"]
    models = cluster.get("/v1/models")
    assert models.status_code == 200, models.text
    assert models.json()["data"][0]["id"] == "tiny-model"
    steps = [line for line in cluster.get("/metrics").text.splitlines() if line.startswith("unet_steps_total{")]
    assert sum(float(line.rpartition(" ")[2]) for line in steps) == 4
    for content, status in ((b"{", 400), (b'{"prompt":"a","quality":"hd"}', 400), (b'{"prompt":""}', 400)):
        refused = cluster.post(GENERATE, content=content, headers={"Content-Type": "application/json"})
        assert refused.status_code == status
        assert set(refused.json()) == {"error"}
    assert cluster.get("/livez", headers={"Host": "another.example"}).status_code == 403
    assert cluster.post("/v1/jobs/nobody/cancel").status_code == 404


@pytest.mark.slow
def test_models_qualities_edits_and_jobs(cluster: httpx.Client) -> None:
    body = {"prompt": "a", "num_inference_steps": 3, "seed": 1}
    assert [model["id"] for model in cluster.get("/v1/models").json()["data"]] == ["tiny-model", "two"]
    drawn = cluster.post(GENERATE, json={"prompt": "a", "model": "two", "quality": "high", "seed": 1}).json()
    assert (drawn["model"], drawn["plan"]["name"], drawn["plan"]["unet_calls"]) == ("two", "fine", 4)
    assert cluster.post(GENERATE, json={**body, "model": "three"}).status_code == 404
    edited = cluster.post(EDIT, data={"prompt": "a", "strength": "0.5"}, files={"image": file(pixels(0))})
    assert edited.json()["data"]
    job = cluster.post(GENERATE, json={**body, "background": True})
    assert job.status_code == 202
    where = job.headers["location"]
    until(lambda: cluster.get(where).json()["status"] == "done")
    assert cluster.get(where, headers={"Authorization": f"Bearer {KEYS[1]}"}).status_code == 404
    assert cluster.get("/v1/models", headers={"Authorization": "Bearer nobody"}).status_code == 401


@pytest.mark.slow
def test_a_cancel_finds_its_replica_and_a_leaver_takes_the_job_along(cluster: httpx.Client) -> None:
    long = {"prompt": "a", "num_inference_steps": 999}
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(cluster.post, GENERATE, json={**long, "job_id": f"job-{k}"}) for k in range(3)]
        until(lambda: running(cluster) == 3)
        for k in range(3):
            assert cluster.post(f"/v1/jobs/job-{k}/cancel").json() == {"id": f"job-{k}", "status": "cancelled"}
        assert [job.result().status_code for job in jobs] == [499] * 3
    with cluster.stream("POST", GENERATE, json={**long, "stream": True, "stream_steps": True}) as answer:
        assert next(answer.iter_lines()).startswith("event: fastcache.step")
    until(lambda: running(cluster) == 0)
    assert cluster.post(GENERATE, json={**long, "timeout": 1}).json()["error"]["code"] == "job_late"


@pytest.mark.slow
def test_more_than_fits_is_told_to_come_again(cluster: httpx.Client) -> None:
    with ThreadPoolExecutor(40) as pool:
        body = {"prompt": "a", "num_inference_steps": 30}
        answers = list(pool.map(lambda _: cluster.post(GENERATE, json=body), range(40)))
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        assert (answer.status_code == 429) == ("retry-after" in answer.headers)
    drawn = sum(answer.status_code == 200 for answer in answers)
    assert drawn >= 2 * SETTINGS["max_batch"]


@pytest.mark.slow
def test_a_request_outlives_its_replica_and_a_stream_is_told(cluster: httpx.Client) -> None:
    with ThreadPoolExecutor() as pool:
        lost = pool.submit(cluster.post, GENERATE, json={"prompt": "a", "num_inference_steps": 200, "seed": 1})
        stream = {"prompt": "a", "num_inference_steps": 200, "stream": True, "stream_steps": True}
        streamed = pool.submit(cluster.post, GENERATE, json=stream)
        until(lambda: running(cluster) == 2)
        kill_replicas(cluster)
        answer = cluster.get("/v1/models")
        assert answer.status_code in (200, 503)
        assert (answer.status_code == 503) == ("retry-after" in answer.headers)
        assert '"code": "replica_lost"' in streamed.result().text.splitlines()[-2]
        assert lost.result().status_code == 200
    until(lambda: len(replicas()) == 2)
    assert cluster.post(GENERATE, json={"prompt": "a", "num_inference_steps": 2}).status_code == 200


@pytest.mark.parametrize(("client", "status"), [("127.0.0.1", 200), ("192.0.2.1", 403), ("::1", 200)])
def test_without_keys_other_machines_are_refused(client: str, status: int) -> None:
    pytest.importorskip("ray.serve", reason="needs Ray: pip install 'fastcache-diffusion[ray]'")
    from starlette.responses import PlainTextResponse

    from fastcache.serve.cluster.ray import OnlyFromHere

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": (client, 1)}
    asyncio.run(OnlyFromHere(PlainTextResponse("drawn"))(scope, receive, send))
    assert sent[0]["status"] == status
