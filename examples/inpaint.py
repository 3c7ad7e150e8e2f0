"""Draw anew where a mask is white, and keep the rest."""

from PIL import Image, ImageDraw

import fastcache

fastcache.build_engines("demo", output="engines/demo")
pipe = fastcache.load("engines/demo")
first = pipe("a large red circle at the left on a white background", num_inference_steps=10, seed=0).images[0]
mask = Image.new("L", first.size, "black")
ImageDraw.Draw(mask).rectangle((32, 0, 63, 63), fill="white")  # the right half
prompt = "a large red circle at the left and a small blue square at the right on a white background"
drawn = pipe(prompt, image=first, mask_image=mask, strength=1.0, num_inference_steps=20, cache_interval=2, seed=2)
drawn.images[0].save("inpainted.png")
print("inpainted.png")
