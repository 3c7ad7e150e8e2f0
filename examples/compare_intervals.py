"""How much caching changes pictures: the same seeds with and without, by steps and interval."""

import math

import torch

import fastcache

fastcache.build_engines("demo", output="engines/demo")
pipe = fastcache.load("engines/demo")
prompts = [
    "a large blue square at the right on a white background",
    "a large yellow ring at the left on a black background",
]


def draw(steps: int, interval: int) -> torch.Tensor:
    return pipe(prompts, num_inference_steps=steps, cache_interval=interval, seed=0, output_type="pt").images


for steps in (10, 20):
    uncached = draw(steps, 1)
    for interval in (2, 3, 5):
        error = (draw(steps, interval) - uncached).square().mean().item()
        print(f"{steps} steps, full every {interval}: PSNR {-10 * math.log10(error):.1f} dB to the uncached pictures")
