"""The machine and the installation that a figure belongs to, and the memory that is free on it.

Reads only: clocks and power limits are recorded as they are found, never set.
"""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import fastcache
import fastcache_engines
from fastcache_engines import BACKENDS, BackendUnavailable

_PACKAGES = ("diffusers", "transformers", "DeepCache")
# nvidia-smi's name of a property -> ours; the numbers come without their units.
_GPU_PROPERTIES = {"name": "name", "compute_cap": "compute_capability", "driver_version": "driver"}
_GPU_STATE = {
    "clocks.sm": "clock_sm_mhz",
    "clocks.mem": "clock_memory_mhz",
    "clocks.max.sm": "clock_sm_max_mhz",
    "power.limit": "power_limit_w",
    "power.draw": "power_draw_w",
    "temperature.gpu": "temperature_c",
}


def environment(threads: int) -> dict[str, Any]:
    """The machine, and the version of everything that a figure may depend on; every backend found is among them."""
    versions = {"fastcache": fastcache.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is not None:
            versions[name] = importlib.metadata.version(name)
    for name in BACKENDS:
        try:
            versions[name] = fastcache_engines.backend(name).version()
        except BackendUnavailable:
            continue
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fast_bf16": fastcache_engines.fast_bf16(),
        "system": platform.platform(),
        "versions": versions,
        "commit": commit(),
    }


def gpus() -> list[dict[str, Any]]:
    """Every NVIDIA GPU as its driver's `nvidia-smi` describes it at this moment; empty where there is no such program.

    Units: clocks in MHz, power in W, temperature in degrees Celsius. Numbers that the driver does not give are None.
    """
    names = _GPU_PROPERTIES | _GPU_STATE
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(answer)


def parse_gpus(answer: str) -> list[dict[str, Any]]:
    """`nvidia-smi`'s lines of comma-separated values, one a GPU, in the order in which `gpus` asks for them."""
    found: list[dict[str, Any]] = []
    for row in csv.reader(answer.splitlines(), skipinitialspace=True):
        values: dict[str, Any] = {}
        for name, text in zip((_GPU_PROPERTIES | _GPU_STATE).values(), row, strict=True):
            values[name] = _number(text) if name in _GPU_STATE.values() else text
        found.append(values)
    return found


def available_bytes() -> int | None:
    """The memory that a new process can have without anything being swapped out; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    line = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return int(line.split()[1]) * 1024 if line else None


def load_average() -> float | None:
    """How many threads wanted to run in the last minute; other programs' among them slow every arm, if not alike."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str | None:
    """This checkout's commit, with "-dirty" behind it where files have changed; None where there is no history."""
    root = Path(fastcache.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
