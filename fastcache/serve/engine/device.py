"""How a device or a backend says that it cannot go on, and whether a new process would. Knows no engine."""

from __future__ import annotations

import torch

from fastcache_engines.capturing import without_captures


class DeviceBroken(RuntimeError):
    """The device answers no more; only a new process can help."""


def check_device(device: str) -> None:
    """Raises: `DeviceBroken` if the device fails at what cannot fail."""
    try:
        with without_captures(device):
            probe = torch.ones(8, device=device)
            alive = float((probe + probe).sum()) == 16.0
    except RuntimeError as error:
        raise DeviceBroken(f"expected the device to add, got {type(error).__name__}; start again") from error
    if not alive:
        raise DeviceBroken("expected the device to add, got another sum; start again")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a backend ran out of memory. Each says it in its own words, so the words are looked at."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in said for words in ("out of memory", "failed to allocate memory", "bad_alloc", "cannot allocate memory")
    )
