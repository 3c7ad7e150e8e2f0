"""A callback after each step, as in diffusers: it shows where the run is, and may end it."""

from typing import Any

import fastcache

fastcache.build_engines("demo", output="engines/demo")
pipe = fastcache.load("engines/demo")


def after_step(running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    print(f"step {step + 1} of {running.num_timesteps}, latents up to {tensors['latents'].abs().max():.2f}")
    if step == 5:
        running._interrupt = True  # diffusers' own way: what is left is not run
    return {}


prompt = "a large yellow ring at the left on a black background"
pipe(prompt, num_inference_steps=10, cache_interval=2, seed=0, callback_on_step_end=after_step).images[0].save(
    "early.png"
)
print("early.png")
