"""Tensors in, tensors out: the kernels of the sampling loop. Knows tensors and nothing else.

Knows nothing about diffusion, ONNX, engines or fastcache, and imports none of them.
"""
