"""Plans of several kinds: which steps are full. They are kept as JSON, and name what they were made for."""

from dataclasses import replace
from pathlib import Path

import fastcache
from fastcache import CachePlan, Forecast

STEPS = 12
plans = {
    "every third": CachePlan.uniform(STEPS, interval=3),
    "dense around step 4": CachePlan.nonuniform(STEPS, interval=3, center=4, power=1.4),
    "these steps": CachePlan.from_refresh_steps(STEPS, [0, 1, 2, 4, 8]),
    "features foretold": replace(CachePlan.uniform(STEPS, interval=3), forecast=Forecast(order=1)),
    "no guidance at the end": CachePlan.uniform(STEPS, interval=3).guided_within(0, 9),
}
fastcache.build_engines("demo", output="engines/demo")
pipe = fastcache.load("engines/demo")
prompt = "a large blue square at the right on a white background"
for name, plan in plans.items():
    file = Path(f"{name.replace(' ', '-')}.json")
    file.write_text(plan.to_json() + "\n", encoding="utf-8")
    again = CachePlan.from_json(file.read_text(encoding="utf-8"))
    pipe(prompt, num_inference_steps=STEPS, sampler="ddim", plan=again, seed=0).images[0].save(file.with_suffix(".png"))
    print(f"{name}: full at {', '.join(map(str, again.refresh_steps))}")
