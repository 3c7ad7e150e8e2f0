"""One capture of a CUDA graph at a time in a process, whoever makes it: an engine for itself, or its user for a loop.

Captures share torch's one pool of streams, and what a second thread allocates or waits for would fall into the first's.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

from fastcache_engines.machine import device_kind

capture_lock = threading.RLock()  # again in one thread: a user's capture may bind an engine that captures


def without_captures(device: str) -> AbstractContextManager[object]:
    """Within this no other thread captures on a device: for a thread that launches work while others load engines."""
    return capture_lock if device_kind(device) == "cuda" else nullcontext()
