"""A program of torch.export -> an engine compiled ahead of time by torch's own AOTInductor, for CPUs and NVIDIA GPUs.

A build writes one package for each role and one file of weights for all of them, equal tensors once; engines that are
alive together hold one copy of it in memory. Needs nothing but torch, and to build a C++ compiler and on a GPU Triton
and a CUDA toolkit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastcache_engines.inductor.engine import InductorEngine
from fastcache_engines.inductor.weights import compute_capability, find_packages
from fastcache_engines.machine import NO_GPU, BackendUnavailable, device_kind, gpu
from fastcache_engines.protocol import BuildOptions, Capabilities, LoadOptions, Program, Support
from fastcache_engines.registry import refuse_evaluate, refuse_targets

CAPABILITIES = Capabilities(
    name="inductor",
    source="program",
    dtypes={"cpu": ("fp32", "bf16"), "cuda": ("fp32", "fp16", "bf16")},
    captured=True,
    shares_weights=True,
    kernels=True,
)

check_targets, evaluate = refuse_targets, refuse_evaluate


def version() -> str:
    """The version of torch, to which packages are bound."""
    return torch.__version__


def support(device: str) -> Support:
    """Building needs a C++ compiler, and Triton and a CUDA toolkit on a GPU; running needs none of them."""
    from fastcache_engines.inductor import compiler

    kind, here = device_kind(device), None
    if kind == "cuda" and (here := gpu(device)) is None:
        return Support(version(), False, False, NO_GPU)
    try:
        reason = compiler.missing(kind)
    except BackendUnavailable as error:
        reason = str(error)
    if reason is not None:
        return Support(version(), False, True, reason)
    return Support(version(), True, True, f"ready, on {here.name if here else 'the CPU in fp32 and bf16'}")


def build(graphs: Mapping[str, Program], folder: Path, options: BuildOptions) -> dict[str, str]:
    """Compile programs into `ROLE.pt2` each and one `FIRST_ROLE.weights.safetensors`; others of theirs beside them.

    These are `ROLE.1.pt2`, `ROLE.2.pt2` and so on, and an engine loads each when it is first bound to that size.

    For a GPU, programs that were exported on the CPU are moved there, in place.

    Raises: `BackendUnavailable`; `ValueError` for a GPU other than the one at hand, or a program that does not build.
    """
    found = support(options.device)
    if not found.can_build:
        raise BackendUnavailable(found.reason)
    here = compute_capability(options.device)
    if set(options.compute_capability) - {here}:
        raise ValueError(
            f"expected to build for the device at hand (compute capability {here}), got "
            f"{', '.join(options.compute_capability)}; AOTInductor builds for no other: build on that GPU"
        )
    from fastcache_engines.inductor.builder import build_packages

    return build_packages(graphs, folder, options)


@dataclass(frozen=True)
class PackageFacts:
    """What the file of weights says of a package: for which torch, device, vector instructions or GPU, and how much."""

    torch: str
    device: str
    isa: str
    compute_capability: str | None
    max_rows: int | None
    constants: int


def describe(path: Path) -> PackageFacts:
    """What is known of a package without loading it.

    Raises: `ValueError` where its weights' description is missing or damaged.
    """
    package = find_packages(path)[0][path.stem]
    capability, constants = package.compute_capability, len(package.constants)
    return PackageFacts(package.torch, package.device, package.isa, capability, package.max_rows, constants)


def load(path: Path, options: LoadOptions = LoadOptions()) -> InductorEngine:
    """An engine from a package and the weights beside it.

    A package holds a shared library, whose code runs as soon as it is loaded, and torch's loader notices no changed
    byte of it: only for files whose hashes were checked.
    `options.threads`, where it is not 0, is set as torch's number of threads while the engine runs.

    Raises: `BackendUnavailable`; `ValueError` for files that are missing, damaged, or built for another torch, device,
    processor or GPU.
    """
    if device_kind(options.device) == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(NO_GPU)
    return InductorEngine(path, options)
