"""The published configurations, without weights: all can be cut at every branch, and cost what the paper says."""

from __future__ import annotations

from typing import Any

import macs
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastcache import PartitionError
from fastcache.bench import work
from fastcache.compile.models import find_model
from fastcache.compile.presets import PRESETS
from fastcache.cut.partition import partition_branches, partition_unet
from fastcache.cut.work import count_work, empty_unet
from small_unets import any_small_unet, named_example

PARAMETERS = {  # millions; published: 860, 866, 2567, 2.3 G (refiner), 1.5 G (SVD), 400 (LDM-4-G), 113.7 (DDPM)
    "sd15": 859.52,
    "sd15-inpaint": 859.54,
    "instruct-pix2pix": 859.53,
    "sd21": 865.91,
    "sdxl": 2567.46,
    "sdxl-refiner": 2259.53,
    "svd-xt": 1524.62,
    "ldm4g": 400.92,
    "ddpm256": 113.67,
}
BRANCHES = dict.fromkeys(PARAMETERS, 12) | {"sdxl": 9, "ddpm256": 18}


@pytest.mark.parametrize("name", PRESETS)
def test_every_branch_of_a_published_configuration_can_be_cut(name: str) -> None:
    unet = work.empty_unet(find_model(name, random_weights=True))
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.01)
    for branch_id in range(BRANCHES[name]):
        cut = partition_unet(unet, branch_id, "auto")
        assert cut.num_branches == BRANCHES[name]
        assert all(parameter.is_meta for parameter in cut.shallow.parameters())
    with pytest.raises(PartitionError, match=f"from 0 to {BRANCHES[name] - 1}"):
        partition_unet(unet, BRANCHES[name])


@pytest.mark.parametrize("name", ["two-blocks", "ddpm", "svd-two-blocks", "animatediff-sdxl"])
def test_work_is_what_each_pass_does(name: str) -> None:
    """Counted for all branches in one full pass; here shallow passes are counted by themselves."""
    unet = any_small_unet(name)
    empty = empty_unet(type(unet), unet.config)
    inputs = to_meta(named_example(unet, batch=1))
    counted = count_work(empty, lambda full: full(**inputs))
    ids = (0, 2, len(counted.shallow) - 1)
    full, (_, *features) = flops(partition_branches(empty, ids).full, inputs)
    assert full == 2 * counted.full.total
    for branch_id, feature in zip(ids, features, strict=True):
        shallow, _ = flops(partition_unet(empty, branch_id).shallow, inputs | {"cached_feature": feature})
        assert shallow == 2 * counted.shallow[branch_id].total, branch_id
    assert counted.shallow[-1].total < counted.full.total
    assert 0 < counted.full.attention < counted.full.layers


def to_meta(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: to_meta(item) for name, item in value.items()}
    return value.to("meta")


@torch.no_grad()
def flops(module: torch.nn.Module, inputs: dict[str, Any]) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter:
        outputs = module(**inputs)
    return counter.get_total_flops(), outputs


def test_averages_are_the_papers() -> None:
    for model in macs.PAPER:
        found = macs.counted(model)
        for interval, theirs in model.macs.items():
            # 13 full steps of 50 are in the paper's figure for SD1.5 at N=5: that is N=4.
            as_counted = 4 if (model.preset, interval) == ("sd15", 5) else interval
            assert found.average(model.steps, as_counted) / 1e9 == pytest.approx(theirs, rel=0.003)


def test_the_table_marks_and_explains_what_differs() -> None:
    rows = macs.table()
    assert len(rows) == 2 + len(macs.PAPER) * len(macs.INTERVALS)
    assert ["130.45" in row for row in rows] == ["see below" in row for row in rows]
    assert "13.01 full steps of 50" in macs.explanation()
