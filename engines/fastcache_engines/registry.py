"""A backend's name -> its module, and the backend that `auto` means on a device.

A new backend is three things: one new file (or folder) with what `protocol.Backend` names, one line in `BACKENDS`, and
one extra in pyproject.toml that installs its library, which nothing but that file imports. It says of itself what it
can do (`Capabilities`); nobody compares names. `auto` picks it once `preference` has it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from fastcache_engines.dtypes import DType
from fastcache_engines.machine import BackendUnavailable, device_here, device_kind, fast_bf16
from fastcache_engines.protocol import Backend, LoadOptions

if TYPE_CHECKING:
    from torch import Tensor

# A backend's name -> its module.
BACKENDS = {
    "onnxruntime": "fastcache_engines.onnxruntime",
    "openvino": "fastcache_engines.openvino",
    "inductor": "fastcache_engines.inductor",
    "tensorrt": "fastcache_engines.tensorrt",
    "tensorrt-rtx": "fastcache_engines.tensorrt_rtx",
    "onnxruntime-tensorrt": "fastcache_engines.onnxruntime_tensorrt",
}
# Computes any ONNX graph on a CPU as it stands: what other backends' graphs are held against.
REFERENCE: Final = "onnxruntime"


def backend(name: str) -> Backend:
    """A backend by its name.

    Raises: `BackendUnavailable` for a name that this version does not have.
    """
    if name not in BACKENDS:
        raise BackendUnavailable(f"expected a backend of this version ({', '.join(BACKENDS)}), got {name!r}")
    return cast(Backend, importlib.import_module(BACKENDS[name]))


def begin_loading(identities: Iterable[str]) -> None:
    """Begin to load, in a thread, what the last process kept of engines of these names (`LoadOptions.identity`).

    It needs no PyTorch, and does nothing for backends that keep nothing.
    """
    from fastcache_engines import openvino_kept

    openvino_kept.begin(identities)


def let_go(identities: Iterable[str]) -> None:
    """Drop what was begun for engines of these names and not asked for."""
    from fastcache_engines import openvino_kept

    openvino_kept.let_go(identities)


def backends_with(capability: str) -> str:
    """The backends that have one of the capabilities that are on or off, by name, for a message."""
    return ", ".join(name for name in BACKENDS if getattr(backend(name).CAPABILITIES, capability))


def preference(device: str) -> tuple[tuple[str, ...], str]:
    """The backends of a device, the fastest first, and what that order rests on."""
    if device_kind(device) == "cuda":
        return ("tensorrt", "inductor", "onnxruntime", "tensorrt-rtx"), "the order expected on a GPU"
    if fast_bf16():
        order = ("openvino", "onnxruntime", "inductor")
        return order, "OpenVINO was faster than ONNX Runtime on the one processor with AVX512-BF16 that was measured"
    order = ("onnxruntime", "openvino", "inductor")
    return order, "ONNX Runtime is the default on processors without AVX512-BF16 and AMX"


def fastest_dtype(device: str) -> tuple[DType, str]:
    """The dtype that a device multiplies fastest of those whose pictures hold, and why."""
    if device_kind(device) == "cuda":
        return "fp16", "a GPU's tensor cores multiply it fastest"
    if fast_bf16():
        return "bf16", "this processor has AVX512-BF16 or AMX, which multiply it faster than fp32"
    return "fp32", "this processor has neither AVX512-BF16 nor AMX, which would multiply bf16 faster"


def choose(device: str, dtype: DType) -> tuple[str, str]:
    """The backend that `auto` means on a device for a dtype, and why.

    Raises: `BackendUnavailable` saying what each one lacks.
    """
    device_here(device)
    order, reason = preference(device)
    lacking: list[str] = []
    for name in order:
        module = backend(name)
        if dtype not in module.CAPABILITIES.computes(device):
            lacking.append(f"{name} has no {dtype} there")
        elif not (support := module.support(device)).can_build or not support.can_run:
            lacking.append(f"{name}: {support.reason}")
        else:
            passed = f"; passed over: {', '.join(lacking)}" if lacking else ""
            return name, f"{reason}{passed}"
    raise BackendUnavailable(f"no backend for {dtype} on {device}: {'; '.join(lacking)}")


def choose_with_dtype(device: str) -> tuple[str, DType, str]:
    """The backend and the dtype that `auto` means on a device, and why, a line each.

    Raises: as `choose`.
    """
    dtype, why = fastest_dtype(device)
    try:
        name, reason = choose(device, dtype)
    except BackendUnavailable:
        if dtype == "fp32":
            raise
        dtype, why = "fp32", f"no backend that is here computes {dtype}"
        name, reason = choose(device, dtype)
    return name, dtype, f"backend {name}: {reason}\ndtype {dtype}: {why}"


def refuse_targets(compute_capability: Sequence[str]) -> None:
    """`check_targets` of a backend that builds for the machine at hand."""
    if compute_capability:
        raise ValueError(
            "expected no compute capability, for this backend builds for the machine at hand, got "
            f"{', '.join(compute_capability)}; use {backends_with('targets')}"
        )


def refuse_evaluate(path: Path, inputs: Mapping[str, Tensor], options: LoadOptions = LoadOptions()) -> Any:
    """`evaluate` of a backend whose engines keep no graph to look into."""
    raise BackendUnavailable(
        f"expected a backend whose layers can be compared ({backends_with('layers')}), got one that keeps no graph; "
        "build with one of these"
    )
