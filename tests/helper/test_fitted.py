"""A fitted plan under the helper: the pipeline's scheduler makes way for the plan's rows, and comes back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from fastcache import Bundle, CachePlan, FastCacheHelper, FastCachePipeline
from fastcache.planning.fitting import Fitting, Reference
from live_pipelines import NATIVE, PROMPT, agreement_db, draw, load_pipe

POINTS = (0, 2, 3, 5)
PASSES = ("full", "shallow-0", "full", "shallow-0")


pytestmark = pytest.mark.slow  # the bundled model, built and fitted


@pytest.fixture(scope="module")
def loaded_pipe() -> StableDiffusionPipeline:
    return load_pipe(NATIVE)


@pytest.fixture(scope="module")
def bundled(demo_bundle: Callable[[int], Bundle]) -> FastCachePipeline:
    return FastCachePipeline(demo_bundle(0))


@pytest.fixture(scope="module")
def plan(bundled: FastCachePipeline) -> CachePlan:
    """Four points of eight steps, fitted on three pictures."""
    fitting = Fitting(bundled, ["a red circle", "a blue ring", "a green square"], Reference("ddim", 8, 4.0))
    return fitting.fit(CachePlan(PASSES), POINTS)


def helped(pipe: Any, plan: CachePlan, engines: Bundle | None = None) -> FastCacheHelper:
    helper = FastCacheHelper(pipe, engines=engines)
    helper.set_params(plan=plan)
    helper.enable()
    return helper


@pytest.mark.parametrize("with_engines", [False, True])
def test_draws_what_the_bundle_draws(
    pipe: Any, plan: CachePlan, bundled: FastCachePipeline, with_engines: bool
) -> None:
    wanted = bundled(PROMPT, plan=plan, guidance_scale=4.0, seed=0, output_type="latent").images
    pipe.scheduler = own = PNDMScheduler.from_config(pipe.scheduler.config)  # what the plan's sampler stands in for
    helper = helped(pipe, plan, bundled.bundle if with_engines else None)
    try:
        assert agreement_db(draw(pipe, guidance_scale=4.0), wanted) > 80
        assert pipe.num_timesteps == len(POINTS)
        assert plan.fit is not None
        assert any(plan.fit.contrasts)
        unguided = bundled(PROMPT, plan=plan, guidance_scale=1.0, seed=0, output_type="latent").images
        assert agreement_db(draw(pipe, guidance_scale=1.0), unguided) > 80
    finally:
        helper.disable()
    assert pipe.scheduler is own


def test_an_unfitted_plan_gives_the_scheduler_back(pipe: Any, plan: CachePlan) -> None:
    own = pipe.scheduler
    plain = draw(pipe, guidance_scale=4.0)
    with helped(pipe, plan) as helper:
        assert pipe.scheduler is not own
        helper.set_params(cache_interval=1)
        assert helper.enabled
        assert pipe.scheduler is own
        assert torch.equal(draw(pipe, guidance_scale=4.0), plain)
        helper.set_params(plan=plan)
        assert pipe.num_timesteps != len(POINTS)
        draw(pipe, guidance_scale=4.0)
        assert pipe.num_timesteps == len(POINTS)


def test_what_is_refused_changes_nothing(pipe: Any, plan: CachePlan, bundled: FastCachePipeline) -> None:
    own, plain = pipe.scheduler, draw(pipe, guidance_scale=4.0)
    assert plan.fit is not None
    astray = replace(plan, fit=replace(plan.fit, points=(0, 2, 3, 70)))
    for engines in (None, bundled.bundle):
        with FastCacheHelper(pipe, engines=engines) as helper:
            for _ in range(2):  # a second time as the first
                with pytest.raises(ValueError, match="points below 8"):
                    helper.set_params(plan=astray)
                if engines is not None:
                    with pytest.raises(ValueError, match="expected passes out of full, shallow-0"):
                        helper.set_params(cache_interval=2, cache_branch_id=3)
            assert helper.enabled
            assert pipe.scheduler is own
            assert agreement_db(draw(pipe, guidance_scale=4.0), plain) > 80


def test_copies_have_the_own_scheduler(pipe: Any, plan: CachePlan) -> None:
    own = pipe.scheduler
    with helped(pipe, plan):
        for copied in (copy.deepcopy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))):
            assert type(copied) is type(own)
            assert copied.config == own.config


def test_what_a_fitted_plan_is_not_for(pipe: Any, plan: CachePlan) -> None:
    with helped(pipe, plan):
        with pytest.raises(ValueError, match=r"num_inference_steps of 8, .* got 50"):
            draw(pipe, num_inference_steps=50)
        with pytest.warns(UserWarning, match="fitted at guidance 4 runs at 9"):
            draw(pipe, guidance_scale=9.0)
        other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        with pytest.raises(ValueError, match="a whole run with a fitted plan"):
            other(PROMPT, image=torch.zeros(1, 3, 64, 64), strength=0.75, num_inference_steps=8)
