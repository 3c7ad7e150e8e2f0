"""Several cuts of one U-Net at once: one full pass feeds them all, deeper shallow passes feed shallower ones."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcache import PartitionError, partition_unet
from fastcache.cut.partition import Cuts, partition_branches
from small_unets import any_small_unet, named_example, small_unet

NAMES = ["two-blocks", "ddpm", "svd-two-blocks", "animatediff-sdxl"]


def run_all(cuts: Cuts, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    noise_pred, *cached = cuts.full(**inputs)
    return noise_pred, dict(zip(cuts.cached, cached, strict=True))


def taken(cuts: Cuts, branch_id: int, cached: dict[str, Tensor]) -> dict[str, Tensor]:
    """What one shallow pass is called with: a single cut's names, whichever the branch's are."""
    return dict(
        zip(("cached_feature", "cached_residual"), (cached[n] for n in cuts.at[branch_id].cached), strict=False)
    )


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_pair_of_branches_equals_the_unet(name: str) -> None:
    unet = any_small_unet(name)
    inputs = named_example(unet)
    expected = unet(**inputs).sample
    singles = {b: partition_unet(unet, b).full(**inputs)[1] for b in range(partition_unet(unet).num_branches)}
    for pair in itertools.combinations(singles, 2):
        pair = pair if sum(pair) % 2 else pair[::-1]  # either may be the primary one
        cuts = partition_branches(unet, pair)
        primary, other = pair
        assert list(cuts.cached) == ["cached_feature", f"cached_feature_{other}"]
        assert list(cuts.at) == [primary, other]
        noise_pred, cached = run_all(cuts, inputs)
        assert torch.equal(noise_pred, expected), pair
        assert all(torch.equal(t, singles[b]) for t, b in zip(cached.values(), pair, strict=True)), pair
        shallower, deeper = sorted(pair)
        assert torch.equal(cuts.at[shallower].shallow(**inputs, **taken(cuts, shallower, cached)), expected), pair
        deep = cuts.at[deeper].shallow(**inputs, **taken(cuts, deeper, cached))
        assert list(cuts.at[deeper].refreshes) == list(cuts.at[shallower].cached)
        assert torch.equal(deep[0], expected), pair
        assert torch.equal(deep[1], singles[shallower]), pair


@torch.no_grad()
def test_a_deeper_step_refreshes_what_lies_above_it() -> None:
    """At another timestep the refreshed feature is the deeper pass's own, and no longer the full pass's."""
    unet = small_unet("sd15")
    inputs = named_example(unet)
    cuts = partition_branches(unet, (0, 2, 6))
    _, cached = run_all(cuts, inputs)
    later = inputs | {"timestep": torch.tensor(500), "sample": inputs["sample"] * 0.9}
    noise_pred, *refreshed = cuts.at[6].shallow(**later, **taken(cuts, 6, cached))
    renewed = cached | dict(zip(cuts.at[6].refreshes, refreshed, strict=True))
    assert list(cuts.at[6].refreshes) == ["cached_feature", "cached_feature_2"]
    for branch_id in (0, 2):
        result: Any = cuts.at[branch_id].shallow(**later, **taken(cuts, branch_id, renewed))
        found = result if branch_id == 0 else result[0]
        assert torch.equal(found, noise_pred)
        assert not torch.equal(found, cuts.full(**later)[0])


@pytest.mark.parametrize("pair", [(0, 2), (7, 0), (2, 6)])
@torch.no_grad()
def test_projected_pairs(pair: tuple[int, int]) -> None:
    unet = small_unet("sd15").double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in named_example(unet).items()}
    expected = unet(**inputs).sample
    cuts = partition_branches(unet, pair, "auto")
    noise_pred, cached = run_all(cuts, inputs)
    limit = 1e-12 * expected.abs().max().item()
    torch.testing.assert_close(noise_pred, expected, rtol=0, atol=limit)
    assert {name: tensor.shape[1] for name, tensor in cached.items()} == cuts.cached
    for branch_id in pair:
        result: Any = cuts.at[branch_id].shallow(**inputs, **taken(cuts, branch_id, cached))
        found, *refreshed = result if isinstance(result, tuple) else (result,)
        assert torch.equal(found, noise_pred)
        for name, tensor in zip(cuts.at[branch_id].refreshes, refreshed, strict=True):
            assert torch.equal(tensor, cached[name])


@pytest.mark.parametrize("branch_ids", [(), (0, 0), (0, 12), (True,), ("0",)])
def test_bad_lists_of_branches(branch_ids: Any) -> None:
    with pytest.raises(PartitionError, match="from 0 to 11"):
        partition_branches(small_unet("sd15"), branch_ids)
