"""Hand-written loops and short runs: every run's first call is FULL, however the U-Net is told its timestep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from fastcache.helper.runs import RunCounter
from fastcache.sampler.scheduler import make_scheduler
from live_pipelines import NATIVE, PROMPT, calls, draw, full_calls, helped

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

Told = Callable[[Tensor], Any]

# How a loop may say its timestep, in the two kinds: entries of the scheduler's tensor, and values of its own.
ENTRIES: dict[str, Told] = {
    "entry": lambda t: t,
    "entry of shape (1,)": lambda t: t[None],
    "expanded entry": lambda t: t.expand(1),
}
VALUES: dict[str, Told] = {
    "int": int,
    "float": float,
    "numpy": lambda t: np.int64(int(t)),
    "tensor": lambda t: torch.tensor(int(t)),
    "full": lambda t: torch.full((1,), int(t)),
    "float tensor": lambda t: t.float(),
}


def picture(pipe: Any, text: Tensor, told: Told, steps: int, *, seed: int, name: str = "ddim") -> Tensor:
    """A loop of the user's own, with a scheduler of its own."""
    scheduler = make_scheduler(name, pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    latents = noise(seed) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, t)
        noise_pred = pipe.unet(given, told(t), encoder_hidden_states=text).sample
        latents = scheduler.step(noise_pred, t, latents).prev_sample
    return latents


def noise(seed: int, side: int = 8) -> Tensor:
    return torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def text(pipe: StableDiffusionPipeline) -> Tensor:
    return pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("told", (ENTRIES | VALUES).values(), ids=(ENTRIES | VALUES).keys())
def test_a_second_picture_is_what_it_is_alone(
    told: Told, steps: int, mode: Callable[[], Any], text: Tensor, pipe: StableDiffusionPipeline
) -> None:
    with mode():
        with helped(pipe):
            alone = picture(pipe, text, told, steps, seed=1)
        with helped(pipe), calls(pipe.unet) as seen:
            for seed in (0, 2, 1):
                last = picture(pipe, text, told, steps, seed=seed)
    assert torch.equal(last, alone)
    assert seen[::steps] == [True] * 3
    if told in ENTRIES.values() or steps == 5:  # of two steps, values alone do not tell that they are one run
        assert seen == [step % 3 == 0 for step in range(steps)] * 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("steps", [1, 2])
def test_short_runs_of_a_second_pipeline(steps: int, mode: Callable[[], Any], pipe: StableDiffusionPipeline) -> None:
    def second() -> StableDiffusionPipeline:
        components = pipe.components | {"scheduler": DDIMScheduler.from_config(pipe.scheduler.config)}
        other = StableDiffusionPipeline(**components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        return other

    with mode(), helped(pipe):
        other = second()
        alone = [draw(second(), seed=seed, num_inference_steps=steps) for seed in range(3)]
        with calls(pipe.unet) as seen:
            after = [draw(other, seed=seed, num_inference_steps=steps) for seed in range(3)]
    assert seen == [step == 0 for step in range(steps)] * 3
    assert all(torch.equal(a, b) for a, b in zip(after, alone, strict=True))
    assert not torch.equal(after[0], after[1])


@pytest.mark.parametrize(("told", "side"), [(ENTRIES["entry"], 8), (int, NATIVE)])
def test_pictures_that_take_turns_reuse_nothing_of_each_other(
    told: Told, side: int, text: Tensor, pipe: StableDiffusionPipeline
) -> None:
    """As the views of a panorama do. Of one prompt, these two look alike in the last of six steps at the small size."""
    scheduler = make_scheduler("ddim", pipe.scheduler.config)

    def turns() -> list[Tensor]:
        scheduler.set_timesteps(6)
        latents = [noise(0, side), noise(1, side)]
        for t in scheduler.timesteps:
            for i, own in enumerate(latents):
                noise_pred = pipe.unet(own, told(t), encoder_hidden_states=text).sample
                latents[i] = scheduler.step(noise_pred, t, own).prev_sample
        return latents

    with torch.no_grad():
        plain = turns()
        with helped(pipe):
            assert full_calls(pipe.unet, turns) == list(range(12))
            assert all(torch.equal(a, b) for a, b in zip(turns(), plain, strict=True))
            picture(pipe, text, told, 4, seed=0)  # and afterwards as ever
            assert full_calls(pipe.unet, lambda: picture(pipe, text, told, 4, seed=1)) == [0, 3]


@pytest.mark.parametrize("told", [ENTRIES["entry"], int])
def test_a_run_that_goes_on_where_another_was_left(told: Told, text: Tensor, pipe: StableDiffusionPipeline) -> None:
    """A picture is left after two steps, and another begins further on in the same timesteps."""
    scheduler = make_scheduler("ddim", pipe.scheduler.config)
    scheduler.set_timesteps(8)

    def some(timesteps: Sequence[Tensor], seed: int) -> None:
        latents = noise(seed)
        for t in timesteps:
            noise_pred = pipe.unet(latents, told(t), encoder_hidden_states=text).sample
            latents = scheduler.step(noise_pred, t, latents).prev_sample

    entries = list(scheduler.timesteps)
    with torch.no_grad(), helped(pipe), calls(pipe.unet) as seen:
        some(entries[:2], 0)
        some(entries[4:], 1)
        some(entries[::2], 2)  # a loop that skips entries caches nonetheless
    assert seen == [True, False] + [True, False, False, True] * 2


@pytest.mark.parametrize(
    ("timesteps", "full"), [((1, 251, 501), [0, 1, 2]), ((900, 900, 800), [0, 1]), ((9, float("nan"), 1), [0, 1, 2])]
)
def test_numbers_that_do_not_fall_begin_a_run(
    timesteps: Sequence[float], full: list[int], text: Tensor, pipe: StableDiffusionPipeline
) -> None:
    """Where it cannot be told whether a run goes on, nothing is reused."""

    def run() -> None:
        for t in timesteps:
            pipe.unet(noise(0), t, encoder_hidden_states=text)

    with torch.no_grad(), helped(pipe, interval=9):
        assert full_calls(pipe.unet, run) == full


def test_a_number_that_comes_twice_begins_a_run(text: Tensor, pipe: StableDiffusionPipeline) -> None:
    """As PNDM's second timestep does, and Heun's all but the first and the last."""
    with torch.no_grad(), helped(pipe, interval=9):
        assert full_calls(pipe.unet, lambda: picture(pipe, text, int, 8, seed=0, name="pndm")) == [0, 2]
        assert full_calls(pipe.unet, lambda: picture(pipe, text, ENTRIES["entry"], 8, seed=0, name="pndm")) == [0]


def test_masks_among_the_channels_do_not_hide_another_picture() -> None:
    """Inpainting's U-Net takes nine channels, of which five are the same in every call."""
    constant = torch.randn(1, 5, 8, 8, generator=torch.Generator().manual_seed(9))
    constant[:, 0] = 0.0
    counter = RunCounter(object())
    first, second = (torch.cat([noise(seed), constant], dim=1) for seed in (0, 1))
    counter.count(0, 900, first)
    assert counter.index(800, first) == 1
    assert counter.index(800, second) == 0


def test_a_buffer_that_a_loop_writes_to_is_another_picture(text: Tensor, pipe: StableDiffusionPipeline) -> None:
    buffer = torch.empty(1, 4, 8, 8)
    with torch.no_grad(), helped(pipe), calls(pipe.unet) as seen:
        for seed, t in ((0, 900), (1, 800)):
            pipe.unet(buffer.copy_(noise(seed)), t, encoder_hidden_states=text)
    assert seen == [True, True]
