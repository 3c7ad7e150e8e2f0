"""A live diffusers pipeline, cached: DeepCacheSDHelper's interface in eager PyTorch or with a bundle's engines."""
