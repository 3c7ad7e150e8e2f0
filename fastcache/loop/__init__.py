"""One loop for every image in flight: lanes, buffers, the plan, and what drives a step."""
