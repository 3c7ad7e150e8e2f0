"""The other ways to leave blocks out: one graph of a chain's, with conditions or with blocks cut away."""

from __future__ import annotations

from pathlib import Path

import block_times
import pytest
import torch
from torch import Tensor

import fastcache_engines
from build_store import BuildStore
from fastcache import Bundle
from fastcache.cut.names import FULL, pattern_pass
from fastcache.loop.lane import Lane


@pytest.fixture(scope="module", params=["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def bundle(request: pytest.FixtureRequest, builds: BuildStore, tiny_model: Path) -> Bundle:
    return builds.bundle(tiny_model, backend=request.param, blocks="transformer", branch_id="0,2")


@pytest.fixture(scope="module")
def lane(bundle: Bundle) -> Lane:
    return block_times.lane_of(bundle)


def noise_of(lane: Lane, name: str) -> Tensor:
    lane.call(name)()
    return lane.tensors["noise_pred"].clone()


@pytest.mark.parametrize("runs", [(True,) * 4, (True, False, True, False), (False,) * 4])
@pytest.mark.parametrize("way", ["conditions", "pattern"])
def test_one_graph_computes_what_the_chain_does(
    way: str, runs: tuple[bool, ...], bundle: Bundle, lane: Lane, tmp_path: Path
) -> None:
    graph, blocks = block_times.one_graph(bundle, way, runs, tmp_path), bundle.manifest.blocks
    noise_of(lane, FULL)  # stores every residual
    lane.tensors["sample"].add_(0.3)
    tensors = {name: tensor.clone() for name, tensor in lane.tensors.items()}
    wanted = noise_of(lane, pattern_pass(runs))

    flags = block_times.flags_of(bundle, tensors, runs)
    assert len(flags) == 2 * len(blocks)
    engine = fastcache_engines.backend(bundle.manifest.backend).load(graph)
    assert {spec.name for spec in engine.inputs} <= {*tensors, *flags}
    tensors["noise_pred"].fill_(torch.nan)
    engine.bind(tensors | flags).run()
    assert torch.allclose(tensors["noise_pred"], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    for block, run in zip(blocks, runs, strict=True):
        if run or way == "conditions":
            assert torch.allclose(tensors[block.residual], lane.tensors[block.residual], rtol=0, atol=1e-5)


def test_reused_blocks_are_spread_evenly() -> None:
    assert block_times.evenly(0, 4) == (True,) * 4
    assert block_times.evenly(1 / 2, 4) == (True, False, True, False)
    assert block_times.evenly(1, 4) == (False,) * 4
