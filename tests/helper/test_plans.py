"""FastCacheHelper follows plans: their depths, their forecasts, and guidance that a plan or a callback switches off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eager_engines import eager_engines, plain_run
from fastcache import CachePlan, FastCacheHelper, Forecast, compile_sampler, partition_unet
from fastcache.cut.partition import partition_branches
from fastcache.loop.lane import Lane
from fastcache.sampler.scheduler import make_scheduler
from live_pipelines import PROMPT, STEPS, agreement_db, calls, draw, full_calls, helped, switch

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

UNIFORM = CachePlan.uniform(STEPS, 3)  # FULL at 0, 3 and 6


def planned(pipe: Any, plan: CachePlan, **arguments: Any) -> Tensor:
    helper = FastCacheHelper(pipe)
    helper.set_params(plan=plan)
    with helper:
        return draw(pipe, **arguments)


@settings(max_examples=8)
@given(st.lists(st.booleans(), min_size=0, max_size=STEPS - 1), st.integers(0, 3))
def test_a_plan_is_followed_step_by_step(
    loaded_pipe: StableDiffusionPipeline, refreshes: list[bool], branch_id: int
) -> None:
    full = [0, *(index + 1 for index, refresh in enumerate(refreshes) if refresh)]
    plan = CachePlan.from_refresh_steps(STEPS, full, branch_id)
    helper = FastCacheHelper(loaded_pipe)
    helper.set_params(plan=plan)
    with helper:
        assert full_calls(loaded_pipe.unet, lambda: draw(loaded_pipe)) == full


def test_a_plan_of_several_depths(pipe: StableDiffusionPipeline) -> None:
    with FastCacheHelper(pipe) as helper:
        expected = draw(pipe)
        errors: list[float] = []
        for branches in ((None, 0, 0, 0) * 2, (None, 0, 5, 0) * 2, (None, 5, 5, 5) * 2):
            helper.set_params(plan=CachePlan.from_branches(branches))
            errors.append(-agreement_db(draw(pipe), expected))
        assert errors[0] > errors[1] > errors[2]


def test_a_plan_too_short_is_refused(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match=f"one for {STEPS - 1} and call {STEPS}"):
        planned(pipe, CachePlan.uniform(STEPS - 1, 3))


TAIL = tuple(range(3, STEPS))  # unguided from the refresh at 3 on
SEVERAL_DEPTHS = CachePlan.from_branches((None, 0, 2, None, 0, 2, 0, 0), unguided_steps=(5, 6, 7), forecast=Forecast())


@pytest.mark.parametrize(
    ("plan", "sampler"),
    [
        (replace(UNIFORM, forecast=Forecast()), "ddim"),
        (replace(UNIFORM, forecast=Forecast(order=2, damping=0.5)), "ddim"),
        (replace(UNIFORM, forecast=Forecast(by="sigma")), "heun"),
        (replace(UNIFORM, unguided_steps=TAIL), "ddim"),
        (replace(UNIFORM, unguided_steps=(1, 2, 4, 7)), "heun"),
        (replace(UNIFORM, unguided_steps=TAIL, forecast=Forecast()), "ddim"),
        (SEVERAL_DEPTHS, "ddim"),
    ],
)
def test_forecasts_and_unguided_steps_draw_what_fastcaches_own_loop_draws(
    plan: CachePlan, sampler: str, pipe: StableDiffusionPipeline
) -> None:
    pipe.scheduler, steps = make_scheduler(sampler, pipe.scheduler.config), STEPS
    if sampler == "heun":  # calls its U-Net twice a step, but for the last
        steps, shorter = STEPS // 2, [step for step in plan.unguided_steps if step < STEPS - 1]
        plan = replace(plan, passes=plan.passes[:-1], unguided_steps=tuple(shorter))
    drawn, expected = planned(pipe, plan, num_inference_steps=steps), own_loop(pipe, plan, steps)
    assert agreement_db(drawn, expected) >= 60
    plain = CachePlan(plan.passes)
    assert agreement_db(planned(pipe, plain, num_inference_steps=steps), expected) < 50


def own_loop(pipe: StableDiffusionPipeline, plan: CachePlan, steps: int) -> Tensor:
    """The same picture by `fastcache.loop`, with the passes of the same cuts as engines."""
    text = torch.cat(pipe.encode_prompt(PROMPT, "cpu", 1, True)[::-1])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = eager_engines(partition_branches(pipe.unet, plan.branch_ids), latents, text[:1])
    lane = Lane(*found, images=1, halves=2, channels=4)
    lane.set_inputs({"encoder_hidden_states": text})
    *_, last = plain_run(lane, compile_sampler(pipe.scheduler, steps), plan, latents, guidance_scale=7.5).steps
    return last.latents.clone()


def test_unguided_steps_take_half_the_rows(pipe: StableDiffusionPipeline) -> None:
    rows: list[int] = []
    hook = pipe.unet.conv_in.register_forward_hook(lambda layer, given, output: rows.append(len(output)))
    plan = replace(UNIFORM, unguided_steps=TAIL)
    planned(pipe, plan)
    assert rows == [2, 2, 2, 1, 1, 1, 1, 1]
    rows.clear()
    unguided = planned(pipe, plan, guidance_scale=1.0)  # where there is no half to leave out
    hook.remove()
    assert rows == [1] * STEPS
    assert torch.equal(unguided, planned(pipe, UNIFORM, guidance_scale=1.0))


def test_a_guided_step_reuses_no_half_of_a_feature(pipe: StableDiffusionPipeline) -> None:
    """Where another prompt makes an unguided step FULL that the plan has SHALLOW."""
    plan = CachePlan.from_branches((None, *(0,) * 7), unguided_steps=(4, 5))
    other = torch.cat(pipe.encode_prompt("a small blue ring", "cpu", 1, True)[::-1])
    change = switch(3, lambda pipe, tensors: tensors | {"prompt_embeds": other})
    helper = FastCacheHelper(pipe)
    helper.set_params(plan=plan)
    with helper:
        assert full_calls(pipe.unet, lambda: draw(pipe)) == [0]
        assert full_calls(pipe.unet, lambda: draw(pipe, **change)) == [0, 4, 6]


def test_a_forecast_forgets_what_another_prompt_made(pipe: StableDiffusionPipeline) -> None:
    """The step after a change reuses the one feature that there is of the new prompt, and extrapolates nothing."""
    other = torch.cat(pipe.encode_prompt("a small blue ring", "cpu", 1, True)[::-1])
    change = switch(3, lambda pipe, tensors: tensors | {"prompt_embeds": other})
    plan = CachePlan.from_branches((None, 0, 0, None, 0, 0, 0, 0))
    drawn = [planned(pipe, replace(plan, forecast=forecast), **change) for forecast in (Forecast(), None)]
    assert torch.equal(*drawn)
    drawn = [planned(pipe, replace(plan, forecast=forecast)) for forecast in (Forecast(), None)]
    assert not torch.equal(*drawn)


def test_three_parts_of_guidance_are_not_halved(pipe: Any) -> None:
    pipe.__class__ = type("Three", (StableDiffusionPipeline,), {"image_guidance_scale": 1.5})
    try:
        with pytest.raises(ValueError, match="with two halves for guidance to tell them apart, got Three"):
            planned(pipe, replace(UNIFORM, unguided_steps=TAIL))
    finally:
        pipe.__class__ = StableDiffusionPipeline


def guidance_off(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 0.0
    return tensors | {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}


def test_guidance_switched_off_on_the_way(pipe: StableDiffusionPipeline) -> None:
    expected = draw(pipe, **switch(3, guidance_off))
    with helped(pipe, interval=1):
        assert torch.equal(draw(pipe, **switch(3, guidance_off)), expected)
    with helped(pipe), calls(pipe.unet) as seen:
        drawn = draw(pipe, **switch(3, guidance_off))
    assert [step for step, full in enumerate(seen) if full] == [0, 3, 6]
    assert torch.equal(drawn, by_hand(pipe, UNIFORM, guided=4))
    with helped(pipe, DeepCacheSDHelper), pytest.raises(RuntimeError):
        draw(pipe, **switch(3, guidance_off))


def test_guidance_switched_off_before_a_forecast(pipe: StableDiffusionPipeline) -> None:
    """Features stored before count by their conditional halves, as at unguided steps of a plan."""
    forecast = replace(UNIFORM, forecast=Forecast())
    drawn = planned(pipe, forecast, **switch(3, guidance_off))
    expected = planned(pipe, replace(forecast, unguided_steps=(4, 5, 6, 7)))
    assert agreement_db(drawn, expected) >= 100  # the pipeline's guidance between equal halves rounds
    assert agreement_db(drawn, planned(pipe, UNIFORM, **switch(3, guidance_off))) < 60


@torch.no_grad()
def by_hand(pipe: StableDiffusionPipeline, plan: CachePlan, guided: int) -> Tensor:
    """DDIM over the two passes of a cut, on both halves for so many steps and on the conditional one from there on."""
    cut = partition_unet(pipe.unet)
    text = torch.cat(pipe.encode_prompt(PROMPT, "cpu", 1, True)[::-1])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(STEPS)
    feature = torch.empty(0)
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        rows = 2 if step < guided else 1
        sample, own = torch.cat([latents] * rows), text[-rows:]
        if plan.is_full(step):
            noise_pred, feature = cut.full(sample, timestep, own)
        else:
            noise_pred = cut.shallow(sample, timestep, own, cached_feature=feature[-rows:])
        if rows == 2:
            negative, positive = noise_pred.chunk(2)
            noise_pred = negative + 7.5 * (positive - negative)
        latents = pipe.scheduler.step(noise_pred, timestep, latents).prev_sample
    return latents
