"""One step of a GPU's check -> what it found, as JSON: versions, tests, benchmarks, the loop, the kernels.

Each runs in a process of its own, on a GPU or, as a rehearsal, on the CPU. Knows nothing about order, time or wheels.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_drawing import run_demo, run_fitted, run_server
from gpu_task import ROOT, Task, say

import fastcache_engines
from fastcache.bench.bench import document, run_bench
from fastcache.bench.kernels import bench_kernels
from fastcache.bench.lineup import build_bundles
from fastcache.bench.machine import environment, gpus, load_average
from fastcache_engines import BACKENDS


def run_step(task: Task, folder: Path) -> dict[str, Any]:
    """What a step finds; it keeps bundles in `folder`, and may leave other files there.

    Raises: what stops it.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.update(dict(task.variables))
    return KINDS[task.kind](task, folder)


def run_versions(task: Task, folder: Path) -> dict[str, Any]:
    """What is installed, what each backend says of the device, and the GPUs as they are."""
    del folder
    support = {name: asdict(fastcache_engines.backend(name).support(task.device)) for name in BACKENDS}
    packages = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    for name, found in support.items():
        say(f"{name}: {found['reason']}")
    return {
        "machine": environment(torch.get_num_threads()),
        "cuda": torch.version.cuda,
        "gpus": gpus(),
        "support": support,
        "packages": dict(sorted(packages.items())),
    }


def run_tests(task: Task, folder: Path) -> dict[str, Any]:
    """The tests marked gpu in some files, one after the other, for they share the GPU.

    Raises: `RuntimeError` where pytest leaves no results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.xml"
    command = [sys.executable, "-u", "-m", "pytest", "-m", "gpu and not slow", "-v", "--tb=short", "-p"]
    command += ["no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={results}"]
    command += ["-k", task.chosen] if task.chosen else []
    ran = subprocess.run([*command, *task.tests], cwd=ROOT, stderr=subprocess.STDOUT, check=False)
    if not results.is_file():
        raise RuntimeError(f"pytest ended with code {ran.returncode} and without results")
    return {"exit_code": ran.returncode} | outcomes(results)


def outcomes(results: Path) -> dict[str, Any]:
    """How many tests passed and were left out, and the names of those that did not, of a JUnit file."""
    found: dict[str, list[str]] = {"failure": [], "error": [], "skipped": [], "passed": []}
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        kind = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        found[kind].append(".".join(filter(None, (case.get("classname"), case.get("name")))))
    return {
        "passed": len(found["passed"]),
        "left_out": len(found["skipped"]),
        "failed": found["failure"],
        "errors": found["error"],
    }


def run_task(task: Task, folder: Path) -> dict[str, Any]:
    """A benchmark's document, as `fastcache bench --json` writes it."""
    before = load_average()
    bundles, lineup = build_bundles(task.lineup, task.settings, folder, say)
    return document(task.settings, bundles, run_bench(task.settings, lineup, bundles, say), before)


def run_kernels(task: Task, folder: Path) -> dict[str, Any]:
    """Every kernel's times, as `fastcache bench --kernels --json` writes them."""
    del folder
    return bench_kernels(task.batch, task.dtype, task.repeats, 0, say)[0]


def run_loop(task: Task, folder: Path) -> dict[str, Any]:
    """What a step takes beside the U-Net, as `loop_overhead.py --json` writes it: here, diffusers', out of graphs."""
    del folder
    command = [sys.executable, str(ROOT / "tools" / "loop_overhead.py"), "--device", task.device, "--json"]
    command += ["--steps", str(task.steps), "--rounds", str(task.repeats)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if ran.returncode != 0:
        raise RuntimeError(f"loop_overhead.py ended with code {ran.returncode}: {ran.stderr.strip()[-500:]}")
    return json.loads(ran.stdout)


KINDS: dict[str, Callable[[Task, Path], dict[str, Any]]] = {
    "versions": run_versions,
    "tests": run_tests,
    "demo": run_demo,
    "server": run_server,
    "bench": run_task,
    "fitted": run_fitted,
    "loop": run_loop,
    "kernels": run_kernels,
}
