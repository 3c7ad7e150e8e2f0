"""Random weights made in 16 bits from the start, and what the model computes with them in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastcache.bundle.parity import relative_error
from fastcache.compile import passes
from fastcache.compile.lower import widened
from fastcache.compile.models import find_model
from fastcache.compile.presets import PRESETS
from fastcache.cut.partition import partition_branches
from small_presets import SMALL_PRESETS

REFINER, LDM = "small-sdxl-refiner", "small-ldm4g"


def made(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return SMALL_PRESETS[name].make(dtype)


@pytest.mark.parametrize("name", SMALL_PRESETS)
def test_narrow_weights_are_the_wide_ones_rounded(name: str) -> None:
    wide, narrow = made(name, torch.float32), made(name, torch.bfloat16)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(wide.parameters(), narrow.parameters(), strict=True))
    assert {x.dtype for x in wide.parameters()} == {torch.float32}
    assert len({float(x.float().std()) for x in wide.parameters() if x.numel() > 1000}) > 10  # not all alike


@pytest.mark.parametrize("cut", ["plain", "projected"])
@pytest.mark.parametrize("name", [REFINER, LDM])
def test_the_reference_is_computed_in_float32(name: str, cut: Any) -> None:
    """As the wide model with the same weights computes it, to the last bit but for the order of sums."""
    narrow = made(name, torch.float16)
    wide = made(name, torch.float16).float()
    inputs = passes.unet_inputs(wide, 2, 16, 16, 7, 5)
    found, expected = (passes.reference(unet, partition_branches(unet, (0,), cut), inputs) for unet in (narrow, wide))
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert relative_error(found[tensor], value) < 1e-5
    assert {x.dtype for x in narrow.parameters()} == {torch.float16}


def test_a_unet_that_rounds_its_timesteps_is_loaded_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, dtype in ((LDM, torch.float16), ("small-ddpm256", torch.float32)):
        monkeypatch.setitem(PRESETS, name, SMALL_PRESETS[name])
        assert find_model(name, random_weights=True).load_unet(torch.float16).dtype == dtype


def test_one_layer_at_a_time_is_wide() -> None:
    unet = made(LDM, torch.float16)
    counts: list[int] = []

    def count(*_: Any) -> None:
        counts.append(sum(x.dtype == torch.float32 for x in unet.parameters()))

    inputs = passes.unet_inputs(unet, 1, 16, 16, 7)
    with torch.no_grad(), widened(unet):
        hooks = [layer.register_forward_pre_hook(count) for layer in unet.modules() if not list(layer.children())]
        passes.call_unet(unet, inputs)
    for hook in hooks:
        hook.remove()
    assert max(counts) == 2  # the weight and the bias of the layer that runs
