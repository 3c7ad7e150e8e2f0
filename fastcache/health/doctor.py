"""This machine -> which backends build and run on it, in which version, and what is missing."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import fastcache_engines
from fastcache.errors import BackendUnavailable
from fastcache_engines import Device
from fastcache_kernels import cpu_step, launch


def examine() -> dict[str, Any]:
    """Ask every backend what it can do on each device of this machine, and say which one `auto` picks and why."""
    devices: list[Device] = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    rows = [
        _backend(name, device)
        for name in fastcache_engines.BACKENDS
        for device in fastcache_engines.backend(name).CAPABILITIES.dtypes
    ]
    return {
        "python": platform.python_version(),
        "device": fastcache_engines.device_here(devices[0]),
        "cuda": torch.cuda.is_available(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fast_bf16": fastcache_engines.fast_bf16(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__},
        "backends": rows,
        "kernels": _kernels(),
        "cpu_loop": dict(zip(("source", "reason"), cpu_step.source(), strict=True)),
        "auto": _auto(devices[0]),
    }


def _backend(name: str, device: Device) -> dict[str, Any]:
    backend = fastcache_engines.backend(name)
    found = backend.support(device)
    return {
        "name": name,
        "device": device,
        "can_build": found.can_build,
        "can_run": found.can_run,
        "version": found.version,
        "dtypes": list(backend.CAPABILITIES.dtypes[device]),
        "can": list(backend.CAPABILITIES.named),
        "reason": found.reason,
    }


def _kernels() -> dict[str, str]:
    """Where the kernels would come from; the loop runs their plain PyTorch meaning, for none has been shown to win."""
    source, reason = launch.source()
    return {"used": "torch", "source": source, "reason": reason}


def _auto(device: Device) -> dict[str, Any]:
    try:
        name, dtype, reason = fastcache_engines.choose_with_dtype(device)
    except BackendUnavailable as error:
        return {"backend": None, "dtype": None, "device": device, "reason": str(error)}
    return {"backend": name, "dtype": dtype, "device": device, "reason": reason}
