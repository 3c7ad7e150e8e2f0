"""Several bundles in one server: who is chosen, loaded, let go and swapped, and that no request is lost meanwhile."""

from __future__ import annotations

import gc
import hashlib
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastcache import Bundle
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.serve.http.limits import Limits
from fastcache.serve.models.listed import Listed, Offer, listed, read_models
from fastcache.serve.models.memory import bytes_of, expected_bytes
from repeats import mostly_slow
from serve.serving import Running, running

ADMIN = "an-administrators-key-for-tests"
HEADERS = {"Authorization": f"Bearer {ADMIN}"}


@pytest.fixture(scope="module")
def two(tiny_bundle: Bundle) -> Iterator[Running]:
    """Two models of one bundle, of which the limit has room for one."""
    models = (Listed(tiny_bundle.path), Listed(tiny_bundle.path, "other"))
    limit = expected_bytes(tiny_bundle.manifest, streams=False) + 1
    keys = [hashlib.sha256(ADMIN.encode()).digest()]
    limits = Limits(max_batch=4, queue=64, max_steps=1000)
    with running(Offer(models, memory_limit_bytes=limit), limits=limits, admin_keys=keys) as served:
        yield served


def loaded(served: Running) -> list[str]:
    return served.client.get("/health").json()["loaded"]


def pictures(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [entry["b64_json"] for entry in answer.json()["data"]]


def test_the_model_field_chooses_and_the_oldest_makes_room(two: Running) -> None:
    assert [model["id"] for model in two.client.get("/v1/models").json()["data"]] == ["tiny-model", "other"]
    first = two.draw()
    assert (first.json()["model"], loaded(two)) == ("tiny-model", ["tiny-model"])
    assert two.client.get("/v1/models/other").json()["loaded"] is False
    other = two.draw(model="other")
    assert (other.json()["model"], loaded(two)) == ("other", ["other"])
    assert pictures(other) == pictures(first)
    two.until(lambda: two.service.desk.bundles == 1)
    missing = two.draw(model="nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_what_makes_room_is_gone_before_another_is_loaded(two: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the bundle that is let go nothing is in memory any more, whatever Python's collector does later."""
    made, left = list[weakref.ref[FastCachePipeline]](), list[int]()

    def pipeline(*args: Any, **kwargs: Any) -> FastCachePipeline:
        gc.disable()
        left.append(sum(pipe() is not None for pipe in made))
        made.append(weakref.ref(pipe := FastCachePipeline(*args, **kwargs)))
        return pipe

    monkeypatch.setattr("fastcache.serve.models.catalogue.FastCachePipeline", pipeline)
    try:
        for name in ("other", "tiny-model", "other", "tiny-model"):
            assert two.draw(model=name).status_code == 200
    finally:
        gc.enable()
    assert len(left) >= 3
    assert set(left) == {0}


@pytest.mark.slow
def test_a_model_that_must_go_finishes_what_it_began(two: Running) -> None:
    expected = pictures(two.draw(num_inference_steps=60))
    with ThreadPoolExecutor(12) as pool:
        names = ["tiny-model", "other"] * 4
        answers = list(pool.map(lambda name: two.draw(model=name, num_inference_steps=60), names))
    assert [answer.json()["model"] for answer in answers] == names
    assert all(pictures(answer) == expected for answer in answers)
    two.until(lambda: two.service.desk.bundles == 1)


@pytest.mark.slow
def test_too_many_who_wait_for_a_load_are_told_to_come_again(tiny_bundle: Bundle) -> None:
    models = (Listed(tiny_bundle.path), Listed(tiny_bundle.path, "other"))
    limit = expected_bytes(tiny_bundle.manifest, streams=False) + 1
    limits = Limits(max_batch=1, queue=2, max_steps=1000)
    with running(Offer(models, memory_limit_bytes=limit), limits=limits) as served, ThreadPoolExecutor(8) as pool:
        long = pool.submit(served.draw, num_inference_steps=600)
        served.until(lambda: served.service.desk.running == 1)
        got = [answer.result() for answer in [pool.submit(served.draw, model="other") for _ in range(6)]]
        assert long.result().status_code == 200
    assert Counter(answer.status_code for answer in got) == {200: 2, 503: 4}
    refused = next(answer for answer in got if answer.status_code == 503)
    assert refused.json()["error"]["code"] == "model_loading"
    assert int(refused.headers["retry-after"]) >= 1


def test_an_administrator_adds_swaps_and_drops(two: Running, tiny_bundle: Bundle) -> None:
    path, body = "/v1/admin/models/third", {"engines": str(tiny_bundle.path)}
    assert two.client.put(path, json=body).status_code == 401
    added = two.client.put(path, json=body, headers=HEADERS)
    assert (added.status_code, added.json()["id"], added.json()["loaded"]) == (200, "third", True)
    with ThreadPoolExecutor(4) as pool:
        drawn = [pool.submit(two.draw, model="third", num_inference_steps=100) for _ in range(3)]
        assert two.client.put(path, json=body, headers=HEADERS).status_code == 200
        assert {answer.result().status_code for answer in drawn} == {200}
        two.until(lambda: two.service.desk.running == 0)
        last = pool.submit(two.draw, model="third", num_inference_steps=100)
        two.until(lambda: two.service.desk.running == 1)
        assert two.client.delete(path, headers=HEADERS).json() == {"id": "third", "object": "model", "deleted": True}
        assert last.result().status_code == 200
    assert two.draw(model="third").status_code == 404
    assert two.client.delete(path, headers=HEADERS).status_code == 404
    wrong = two.client.put(path, json={"engines": str(tiny_bundle.path / "nowhere")}, headers=HEADERS)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (409, "model_not_loaded")
    assert two.draw(model="third").status_code == 404
    assert two.draw().status_code == 200


@pytest.mark.parametrize("damaged", mostly_slow([False, True], bool))
def test_a_model_that_is_not_loaded_stays_where_another_does_not_load(
    two: Running, damaged: bool, bundle_copy: Path, tmp_path: Path
) -> None:
    assert two.draw().status_code == 200  # so that the other one is out of memory
    (bundle_copy / "unet.weights").write_bytes(b"other")
    engines = bundle_copy if damaged else tmp_path / "nowhere"
    refused = two.client.put("/v1/admin/models/other", json={"engines": str(engines)}, headers=HEADERS)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_not_loaded")
    assert two.draw(model="other").status_code == 200


@pytest.mark.slow
def test_a_file_of_models_is_read_again(tiny_bundle: Bundle, tmp_path: Path) -> None:
    from serve.http.test_life import reload

    file = tmp_path / "models.toml"
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")

    def offer(*names: str) -> tuple[Listed, ...]:
        file.write_text("".join(f'[[model]]\nname = "{name}"\nengines = "bundle"\n' for name in names))
        return tuple(read_models(file))

    def offered(served: Running) -> list[str]:
        return [model["id"] for model in served.client.get("/v1/models").json()["data"]]

    with running(Offer(offer("a", "b"), file)) as served:
        offer("b", "c")
        reload(served)
        assert offered(served) == ["b", "c"]
        assert served.draw(model="c").status_code == 200
        file.write_text("nothing")
        with pytest.raises(ValueError, match="TOML"):
            reload(served)
        assert served.draw().json()["model"] == "b"


def test_a_method_that_a_path_lacks_is_told_those_that_it_has(two: Running) -> None:
    for path, methods in (("/v1/admin/models/a", "DELETE, PUT"), ("/v1/images/generations", "POST")):
        refused = two.client.patch(path, json={"engines": "a"}, headers=HEADERS)
        assert refused.status_code == 405, refused.text
        assert refused.headers["Allow"] == methods


def test_without_an_administrators_key_nobody_changes_what_is_served(tiny: Running) -> None:
    got = tiny.client.put("/v1/admin/models/a", json={"engines": "/nowhere"})
    assert (got.status_code, got.json()["error"]["code"]) == (403, "no_admin_key")


@pytest.mark.parametrize(
    ("text", "says"), [("nowhere", "expected --engines"), ("a b=.", "a name of letters"), ("=.", "a name of letters")]
)
def test_what_cannot_be_offered_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        listed(text)


@pytest.mark.parametrize(
    ("text", "size"), [("6GiB", 6 * 2**30), ("1.5 M", 1.5 * 2**20), ("100", 100), ("0", None), ("much", None)]
)
def test_sizes_of_memory(text: str, size: Any) -> None:
    if size is not None:
        assert bytes_of(text) == size
        return
    with pytest.raises(ValueError, match="memory limit"):
        bytes_of(text)
