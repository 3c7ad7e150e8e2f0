"""A bundle of blocks: its engines, and that patterns of blocks draw what the pieces draw in eager PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

import fastcache
import fastcache_engines
from build_store import BuildStore
from conftest import Said
from fastcache import Bundle, BundleError, CachePlan, FastCacheHelper, FastCachePipeline, partition_blocks
from fastcache.bundle.bundle import MANIFEST, open_bundle, read_manifest
from fastcache.bundle.parity import measure_parity, trials
from fastcache.bundle.recipe import recipe_from
from fastcache.compile import worker
from fastcache.compile.builder import resolve
from fastcache.cut.chain import residual
from fastcache.cut.names import pattern_of
from fastcache.evaluate.quality import psnr_db
from fastcache.health.verify import verify_bundle
from fastcache.loop.adjustment import ScaleShift
from fastcache.planning.blocks import block_plan, measured_changes, pattern_costs
from fastcache.planning.walks import Walks
from fastcache.sampler.scheduler import make_scheduler
from fastcache.sampler.table import compile_sampler
from fastcache_engines import LoadOptions
from tiny_model import TEXT_WIDTH, TOKENS

CHAIN = "onnxruntime, a chain"
PASSES = ("full", "blocks-1010", "blocks-0000", "shallow-0", "blocks-0111", "full", "blocks-0001")


@pytest.fixture(
    scope="module", params=["onnxruntime", *(pytest.param(one, marks=pytest.mark.slow) for one in ("openvino", CHAIN))]
)
def bundle(
    request: pytest.FixtureRequest, builds: BuildStore, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """One engine with conditions, or as for a backend that cannot have them a chain."""
    fields: dict[str, Any] = {"blocks": "transformer", "branch_id": "0,2"}
    if request.param != CHAIN:
        return builds.bundle(tiny_model, backend=request.param, **fields)
    with pytest.MonkeyPatch.context() as patched:
        own = fastcache_engines.backend("onnxruntime")
        patched.setattr(own, "CAPABILITIES", replace(own.CAPABILITIES, conditions=False))
        job = resolve(recipe_from({"model": str(tiny_model), "backend": "onnxruntime", "dtype": "fp32", **fields}))
        folder = tmp_path_factory.mktemp("chain")
        worker.build(job, folder, lambda line: None)
    return open_bundle(folder)


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> FastCachePipeline:
    return FastCachePipeline(bundle)


def randomly(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def plan(bundle: Bundle) -> CachePlan:
    """Patterns and a shallow pass; what they reuse is scaled and shifted at random."""
    blocks = bundle.manifest.blocks
    table = np.random.default_rng(0).normal(0, 0.1, (len(PASSES), 2, sum(block.channels for block in blocks)))
    table[:, 0] += 1
    for step, name in enumerate(PASSES):
        runs, first = pattern_of(name, len(blocks)) or (True,) * len(blocks), 0
        for block, run in zip(blocks, runs, strict=True):
            if run:
                table[step, :, first : first + block.channels] = [[1.0], [0.0]]
            first += block.channels
    return CachePlan(PASSES, sampler="ddim", scale_shift=ScaleShift.of(table))


def drawn(pipe: FastCachePipeline, plan: CachePlan, guidance_scale: float = 5.0) -> Tensor:
    inputs: dict[str, Any] = {"prompt_embeds": randomly(1, 1, TOKENS, TEXT_WIDTH)}
    if guidance_scale > 1:
        inputs["negative_prompt_embeds"] = randomly(2, 1, TOKENS, TEXT_WIDTH)
    return pipe(
        **inputs,
        latents=randomly(3, 1, 4, 8, 8),
        num_inference_steps=len(PASSES),
        guidance_scale=guidance_scale,
        plan=plan,
        output_type="latent",
    ).images.clone()


@torch.no_grad()
def eager(tiny_model: Path, plan: CachePlan, scheduler_config: Mapping[str, Any]) -> Tensor:
    """The same by the pieces in PyTorch and a scheduler of diffusers."""
    unet: Any = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    scheduler: Any = make_scheduler("ddim", scheduler_config)
    chain, kept = partition_blocks(unet.eval()), dict[str, Tensor]()
    scheduler.set_timesteps(plan.num_steps)
    text = torch.cat([randomly(2, 1, TOKENS, TEXT_WIDTH), randomly(1, 1, TOKENS, TEXT_WIDTH)])
    x = randomly(3, 1, 4, 8, 8)
    for step, timestep in enumerate(scheduler.timesteps):
        runs = pattern_of(plan.passes[step], len(chain.blocks))
        names = ["cached_feature"] if runs is None else [residual(k) for k, run in enumerate(runs) if not run]
        adjusted = None
        if plan.scale_shift is not None:
            adjusted = torch.from_numpy(plan.scale_shift.table[step].copy()).expand(2, -1, -1)
        reuse = {name: kept[name] for name in names}
        noise_pred, stored = chain(torch.cat([x, x]), timestep, text, reuse=reuse, scale_shift=adjusted)
        kept |= stored
        unconditional, conditional = noise_pred.chunk(2)
        guided = unconditional + 5.0 * (conditional - unconditional)
        x = scheduler.step(guided, timestep, x).prev_sample
    return x


def test_patterns_draw_what_the_pieces_draw(pipe: FastCachePipeline, tiny_model: Path, plan: CachePlan) -> None:
    plain, config = replace(plan, scale_shift=None), pipe.bundle.manifest.model.scheduler
    for own in (plan, plain):
        assert psnr_db(drawn(pipe, own).flatten(1), eager(tiny_model, own, config).flatten(1)) >= 100
    # What one run was scaled and shifted by is gone in the next, and counts.
    assert psnr_db(drawn(pipe, plan).flatten(1), drawn(pipe, plain).flatten(1)) < 60
    assert not torch.equal(drawn(pipe, plan, guidance_scale=1.0), drawn(pipe, plain, guidance_scale=1.0))


def test_the_bundle_says_what_its_passes_run(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert [block.place for block in manifest.blocks] == [
        f"{place}.attention" for place in ("down.0", "middle.1", "up.2", "up.3")
    ]
    passes, full = manifest.passes, manifest.passes["full"]
    assert [*passes] == ["full", "shallow-0", "shallow-2"]
    own = passes["blocks-1010"]
    if manifest.chain:
        assert full.engines == manifest.chain
        assert set(full.engines) - set(own.engines) == {"block-1", "block-3"}
        assert "block-0" not in passes["shallow-0"].engines
    else:
        assert [*manifest.engines][:3] == ["full", "shallow-0", "shallow-2"]
        assert (full.engines, full.runs) == (("full",), (True,) * 4)
        assert (own.engines, own.runs) == (("full",), (True, False, True, False))
        assert passes["shallow-0"].runs == ()
    assert own.takes == ("residual_1", "residual_3")
    assert set(own.stores) == set(full.stores) - set(own.takes)
    assert 0 < full.multiply_adds - own.multiply_adds < full.multiply_adds
    assert passes["shallow-0"].takes == ("cached_feature",)
    for name in ("blocks-10", "blocks-10101", "blocks-1012", "shallow-1"):
        assert name not in passes
    assert verify_bundle(bundle.path).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("chained", [False, True])
def test_resnets_may_be_left_out_too(
    chained: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a resnet takes is a skip connection under another name. The build checks patterns against the model."""
    own = fastcache_engines.backend("onnxruntime")
    monkeypatch.setattr(own, "CAPABILITIES", replace(own.CAPABILITIES, conditions=not chained))
    fields = {"model": str(tiny_model), "backend": "onnxruntime", "dtype": "fp32", "components": ("unet",)}
    worker.build(resolve(recipe_from(fields | {"blocks": "transformer,resnet"})), tmp_path, lambda line: None)
    manifest = open_bundle(tmp_path).manifest
    kinds = [block.place.rpartition(".")[2] for block in manifest.blocks]
    assert {*kinds} == {"attention", "resnet"}
    assert bool(manifest.chain) is chained
    assert verify_bundle(tmp_path).problems == []


def test_an_engine_that_runs_what_it_should_reuse_is_found(bundle: Bundle) -> None:
    """It gives the same as long as what is reused is what it would compute."""
    manifest, backend = bundle.manifest, fastcache_engines.backend(bundle.manifest.backend)
    if manifest.chain:
        pytest.skip("a chain has no conditions: a block that is left out is not called")
    tried = trials(manifest.engines, manifest.passes, manifest.blocks)
    assert [one.adjusted for one in tried] == [False] * 5 + [True]
    assert measure_parity(backend, bundle.path, tried, LoadOptions()).shallow_vs_full < 1e-4
    heedless = [replace(one, entry=one.entry.model_copy(update={"runs": (True,) * 4})) for one in tried]
    assert measure_parity(backend, bundle.path, heedless[:-1], LoadOptions()).shallow_vs_full < 1e-4
    assert measure_parity(backend, bundle.path, heedless, LoadOptions()).shallow_vs_full > 1e-3


def test_plans_of_other_blocks_are_refused(pipe: FastCachePipeline, plan: CachePlan, tiny_bundle: Bundle) -> None:
    with pytest.raises(ValueError, match=r"expected a plan of the passes full, shallow-0, shallow-2.*blocks-10101"):
        drawn(pipe, CachePlan(("full",) * 6 + ("blocks-10101",)))
    with pytest.raises(ValueError, match=r"expected a scale and shift for 80 channels.*got them for 3"):
        drawn(pipe, replace(plan, scale_shift=ScaleShift.of(np.ones((7, 2, 3)))))
    with pytest.raises(ValueError, match=r"expected a plan of the passes full, shallow-0.*blocks-1010"):
        drawn(FastCachePipeline(tiny_bundle), plan)


@pytest.mark.parametrize("with_engines", [False, True])
def test_the_helper_draws_the_same(
    with_engines: bool, bundle: Bundle, pipe: FastCachePipeline, plan: CachePlan, tiny_model: Path
) -> None:
    live: Any = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    live.set_progress_bar_config(disable=True)
    helper = FastCacheHelper(live, engines=bundle if with_engines else None)
    helper.set_params(plan=plan)
    with helper:
        got = live(
            prompt_embeds=randomly(1, 1, TOKENS, TEXT_WIDTH),
            negative_prompt_embeds=randomly(2, 1, TOKENS, TEXT_WIDTH),
            latents=randomly(3, 1, 4, 8, 8),
            num_inference_steps=plan.num_steps,
            guidance_scale=5.0,
            output_type="latent",
        ).images
    assert psnr_db(got.flatten(1), drawn(pipe, plan).flatten(1)) >= 100


def test_a_plan_file_keeps_its_scales_and_shifts(plan: CachePlan) -> None:
    assert CachePlan.from_json(plan.to_json()) == plan
    assert plan.scale_shift is not None
    assert plan.last_steps(2).scale_shift == ScaleShift.of(plan.scale_shift.table[-2:])
    document = json.loads(plan.to_json())
    for damage in (
        {"channels": 96},
        {"channels": 96, "data": "?"},
        {"channels": 95, "data": ""},
        3,
        {"channels": True},
    ):
        with pytest.raises(ValueError, match="scale_shift"):
            CachePlan.from_json(json.dumps(document | {"scale_shift": damage}))
    with pytest.raises(ValueError, match="expected numbers of at most 10000 in scale_shift"):
        ScaleShift.of(np.full((1, 2, 3), np.nan))
    with pytest.raises(ValueError, match="expected a scale and shift for 7 steps, got 1"):
        replace(plan, scale_shift=ScaleShift.of(np.ones((1, 2, 3))))


def test_blocks_that_no_build_wrote_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    manifest = read_manifest(bundle.path)
    passes = manifest.named_passes

    def running(name: str, *runs: bool) -> dict[str, Any]:
        return {"named_passes": passes | {name: passes[name].model_copy(update={"runs": runs})}}

    every: list[dict[str, Any]] = [{"blocks": manifest.blocks[:1] * 2}, running("full", True)]
    if manifest.chain:
        every += [{"chain": manifest.chain[::-1]}, {"chain": ()}, running("full", True, True, True, True)]
    else:
        every += [{"chain": ("full",)}, {"blocks": ()}, running("full"), running("shallow-0", True, True, True, True)]
        engine, shallow = manifest.engines["full"], manifest.engines["shallow-0"]
        strange = next(spec for spec in engine.inputs if spec.name.startswith("kept."))
        more = shallow.model_copy(update={"inputs": (*shallow.inputs, replace(strange, name="kept.nothing"))})
        every.append({"engines": manifest.engines | {"shallow-0": more}})
        for name in ("runs", "kept.residual_2"):
            without = tuple(spec for spec in engine.inputs if spec.name != name)
            every.append({"engines": manifest.engines | {"full": engine.model_copy(update={"inputs": without})}})
    for changes in every:
        forged = manifest.model_copy(update=changes)
        forged = forged.model_copy(update={"bundle_sha256": forged.digest()})
        (tmp_path / MANIFEST).write_text(json.dumps(forged.to_json()))
        with pytest.raises(BundleError, match=r"is no build's: expected (a chain|a full pass|conditions)"):
            read_manifest(tmp_path)


def test_what_goes_together_with_blocks() -> None:
    assert recipe_from({"blocks": "transformer,resnet"}).blocks == ("transformer", "resnet")
    for other in ({"cut": "projected"}, {"kernels": True}, {"controlnet": "x"}):
        with pytest.raises(ValueError, match="expected blocks with the plain cut"):
            recipe_from({"blocks": "transformer", **other})
    with pytest.raises(ValueError, match="blocks"):
        recipe_from({"blocks": "attention"})


@torch.no_grad()
def test_schedules_follow_the_papers_rule_on_eager_changes(pipe: FastCachePipeline, tiny_model: Path) -> None:
    """Equation 4 and the rule of arXiv 2312.03209, section 3.2, on what diffusers' transformers add to their input."""
    manifest, steps, count = pipe.bundle.manifest, 6, len(pipe.bundle.manifest.blocks)
    table = compile_sampler(make_scheduler("ddim", manifest.model.scheduler), steps)
    walks = Walks(pipe, ["a"], [0], table=table, guidance_scale=5.0)
    unet: Any = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet").eval()
    scheduler: Any = make_scheduler("ddim", manifest.model.scheduler)
    scheduler.set_timesteps(steps)
    added = list[Tensor]()  # call by call, each block once, in the order in which they are computed
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            module.register_forward_hook(lambda _, given, result: added.append(result[0] - given[0]))
    text, x = torch.cat([pipe.encode_prompt(["a"]), pipe.encode_prompt([""])]).flip(0), walks.start.float()
    for timestep in scheduler.timesteps:
        unconditional, conditional = unet(torch.cat([x, x]), timestep, text).sample.chunk(2)
        x = scheduler.step(unconditional + 5.0 * (conditional - unconditional), timestep, x).prev_sample
    wanted = np.zeros((count, steps))
    for call in range(1, steps):
        for block in range(count):
            now, before = added[call * count + block], added[(call - 1) * count + block]
            wanted[block, call] = ((now - before).abs().sum((1, 2, 3)) / now.abs().sum((1, 2, 3))).mean()
    changes = measured_changes(walks, manifest.blocks)
    assert np.allclose(changes, wanted, rtol=1e-3)
    for threshold in np.quantile(wanted[:, 1:], (0.3, 0.6, 0.9)) * 1.5:
        since = np.zeros(count)
        passes = list[str]()
        for call in range(steps):
            since += wanted[:, call]
            runs = (since > threshold) | (call == 0)
            since[runs] = 0
            passes.append("full" if runs.all() else "blocks-" + "".join(map(str, runs.astype(int))))
        assert block_plan(manifest, "ddim", changes, float(threshold)).passes == tuple(passes)


def test_a_schedule_by_threshold(bundle: Bundle, tmp_path: Path, command: Callable[..., Said]) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "plan.json"
    prompts.write_text("a\nb\nab\n")
    flags = ("--engines", bundle.path, "--steps", 6, "--prompts", prompts, "--output", output, "--blocks")
    chart = tmp_path / "chart.png"
    said = command("plan", *flags, "--threshold", 0.05, "--chart", chart, "--json")
    made = CachePlan.from_json(output.read_text())
    assert made.passes[0] == "full"
    assert any(name.startswith("blocks-") for name in made.passes)
    assert made.scale_shift is not None
    assert said.json["blocks_reused"].endswith("%")
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert fastcache.load(bundle.path)("a", plan=made, seed=0, output_type="latent").images.isfinite().all()
    command("plan", *flags, "--threshold", 1e-9, "--no-scale-shift")
    assert set(CachePlan.from_json(output.read_text()).passes) == {"full"}


def test_a_fitted_plan_may_run_patterns(
    bundle: Bundle, tiny_bundle: Bundle, tmp_path: Path, command: Callable[..., Said]
) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "plan.json"
    prompts.write_text("a\nb\nab\n")
    flags = ("--steps", 6, "--prompts", prompts, "--output", output, "--budget", 3, "--blocks")
    said = command("plan", "--engines", bundle.path, *flags, "--json")
    assert said.code == 0
    made = CachePlan.from_json(output.read_text())
    assert made.fit is not None
    assert said.json["full_steps"] <= 3
    assert all(name in bundle.manifest.passes for name in made.passes)
    refused = command("plan", "--engines", tiny_bundle.path, *flags)
    assert refused.code == 2
    assert "expected a bundle of blocks" in refused.err


def test_patterns_of_different_cost(pipe: FastCachePipeline) -> None:
    """Each leaves out more than the one before, those blocks first that change least for their time."""
    table = compile_sampler(make_scheduler("ddim", pipe.bundle.manifest.model.scheduler), 4)
    costs = pattern_costs(pipe, Walks(pipe, ["a", "b"], range(2), table=table, guidance_scale=4.0))
    runs = [pattern_of(name, 4) or () for name in costs]
    assert [sum(own) for own in runs] == [3, 2, 1, 0]
    for more, fewer in pairwise(runs):
        assert all(one or not other for one, other in zip(more, fewer, strict=True))
    assert [*costs.values()] == sorted(costs.values(), reverse=True)  # shares of time, all above 0, are taken off
