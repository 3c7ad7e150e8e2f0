"""Build the bundled model's engines, and draw with a full U-Net step every third."""

import fastcache

fastcache.build_engines("demo", output="engines/demo")  # does nothing where the bundle is up to date
pipe = fastcache.load("engines/demo")
prompt = "a large cyan square at the top and a small orange circle at the bottom on a white background"
image = pipe(prompt, num_inference_steps=20, cache_interval=3, seed=0).images[0]
image.save("draw.png")
print("draw.png")
