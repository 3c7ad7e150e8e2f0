"""Invariants 1 and 2 in eager PyTorch: a cut computes bit for bit what the U-Net computes, whatever its class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from fastcache import PartitionError, partition_unet
from fastcache.cut.unet import take_apart
from repeats import mostly_slow
from small_unets import CONFIGS, OTHERS, any_small_unet, example, named_example, small_unet

ALL = [*CONFIGS, *OTHERS]
PROJECTED = [  # one of each structure: all of them, in double precision, take a minute
    *("sd15", "sdxl", "two-blocks", "uneven-layers", "self-attention", "resnet-resampling", "text-projection"),
    *("ddpm", "ddpm-resnets", "svd-two-blocks", "animatediff-sdxl"),
]


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_full_and_shallow_equal_the_unet_at_every_branch(name: str) -> None:
    unet = any_small_unet(name)
    inputs = named_example(unet)
    expected = unet(**inputs).sample
    frames = 3 if expected.ndim == 5 else 1
    for branch_id in range(partition_unet(unet).num_branches):
        cut = partition_unet(unet, branch_id)
        noise_pred, cached_feature = cut.full(**inputs)
        assert torch.equal(noise_pred, expected), branch_id
        stride = cut.feature_stride
        assert cached_feature.shape == (2 * frames, cut.feature_channels, 16 // stride, 16 // stride)
        assert torch.equal(cut.shallow(**inputs, cached_feature=cached_feature), expected), branch_id
        # The shallow pass really depends on the feature it is given, and not on a full pass of its own.
        assert not torch.equal(cut.shallow(**inputs, cached_feature=cached_feature + 1), expected), branch_id


@pytest.mark.parametrize("name", mostly_slow(["sd15", "svd", "animatediff"], lambda name: name == "sd15"))
@pytest.mark.parametrize(("height", "width"), [(18, 22), (15, 17)])
@torch.no_grad()
def test_sizes_that_do_not_halve_evenly(name: str, height: int, width: int) -> None:
    unet = any_small_unet(name)
    inputs = named_example(unet, height=height, width=width)
    expected = unet(**inputs).sample
    for branch_id in range(12):
        cut = partition_unet(unet, branch_id)
        noise_pred, cached_feature = cut.full(**inputs)
        assert torch.equal(noise_pred, expected), branch_id
        assert torch.equal(cut.shallow(**inputs, cached_feature=cached_feature), expected), branch_id


@pytest.mark.parametrize("name", PROJECTED)
@torch.no_grad()
def test_the_projected_cut_equals_the_unet(name: str) -> None:
    """Section 7 of the design: exact but for the order in which sums are taken."""
    unet = any_small_unet(name).double()
    inputs = double(named_example(unet))
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    expected = unet(**inputs).sample
    frames = 3 if expected.ndim == 5 else 1
    for branch_id in range(partition_unet(unet).num_branches):
        cut = partition_unet(unet, branch_id, "auto")
        if cut.kind == "plain":
            with pytest.raises(PartitionError, match=f"got branch {branch_id}: .*; use cut plain"):
                partition_unet(unet, branch_id, "projected")
            continue
        noise_pred, *cached = cut.full(**inputs)
        torch.testing.assert_close(noise_pred, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
        stride = cut.feature_stride
        shapes = [(2 * frames, n, 16 // stride, 16 // stride) for n in cut.cached.values()]
        assert [tuple(c.shape) for c in cached] == shapes

        def shallow(feature: torch.Tensor, residual: torch.Tensor, cut: Any = cut) -> torch.Tensor:
            return cut.shallow(**inputs, cached_feature=feature, cached_residual=residual)

        assert torch.equal(shallow(*cached), noise_pred)
        for changed in ((cached[0].flip(-1), cached[1]), (cached[0], cached[1].flip(-1))):  # a norm undoes a shift
            assert not torch.allclose(shallow(*changed), noise_pred)
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
    with pytest.raises(PartitionError, match="SpatioTemporalResBlock"):
        partition_unet(any_small_unet("svd"), 0, "projected")


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
    blocks: dict[str, Any] = {"block_out_channels": (32, 32), "up_block_types": ("UpBlock2D",) * 2}
    with pytest.raises(PartitionError, match="SkipDownBlock2D"):
        partition_unet(UNet2DModel(down_block_types=("SkipDownBlock2D",) * 2, **blocks))
    with pytest.raises(PartitionError, match="Fourier time"):
        partition_unet(UNet2DModel(down_block_types=("DownBlock2D",) * 2, time_embedding_type="fourier", **blocks))
    with pytest.raises(PartitionError, match=r"expected a U-Net of UNet2DConditionModel.*got Linear"):
        partition_unet(torch.nn.Linear(1, 1))
    unet = small_unet("sd15")
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(PartitionError, match="disable_freeu"):
        partition_unet(unet)
    unet.disable_freeu()
    partition_unet(unet)


def test_arguments_that_a_unet_does_not_take_are_refused() -> None:
    unet = any_small_unet("ddpm")
    cut, inputs = partition_unet(unet, 0), named_example(unet)
    with pytest.raises(ValueError, match="no encoder_hidden_states"):
        cut.full(**inputs, encoder_hidden_states=torch.zeros(2, 7, 24))
    with pytest.raises(ValueError, match="no class_labels"):
        cut.full(**inputs, class_labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="added_time_ids"):
        cut.full(**inputs, added_time_ids=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected cached_feature"):
        cut.shallow(**inputs)


def test_the_description_of_a_unet() -> None:
    """Twelve skip connections of SD1.5's shape: what each holds, what it is joined to, and how small it is."""
    parts = take_apart(small_unet("sd15"))
    assert parts.skip_channels == (32, 32, 32, 32, 32, 32, 32, 64, 64, 64, 64, 64)
    assert parts.main_channels == (32, 32, 32, 32, 32, 64, 64, 64, 64, 64, 64, 64)
    assert parts.skip_strides == (1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8)
    assert parts.adapted == (1, 4, 7, 10)
