"""The import path that Ray Serve is given: `fastcache.serve.ray:application`. The room itself is `cluster/ray.py`."""

from __future__ import annotations

from fastcache.serve.cluster.ray import application

__all__ = ["application"]
