"""Jobs in the background: accepted, asked after, cancelled, and forgotten."""

from __future__ import annotations

import time
from typing import Any

import httpx

from fastcache import Bundle
from fastcache.serve.http.limits import Limits
from serve.serving import Running, running

LONG = {"num_inference_steps": 900}


def begin(served: Running, **fields: Any) -> str:
    got = served.draw(background=True, **fields)
    assert got.status_code == 202
    assert got.headers["location"] == f"/v1/jobs/{got.json()['id']}"
    return got.json()["id"]


def status(served: Running, job: str) -> dict[str, Any]:
    got = served.client.get(f"/v1/jobs/{job}")
    assert got.status_code == 200, got.text
    return got.json()


def ended(served: Running, job: str) -> dict[str, Any]:
    served.until(lambda: status(served, job)["status"] in ("done", "failed", "cancelled"))
    return status(served, job)


def test_a_job_is_what_waiting_for_it_gives(tiny: Running) -> None:
    found = ended(tiny, begin(tiny, n=2))
    assert (found["status"], found["step"], found["num_steps"], found["error"]) == ("done", 8, 8, None)
    assert found["result"]["data"] == tiny.draw(n=2).json()["data"]
    assert 0 < found["kept_s"] <= 600


def test_a_job_tells_its_place_its_steps_and_how_it_looks(tiny_bundle: Bundle) -> None:
    with running(tiny_bundle.path, limits=Limits(max_batch=1, queue=8, max_steps=1000)) as served:
        first, second = begin(served, **LONG, partial_images=16), begin(served, n=2, **LONG)
        third = begin(served)
        served.until(lambda: status(served, first)["preview_b64_json"] is not None)
        assert (status(served, first)["status"], status(served, first)["position"]) == ("running", None)
        assert (status(served, second)["status"], status(served, second)["position"]) == ("queued", 0)
        assert status(served, third)["position"] == 2
        for job in (second, first):
            assert served.client.post(f"/v1/jobs/{job}/cancel").json()["status"] == "cancelled"
        cancelled = ended(served, first)
        assert (cancelled["status"], cancelled["error"]["code"]) == ("cancelled", "job_cancelled")
        assert ended(served, third)["status"] == "done"
        assert served.draw(job_id=third).status_code == 409


def test_results_are_bounded(tiny_bundle: Bundle) -> None:
    limits = Limits(max_batch=2, queue=8, max_results=2, keep_results_s=3600)
    with running(tiny_bundle.path, limits=limits) as served:
        jobs = list[str]()
        for k in range(4):
            jobs.append(begin(served, seed=k))
            ended(served, jobs[-1])
        assert [served.client.get(f"/v1/jobs/{job}").status_code for job in jobs] == [404, 404, 200, 200]
    limits = Limits(max_batch=2, queue=8, keep_results_s=0.01)
    with running(tiny_bundle.path, limits=limits) as served:
        job = begin(served)
        served.until(lambda: served.service.desk.outstanding == 0)
        time.sleep(0.02)
        served.until(lambda: served.client.get(f"/v1/jobs/{job}").status_code == 404)


def test_what_does_not_fit_is_refused_at_once(tiny: Running) -> None:
    assert tiny.draw(background=True, size="1x1").status_code == 400
    assert tiny.draw(background=True, stream=True).json()["error"]["param"] == "background"
    missing = tiny.client.get("/v1/jobs/nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "job_not_found")


def test_a_job_belongs_to_the_key_that_asked(tiny_bundle: Bundle) -> None:
    import hashlib

    keys = ("first-key-for-the-tests", "second-key-for-the-tests")
    with running(tiny_bundle.path, keys=[hashlib.sha256(key.encode()).digest() for key in keys]) as served:
        own, other = ({"Authorization": f"Bearer {key}"} for key in keys)
        got: httpx.Response = served.draw(own, background=True)
        path = got.headers["location"]
        assert served.client.get(path, headers=own).status_code == 200
        assert served.client.get(path, headers=other).status_code == 404
        assert served.client.get(path).status_code == 401
