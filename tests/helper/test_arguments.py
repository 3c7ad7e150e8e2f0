"""Values of wrong types, ranges and shapes for FastCacheHelper: one line that names the argument, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import StableDiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastcache import BundleError, CachePlan, FastCacheHelper, Forecast, PartitionError
from live_pipelines import draw, helped

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(max_size=8),
    st.dates(),
    st.decimals(allow_nan=False),
)
STRANGE = st.sampled_from(
    [
        torch.zeros(2, 2),
        torch.tensor(3),
        torch.tensor(True),
        np.zeros(3),
        np.array(2),
        np.bool_(True),
        np.float32(2),
        np.nan,
        range(3),
        object(),
        object,
        len,
        nn.Identity(),
        SimpleNamespace(unet=None),
        SimpleNamespace(unet="unet"),
        Forecast(),
        CachePlan,
        "\n",
        "two\nlines",
        "\ud800",
        1 << 200,
    ]
)
ANYTHING = st.one_of(
    PLAIN,
    STRANGE,
    st.lists(PLAIN, max_size=3),
    st.tuples(PLAIN),
    st.sets(st.integers()),
    st.dictionaries(st.text(), PLAIN),
)
OWN = (ValueError, TypeError, PartitionError, BundleError)
MANY = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refusal(call: Any, **arguments: Any) -> str | None:
    """The one line that a call is refused with, if it is."""
    try:
        call(**arguments)
    except OWN as error:
        (line,) = str(error).splitlines()
        return line
    return None


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
