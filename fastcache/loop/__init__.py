"""One loop for every image in flight: lanes, buffers, the sampler's table, the plan, and what drives a step."""
