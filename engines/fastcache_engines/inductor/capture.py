"""A call on fixed tensors -> a CUDA graph of it, in memory that graphs of one workspace share.

Knows nothing about packages.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from fastcache_engines.capturing import capture_lock
from fastcache_engines.machine import ieee_float32
from fastcache_engines.protocol import Workspace

_WARM_UP_RUNS = 3  # as torch.cuda.make_graphed_callables has it

_pools: weakref.WeakKeyDictionary[Workspace, Any] = weakref.WeakKeyDictionary()


def capture(
    call: Callable[[], None], trial: Callable[[], Callable[[], None]], device: torch.device, workspace: Workspace | None
) -> torch.cuda.CUDAGraph:
    """Capture a call; graphs of one workspace share the memory for what lies between inputs and outputs.

    That is safe for graphs that never run at the same time: none leaves anything there for a later run. `trial` makes
    the same call on tensors of its own, for what a call loads or allocates once must not fall into the graph.
    """
    with capture_lock, torch.cuda.device(device), ieee_float32():
        pool = None if workspace is None else _pools.setdefault(workspace, torch.cuda.graph_pool_handle())
        stream, current = capture_stream(device), torch.cuda.current_stream()
        warm_up = trial()
        stream.wait_stream(current)  # only now, for the trial's own tensors are written there
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                warm_up()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            call()
        current.wait_stream(stream)
    return graph


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace for each stream it has seen, 32 MiB on Hopper."""
    return torch.cuda.Stream(device)
