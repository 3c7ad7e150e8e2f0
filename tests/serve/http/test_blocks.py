"""Plans that leave blocks out, with their scales and shifts, as a request's own plan."""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastcache
from build_store import BuildStore
from fastcache import Bundle, CachePlan
from fastcache.loop.adjustment import ScaleShift
from serve.serving import Running, running

PASSES = ("full", "blocks-1010", "blocks-0000", "blocks-0111")


@pytest.fixture(scope="module")
def bundle(builds: BuildStore, tiny_model: Path) -> Bundle:
    return builds.bundle(tiny_model, backend="onnxruntime", blocks="transformer", branch_id="0,2")


@pytest.fixture(scope="module")
def served(bundle: Bundle) -> Generator[Running]:
    with running(bundle.path) as one:
        yield one


def plan_of(steps: int, channels: int) -> dict[str, Any]:
    table = np.random.default_rng(0).normal(1, 0.1, (steps, 2, channels))
    return json.loads(CachePlan(PASSES[:steps], scale_shift=ScaleShift.of(table)).to_json())


def test_scales_and_shifts_come_with_a_request(bundle: Bundle, served: Running) -> None:
    """Longer than any other text of a plan may be. The picture's own record tells their hash."""
    plan = plan_of(4, sum(block.channels for block in bundle.manifest.blocks))
    assert len(plan["scale_shift"]["data"]) > 256
    answer = served.draw(plan=plan, sampler="ddim")
    assert answer.status_code == 200, answer.text
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    wanted = fastcache.load(bundle.path, threads=1)(
        "a", plan=CachePlan.from_json(json.dumps(plan)), sampler="ddim", num_inference_steps=4, seed=0
    ).images[0]
    assert np.abs(np.asarray(image, int) - np.asarray(wanted, int)).max() <= 1
    told: Any = image.text["plan"]
    assert json.loads(told)["passes"] == list(PASSES)
    assert json.loads(told)["scale_shift"].keys() == {"channels", "sha256"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"channels": 3}, "expected a scale_shift for 80 channels, those of the bundle's blocks, got another"),
        ({"data": "A" * 100_000}, "expected a scale_shift of at most"),
        ({"data": "AAAA"}, "expected the data of scale_shift as it was written"),
        ({"data": base64.b64encode(zlib.compress(bytes(10**7))).decode()}, "scale_shift"),
        ({"more": "x" * 300}, "texts of at most 256 characters"),
    ],
)
def test_others_are_refused_in_one_line(change: dict[str, Any], said: str, served: Running) -> None:
    plan = plan_of(4, 80)
    answer = served.draw(plan={**plan, "scale_shift": plan["scale_shift"] | change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "plan")
    assert said in answer.json()["error"]["message"]


def test_a_bundle_without_blocks_takes_none(tiny: Running) -> None:
    answer = tiny.draw(plan=plan_of(4, 80))
    assert answer.status_code == 400
    assert "expected a scale_shift for 0 channels" in answer.json()["error"]["message"]
