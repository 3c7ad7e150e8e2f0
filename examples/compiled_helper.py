"""A live diffusers pipeline whose U-Net is replaced by a bundle's engines; scheduler and arguments stay its own."""

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

import fastcache
from fastcache.demo import MODEL_DIRECTORY

fastcache.build_engines("demo", output="engines/demo")
pipeline = StableDiffusionPipeline.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32, safety_checker=None)
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
pipeline.set_progress_bar_config(disable=True)
helper = fastcache.FastCacheHelper(pipeline, engines="engines/demo")
helper.set_params(cache_interval=2)
prompt = "a large yellow ring at the left on a black background"
with helper:
    image = pipeline(prompt, num_inference_steps=10, guidance_scale=4.0, generator=torch.Generator().manual_seed(0))
image.images[0].save("compiled.png")
print("compiled.png")
