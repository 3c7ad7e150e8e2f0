"""What somebody may pass by mistake for any argument, and what a call says that refuses it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from fastcache import BackendUnavailable, BuildError, BundleError, CachePlan, Forecast

OWN = (ValueError, TypeError, BundleError, BackendUnavailable, BuildError)


class _Rude:
    def __repr__(self) -> str:
        return "first line\nsecond line" * 9


def _odd() -> list[Any]:
    """Values of every kind, at the edges of what arguments take and beyond."""
    tensors = [torch.zeros(0), torch.full((1, 4, 8, 8), torch.nan), torch.zeros(1, 4, 8, 8), torch.zeros(2, 8, 16)]
    tensors += [
        torch.zeros(1, 3, 32, 32),
        torch.ones(1, 8, 16, dtype=torch.int64),
        torch.tensor(3.0),
        torch.zeros(1, 16),
    ]
    arrays = [np.zeros((32, 32, 3)), np.zeros(3), np.full((32, 32, 3), np.nan), np.zeros((1, 1), dtype=object)]
    numbers = [-1, 0, 1, 2, 10**30, -0.5, 0.0, 0.3, 1.0, 1e308, np.nan, np.inf, True, 2 + 1j, np.int64(2)]
    texts = ["", "a", "7.5", "\ud800", "pil", "euler", "ddim", "a\nb", b"bytes", "\0"]
    pictures = [Image.new("RGB", (32, 32)), Image.new("I", (32, 32)), Image.new("L", (0, 0)), Image.new("1", (8, 8))]
    others = [None, [], (), {}, {"a": 1}, [None], ["a", 3], [1, 2], (64, 64), [0.5, 2.0], [[1]], {1, 2}, range(3)]
    others += [object(), _Rude(), [_Rude()], int, print, lambda *_: None, CachePlan.all_full(9)]
    others += [CachePlan.uniform(3, 2), torch.Generator(), [torch.Generator()] * 2, diffusers.DDIMScheduler()]
    others += [diffusers.DDIMScheduler, diffusers.IPNDMScheduler(), [tensors[3]], [torch.zeros(1, 1, 16)]]
    return [*tensors, *arrays, *numbers, *texts, *pictures, *others, np.float32(0.5), 2**63]


ODD = _odd()

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
# fmt: off
_STRANGE = [
    torch.zeros(2, 2), torch.tensor(3), torch.tensor(True), np.zeros(3), np.array(2), np.bool_(True), np.float32(2),
    np.nan, range(3), object(), object, len, nn.Identity(), SimpleNamespace(unet=None), SimpleNamespace(unet="unet"),
    Forecast(), CachePlan, "\n", "two\nlines", "\ud800", 1 << 200,
]
# fmt: on
ANYTHING = st.one_of(
    PLAIN,
    st.sampled_from(_STRANGE),
    st.lists(PLAIN, max_size=3),
    st.tuples(PLAIN),
    st.sets(st.integers()),
    st.dictionaries(st.text(), PLAIN),
)


def refusal(call: Callable[..., Any], **arguments: Any) -> str | None:
    """What a call says that refuses its arguments, if it does: one line, of an error that is meant for people."""
    try:
        call(**arguments)
    except OWN as error:
        said = str(error)
        assert said and said == " ".join(said.splitlines()), said  # noqa: PT018 (one thing: a line)
        assert len(said) < 600, said
        return said
    return None
