"""Graph in, named tensors out: one small protocol that every backend speaks, one file or folder a backend.

What is here is all that a user of engines needs; a backend's own module is found by `backend(name)`.
"""

from __future__ import annotations

from fastcache_engines.dtypes import (
    DTYPES,
    INT8_GRAPH_TOLERANCE,
    INT8_TOLERANCE,
    TOLERANCE,
    Device,
    DType,
    dtype_of,
    torch_dtype,
)
from fastcache_engines.machine import BackendUnavailable, device_here, fast_bf16, int8_weight_bits
from fastcache_engines.protocol import (
    Backend,
    Binding,
    BuildOptions,
    Capabilities,
    Engine,
    LoadOptions,
    Program,
    Support,
    Workspace,
)
from fastcache_engines.registry import (
    BACKENDS,
    REFERENCE,
    backend,
    backends_with,
    begin_loading,
    choose,
    choose_with_dtype,
    fastest_dtype,
    let_go,
    preference,
)
from fastcache_engines.tensors import TensorSpec, check_tensors

__all__ = [
    "BACKENDS",
    "DTYPES",
    "INT8_GRAPH_TOLERANCE",
    "INT8_TOLERANCE",
    "REFERENCE",
    "TOLERANCE",
    "Backend",
    "BackendUnavailable",
    "Binding",
    "BuildOptions",
    "Capabilities",
    "DType",
    "Device",
    "Engine",
    "LoadOptions",
    "Program",
    "Support",
    "TensorSpec",
    "Workspace",
    "backend",
    "backends_with",
    "begin_loading",
    "check_tensors",
    "choose",
    "choose_with_dtype",
    "device_here",
    "dtype_of",
    "fast_bf16",
    "fastest_dtype",
    "int8_weight_bits",
    "let_go",
    "preference",
    "torch_dtype",
]
