"""Values of wrong types, ranges and shapes for FastCacheHelper: one line that names the argument, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import StableDiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastcache import FastCacheHelper
from live_pipelines import draw, helped
from odd_values import ANYTHING, refusal

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

MANY = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@MANY
@given(value=ANYTHING)
def test_interval_branch_and_mode(value: Any, loaded_pipe: StableDiffusionPipeline) -> None:
    helper = FastCacheHelper(loaded_pipe)
    for name, least in (("cache_interval", 1), ("cache_branch_id", 0)):
        message = refusal(helper.set_params, **{name: value})
        counts = isinstance(value, int | np.integer) and not isinstance(value, bool)
        assert (message is None) == (counts and value >= least)
        assert message is None or f"expected {name} to be an integer >= {least}, got" in message
    message = refusal(helper.set_params, skip_mode=value)
    assert (message is None) == (isinstance(value, str) and value == "uniform")
    assert message is None or 'expected skip_mode to be "uniform", got' in message
    message = refusal(helper.set_params, plan=value)
    assert (message is None) == (value is None)
    assert message is None or "expected plan to be a CachePlan or None, got" in message


@MANY
@given(value=ANYTHING)
def test_pipe_and_kernels(value: Any, loaded_pipe: StableDiffusionPipeline) -> None:
    assert "expected pipe with a U-Net, got" in str(refusal(FastCacheHelper, pipe=value))
    message = refusal(FastCacheHelper, pipe=loaded_pipe, kernels=value)
    assert (message is None) == isinstance(value, bool)
    assert message is None or "expected kernels to be True or False, got" in message


@MANY
@given(value=ANYTHING)
def test_engines(value: Any, loaded_pipe: StableDiffusionPipeline) -> None:
    message = refusal(FastCacheHelper, pipe=loaded_pipe, engines=value)
    assert (message is None) == (value is None)
    if not isinstance(value, str | None):
        assert "expected engines to be a bundle or its folder, got" in str(message)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(interval=st.integers(1, 10**9), branch_id=st.integers(0, 10**9))
def test_enabling_a_branch_that_there_is_or_is_not(
    interval: int, branch_id: int, loaded_pipe: StableDiffusionPipeline
) -> None:
    unet, helper = loaded_pipe.unet, FastCacheHelper(loaded_pipe)
    helper.set_params(interval, branch_id)
    message = refusal(helper.enable)
    helper.disable()
    assert (message is None) == (branch_id < 12)
    assert message is None or ("branch_id" in message and "from 0 to 11" in message)
    assert loaded_pipe.unet is unet


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8])
def test_set_params_takes_what_the_old_helper_takes(kind: Any, pipe: StableDiffusionPipeline) -> None:
    drawn: list[torch.Tensor] = []
    for helper_class in (DeepCacheSDHelper, FastCacheHelper):
        helper = helper_class(pipe)
        helper.set_params(cache_interval=kind(3), cache_branch_id=kind(1), skip_mode="uniform")
        helper.enable()
        drawn.append(draw(pipe))
        helper.disable()
    assert torch.allclose(*drawn, atol=1e-4)
    with helped(pipe, interval=2, branch_id=1):
        assert not torch.allclose(draw(pipe), drawn[0], atol=1e-2)
