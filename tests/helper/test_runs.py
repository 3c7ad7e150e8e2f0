"""FastCacheHelper counts a run's calls, knows a new run, and notices what changes between two calls.

Told by which U-Net calls run the middle block, for only FULL ones do; beside the old helper, where that is wrong.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcache import FastCacheHelper
from fastcache.sampler.scheduler import make_scheduler
from live_pipelines import PROMPT, STEPS, calls, draw, full_calls, helped, switch
from repeats import mostly_slow
from small_unets import example, small_unet

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")


def call(unet: Any, timestep: Any, sample: Tensor, text: Tensor) -> Tensor:
    with torch.no_grad():
        return unet(sample, timestep=timestep, encoder_hidden_states=text).sample


@pytest.mark.parametrize(("sampler", "num_calls"), [("pndm", STEPS + 1), ("heun", 2 * STEPS - 1), ("euler", STEPS)])
def test_calls_are_counted_whatever_the_sampler(sampler: str, num_calls: int, pipe: StableDiffusionPipeline) -> None:
    pipe.scheduler = make_scheduler(sampler, pipe.scheduler.config)
    with helped(pipe, interval=2):
        assert full_calls(pipe.unet, lambda: draw(pipe)) == list(range(0, num_calls, 2))
    with helped(pipe, DeepCacheSDHelper, interval=2):
        old = full_calls(pipe.unet, lambda: draw(pipe))
    # It looks timesteps up by value and finds a repeated one at its first place, for Heun's always an odd one.
    assert old == {"pndm": [0, 4, 6, 8], "heun": [0], "euler": [0, 2, 4, 6]}[sampler]


def test_another_strength_reuses_nothing_of_the_image_before(pipe: StableDiffusionPipeline) -> None:
    img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)

    def pictures(helper_class: Any) -> list[Tensor]:
        drawn: list[Tensor] = []
        for strengths in ((1.0, 0.6), (0.6,)):
            with helped(img2img, helper_class):
                for strength in strengths:
                    image = torch.full((1, 3, 64, 64), strength)
                    drawn.append(draw(img2img, image=image, strength=strength))
        return drawn

    _, after_another, alone = pictures(FastCacheHelper)
    assert torch.equal(after_another, alone)
    # 5 of 8 steps begin at index 3 of the timesteps, which is a refresh of N=3 by chance; 0.6 of 8 is 4, at index 4
    _, after_another, alone = pictures(DeepCacheSDHelper)
    assert not torch.allclose(after_another, alone, atol=1e-2)


def test_an_interrupted_run_leaves_nothing(pipe: StableDiffusionPipeline) -> None:
    def stop(pipe: Any, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with helped(pipe):
        expected = draw(pipe, "a small blue ring")
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, callback_on_step_end=stop)
        assert torch.equal(draw(pipe, "a small blue ring"), expected)

        def leave(pipe: Any, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = step == 1
            return arguments

        draw(pipe, callback_on_step_end=leave)
        assert torch.equal(draw(pipe, "a small blue ring"), expected)


def test_an_exchanged_scheduler_begins_a_run(pipe: StableDiffusionPipeline) -> None:
    with helped(pipe):
        expected, own = draw(pipe), pipe.scheduler
        pipe.scheduler = make_scheduler("dpm++_2m", own.config)
        assert full_calls(pipe.unet, lambda: draw(pipe)) == [0, 3, 6]
        pipe.scheduler = own
        assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("scheduler", mostly_slow(["the same", "its own"], lambda own: own == "its own"))
@pytest.mark.parametrize("built", ["before", "while enabled"])
def test_a_second_pipeline_on_the_same_unet(built: str, scheduler: str, pipe: StableDiffusionPipeline) -> None:
    """Built before, it knows nothing of the helper; built while it is enabled, it has a U-Net that caches."""

    def second() -> StableDiffusionPipeline:
        components = dict(pipe.components)
        if scheduler == "its own":
            components["scheduler"] = make_scheduler("euler", pipe.scheduler.config)
        other = StableDiffusionPipeline(**components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        return other

    other = second()
    plain = draw(other, seed=1)
    with helped(pipe):
        expected = draw(pipe)
        if built == "before":
            assert torch.equal(draw(other, seed=1), plain)
        else:
            other = second()
            assert full_calls(pipe.unet, lambda: draw(other, seed=1)) == [0, 3, 6]
            first = draw(other, seed=1)
            assert torch.equal(draw(other, seed=1), first)
        assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(other, seed=1), plain)


def test_the_old_helper_caches_in_every_pipeline_on_the_unet(pipe: StableDiffusionPipeline) -> None:
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    with helped(pipe, DeepCacheSDHelper):
        assert full_calls(pipe.unet, lambda: draw(other)) == [0, 3, 6]


def test_a_loop_over_the_same_timesteps_again_is_a_new_run(pipe: StableDiffusionPipeline) -> None:
    """A loop of the user's own, which never sets its timesteps anew, and names its arguments."""
    pipe.scheduler.set_timesteps(4)
    text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    samples = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def loop(sample: Tensor) -> list[Tensor]:
        return [call(pipe.unet, t, sample, text) for t in pipe.scheduler.timesteps]

    with helped(pipe):
        alone = loop(samples[1])
        with calls(pipe.unet) as seen:
            loop(samples[0])
            again = loop(samples[1])
    assert seen == [True, False, False, True] * 2
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))
    with helped(pipe, DeepCacheSDHelper), pytest.raises(IndexError):
        loop(samples[0])  # `timestep` by keyword


def test_a_prompt_changed_on_the_way(pipe: StableDiffusionPipeline) -> None:
    other = torch.cat(pipe.encode_prompt("a small blue ring", "cpu", 1, True)[::-1])

    def change(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors | {"prompt_embeds": other}

    def copied(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors | {"prompt_embeds": tensors["prompt_embeds"].clone()}

    with helped(pipe):
        assert full_calls(pipe.unet, lambda: draw(pipe, **switch(3, change))) == [0, 3, 4, 6]
        assert full_calls(pipe.unet, lambda: draw(pipe, **switch(3, copied))) == [0, 3, 6]
    with helped(pipe, DeepCacheSDHelper):
        assert full_calls(pipe.unet, lambda: draw(pipe, **switch(3, change))) == [0, 3, 6]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_prompt_written_in_place(mode: Any, pipe: StableDiffusionPipeline) -> None:
    """As one that another tensor took the place of; guidance off or on, in inference mode too."""

    def write(pipe: Any, tensors: dict[str, Any]) -> None:
        tensors["prompt_embeds"].mul_(0.2)

    def replace(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors | {"prompt_embeds": tensors["prompt_embeds"] * 0.2}

    with mode(), helped(pipe):
        for scale in (1.0, 7.5):
            expected = draw(pipe, guidance_scale=scale, **switch(0, replace))
            run = lambda own=scale: draw(pipe, guidance_scale=own, **switch(0, write))  # noqa: E731
            assert full_calls(pipe.unet, run) == [0, 1, 3, 6]
            assert torch.equal(run(), expected)


def test_a_prompt_written_in_place_as_guidance_ends(pipe: StableDiffusionPipeline) -> None:
    """Its conditional half is another than that of what is cached."""

    def end(pipe: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        tensors["prompt_embeds"].mul_(0.2)
        return tensors | {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}

    with helped(pipe):
        assert full_calls(pipe.unet, lambda: draw(pipe, **switch(3, end))) == [0, 3, 4, 6]


def test_batch_and_size_may_change(pipe: StableDiffusionPipeline) -> None:
    with helped(pipe):
        alone = draw(pipe)
        assert draw(pipe, num_images_per_prompt=3).shape[0] == 3
        assert draw(pipe, height=32, width=48).shape[2:] == (8, 12)
        assert torch.equal(draw(pipe), alone)
        text = torch.randn(2, 77, 128)
        pipe.scheduler.set_timesteps(4)
        with calls(pipe.unet) as seen:
            for shape, t in zip([(2, 16), (2, 16), (1, 16), (1, 8)], pipe.scheduler.timesteps, strict=True):
                call(pipe.unet, t, torch.randn(shape[0], 4, shape[1], shape[1]), text[: shape[0]])
        assert seen == [True, False, True, True]


class _Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: values that are read back."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing() -> None:
    """The U-Net alone, for schedulers and pipelines wait in places of their own."""
    unet = small_unet("sd15")
    (sample, _, text), _ = example(unet)
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    bare = type("Pipe", (), {})()
    bare.unet, bare.scheduler = unet, scheduler

    def waits(helper_class: Any) -> int:
        with helped(bare, helper_class), _Waits() as mode, torch.no_grad():
            for t in scheduler.timesteps:
                bare.unet(sample, t, encoder_hidden_states=text)
        return mode.count

    assert waits(FastCacheHelper) == 0
    assert waits(DeepCacheSDHelper) >= STEPS
