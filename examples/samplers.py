"""One prompt and seed with several samplers, side by side in one picture."""

from PIL import Image

import fastcache

fastcache.build_engines("demo", output="engines/demo")
pipe = fastcache.load("engines/demo")
samplers = ("ddim", "euler", "dpm++_2m", "unipc")
prompt = "a large cyan square at the top and a small orange circle at the bottom on a white background"
sheet = Image.new("RGB", (64 * len(samplers), 64))
for place, sampler in enumerate(samplers):
    image = pipe(prompt, num_inference_steps=10, sampler=sampler, cache_interval=2, seed=0).images[0]
    sheet.paste(image, (64 * place, 0))
sheet.save("samplers.png")
print(f"samplers.png: {', '.join(samplers)}")
