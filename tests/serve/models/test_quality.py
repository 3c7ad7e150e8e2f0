"""Qualities and latencies in place of steps: which plan is chosen, what the answer says of it, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastcache import Bundle, CachePlan
from fastcache.loop.fit import Fit
from fastcache.serve.engine.speeds import Speeds, latency_s
from fastcache.serve.models.listed import Listed, Offer
from fastcache.serve.models.quality import read_plans
from serve.serving import LIMITS, Running, running


def fitted(bundle: Bundle, points: tuple[int, ...], psnr_db: float) -> CachePlan:
    manifest = bundle.manifest
    rows = tuple((1.0, 0.1) if k == 0 else (0.1, 0.02, 0.9, -0.3) for k in range(len(points)))
    size = manifest.height, manifest.width
    fit = Fit(12, points, rows, 7.5, *size, manifest.weights_sha256, "any", "fp32", 4, psnr_db, 3.0)
    passes = ("full", "shallow-0", "full", "shallow-0")[: len(points)]
    return CachePlan(passes, sampler="ddim", fit=fit)


@pytest.fixture(scope="module")
def folder(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    every = {"draft": ((0, 6), 20.5), "standard": ((0, 4, 8), 25.5), "fine": ((0, 3, 6, 9), 30.5)}
    for name, (points, psnr_db) in every.items():
        (folder / f"{name}.json").write_text(fitted(tiny_bundle, points, psnr_db).to_json())
    return folder


@pytest.fixture(scope="module")
def planned(tiny_bundle: Bundle, folder: Path) -> Iterator[Running]:
    with running(Offer((Listed(tiny_bundle.path),), plans=(folder,)), limits=LIMITS) as served:
        yield served


def draw(served: Running, **fields: Any) -> Any:
    return served.draw(num_inference_steps=None, **fields)


@pytest.mark.parametrize(
    ("quality", "name", "calls", "psnr_db"),
    [
        ("low", "draft", 2, 20.5),
        ("medium", "standard", 3, 25.5),
        ("high", "fine", 4, 30.5),
        ("auto", "standard", 3, 25.5),
    ],
)
def test_a_quality_is_a_plan(quality: str, name: str, calls: int, psnr_db: float, planned: Running) -> None:
    got = draw(planned, quality=quality).json()
    assert got["plan"] == {"name": name, "unet_calls": calls, "full_calls": (calls + 1) // 2, "psnr_db": psnr_db}
    assert got["quality"] == (quality if quality != "auto" else "medium")
    png = planned.draw({"Accept": "image/png"}, num_inference_steps=None, quality=quality)
    assert png.headers["x-plan"] == name


def test_without_a_quality_it_is_as_the_fields_say(planned: Running) -> None:
    assert draw(planned).json()["plan"]["name"] == "uncached"
    assert planned.draw(quality="auto").json()["plan"]["unet_calls"] == 4
    assert planned.draw(cache_interval=2).json()["plan"]["name"] == "interval"


@pytest.mark.parametrize("name", ["num_inference_steps", "sampler", "cache_interval"])
def test_a_plan_says_its_steps_itself(name: str, planned: Running) -> None:
    value = "ddim" if name == "sampler" else 4
    got = planned.draw(**{"num_inference_steps": None, name: value}, quality="low")
    assert (got.status_code, got.json()["error"]["param"]) == (400, "quality")
    assert name in got.json()["error"]["message"]


def test_the_best_plan_that_fits_is_taken(planned: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times that the server measures are given, so that the test asks for none of its own."""
    executor = planned.service.shelf.first.served
    assert executor is not None
    monkeypatch.setattr(Speeds, "step_s", lambda self, name, guided: 1.0 if name == "full" else 0.5)
    monkeypatch.setattr(Speeds, "image_s", lambda self, plan, guided, first=0: self.steps_s(plan, guided, first))
    monkeypatch.setattr(Speeds, "encode_s", 0.0)
    # 50 full steps without caching are 50 s; the draft's two take 1.5 s, and no test waits for less than a minute more.
    assert draw(planned, max_latency_ms=1e6).json()["plan"]["name"] == "uncached"
    assert draw(planned, max_latency_ms=4.9e4).json()["plan"]["name"] == "fine"
    late = draw(planned, max_latency_ms=1400)
    found = late.json()["error"]
    assert (late.status_code, found["code"], found["param"]) == (422, "latency_unattainable", "max_latency_ms")
    assert "or more, the least that this server can do now" in found["message"]
    assert draw(planned, max_latency_ms=1e6, quality="low").json()["plan"]["name"] == "draft"


def test_a_fitted_plan_draws_edits(planned: Running) -> None:
    from serve.http.test_edits import EDIT, pixels, text

    body = {"prompt": "a", "quality": "high", "seed": 1, "image": text(pixels(0)), "strength": 0.9}
    got = planned.client.post(EDIT, json=body)
    assert got.json()["plan"]["name"] == "fine"
    masked = planned.client.post(EDIT, json={**body, "mask": text(pixels(0, "L")), "strength": 1.0})
    assert masked.json()["plan"]["name"] == "fine"


def test_folders_that_hold_no_plans_for_a_model_are_refused(tiny_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected --plans to be a folder"):
        read_plans(tmp_path)
    for name in ("draft", "standard", "fine"):
        plan = CachePlan.from_json((folder / f"{name}.json").read_text())
        assert plan.fit is not None
        other = replace(plan, fit=replace(plan.fit, weights_sha256="0" * 64))
        (tmp_path / f"{name}.json").write_text(other.to_json())
    with running(Offer((Listed(tiny_bundle.path),), plans=(tmp_path,)), wait=False) as served:
        served.until(lambda: served.service.state == "broken")
        assert "fitted for a model that is served" in str(served.service.failure)


def test_turns_go_round_in_what_is_foretold() -> None:
    assert latency_s(2.0, [10.0, 1.0], waits=False) == 2 + 2 + 1
    assert latency_s(2.0, [10.0, 1.0], waits=True) == 13
    speeds = Speeds()
    speeds.note_step("full", True, 1.0)
    speeds.note_step("full", True, 2.0)
    assert speeds.step_s("full", True) == pytest.approx(1.1)
    assert speeds.step_s("shallow-0", True) == pytest.approx(1.1)
