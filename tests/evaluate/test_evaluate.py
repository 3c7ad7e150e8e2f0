"""Plans made and judged through the command line over the tiny bundle; the judges and the figures' own arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from fastcache.bundle.bundle import Bundle
from fastcache.commands.evaluate import _cell
from fastcache.demo.scenes import COLOURS, held_out_scenes, render
from fastcache.evaluate import judges
from fastcache.evaluate.chart import frontier
from fastcache.evaluate.evaluate import candidates_of
from fastcache.evaluate.quality import Estimate, frechet_distance, frechet_estimate, mean_of, psnr_db, psnr_db_each
from fastcache.loop.plan import CachePlan
from fastcache.pipeline.pipeline import FastCachePipeline
from tiny_model import TOKENS

PROMPTS = ("abc", "d e", "fgh")


@pytest.fixture
def run(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The command line, with a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return command


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    return file


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """True pictures of held-out scenes. Shapes: (count, 3, 64, 64) in [0, 1]."""
    rng = np.random.default_rng(seed)
    pixels = np.stack([render(scene, rng) for scene in held_out_scenes(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def test_plans_are_found_from_a_calibration_that_is_kept(
    run: Any, tiny_bundle: Bundle, prompts_file: Path, tmp_path: Path
) -> None:
    common = ("plan", "--engines", tiny_bundle.path, "--steps", 6, "--prompts", prompts_file)
    first = run(*common, "--refreshes", 3, "--output", tmp_path / "three.json", "--json")
    assert first.code == 0, first.err
    assert "calibrating" in first.err
    plan = CachePlan.from_json((tmp_path / "three.json").read_text())
    assert len(plan.refresh_steps) == 3
    assert plan.num_steps == 6
    assert plan.model == tiny_bundle.manifest.model.name
    assert plan.sampler == "ddim"
    assert plan.made_by.startswith("optimal(refreshes=3, guidance_scale=7.5, samples=3")
    assert json.loads(first.out)["passes"] == list(plan.passes)
    again = run(*common, "--threshold", 1e9, "--output", tmp_path / "one.json")
    assert "calibrating" not in again.err
    assert CachePlan.from_json((tmp_path / "one.json").read_text()).refresh_steps == (0,)
    (kept,) = (tmp_path / "cache").rglob("calibrations/*.json")
    given_file = ("plan", "--engines", tiny_bundle.path, "--calibration", kept, "--output", tmp_path / "same.json")
    run(*given_file, "--steps", 6, "--refreshes", 3)
    assert CachePlan.from_json((tmp_path / "same.json").read_text()) == plan
    refused = run(*given_file, "--steps", 7, "--refreshes", 3)
    assert refused.code == 2
    assert "expected a calibration for num_steps 7, got" in refused.err


def test_a_plan_within_a_time(run: Any, tiny_bundle: Bundle, prompts_file: Path, tmp_path: Path) -> None:
    common = ("plan", "--engines", tiny_bundle.path, "--steps", 4, "--prompts", prompts_file, "--json")
    ample = run(*common, "--max-latency-ms", 1e7, "--output", tmp_path / "plan.json")
    assert ample.code == 0, ample.err
    found = json.loads(ample.out)
    assert found["passes"] == ["full"] * 4
    assert found["full_step_ms"] > 0
    assert found["timed_at"].startswith(f"batch 1, {tiny_bundle.manifest.backend} fp32")
    choosing = run(*common, "--max-latency-ms", 1e7, "--choose-guidance", "--output", tmp_path / "plan.json")
    assert choosing.code == 0, choosing.err
    assert "calibrating" in choosing.err  # again, now also for what missing guidance does
    assert json.loads(choosing.out)["passes"] == ["full"] * 4
    assert set(json.loads(choosing.out)["unguided_step_ms"]) == {"full", "0"}
    short = run(*common, "--max-latency-ms", 1e-6, "--output", tmp_path / "plan.json")
    assert short.code == 2
    assert "expected --max-latency-ms of" in short.err
    assert "calibrating" not in short.err


@pytest.mark.slow
def test_plan_writes_fitted_plans_and_generate_draws_with_them(
    run: Any, tiny_bundle: Bundle, prompts_file: Path, tmp_path: Path
) -> None:
    common = ("plan", "--engines", tiny_bundle.path, "--steps", 8, "--sampler", "ddim", "--prompts", prompts_file)
    made = run(*common, "--frontier", tmp_path / "plans", "--json")
    assert made.code == 0, made.err
    rows = {row["name"]: row for row in json.loads(made.out)["rows"]}
    assert {"uncached", "draft", "standard", "fine", "ddim 2"} <= rows.keys()
    assert (tmp_path / "plans" / "frontier.png").is_file()
    drawing = ("generate", "--engines", tiny_bundle.path, "--prompt", "a ring", "--output", tmp_path / "ring.png")
    drawn = run(*drawing, "--quality", "fine", "--plans", tmp_path / "plans", "--json")
    assert drawn.code == 0, drawn.err
    assert json.loads(drawn.out)["plan"] == json.loads((tmp_path / "plans" / "fine.json").read_text())
    refused = run(*drawing, "--quality", "fine")
    assert refused.code == 2
    assert "expected --quality with --plans" in refused.err
    fitted = run(*common, "--uniform", 2, "--fit", "--reference-steps", 12, "--output", tmp_path / "plan.json")
    assert fitted.code == 0, fitted.err
    fit = CachePlan.from_json((tmp_path / "plan.json").read_text()).fit
    assert fit is not None
    assert fit.points == tuple(k * 12 // 8 for k in range(8))


def test_what_plan_refuses(run: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    common = ("plan", "--engines", tiny_bundle.path, "--steps", 4, "--output", tmp_path / "plan.json")
    for options, says in (
        (("--uniform", 2, "--choose-guidance"), "expected --choose-guidance with --max-latency-ms"),
        (("--uniform", 2, "--branch-id", 3), "expected --branch-id out of 0, which the bundle has"),
        (("--uniform", 2, "--branch-id", "0,zero"), "expected --branch-id out of 0, which the bundle has"),
        (("--uniform", 2, "--refreshes", 2), "expected one of --uniform"),
    ):
        refused = run(*common, *options)
        assert refused.code == 2
        assert says in refused.err
    assert run(*common, "--uniform", 2, "--branch-id", 0).code == 0


def write_plan(path: Path, plan: CachePlan) -> Path:
    path.write_text(plan.to_json())
    return path


def test_evaluate_compares_plans(run: Any, tiny_bundle: Bundle, prompts_file: Path, tmp_path: Path) -> None:
    all_full = write_plan(tmp_path / "all.json", CachePlan.all_full(6))
    cached = write_plan(tmp_path / "third.json", CachePlan.uniform(6, 3))
    fewer = write_plan(tmp_path / "fewer.json", CachePlan.all_full(3))
    plans = [argument for file in (all_full, cached, fewer) for argument in ("--plan", file)]
    output = tmp_path / "evaluation"
    arguments = ("--engines", tiny_bundle.path, *plans, "--prompts", prompts_file, "--num-images", 5)
    result = run("evaluate", *arguments, "--output", output, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found == json.loads((output / "results.json").read_text())
    assert found["conditions"]["images"] == 5
    assert found["settings"]["prompts"] == [*PROMPTS, *PROMPTS[:2]]
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows)[:4] == ["uncached", "all", "third", "fewer"]
    for name, row in list(rows.items())[4:]:  # what takes as long as one of these without caching
        assert name == f"{row['unet_calls']} steps"
        assert row["refreshes"] == row["unet_calls"] < 6
    assert "third makes 6 U-Net calls; below 8" in result.err
    assert "fewer makes" not in result.err
    assert rows["all"]["metrics"]["psnr_db"] == {"value": 100.0, "low": 100.0, "high": 100.0}
    assert rows["all"]["metrics"]["ssim"]["value"] == pytest.approx(1)
    psnr = rows["third"]["metrics"]["psnr_db"]
    assert 5 < psnr["low"] <= psnr["value"] <= psnr["high"] < 90
    assert psnr["value"] == pytest.approx(np.mean(rows["third"]["per_image"]["psnr_db"]), abs=1e-3)
    assert rows["third"]["refresh_steps"] == [0, 3]
    assert rows["uncached"]["speedup"]["value"] == 1
    assert rows["fewer"]["unet_calls"] == 3
    for name in ("chart.png", "grid.png"):
        with Image.open(output / name) as picture:
            assert min(picture.size) > 200


def test_what_evaluate_refuses(run: Any, tiny_bundle: Bundle, prompts_file: Path, tmp_path: Path) -> None:
    def refusal(plan: CachePlan, *more: object) -> str:
        file = write_plan(tmp_path / "plan.json", plan)
        result = run("evaluate", "--engines", tiny_bundle.path, "--plan", file, "--output", tmp_path / "out", *more)
        assert result.code == 2
        assert result.err.strip().count("\n") == 0
        return result.err

    given = ("--prompts", prompts_file)
    assert "made for model" in refusal(replace(CachePlan.uniform(6, 3), model="another"), *given)
    assert "branch" in refusal(CachePlan.uniform(6, 3, branch_id=3), *given)
    assert "as many U-Net calls as heun makes" in refusal(replace(CachePlan.uniform(6, 3), sampler="heun"), *given)
    assert "expected --prompts" in refusal(CachePlan.uniform(6, 3))
    assert "expected a file of prompts" in refusal(CachePlan.uniform(6, 3), "--prompts", tmp_path)
    assert "--reference-images" in refusal(CachePlan.uniform(6, 3), *given, "--inception", tmp_path)
    assert "expected torchvision's alexnet" in refusal(CachePlan.uniform(6, 3), *given, "--lpips", prompts_file)
    assert "expected a folder with a CLIP model" in refusal(CachePlan.uniform(6, 3), *given, "--clip", tmp_path)
    twice = refusal(CachePlan.uniform(6, 3), *given, "--plan", tmp_path / "plan.json")
    assert "of different names" in twice


@pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")  # numpy's word to diffusers, not to us
def test_steps_of_samplers_that_call_twice(tiny_bundle: Bundle) -> None:
    pipe = FastCachePipeline(tiny_bundle)
    plans = {"heun": replace(CachePlan.uniform(9, 3), sampler="heun"), "pndm": CachePlan.uniform(6, 2)}
    candidates = candidates_of(pipe, plans, "pndm", None)
    assert [(candidate.name, candidate.sampler, candidate.steps) for candidate in candidates] == [
        ("uncached", "pndm", 5),
        ("heun", "heun", 5),
        ("pndm", "pndm", 5),
    ]


def test_scenes_are_read_back() -> None:
    scenes = held_out_scenes(24)
    captions = [scene.caption() for scene in scenes]
    assert [judges.scene_of(caption) for caption in captions] == scenes
    assert judges.scene_of("a large red circle") is None
    assert judges.scene_of(captions[0] + " and more") is None
    images = pictures(24)
    assert judges.scene_right(images, images, captions).mean() > 0.9
    assert judges.attribute_accuracy(images, images, captions).mean() > 0.97
    wrong = [
        replace(scene, objects=(replace(scene.objects[0], colour=other(scene.objects[0].colour)), *scene.objects[1:]))
        for scene in scenes
    ]
    assert judges.scene_right(images, images, [scene.caption() for scene in wrong]).max() == 0
    lost = judges.attribute_accuracy(images, images, captions) - judges.attribute_accuracy(
        images, images, [scene.caption() for scene in wrong]
    )
    assert_close(lost, np.array([1 / (1 + 3 * len(scene.objects)) for scene in scenes]), atol=0.15, rtol=0)
    with pytest.raises(ValueError, match="expected full captions"):
        judges.scene_right(images[:1], images[:1], ["anything"])


def other(colour: str) -> str:
    return next(name for name in COLOURS if name != colour)


def test_calibration_and_evaluation_share_no_prompt() -> None:
    assert not set(judges.calibration_prompts(64)) & set(judges.held_out_prompts(400))


@pytest.mark.slow
def test_the_distance_sees_spoiled_pictures() -> None:
    captions = [scene.caption() for scene in held_out_scenes(150)]
    truth, images = judges.true_features(captions), pictures(150, seed=9)
    noisy = (images + 0.15 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    clean = frechet_distance(judges.demo_features(images), truth)
    assert clean < 3
    assert frechet_distance(judges.demo_features(noisy), truth) > 3 * clean
    with pytest.raises(ValueError, match="expected images of shape"):
        judges.demo_features(images[..., :32])


def test_frechet_distance_is_torchmetrics() -> None:
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(300, 5)) + 1
    moments = [torch.from_numpy(np.asarray(m)) for x in (a, b) for m in (x.mean(0), np.cov(x, rowvar=False))]
    assert frechet_distance(a, b) == pytest.approx(_compute_fid(*moments).item())
    assert frechet_distance(a, a + np.array([3.0, 4, 0, 0, 0])) == pytest.approx(25)


def test_likeness_of_each_picture() -> None:
    images = pictures(3)
    changed = (images + torch.tensor([0.0, 0.02, 0.1]).view(3, 1, 1, 1)).clamp(0, 1)
    each = psnr_db_each(changed, images)
    assert each[0] == 100
    assert each[1:] == pytest.approx([psnr_db(changed[k : k + 1], images[k : k + 1]) for k in (1, 2)])
    assert judges.ssim(images, images, []) == pytest.approx(1)
    assert judges.ssim(images.roll(9, 3), images, []).max() < 0.9


def test_intervals_hold_the_mean() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(40):
        estimate = mean_of(rng.exponential(size=60), resamples=300)
        assert estimate.low <= estimate.value <= estimate.high
        held += estimate.low <= 1 <= estimate.high
    assert held >= 32
    assert mean_of(np.full(9, 2.5)).high == 2.5


def test_a_cell_has_no_more_places_than_its_interval() -> None:
    assert _cell("psnr_db", Estimate(100.0, 100.0, 100.0)) == "equal"
    assert _cell("ssim", Estimate(1.0, 1.0, 1.0)) == "1"
    assert _cell("psnr_db", Estimate(38.4321, 37.9, 38.8)) == "38.4 ± 0.5"
    assert _cell("frechet_distance", Estimate(5.79, 0.0, 24.6)) == "6 ± 19"


def test_a_distance_is_never_below_nothing() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(12, 8))
    found = frechet_estimate(features, features + 0.01)
    assert 0 <= found.low <= found.value < found.high


POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12, unique=True)


@given(POINTS, st.booleans())
def test_the_frontier_is_what_no_point_beats(points: list[tuple[float, float]], higher: bool) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and a[0] >= b[0] and (a[1] >= b[1] if higher else a[1] <= b[1])

    expected = {k for k, point in enumerate(points) if not any(beats(rival, point) for rival in points)}
    found = frontier(points, higher=higher)
    assert set(found) == expected
    assert [points[k][0] for k in found] == sorted(points[k][0] for k in found)


def test_lpips_is_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random AlexNet in both; torchmetrics takes the network from torchvision, which tests do without."""
    from torchmetrics.functional.image import lpips

    torch.manual_seed(0)
    sizes = [(3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3)]
    weights: dict[str, torch.Tensor] = {}
    for index, (before, after, size) in zip((0, 3, 6, 8, 10), sizes, strict=True):
        weights[f"features.{index}.weight"] = torch.randn(after, before, size, size) * (before * size**2) ** -0.5
        weights[f"features.{index}.bias"] = torch.randn(after) * 0.1
    save_file(weights, tmp_path / "alexnet.safetensors")
    backbone = nn.Sequential(*judges._alexnet(tmp_path / "alexnet.safetensors"), nn.MaxPool2d(3, 2))
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda *_: backbone)
    oracle = lpips._LPIPS(pretrained=True, net="alex")
    images, reference = pictures(4), pictures(4, seed=5).roll(3, 2)
    expected = oracle(images, reference, normalize=True).flatten().double()
    found = judges.lpips_judge(tmp_path / "alexnet.safetensors")(images, reference, [""] * 4)
    assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-4)
    assert found.min() > 0


def test_clip_score_is_the_model_s_own(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_model / "tokenizer")
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": TOKENS, "eos_token_id": tokenizer.eos_token_id}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    images, prompts = pictures(3), ["abc", "a very long text", "xyz"]
    inputs = processor(
        text=prompts,
        images=list((images * 255).to(torch.uint8)),
        return_tensors="pt",
        padding=True,
        truncation=True,
    )
    with torch.no_grad():
        cosines = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
    found = judges.clip_judge(tmp_path)(images, images, prompts)
    assert found == pytest.approx((cosines * 100).clamp(min=0).numpy(), abs=1e-3)


@pytest.mark.slow
def test_the_bundled_model_s_plans(run: Any, demo_bundle: Callable[[int], Bundle], tmp_path: Path) -> None:
    """An optimal plan is nearer to uncached than a bad one of as many refreshes, and both are judged as scenes."""
    bundle = demo_bundle(0)
    best, worst = tmp_path / "best.json", tmp_path / "worst.json"
    made = run("plan", "--engines", bundle.path, "--steps", 12, "--refreshes", 4, "--num-prompts", 4, "--output", best)
    assert made.code == 0, made.err
    write_plan(worst, CachePlan.from_refresh_steps(12, (0, 9, 10, 11)))
    plans = ("--plan", best, "--plan", worst)
    result = run("evaluate", "--engines", bundle.path, *plans, "--num-images", 8, "--output", tmp_path, "--json")
    rows = {row["name"]: row["metrics"] for row in json.loads(result.out)["rows"]}
    assert rows["best"]["psnr_db"]["value"] > rows["worst"]["psnr_db"]["value"] + 3
    assert all(0 <= rows[name]["attribute_accuracy"]["value"] <= 1 for name in rows)
    assert rows["uncached"]["scene_right"]["value"] >= 0.5
    assert all(math.isfinite(rows[name]["frechet_distance"]["value"]) for name in rows)
