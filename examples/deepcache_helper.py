"""A live diffusers pipeline: `FastCacheHelper` takes the place of DeepCacheSDHelper."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from fastcache import FastCacheHelper
from fastcache.demo import MODEL_DIRECTORY

pipeline = StableDiffusionPipeline.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32, safety_checker=None)
pipeline.set_progress_bar_config(disable=True)
prompt = "a large blue square at the right on a white background"


def draw() -> Any:
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(prompt, num_inference_steps=8, guidance_scale=4.0, generator=generator, output_type="pt")
    return drawn.images[0]


plain = draw()
helper = FastCacheHelper(pipeline)
helper.set_params(cache_interval=3, cache_branch_id=0)
helper.enable()
cached = draw()
helper.disable()
print(f"largest difference of a value from 0 to 1: {(plain - cached).abs().max():.3f}")
assert torch.equal(draw(), plain)  # the pipeline is what it was
