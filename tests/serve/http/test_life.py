"""A server's life: full queues, clients that leave, cancels, deadlines, faults, swaps, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import fastcache
from fastcache import Bundle
from fastcache.bundle.bundle import MANIFEST, read_manifest
from fastcache.serve.engine.device import DeviceBroken
from fastcache.serve.engine.executor import Executor
from fastcache.serve.http.limits import Limits
from fastcache.serve.models import catalogue
from serve.serving import GENERATE, LIMITS, Running, running

LONG = {"num_inference_steps": 999, "prompt": "a", "seed": 0}


@pytest.fixture
def small(tiny_bundle: Bundle) -> Iterator[Running]:
    with running(tiny_bundle.path, limits=Limits(max_batch=1, queue=8, max_steps=1000)) as served:
        yield served


def statuses(served: Running, bodies: list[dict[str, Any]], refused: Callable[[], None] = lambda: None) -> Counter[int]:
    """What a burst of requests is answered, all sent at once; `refused` is called after each that is turned away."""

    async def burst() -> Counter[int]:
        async def status(body: dict[str, Any]) -> int:
            answer = await client.post(GENERATE, json=body)
            assert (answer.status_code == 429) == ("retry-after" in answer.headers)
            if answer.status_code == 429:
                refused()
            return answer.status_code

        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.client.base_url, timeout=120, limits=limits) as client:
            return Counter(await asyncio.gather(*map(status, bodies)))

    return asyncio.run(burst())


def test_a_burst_beyond_the_queue_is_told_to_come_again(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image that is drawn takes no step until each of the burst has been turned away or waits."""
    gate, run, refused = threading.Event(), Executor.run, itertools.count(1)

    def held(self: Executor, *arguments: Any, **named: Any) -> None:
        assert gate.wait(60)
        run(self, *arguments, **named)

    def open_gate() -> None:
        if next(refused) + small.service.desk.outstanding == 100:
            gate.set()

    monkeypatch.setattr(Executor, "run", held)
    with ThreadPoolExecutor() as pool:
        running_one = pool.submit(small.draw, num_inference_steps=600, job_id="first")
        small.until(lambda: small.service.desk.running == 1)
        assert statuses(small, [{"prompt": "a", "num_inference_steps": 1}] * 99, open_gate) == {200: 8, 429: 91}
        assert running_one.result().status_code == 200
    assert small.service.desk.outstanding == 0


def steps_of(served: Running) -> float:
    return sum(served.metric(f'unet_steps_total{{kind="{kind}"}}') for kind in ("full", "shallow"))


def test_a_client_that_leaves_takes_its_job_with_it(tiny: Running) -> None:
    at_hand = tiny.metric("unet_steps_abandoned_total")
    for _ in range(5):
        with tiny.client.stream("POST", GENERATE, json={**LONG, "stream": True, "stream_steps": True}) as response:
            for line in response.iter_lines():
                if '"step": 3,' in line:
                    break
        tiny.until(lambda: tiny.service.desk.outstanding == 0)
    with pytest.raises(httpx.ReadTimeout):
        tiny.client.post(GENERATE, json=LONG, timeout=0.3)
    tiny.until(lambda: tiny.service.desk.outstanding == 0)
    steps = steps_of(tiny)
    assert tiny.draw(num_inference_steps=7).status_code == 200
    assert steps_of(tiny) - steps - 7 in (0, 1)  # the step at hand, and nothing after it
    assert tiny.metric("unet_steps_abandoned_total") - at_hand <= 6


def test_a_cancel_ends_the_named_job_only(tiny: Running) -> None:
    with ThreadPoolExecutor() as pool:
        jobs = {
            f"job-{k}": pool.submit(tiny.draw, **{**LONG, "num_inference_steps": 300}, job_id=f"job-{k}")
            for k in range(6)
        }
        tiny.until(lambda: tiny.service.desk.outstanding == 6)
        for name in ("job-1", "job-5", "job-1"):
            answer = tiny.client.post(f"/v1/jobs/{name}/cancel")
            assert (answer.status_code, answer.json()) == (200, {"id": name, "status": "cancelled"})
        got = {name: job.result() for name, job in jobs.items()}
    assert {name for name, answer in got.items() if answer.status_code == 499} == {"job-1", "job-5"}
    assert got["job-1"].json()["error"]["code"] == "job_cancelled"
    pictures = {answer.json()["data"][0]["b64_json"] for answer in got.values() if answer.status_code == 200}
    assert len(pictures) == 1
    assert tiny.client.post("/v1/jobs/job-1/cancel").json()["status"] == "cancelled"
    assert tiny.client.post("/v1/jobs/job-2/cancel").json()["status"] == "drawn"
    assert tiny.client.post("/v1/jobs/nobody/cancel").status_code == 404
    assert tiny.draw(job_id="job-2").status_code == 409


def test_a_deadline_can_be_shortened(tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Executor.run

    def slowly(self: Executor, *arguments: Any, **named: Any) -> None:
        time.sleep(0.005)  # 999 steps take five seconds at the least, on any machine
        run(self, *arguments, **named)

    monkeypatch.setattr(Executor, "run", slowly)
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(tiny.draw, num_inference_steps=100) for _ in range(4)]
        tiny.until(lambda: tiny.service.desk.running == 4)
        late = tiny.draw(**LONG, timeout=1)
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "job_late"
        assert {other.result().status_code for other in others} == {200}


class Failing:
    """An engine that fails as told, in place of its call."""

    def __init__(self, executor: Executor, *failures: Exception, when: int = 1) -> None:
        lanes = executor.lanes(executor.pipe.bundle.manifest.sizes[0])
        self.run, self.failures, self.when, self.sizes = lanes.run, list(failures), when, list[int]()
        lanes.run = self  # type: ignore[method-assign]

    def __call__(self, name: str, lanes: Any, guided: bool) -> None:
        self.sizes.append(len(lanes))
        if self.failures and len(lanes) >= self.when:
            raise self.failures.pop(0)
        self.run(name, lanes, guided)


def executor_of(served: Running) -> Executor:
    assert served.service.served is not None
    return served.service.served.executor


@pytest.fixture
def fresh(tiny_bundle: Bundle) -> Iterator[Running]:
    with running(tiny_bundle.path, limits=LIMITS) as served:
        yield served


def test_out_of_memory_halves_the_batch_once(fresh: Running) -> None:
    body = {"prompt": "a", "num_inference_steps": 20, "seed": 3, "cache_interval": 2, "n": 4}
    expected = fresh.draw(**body).json()["data"]
    failing = Failing(executor_of(fresh), MemoryError("no room"), when=3)
    got = fresh.draw(**body)
    assert got.status_code == 200
    assert [entry["b64_json"] for entry in got.json()["data"]] == [entry["b64_json"] for entry in expected]
    assert failing.sizes[:3] == [4, 2, 2]
    assert max(failing.sizes[1:]) == 2


def test_a_failure_is_one_jobs_own(fresh: Running) -> None:
    executor = executor_of(fresh)
    Failing(executor, MemoryError("/secret/path"))
    got = fresh.draw()
    assert (got.status_code, got.json()["error"]["code"]) == (500, "job_out_of_memory")
    Failing(executor, RuntimeError("/secret/path of the engine"))
    got = fresh.draw()
    assert (got.status_code, got.json()["error"]["code"]) == (500, "job_failed")
    assert "secret" not in got.text
    assert fresh.draw().status_code == 200


def test_an_engine_that_keeps_failing_ends_the_server(fresh: Running) -> None:
    """A supervisor then starts another; requests until then are told to come again."""
    Failing(executor_of(fresh), *[RuntimeError("an illegal memory access was encountered")] * 9)
    codes = [fresh.draw().status_code for _ in range(3)]
    assert codes[:2] == [500, 500]
    fresh.until(lambda: fresh.server.should_exit)
    assert fresh.service.state == "broken"
    assert isinstance(fresh.service.failure, DeviceBroken)
    fresh._thread.join()


@pytest.fixture
def swappable(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))


def rename(folder: Path, name: str) -> None:
    """Make a bundle another one: that of a model of another name, as whole as before."""
    manifest = read_manifest(folder)
    other = manifest.model_copy(update={"model": manifest.model.model_copy(update={"name": name})})
    other = other.model_copy(update={"bundle_sha256": other.digest()})
    (folder / MANIFEST).write_text(json.dumps(other.to_json()))


@pytest.mark.slow
def test_a_bundle_is_swapped_without_dropping_a_request(swappable: Path) -> None:
    """The bundle is replaced by another while requests run, wait and arrive."""
    rename(swappable, "first")
    with running(swappable, limits=LIMITS) as served, ThreadPoolExecutor(24) as pool:
        stop, answers = threading.Event(), list[Any]()

        def client() -> None:
            while not stop.is_set():
                answers.append(served.draw(num_inference_steps=50))

        clients = [pool.submit(client) for _ in range(6)]
        served.until(lambda: len(answers) > 10)
        long = pool.submit(served.draw, num_inference_steps=300, model="first", job_id="long")
        served.until(lambda: "long" in served.service.names)
        rename(swappable, "second")
        reload(served)
        seen = len(answers)
        served.until(lambda: len(answers) > seen + 20)
        stop.set()
        for one in clients:
            one.result()
        assert long.result().json()["model"] == "first"
        assert {answer.status_code for answer in answers} == {200}
        assert Counter(answer.json()["model"] for answer in answers).keys() == {"first", "second"}
        served.until(lambda: served.service.desk.bundles == 1)  # the first is let go
        assert served.draw(model="first").status_code == 404
        assert served.draw(model="second").status_code == 200


def reload(served: Running) -> None:
    loop = served.service.loop
    assert loop is not None
    asyncio.run_coroutine_threadsafe(served.service.catalogue.reload(), loop).result()


def test_a_bundle_that_does_not_load_leaves_the_old_one(swappable: Path) -> None:
    with running(swappable, limits=LIMITS) as served:
        expected = served.draw().json()["data"]
        (swappable / "manifest.json").write_text("{}")
        with pytest.raises(fastcache.BundleError):
            reload(served)
        assert served.draw().json()["data"] == expected


def test_while_it_loads_requests_are_told_to_come_again(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, warm_up = threading.Event(), catalogue.warm_up

    def slowly(executor: Executor) -> None:
        gate.wait()
        warm_up(executor)

    monkeypatch.setattr(catalogue, "warm_up", slowly)
    with running(tiny_bundle.path, wait=False) as served:
        served.until(lambda: _answers(served))
        for answer in (served.draw(), served.client.get("/readyz"), served.client.get("/v1/models")):
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
        assert served.client.get("/livez").json() == {"status": "loading"}
        gate.set()
        served.until(lambda: served.client.get("/readyz").status_code == 200)
        assert served.draw().status_code == 200


def _answers(served: Running) -> bool:
    try:
        return served.client.get("/livez").status_code == 200
    except httpx.ConnectError:
        return False


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "fastcache.cli", "serve", "--engines", str(folder), "--port", "0", *options]


def started(process: subprocess.Popen[str], *, wait: bool = True) -> str:
    """The address that a server says it listens on; once it is ready."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"listening on (\S+)", line):
            url = found[1]
            break
    else:
        raise RuntimeError("it ended before it listened")
    while wait and httpx.get(f"{url}/readyz").status_code != 200:
        time.sleep(0.05)
    return url


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_finishes_what_runs_and_refuses_what_waits(tiny_bundle: Bundle) -> None:
    options = ["--max-batch", "1", "--queue", "8", "--max-steps", "1000", "--threads", "1"]
    with subprocess.Popen(command(tiny_bundle.path, *options), stderr=subprocess.PIPE, text=True) as process:
        url = started(process)

        def draw(_: int) -> httpx.Response:
            return httpx.post(url + GENERATE, json={**LONG, "num_inference_steps": 250}, timeout=60)

        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(draw, k) for k in range(6)]
            for _ in range(600):
                health = httpx.get(f"{url}/health").json()
                if (health["running"], health["waiting"]) == (1, 5):
                    break
                time.sleep(0.01)
            process.send_signal(signal.SIGHUP)  # loads beside, and disturbs nothing
            process.send_signal(signal.SIGTERM)
            codes = Counter(answer.result().status_code for answer in answers)
        said = process.stderr.read() if process.stderr else ""
    assert codes == {200: 1, 503: 5}
    assert process.returncode == 0
    assert "Traceback" not in said
    assert '"prompt"' not in said


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_does_not_wait_for_engines_to_load(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Loading takes ten minutes here, longer than any test."""
    slow = (
        "import time; from fastcache.serve.models import catalogue; "
        "catalogue.warm_up = lambda executor: time.sleep(600)"
    )
    (tmp_path / "sitecustomize.py").write_text(slow)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command(tiny_bundle.path), stderr=subprocess.PIPE, text=True, env=environment) as process:
        url = started(process, wait=False)
        answered = False
        while not answered:
            with contextlib.suppress(httpx.ConnectError):
                answered = httpx.get(f"{url}/readyz").status_code == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
        assert "Traceback" not in (process.stderr.read() if process.stderr else "")


@pytest.mark.slow
def test_a_bundle_that_does_not_load_ends_the_command(bundle_copy: Path) -> None:
    (bundle_copy / "full.onnx").write_bytes(b"other")
    done = subprocess.run(command(bundle_copy), capture_output=True, text=True)
    assert done.returncode == 4
    assert done.stdout == ""
    assert "full.onnx" in done.stderr
    assert "Traceback" not in done.stderr
    refused = subprocess.run(command(bundle_copy, "--host", "0.0.0.0"), capture_output=True, text=True)
    assert refused.returncode == 2
    assert json.dumps("--api-key-file")[1:-1] in refused.stderr
