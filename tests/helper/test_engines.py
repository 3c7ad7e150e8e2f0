"""FastCacheHelper with engines: what its torch modules draw, and what engines do not compute is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import fastcache
from build_store import BuildStore
from fastcache import Bundle, CachePlan, FastCacheHelper, Forecast
from fastcache.sampler.scheduler import make_scheduler
from live_pipelines import NATIVE, PROMPT, STEPS, add_lora, agreement_db, draw, full_calls, helped, load_pipe, switch

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")


@pytest.fixture(scope="module")
def loaded_pipe() -> StableDiffusionPipeline:
    return load_pipe(NATIVE)


@pytest.fixture(scope="module")
def bundle(demo_bundle: Callable[[int], Bundle]) -> Bundle:
    return demo_bundle(0)


def test_engines_draw_what_the_torch_modules_draw(bundle: Bundle, pipe: StableDiffusionPipeline) -> None:
    unet, drawn = pipe.unet, dict[int, Tensor]()
    helper = FastCacheHelper(pipe, engines=bundle.path)
    for interval in (1, 3):
        helper.set_params(cache_interval=interval)
        with helper:
            assert full_calls(pipe.unet, lambda: draw(pipe)) == []  # the engines', not the U-Net's
            drawn[interval] = draw(pipe)
        assert pipe.unet is unet
    assert agreement_db(drawn[1], draw(pipe)) >= 50
    with helped(pipe, interval=3):
        assert agreement_db(drawn[3], draw(pipe)) >= 50
    assert agreement_db(drawn[1], drawn[3]) < 45


def test_engines_serve_a_multistep_scheduler_without_guidance(bundle: Bundle, pipe: StableDiffusionPipeline) -> None:
    """Which keeps each noise prediction itself over the next step."""
    pipe.scheduler = make_scheduler("pndm", pipe.scheduler.config)
    with helped(pipe):
        expected = draw(pipe, guidance_scale=1.0)
    helper = FastCacheHelper(pipe, engines=bundle)
    helper.set_params(3)
    with helper:
        assert agreement_db(draw(pipe, guidance_scale=1.0), expected) >= 50


UNIFORM = CachePlan.uniform(STEPS, 3)  # FULL at 0, 3 and 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "sampler"),
    [
        (replace(UNIFORM, forecast=Forecast()), "ddim"),
        (replace(UNIFORM, forecast=Forecast(order=2, damping=0.5, by="sigma")), "euler"),
        (replace(UNIFORM, unguided_steps=(1, 2, 4, 5, 6, 7)), "ddim"),
        (replace(UNIFORM, unguided_steps=(4, 5, 6, 7), forecast=Forecast()), "ddim"),
    ],
)
def test_engines_follow_forecasts_and_unguided_steps(
    plan: CachePlan, sampler: str, bundle: Bundle, pipe: StableDiffusionPipeline
) -> None:
    """As fastcache's own loop over them does: a forecast under a projected cut is none of the feature itself."""
    config = pipe.scheduler.config
    pipe.scheduler = make_scheduler(sampler, config)
    drawn, uniform = (planned(pipe, bundle, own) for own in (plan, UNIFORM))
    given: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "latent", "plan": plan}
    noise = torch.Generator().manual_seed(0)
    expected = fastcache.load(bundle.path)(PROMPT, sampler=pipe.scheduler, generator=noise, **given).images
    assert agreement_db(drawn, expected) >= 50
    assert agreement_db(uniform, expected) < 45
    if plan.forecast is None:
        assert agreement_db(drawn, planned(pipe, None, plan)) >= 50


@pytest.mark.slow
def test_engines_go_on_with_half_where_guidance_is_switched_off(bundle: Bundle, pipe: StableDiffusionPipeline) -> None:
    """Between two refreshes; a FULL step there, which is nearer to the uncached run, would not agree."""
    drawn = [planned(pipe, engines, UNIFORM, **switch(3, guidance_off)) for engines in (bundle, None)]
    assert agreement_db(*drawn) >= 80
    refreshed = CachePlan.from_refresh_steps(STEPS, [0, 3, 4, 6])
    assert agreement_db(planned(pipe, bundle, refreshed, **switch(3, guidance_off)), drawn[1]) < 60


def planned(pipe: Any, engines: Bundle | None, plan: CachePlan, prompt: str = PROMPT, **arguments: Any) -> Tensor:
    helper = FastCacheHelper(pipe, engines=engines)
    helper.set_params(plan=plan)
    with helper:
        return draw(pipe, prompt, **arguments)


def guidance_off(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 0.0
    return tensors | {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}


def test_engines_refuse_what_they_do_not_compute(bundle: Bundle, native_pipe: StableDiffusionPipeline) -> None:
    pipe = native_pipe
    helper = FastCacheHelper(pipe, engines=bundle)
    with pytest.raises(ValueError, match=r"expected kernels or engines, got both; .*--kernels\)$"):
        FastCacheHelper(pipe, engines=bundle, kernels=True)
    helper.set_params(cache_branch_id=1)
    with pytest.raises(ValueError, match="out of full, shallow-0, as the engines were built, got shallow-1"):
        helper.enable()
    with FastCacheHelper(pipe, engines=bundle):
        with pytest.raises(ValueError, match="expected sample of shape"):
            draw(pipe, height=32, width=32)
        with pytest.raises(ValueError, match="rows"):
            draw(pipe, num_images_per_prompt=9)
        with pytest.raises(ValueError, match="attention_mask"):
            pipe.unet(torch.zeros(2, 4, 16, 16), 1, torch.zeros(2, 77, 128), attention_mask=torch.ones(2, 77))
        add_lora(pipe.unet, "a", "to_q")
        with pytest.raises(ValueError, match="LoRA"):
            draw(pipe)
    with pytest.raises(ValueError, match="from which it differs"):
        FastCacheHelper(pipe, engines=bundle).enable()


def test_engines_of_another_architecture_are_refused(tiny_bundle: Bundle, pipe: StableDiffusionPipeline) -> None:
    unet = pipe.unet
    with pytest.raises(ValueError, match="whose inputs it does not take"):
        FastCacheHelper(pipe, engines=tiny_bundle).enable()
    assert pipe.unet is unet


@pytest.mark.slow
def test_engines_of_several_depths_and_sizes(tiny_model: Path, builds: BuildStore) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    sizes, branch_ids = ("32x32", "48x32"), (0, 2)
    bundle = builds.bundle(tiny_model, branch_id=branch_ids, sizes=sizes, components=("unet",))
    plan = CachePlan.from_branches((None, 0, 2, 0, None, 2, 0, 0))
    drawn: list[Tensor] = []
    for engines in (None, bundle):
        helper = FastCacheHelper(pipe, engines=engines)
        helper.set_params(plan=plan)
        with helper:
            drawn += [draw(pipe, "abc"), draw(pipe, "abc", height=32, width=48)]
            if engines is not None:
                with pytest.raises(ValueError, match="32x32, 48x32"):
                    draw(pipe, "abc", height=48, width=48)
    for eager, engine in zip(drawn[:2], drawn[2:], strict=True):
        assert agreement_db(engine, eager) >= 50
    plain = draw(pipe, "abc")
    assert agreement_db(drawn[0], plain) < 50
    several = replace(plan, unguided_steps=(3, 6, 7), forecast=Forecast())
    both = [planned(pipe, engines, several, "abc") for engines in (bundle, None)]
    assert agreement_db(*both) >= 50
    assert agreement_db(both[0], drawn[0]) < 50
