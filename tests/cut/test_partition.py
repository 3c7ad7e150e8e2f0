"""Invariants 1 and 2 in eager PyTorch: the cut computes bit for bit what the U-Net computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from fastcache import PartitionError, partition_unet
from small_unets import CONFIGS, example, small_unet

BRANCHES = [(name, branch) for name in CONFIGS for branch in range(partition_unet(small_unet(name)).num_branches)]


@pytest.mark.parametrize(("name", "branch_id"), BRANCHES)
@torch.no_grad()
def test_full_and_shallow_equal_the_unet(name: str, branch_id: int) -> None:
    unet = small_unet(name)
    cut = partition_unet(unet, branch_id)
    args, kwargs = example(unet)
    expected = unet(*args, **kwargs, return_dict=False)[0]

    noise_pred, cached_feature = cut.full(*args, **kwargs)
    assert torch.equal(noise_pred, expected)
    stride = cut.feature_stride
    assert cached_feature.shape == (2, cut.feature_channels, 16 // stride, 16 // stride)

    assert torch.equal(cut.shallow(*args, cached_feature, **kwargs), expected)
    # The shallow pass really depends on the feature it is given, and not on a full pass of its own.
    assert not torch.equal(cut.shallow(*args, cached_feature + 1, **kwargs), expected)


@pytest.mark.parametrize(("name", "branch_id"), BRANCHES)
@torch.no_grad()
def test_the_projected_cut_equals_the_unet(name: str, branch_id: int) -> None:
    """Section 7 of the design: exact but for the order in which sums are taken."""
    unet = small_unet(name).double()
    args, kwargs = example(unet)
    args = tuple(double(value) for value in args)
    kwargs = {key: double(value) for key, value in kwargs.items()}
    cut = partition_unet(unet, branch_id, "auto")
    if cut.kind == "plain":
        with pytest.raises(PartitionError, match=f"got branch {branch_id}: .*; use cut plain"):
            partition_unet(unet, branch_id, "projected")
        return
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    expected = unet(*args, **kwargs, return_dict=False)[0]
    noise_pred, *cached = cut.full(*args, **kwargs)
    torch.testing.assert_close(noise_pred, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    stride = cut.feature_stride
    assert [tuple(c.shape) for c in cached] == [(2, n, 16 // stride, 16 // stride) for n in cut.cached.values()]
    assert torch.equal(cut.shallow(*args, *cached, **kwargs), noise_pred)
    for changed in ((cached[0].flip(-1), cached[1]), (cached[0], cached[1].flip(-1))):  # a norm undoes a shift
        assert not torch.allclose(cut.shallow(*args, *changed, **kwargs), noise_pred)
    assert all(torch.equal(before[key], value) for key, value in unet.state_dict().items())


def double(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: double(tensor) for name, tensor in value.items()}
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def test_most_cuts_can_be_projected() -> None:
    """SD1.5's groups of 20 channels end at its branch 0's 320; at branch 3 groups of 30 straddle 640."""
    kinds = {branch: partition_unet(small_unet("sd15"), branch, "auto").kind for branch in range(12)}
    assert kinds[0] == "projected"
    assert "projected" in kinds.values()


@pytest.mark.parametrize("branch_id", range(12))
@torch.no_grad()
def test_sizes_that_do_not_halve_evenly(branch_id: int) -> None:
    unet = small_unet("sd15")
    cut = partition_unet(unet, branch_id)
    args, _ = example(unet, height=18, width=22)
    expected = unet(*args, return_dict=False)[0]
    noise_pred, cached_feature = cut.full(*args)
    assert torch.equal(noise_pred, expected)
    assert torch.equal(cut.shallow(*args, cached_feature), expected)


@torch.no_grad()
def test_a_timestep_per_sample() -> None:
    unet = small_unet("sd15")
    cut = partition_unet(unet, 2)
    (sample, _, context), _ = example(unet)
    timestep = torch.tensor([17.0, 900.0])
    noise_pred, feature = cut.full(sample, timestep, context)
    assert torch.equal(noise_pred, unet(sample, timestep, context, return_dict=False)[0])
    assert torch.equal(cut.shallow(sample, timestep, context, feature), noise_pred)


def test_the_shallow_module_holds_only_what_it_runs() -> None:
    unet = small_unet("sd15")
    before = {name: id(p) for name, p in unet.named_parameters()}
    cut = partition_unet(unet, 0)
    everything = {id(p) for p in unet.parameters()}
    assert {id(p) for p in cut.full.parameters()} == everything
    shallow = {id(p) for p in cut.shallow.parameters()}
    assert shallow < everything
    assert not shallow & {id(p) for p in unet.mid_block.parameters()}
    assert {name: id(p) for name, p in unet.named_parameters()} == before


@pytest.mark.parametrize("branch_id", [-1, 12, 1.0, True, "0", None])
def test_bad_branch_ids_name_the_range(branch_id: object) -> None:
    with pytest.raises(PartitionError, match="from 0 to 11"):
        partition_unet(small_unet("sd15"), branch_id)  # type: ignore[arg-type]


def test_what_cannot_be_cut_says_why() -> None:
    with pytest.raises(PartitionError, match="got UNet2DModel"):
        partition_unet(
            UNet2DModel(
                block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
            )
        )
    with pytest.raises(PartitionError, match="got Linear"):
        partition_unet(torch.nn.Linear(1, 1))
    unet = small_unet("sd15")
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(PartitionError, match="disable_freeu"):
        partition_unet(unet)
    unet.disable_freeu()
    partition_unet(unet)
