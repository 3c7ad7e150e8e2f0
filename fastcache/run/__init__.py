"""Bundle to images: plans, samplers, buffers and the loop that runs the engines."""
