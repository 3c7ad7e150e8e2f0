"""Callbacks as in diffusers' pipelines: they see the run, replace latents and end it; the rest is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, SDCFGCutoffCallback
from torch import Tensor

import fastcache
from fastcache import Bundle, CachePlan, FastCachePipeline
from fastcache.evaluate.quality import psnr_db

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

STEPS = 6


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Bundle) -> FastCachePipeline:
    return fastcache.load(tiny_bundle.path, threads=1)


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    found = StableDiffusionPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def drawn(pipe: Any, callback: Any = None, **arguments: Any) -> Tensor:
    given = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return pipe("a cat", **given, callback_on_step_end=callback, **arguments).images


@pytest.mark.parametrize("cutoff", [{"cutoff_step_ratio": 0.4}, {"cutoff_step_ratio": None, "cutoff_step_index": 0}])
def test_guidance_ends_where_diffusers_callback_ends_it(
    cutoff: dict[str, Any], pipe: FastCachePipeline, reference: Any
) -> None:
    callback = SDCFGCutoffCallback(**cutoff)
    given = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    expected = drawn(reference, callback, **given)
    assert psnr_db(drawn(pipe, callback, **given), expected) >= 50
    assert psnr_db(drawn(pipe, MultiPipelineCallbacks([callback])), expected) >= 50
    assert psnr_db(drawn(pipe), expected) < 40
    cached = pipe("a cat", num_inference_steps=STEPS, cache_interval=2, callback_on_step_end=callback)
    assert cached.plan.unguided_steps == tuple(range(3 if "cutoff_step_index" not in cutoff else 1, STEPS))


def test_a_callback_sees_guidance_and_the_number_of_calls(pipe: FastCachePipeline, reference: Any) -> None:
    seen: list[list[Any]] = []

    def callback(own: Any, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes = [tuple(values[name].shape) for name in ("latents", "prompt_embeds", "negative_prompt_embeds")]
        run = [own.guidance_scale, own.num_timesteps, own.do_classifier_free_guidance, own.interrupt]
        seen.append([step, timestep.item(), *run, *shapes])
        return {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    for each in (reference, pipe):
        drawn(each, callback, callback_on_step_end_tensor_inputs=names)
    assert len(seen) == 2 * STEPS
    assert seen[:STEPS] == seen[STEPS:]


def test_a_callback_ends_the_run(pipe: FastCachePipeline, reference: Any) -> None:
    def stop(own: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        own._interrupt = step == 2
        return values

    assert psnr_db(drawn(pipe, stop), drawn(reference, stop)) >= 50
    assert psnr_db(drawn(pipe, stop), drawn(pipe)) < 40
    assert torch.equal(drawn(pipe), drawn(pipe, cache_interval=1))  # and the next run goes to its end


def in_place(own: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    values["prompt_embeds"].mul_(0.2)
    return values


def other_embeds(own: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"prompt_embeds": values["prompt_embeds"] * 0.2}


def other_guidance(own: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> None:
    own._guidance_scale = 1.5


def wrong_shape(own: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"latents": torch.zeros(1)}


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (in_place, "a callback to leave prompt_embeds"),
        (other_embeds, "a callback to leave prompt_embeds"),
        (other_guidance, "a callback to leave guidance_scale, .*; give plan.guided_within"),
        (wrong_shape, r"latents of shape \[1, 4, 8, 8\] from a callback, got Tensor of shape \[1\]"),
        (IPAdapterScaleCutoffCallback(), "got 'IPAdapterScaleCutoffCallback'; leave it out"),
        (3, "callback_on_step_end to be a function"),
    ],
)
def test_what_a_callback_cannot_change_is_refused_by_name(callback: Any, message: str, pipe: FastCachePipeline) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        drawn(pipe, callback, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"out of latents, prompt_embeds, .*, got 'noise_pred'"):
        drawn(pipe, in_place, callback_on_step_end_tensor_inputs=["noise_pred"])


def test_a_plan_keeps_its_own_steps_without_guidance(pipe: FastCachePipeline) -> None:
    plan = CachePlan.all_full(STEPS).guided_within(1, STEPS)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=3)
    output = pipe("a cat", num_inference_steps=STEPS, plan=plan, callback_on_step_end=cutoff)
    assert output.plan.unguided_steps == (0, 4, 5)
