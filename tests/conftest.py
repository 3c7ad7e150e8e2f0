"""What every test shares: no network for the hub, few threads, and a reason for each GPU test skipped."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported anywhere; inherited by subprocesses
os.environ.setdefault("OMP_NUM_THREADS", "2")

import hypothesis
import pytest
import torch

torch.set_num_threads(2)  # tests run in parallel workers

hypothesis.settings.register_profile("fastcache", deadline=None)  # a busy machine is not a failing test
hypothesis.settings.load_profile("fastcache")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
