"""Many machines: Ray Serve, Ray Data and Triton Inference Server."""
