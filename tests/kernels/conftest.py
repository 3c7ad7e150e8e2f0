"""Where kernels run in these tests: on the CPU, by their plain PyTorch meaning or, told so before Triton was imported,
in Triton's interpreter (`test_interpreter.py` starts that run), and on a GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of a test's tensors; a GPU by its number, as tensors there name it."""
    return torch.device("cuda:0") if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
