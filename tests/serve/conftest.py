"""A server of the tiny model for a module's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastcache import Bundle
from serve.serving import LIMITS, Running, running


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Bundle) -> Iterator[Running]:
    """For four images at once, shared by a module's tests."""
    with running(tiny_bundle.path, limits=LIMITS) as served:
        yield served
