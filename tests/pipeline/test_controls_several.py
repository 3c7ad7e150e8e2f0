"""Oracle: a bundle with two ControlNets against diffusers' pipeline of both, and what a benchmark makes of it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from torch import Tensor

import fastcache
from build_store import BuildStore
from controlled import STEPS, command, latents, live, picture, pil, seeded, texts
from fastcache import CachePlan, FastCacheHelper, FastCachePipeline
from fastcache.bundle.recipe import recipe_from
from fastcache.health.verify import verify_bundle
from fastcache.loop.drivers import Guidance
from fastcache.loop.drivers.cudagraph import CapturedRun
from fastcache.loop.steps import PlainRun
from fastcache.pipeline.request import Request
from list_recorder import ListRecorder
from live_pipelines import agreement_db
from tiny_controls import save_controlnet

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")]

PICTURES: dict[str, Any] = {"control_image": [picture(1), picture(2)]}


@pytest.fixture(scope="module")
def folders(builds: BuildStore, tiny_model: Path) -> list[Path]:
    def saved(name: str) -> Path:
        return builds.model(f"tiny-{name}", lambda folder: save_controlnet(folder, tiny_model, len(name)))

    return [saved(name) for name in ("pose", "edges")]


@pytest.fixture(scope="module")
def pipe(builds: BuildStore, tiny_model: Path, folders: list[Path]) -> FastCachePipeline:
    output = builds.bundle(tiny_model, controlnet=tuple(map(str, folders))).path
    flags = ["--model", tiny_model, "--output", output, "--dtype", "fp32"]
    flags += [text for folder in folders for text in ("--controlnet", folder)]
    with pytest.MonkeyPatch.context() as patch:
        command("build-engines", *flags, patch=patch)  # finds that these flags' bundle is there
    return fastcache.load(output)


@pytest.fixture(scope="module")
def reference(tiny_model: Path, folders: list[Path]) -> Any:
    nets = [ControlNetModel.from_pretrained(folder) for folder in folders]
    return live(StableDiffusionControlNetPipeline, tiny_model, controlnet=nets)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"controlnet_conditioning_scale": [0.3, 0.9]},
        {"controlnet_conditioning_scale": 0.5, "guidance_scale": 1.0},
        {"control_guidance_start": [0.0, 0.3], "control_guidance_end": [0.5, 1.0]},
        {"control_guidance_end": 0.6, "num_images_per_prompt": 2, "seeds": (1, 2)},
        {"control_image": [[picture(1), picture(2)], [picture(3), picture(4)]], **texts(2), "seeds": (1, 2)},
    ],
    ids=lambda arguments: ",".join(arguments),
)
def test_arguments_mean_what_they_mean_in_diffusers(
    arguments: dict[str, Any], pipe: FastCachePipeline, reference: Any
) -> None:
    given = {**PICTURES, "controlnet_conditioning_scale": 1.0, **arguments}
    theirs = {"image" if name == "control_image" else name: value for name, value in given.items()}
    drawn = latents(pipe, **given)
    assert agreement_db(drawn, latents(reference, **theirs)) >= 80
    shown: Any = given["control_image"]
    swapped = [own[::-1] for own in shown] if isinstance(shown[0], list) else shown[::-1]
    assert agreement_db(latents(pipe, **{**given, "control_image": swapped}), drawn) < 60


def test_cached_runs_draw_what_the_helper_draws(pipe: FastCachePipeline, reference: Any) -> None:
    """A step at which either's scale changes is FULL in both."""
    given: dict[str, Any] = {"controlnet_conditioning_scale": [1.0, 0.6], "control_guidance_end": [1.0, 0.4]}
    with FastCacheHelper(pipe=reference) as helper:
        helper.set_params(cache_interval=4)
        expected = latents(reference, image=PICTURES["control_image"], **given)
    shown: dict[str, Any] = {**texts(), **PICTURES, "num_inference_steps": STEPS, "output_type": "latent"}
    run = pipe(**shown, **given, plan=CachePlan.uniform(STEPS, 4), generator=seeded())
    assert [i for i in range(STEPS) if run.plan.is_full(i)] == [0, 3, 4]
    assert agreement_db(run.images, expected) >= 50
    assert agreement_db(latents(pipe, **PICTURES, **given), expected) < 50


def test_scales_that_change_are_in_the_recorded_loop(pipe: FastCachePipeline) -> None:
    plan, table = CachePlan.from_branches((None, 0, None, 0, None, 0, 0, 0)), pipe.schedule("ddim", STEPS).sampler
    results: list[Tensor] = []
    for scales in ([[1.0, 0.2]] * 4 + [[0.0, 0.2]] * 4, [[0.0, 0.2]] * 4 + [[1.0, 0.9]] * 4):
        lane = pipe.begin(Request(**texts(), **PICTURES, num_inference_steps=STEPS)).lane
        noise, drawn = torch.randn(1, 4, 8, 8, generator=seeded(6)), list[Tensor]()
        for kind in (PlainRun, partial(CapturedRun, ListRecorder(anything=True))):
            run = kind(lane, table, plan, Guidance(5.0), conditioning_scales=scales)
            run.latents.copy_(noise)
            drawn.append(list(run.steps)[-1].latents.clone())
        torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-4, atol=1e-4)
        results.append(drawn[0])
    assert not torch.allclose(results[0], results[1], atol=1e-3)


def test_invariants_hold_and_the_manifest_names_both(pipe: FastCachePipeline) -> None:
    found, manifest = verify_bundle(pipe.bundle.path), pipe.bundle.manifest
    assert not found.problems
    assert [entry.name for entry in manifest.model.controls] == ["tiny-pose", "tiny-edges"]
    assert {"controlnet_embedding", "controlnet_embedding_2"} <= manifest.engines.keys()
    assert manifest.parity is not None
    assert max(manifest.parity.full_vs_model, manifest.parity.shallow_vs_full) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control_image": None}, "expected control_image for a bundle with the ControlNet tiny-pose and tiny-edges"),
        ({"control_image": picture(1)}, "control_image as a list of 2, one for each ControlNet, got one"),
        ({"control_image": [picture(1)]}, "control_image as a list of 2, one for each ControlNet, got 1"),
        ({"control_image": [[picture(1)]]}, "lists of 2 in control_image, one for each ControlNet, got 1"),
        ({"controlnet_conditioning_scale": [1.0]}, "controlnet_conditioning_scale as one number, or 2 of them, got 1"),
        ({"control_guidance_end": [1.0, 0.0]}, "got 0.0 and 0.0"),
        (
            {"control_guidance_start": [0.0, float("nan")]},
            "to be a finite number from 0 to 1, got nan",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    arguments: dict[str, Any], message: str, pipe: FastCachePipeline
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        latents(pipe, **{**PICTURES, **arguments})
    assert "\n" not in str(caught.value)


def test_generate_takes_a_picture_for_each(
    pipe: FastCachePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "pose.png", tmp_path / "edges.png"]
    for seed, file in enumerate(files):
        pil(seed, 32).save(file)
    common = ["generate", "--engines", pipe.bundle.path, "--prompt", "a cat", "--steps", 4, "--output"]
    flags = [
        text
        for file, scale in zip(files, (0.4, 1.0), strict=True)
        for text in ("--control-image", file, "--controlnet-conditioning-scale", scale)
    ]
    command(*common, tmp_path / "out.png", *flags, "--control-guidance-end", 0.6, patch=monkeypatch)
    (expected,) = pipe(
        "a cat",
        control_image=[pil(0, 32), pil(1, 32)],
        controlnet_conditioning_scale=[0.4, 1.0],
        control_guidance_end=0.6,
        num_inference_steps=4,
        generator=[seeded()],
    ).images
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.tobytes() == expected.tobytes()
        assert drawn.info["control_image"] == "['pose.png', 'edges.png']"
    capsys.readouterr()
    command(*common, tmp_path / "no.png", *["--control-image", files[0]] * 3, patch=monkeypatch, code=2)
    assert "expected --control-image once for each of 2 ControlNets, got it 3 times" in capsys.readouterr().err


def test_a_benchmark_shows_them_a_drawn_picture(
    pipe: FastCachePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms, file = ("eager", "deepcache", "engine", "engine+cache"), tmp_path / "bench.json"
    flags = ["--arms", ",".join(arms), "--steps", 4, "--cache-interval", 2, "--repeats", 1, "--json", file]
    command("bench", "--engines", pipe.bundle.path, *flags, patch=monkeypatch)
    found = {arm["name"]: arm for arm in json.loads(file.read_text())["arms"]}
    assert [arm.get("skipped") for arm in found.values()] == [None] * 4
    assert found["engine"]["latents_error_vs_eager"] < 1e-4 < found["deepcache"]["latents_error_vs_eager"]
    assert found["engine+cache"]["psnr_db_vs_eager"] == pytest.approx(found["deepcache"]["psnr_db_vs_eager"], abs=0.5)
    for arm in found.values():
        assert arm["loop_ms_p50"] > arm["full_step_ms_p50"] > 0


def test_a_recipe_names_one_or_several() -> None:
    one, listed, two = (recipe_from({"controlnet": given}) for given in ("a", ["a"], ["a", "b"]))
    assert one == listed
    assert (one.controls, two.controls) == ({"controlnet": ("a",)}, {"controlnet": ("a", "b")})
    assert recipe_from({"controlnet": []}).controls == {}
    with pytest.raises(ValueError, match="controlnet"):
        recipe_from({"controlnet": ["a", ""]})
