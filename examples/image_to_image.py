"""Begin with a picture: draw one, then draw another scene from it."""

import fastcache

fastcache.build_engines("demo", output="engines/demo")
pipe = fastcache.load("engines/demo")
first = pipe("a large red circle at the left on a white background", num_inference_steps=10, seed=0).images[0]
first.save("first.png")
other = "a large blue circle at the left on a white background"
second = pipe(other, image=first, strength=0.8, num_inference_steps=20, cache_interval=2, seed=1).images[0]
second.save("second.png")
print("first.png, second.png")
