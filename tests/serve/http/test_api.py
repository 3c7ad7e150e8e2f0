"""The API as a client sees it: OpenAI's shapes, pictures, events, and errors that say what does not fit."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastcache
from fastcache import Bundle, CachePlan, FastCachePipeline
from fastcache.evaluate.quality import psnr_db
from fastcache.loop.plan import Forecast
from fastcache.sampler.scheduler import SAMPLERS
from fastcache.serve.http.limits import Limits
from serve.malformed import malformed_bodies, malformed_requests
from serve.serving import GENERATE, Running, running, schemathesis_command

pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")


KEY = "a-key-for-the-tests-only"


def picture(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def error(response: Any) -> dict[str, Any]:
    """The body of a refusal, which is of OpenAI's shape and opaque."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    for word in ("Traceback", "/work", "/tmp", "site-packages", ".py"):
        assert word not in response.text
    return body["error"]


def test_images_are_those_of_the_pipeline(tiny: Running, tiny_bundle: Bundle) -> None:
    response = tiny.draw(prompt="abc", n=3, seed=5, cache_interval=2, sampler="euler_a", negative_prompt="z")
    assert response.status_code == 200
    body = response.json()
    assert (body["model"], body["size"], body["output_format"]) == ("tiny-model", "32x32", "png")
    assert [entry["seed"] for entry in body["data"]] == [5, 6, 7]
    expected = fastcache.load(tiny_bundle.path, threads=1)(
        ["abc"] * 3,
        negative_prompt="z",
        num_inference_steps=4,
        cache_interval=2,
        sampler="euler_a",
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7)],
    )
    for entry, image in zip(body["data"], expected.images, strict=True):
        got = picture(entry["b64_json"])
        difference = max(abs(a - b) for a, b in zip(got.tobytes(), image.tobytes(), strict=True))
        assert difference <= 1
    assert expected.images[0].tobytes() != expected.images[1].tobytes()


def test_raw_png_says_how_it_was_made(tiny: Running) -> None:
    body = {"prompt": "abc", "num_inference_steps": 4, "seed": 9, "cache_interval": 2}
    response = tiny.client.post(GENERATE, json=body, headers={"Accept": "image/png"})
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-seed"] == "9"
    image: Any = Image.open(io.BytesIO(response.content))
    assert image.text["prompt"] == "abc"
    assert CachePlan.from_json(image.text["plan"]).refresh_steps == (0, 2)
    assert image.tobytes() == picture(tiny.draw(**body).json()["data"][0]["b64_json"]).tobytes()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_output_formats(kind: str, tiny: Running) -> None:
    quality = {} if kind == "png" else {"output_compression": 90}
    body = tiny.draw(output_format=kind, **quality).json()
    assert picture(body["data"][0]["b64_json"]).format == kind.upper()


def test_a_plan_is_followed_and_counted(tiny: Running) -> None:
    before = [tiny.metric(f'unet_steps_total{{kind="{kind}"}}') for kind in ("full", "shallow")]
    plan = CachePlan.from_refresh_steps(6, (0, 1, 4))
    by_plan = tiny.draw(plan=json.loads(plan.to_json()), num_inference_steps=6)
    after = [tiny.metric(f'unet_steps_total{{kind="{kind}"}}') for kind in ("full", "shallow")]
    assert by_plan.status_code == 200
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 3]
    all_full = tiny.draw(num_inference_steps=6).json()["data"]
    assert by_plan.json()["data"] != all_full


def test_plans_with_forecasts_are_the_pipelines_alone_and_in_company(tiny: Running, tiny_bundle: Bundle) -> None:
    """And with steps without guidance, among plain ones: of 10 to 13 steps, so at different ones."""
    forecasts = [None, Forecast(1), Forecast(2, 0.5), Forecast(1, by="sigma")]
    plans = [replace(CachePlan.uniform(10 + k, 4), forecast=forecast) for k, forecast in enumerate(forecasts)]
    plans[2] = replace(plans[2], unguided_steps=tuple(range(6, 12)))
    bodies = [
        {"prompt": "abc", "seed": k, "num_inference_steps": plan.num_steps, "plan": json.loads(plan.to_json())}
        for k, plan in enumerate(plans)
    ]
    alone = [tiny.draw(**body) for body in bodies]
    before = steps_and_calls(tiny)
    with ThreadPoolExecutor(8) as pool:
        company = list(pool.map(lambda body: tiny.draw(**body), bodies * 2))
    steps, calls = (after - then for after, then in zip(steps_and_calls(tiny), before, strict=True))
    assert steps == 2 * sum(plan.num_steps for plan in plans)
    assert calls < 0.8 * steps
    pipe = fastcache.load(tiny_bundle.path, threads=1)
    for k, answers in enumerate(zip(alone, company[:4], company[4:], strict=True)):
        expected = drawn_by(pipe, k, plans[k])
        for answer in answers:
            assert answer.status_code == 200
            assert psnr_db(pixels(picture(answer.json()["data"][0]["b64_json"])), expected) > 60
        if plans[k].forecast is not None:
            assert psnr_db(drawn_by(pipe, k, replace(plans[k], forecast=None)), expected) < 60


def steps_and_calls(served: Running) -> list[float]:
    """U-Net steps of images, and engine calls: fewer where images shared them."""
    kinds = ("full", "shallow")
    return [sum(served.metric(f'unet_{what}_total{{kind="{kind}"}}') for kind in kinds) for what in ("steps", "calls")]


def drawn_by(pipe: FastCachePipeline, seed: int, plan: CachePlan) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(seed)]
    return pixels(pipe(["abc"], num_inference_steps=plan.num_steps, plan=plan, generator=generator).images[0])


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None]


def events(response: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for block in response.read().decode().strip().split("\n\n"):
        name, data = block.split("\n")
        yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_a_stream_has_openais_events(tiny: Running) -> None:
    body = {"prompt": "abc", "seed": 1, "num_inference_steps": 6, "cache_interval": 3, "stream": True}
    with tiny.client.stream("POST", GENERATE, json={**body, "partial_images": 2, "stream_steps": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        got = list(events(response))
    assert all(data["type"] == name for name, data in got)
    steps = [data for name, data in got if name == "fastcache.step"]
    assert [data["kind"] for data in steps] == ["full", "shallow", "shallow"] * 2
    partial = [data for name, data in got if name == "image_generation.partial_image"]
    assert [data["partial_image_index"] for data in partial] == [0, 1]
    name, last = got[-1]
    assert name == "image_generation.completed"
    alone = tiny.draw(**{**body, "stream": False}).json()["data"][0]["b64_json"]
    assert last["b64_json"] == alone
    assert len({data["b64_json"] for data in [*partial, last]}) == 3
    with tiny.client.stream("POST", GENERATE, json=body) as response:
        assert [name for name, _ in events(response)] == ["image_generation.completed"]


def test_models_and_health(tiny: Running) -> None:
    (model,) = tiny.client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny-model"
    assert model["samplers"] == list(SAMPLERS)
    assert tiny.draw(model=model["id"], size=model["sizes"][0]).status_code == 200
    assert tiny.client.get("/health").json() == {
        "status": "ready",
        "model": "tiny-model",
        "running": 0,
        "waiting": 0,
        "bundles": 1,
        "loaded": ["tiny-model"],
        "max_batch": 4,
        "queue": 64,
    }
    assert tiny.client.get("/livez").json() == tiny.client.get("/readyz").json() == {"status": "ready"}


def test_a_model_is_found_by_its_id(tiny: Running) -> None:
    (listed,) = tiny.client.get("/v1/models").json()["data"]
    assert tiny.client.get(f"/v1/models/{listed['id']}").json() == listed
    for other in ("another", "a/b", "a%2Fb"):
        found = tiny.client.get(f"/v1/models/{other}")
        assert (found.status_code, error(found)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/metrics"])
def test_a_probe_may_be_a_head(path: str, tiny: Running) -> None:
    head = tiny.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == tiny.client.get(path).headers["content-type"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "expected"),
    [
        (b'{"prompt": "a"}', "application/x-www-form-urlencoded", 415, "-H 'Content-Type: application/json'"),
        (b'{"prompt": "a"}', "text/plain", 415, "expected Content-Type: application/json, got text/plain"),
        (b'{"prompt": "a"}', None, 415, "got none; curl needs"),
        (b"", "application/json", 400, "got an empty body"),
        (b"", None, 400, "got an empty body"),
        (b'{"prompt": "\xff"}', "application/json", 400, "expected a body of JSON in UTF-8, got other bytes"),
        (b"[]", "application/json", 400, "expected a JSON object"),
        (b"null", "application/json", 400, "expected a JSON object"),
    ],
)
def test_a_body_that_is_no_object(content: bytes, kind: str | None, status: int, expected: str, tiny: Running) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = tiny.client.post(GENERATE, content=content, headers=headers)
    assert response.status_code == status
    assert expected in error(response)["message"]


def test_metrics_never_hold_a_prompt(tiny: Running) -> None:
    tiny.draw(prompt="secret", job_id="a-job-of-mine")
    text = tiny.client.get("/metrics").text
    assert "secret" not in text
    assert "a-job-of-mine" not in text
    assert 'fastcache_requests_total{route="/v1/images/generations",status="200"}' in text
    for stage in ("queue", "encode", "full_step", "decode", "total"):
        assert f'fastcache_stage_seconds_count{{stage="{stage}"}}' in text


BAD_FIELDS: list[tuple[dict[str, Any], str, int]] = [
    ({"prompt": ""}, "prompt", 400),
    ({"prompt": "a" * 2001}, "prompt", 400),
    ({"prompt": "abcdefghij"}, "prompt", 400),
    ({"negative_prompt": "abcdefghij"}, "negative_prompt", 400),
    ({"promt": "a"}, "promt", 400),
    ({"quality": "high"}, "quality", 400),
    ({"quality": "hd"}, "quality", 400),
    ({"style": "natural"}, "style", 400),
    ({"background": "transparent"}, "background", 400),
    ({"moderation": "high"}, "moderation", 400),
    ({"user": "a" * 257}, "user", 400),
    ({"response_format": "url"}, "response_format", 400),
    ({"output_format": "gif"}, "output_format", 400),
    ({"output_compression": 50}, "output_compression", 400),
    ({"size": "64x64"}, "size", 400),
    ({"n": 0}, "n", 400),
    ({"n": 11}, "n", 400),
    ({"n": "1"}, "n", 400),
    ({"n": True}, "n", 400),
    ({"n": 1.5}, "n", 400),
    ({"n": 2, "stream": True}, "n", 400),
    ({"partial_images": 1}, "stream", 400),
    ({"num_inference_steps": 0}, "num_inference_steps", 400),
    ({"num_inference_steps": 1001}, "num_inference_steps", 400),
    ({"num_inference_steps": 800, "sampler": "lcm"}, "num_inference_steps", 400),
    ({"guidance_scale": -1}, "guidance_scale", 400),
    ({"seed": -1}, "seed", 400),
    ({"seed": 2**64}, "seed", 400),
    ({"sampler": "magic"}, "sampler", 400),
    ({"cache_interval": 0}, "cache_interval", 400),
    ({"plan": {}}, "plan", 400),
    ({"plan": json.loads(CachePlan.uniform(5, 2).to_json())}, "plan", 400),
    ({"plan": json.loads(CachePlan.uniform(4, 2, branch_id=1).to_json())}, "plan", 400),
    ({"plan": json.loads(CachePlan.uniform(4, 2).to_json()), "cache_interval": 2}, "plan", 400),
    ({"plan": {**json.loads(CachePlan.uniform(4, 2).to_json()), "forecast": {"order": 1, "damping": 1}}}, "plan", 400),
    (
        {
            "plan": json.loads(replace(CachePlan.uniform(5, 2), forecast=Forecast(1)).to_json()),
            "num_inference_steps": 4,
        },
        "plan",
        400,
    ),
    ({"plan": {**json.loads(CachePlan.uniform(4, 2).to_json()), "unguided_steps": [0]}}, "plan", 400),
    ({"timeout": 0}, "timeout", 400),
    ({"timeout": 301}, "timeout", 400),
    ({"job_id": "../etc"}, "job_id", 400),
    ({"model": "another"}, "model", 404),
]


@pytest.mark.parametrize(("fields", "param", "status"), BAD_FIELDS, ids=lambda value: str(value)[:30])
def test_what_does_not_fit_is_refused(fields: dict[str, Any], param: str, status: int, tiny: Running) -> None:
    response = tiny.draw(**fields)
    assert response.status_code == status
    found = error(response)
    assert found["param"] == param
    assert found["type"] == "invalid_request_error"
    assert found["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"quality": "auto", "style": "vivid", "background": "auto", "moderation": "auto", "user": "me"},
        {"quality": "standard", "background": "opaque", "moderation": "low", "response_format": "b64_json"},
    ],
)
def test_what_openais_clients_always_send_means_what_is_done(fields: dict[str, Any], tiny: Running) -> None:
    assert tiny.draw(**fields).json()["data"] == tiny.draw().json()["data"]


SHORT_PLAN = json.loads(CachePlan.uniform(4, 2).to_json())
LONG_PLAN = {**SHORT_PLAN, "passes": ["full", *["shallow-0"] * 9_000]}  # nearly as long as a body may be
FIRST_SCHEMA = {key: value for key, value in SHORT_PLAN.items() if key != "passes"} | {"schema": "fastcache.plan/1"}
COSTLY: dict[str, tuple[dict[str, Any], str | None]] = {
    "a long plan": ({"plan": LONG_PLAN}, "of at most 16 calls for these steps, got 9001"),
    "a long plan of branch ids": (
        {"plan": {**FIRST_SCHEMA, "branches": [None, *[0] * 40_000]}},
        "of at most 16 calls for these steps, got 40001",
    ),
    "whose number is small": ({"plan": {**LONG_PLAN, "num_steps": 4}}, "of at most 16 calls"),
    "whose number is right": ({"plan": {**LONG_PLAN, "num_steps": 9_001}}, "of at most 16 calls"),
    "unguided steps": (
        {"plan": {**LONG_PLAN, "passes": ["full"] * 4, "unguided_steps": [0] * 20_000}},
        "of at most 16",
    ),
    "a nested plan": ({"plan": {"a": [[[0] * 9] * 9] * 9, "b": [[0] * 10_000]}}, "of at most 16 calls"),
    "many keys": ({"plan": {str(k): 0 for k in range(9_000)}}, "expected at most 64 fields, got 9000"),
    "a long maker": (
        {"plan": {**LONG_PLAN, "passes": ["full"] * 4, "made_by": "x" * 100_000}},
        "at most 256 characters",
    ),
    "a long key": ({"plan": {"x" * 100_000: 0}}, "at most 256 characters"),
    "a longer plan for more steps": (
        {"plan": json.loads(CachePlan.uniform(999, 3).to_json()), "num_inference_steps": 998},
        "expected a plan for the sampler's 998 U-Net calls, got one for 999",
    ),
    "spaces": ({"prompt": " " * 2000}, None),
    "long words": ({"prompt": "a" * 2000}, "tokens"),
    "long negative words": ({"negative_prompt": "a" * 2000}, "tokens"),
    "characters of four bytes": ({"prompt": "\U0001f534" * 2000}, "tokens"),
    "an interval": ({"cache_interval": 1000}, None),
    "a seed": ({"seed": 2**63 - 11}, None),
    "guidance": ({"guidance_scale": 100}, None),
    "a name": ({"job_id": "x" * 64}, None),
    "previews": ({"stream": True, "partial_images": 16, "stream_steps": True}, None),
    "the best webp": ({"output_format": "webp", "output_compression": 100}, None),
    "images": ({"n": 10, "num_inference_steps": 1}, None),
    **{f"steps of {name}": ({"sampler": name, "num_inference_steps": 150}, None) for name in ("heun", "unipc", "lms")},
}


@pytest.mark.parametrize("case", COSTLY)
def test_valid_but_costly_input(case: str, tiny: Running) -> None:
    """Lengths are looked at before anything is made of them: 40 kB of zeros used to take 22 s to be refused."""
    fields, expected = COSTLY[case]
    response = tiny.draw(**fields)
    assert response.status_code == (200 if expected is None else 400), response.text
    if expected is not None:
        assert expected in error(response)["message"]


def test_null_and_whole_numbers_are_json(tiny: Running) -> None:
    assert tiny.draw(n=1.0, size=None, plan=None, stream=None, seed=0.0).status_code == 200


@pytest.mark.parametrize(
    ("accept", "fields", "status"),
    [
        ("image/png", {"n": 2}, 400),
        ("image/png", {"output_format": "jpeg"}, 400),
        ("text/html", {}, 406),
        ("image/jpeg", {}, 406),
        ("image/png", {"stream": True}, 406),
        ("text/html, */*", {}, 200),
        ("application/json, image/png", {}, 200),
    ],
)
def test_accept(accept: str, fields: dict[str, Any], status: int, tiny: Running) -> None:
    body = {"prompt": "a", "num_inference_steps": 2, **fields}
    response = tiny.client.post(GENERATE, json=body, headers={"Accept": accept})
    assert response.status_code == status
    if status != 200:
        error(response)


def test_malformed_bodies_are_refused_and_the_next_good_one_is_served(tiny: Running) -> None:
    bodies = malformed_bodies()
    assert len(bodies) >= 500
    for body in bodies:
        response = tiny.client.post(GENERATE, content=body, headers={"Content-Type": "application/json"})
        assert 400 <= response.status_code < 500, body[:200]
        error(response)
    assert tiny.draw().status_code == 200


def test_malformed_requests_are_refused_and_the_next_good_one_is_served(tiny: Running) -> None:
    for request in malformed_requests(tiny.port):
        with socket.create_connection(("127.0.0.1", tiny.port), timeout=20) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), (request[:80], answer[:80])
    assert tiny.draw().status_code == 200


def test_the_openapi_document_tells_the_truth(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Nothing undeclared: statuses, bodies, content types and methods, by examples made from the document itself."""
    keys = [hashlib.sha256(KEY.encode()).digest()]
    limits = Limits(max_steps=3, max_images=2)
    with running(tiny_bundle.path, limits=limits, keys=keys, admin_keys=keys) as served:
        command = schemathesis_command(served.port, 5, KEY)
        examined = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert examined.returncode == 0, examined.stdout
        assert served.draw(num_inference_steps=2, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
