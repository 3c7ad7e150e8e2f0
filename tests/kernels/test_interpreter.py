"""The kernels themselves, in Triton's interpreter on the CPU: their tests once more, in a process of their own.

Triton decides at its import whether it interprets, for a whole process, where other tests want its compiler.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="is the interpreter's run itself")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton; run: pip install triton")
@pytest.mark.parametrize("name", ["test_norm.py", "test_guidance.py"])
def test_the_same_tests_pass_with_the_kernels(name: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", str(HERE / name)]
    result = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, f"{result.stdout[-8000:]}\n{result.stderr[-4000:]}"
