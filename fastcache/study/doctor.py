"""This machine -> which backends build and run on it, in which version, and what is missing."""

from __future__ import annotations

import os
import platform
from typing import Any, get_args

import torch

import fastcache_engines
from fastcache.errors import BackendUnavailable
from fastcache.recipe import Backend


def examine() -> dict[str, Any]:
    """Try every backend that the command line knows, and say which one `auto` picks and why."""
    backends = [_backend(name) for name in get_args(Backend) if name != "auto"]
    usable = next((b for b in backends if b["can_run"]), None)
    return {
        "python": platform.python_version(),
        "device": f"cpu-{platform.machine()}",
        "cuda": torch.cuda.is_available(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__},
        "backends": backends,
        "kernels": {"source": "torch", "reason": "the CPU loop runs plain PyTorch operations"},
        "auto": {
            "backend": usable["name"] if usable else None,
            "reason": "the first backend of this version that runs here" if usable else "no backend runs here",
        },
    }


def _backend(name: str) -> dict[str, Any]:
    if name not in fastcache_engines.BACKENDS:
        reason = "not in this version of fastcache"
        return {"name": name, "can_build": False, "can_run": False, "version": None, "reason": reason}
    try:
        version = fastcache_engines.backend(name).version()
    except BackendUnavailable as error:
        return {"name": name, "can_build": False, "can_run": False, "version": None, "reason": str(error)}
    return {"name": name, "can_build": True, "can_run": True, "version": version, "reason": "ready, on the CPU in fp32"}
