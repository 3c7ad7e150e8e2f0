"""The first norm above a cut as one operator: the same result in eager PyTorch, exported, and in a package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastcache
from fastcache import PartitionError, partition_unet
from fastcache.bundle.parity import TOLERANCE, relative_error
from fastcache.compile import export, lower, passes
from fastcache.cut.fused import fuse_first_norm
from fastcache.cut.partition import Cut
from fastcache.errors import BackendUnavailable
from fastcache_engines import BuildOptions, LoadOptions, inductor
from small_unets import example, small_unet

CUTS = [("sd15", 0, "plain"), ("sd15", 0, "projected"), ("sd15", 2, "plain"), ("resnet-resampling", 1, "projected")]
OPERATORS = {"plain": "fastcache.concat_groupnorm_silu_joined.default", "projected": "fastcache.groupnorm_silu.default"}
ALONE = """
import sys
sys.modules["fastcache_kernels"] = sys.modules["triton"] = None  # what packages that are not there come to
from pathlib import Path
import torch
from safetensors.torch import load_file
from fastcache_engines import inductor
folder = Path(sys.argv[1])
tensors = load_file(folder / "reference.safetensors")
expected = tensors.pop("noise_pred")
tensors["noise_pred"] = torch.full_like(expected, torch.nan)
inductor.load(folder / "shallow.pt2").bind(tensors).run()
torch.testing.assert_close(tensors["noise_pred"], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
"""


def both(cut: Cut, inputs: Any) -> tuple[Tensor, ...]:
    """The noise predictions of the full and of the shallow pass, and what is cached."""
    args, kwargs = inputs
    with torch.no_grad():
        noise_pred, *cached = cut.full(*args, **kwargs)
        return noise_pred, cut.shallow(*args, *cached, **kwargs), *cached


@pytest.mark.parametrize(("name", "branch_id", "kind"), CUTS)
def test_both_passes_compute_what_they_did(name: str, branch_id: int, kind: Any) -> None:
    unet = small_unet(name)
    inputs, before = example(unet), {key: value.clone() for key, value in unet.state_dict().items()}
    expected = both(partition_unet(unet, branch_id, kind), inputs)
    fused = partition_unet(unet, branch_id, kind)
    fuse_first_norm(fused)
    for got, wanted in zip(both(fused, inputs), expected, strict=True):
        assert relative_error(got, wanted) < 1e-5
    assert all(torch.equal(before[key], value) for key, value in unet.state_dict().items())
    assert torch.equal(both(partition_unet(unet, branch_id, kind), inputs)[0], expected[0])  # others are not changed


@pytest.mark.parametrize("kind", ["plain", "projected"])
def test_another_activation_is_refused(kind: Any) -> None:
    with pytest.raises(PartitionError, match=r"got branch 0: its activation is GELU; leave the kernels out$"):
        fuse_first_norm(partition_unet(small_unet("sd15", act_fn="gelu"), 0, kind))


@pytest.mark.parametrize("kind", ["plain", "projected"])
def test_export_keeps_the_operator(kind: Any) -> None:
    unet = small_unet("two-blocks")
    inputs = passes.unet_inputs(unet, 2, 16, 16, 7)
    fused = partition_unet(unet, 0, kind)
    fuse_first_norm(fused)
    program, _ = export.export_program(passes.exportable_unet(fused, inputs)[1])
    assert OPERATORS[kind] in {str(node.target) for node in program.exported.graph.nodes}
    with torch.no_grad():
        expected = passes.call_unet(unet, inputs).sample
        _, *cached = passes.call_unet(fused.full, inputs)
        got = program.exported.module()(inputs=inputs | dict(zip(fused.cached, cached, strict=True)))
    assert relative_error(got, expected) < 1e-5


@pytest.mark.slow
def test_a_package_computes_it_without_the_package_of_kernels(tmp_path: Path) -> None:
    """AOTInductor opens the operator up, so that nothing has to be registered where the package runs."""
    unet = small_unet("two-blocks", layers_per_block=1)
    inputs, fused = passes.unet_inputs(unet, 2, 16, 16, 7), partition_unet(unet, 0, "plain")
    with torch.no_grad():
        expected, *cached = passes.call_unet(fused.full, inputs)
    fuse_first_norm(fused)
    program, _ = export.export_program(passes.exportable_unet(fused, inputs)[1])
    inductor.build({"shallow": program}, tmp_path, BuildOptions())
    tensors = inputs | dict(zip(fused.cached, cached, strict=True)) | {"noise_pred": expected}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "reference.safetensors")
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "projected"])
def test_a_package_on_a_gpu_holds_the_kernels(kind: Any, tmp_path: Path) -> None:
    """Exported on the CPU and moved, as a build does it; another batch than the exported one."""
    unet = small_unet("two-blocks", layers_per_block=1)
    inputs, fused = passes.unet_inputs(unet, 3, 16, 16, 7), partition_unet(unet, 0, kind)
    with torch.no_grad():
        expected, *cached = passes.call_unet(fused.full, inputs)
    fuse_first_norm(fused)
    lower.lower(fused, "fp16")
    examples = {name: tensor[:2] for name, tensor in inputs.items()}
    program, _ = export.export_program(passes.exportable_unet(fused, examples)[1])
    inductor.build({"shallow": program}, tmp_path, BuildOptions(device="cuda", dtype="fp16"))
    engine = inductor.load(tmp_path / "shallow.pt2", LoadOptions(device="cuda", dtype="fp16"))
    given = inputs | {name: tensor.half() for name, tensor in zip(fused.cached, cached, strict=True)}
    tensors = {name: tensor.cuda().contiguous() for name, tensor in given.items()}
    tensors["noise_pred"] = torch.full_like(expected, torch.nan, device="cuda")
    engine.bind(tensors).run()
    assert relative_error(tensors["noise_pred"].cpu(), expected) < TOLERANCE["fp16"]


@pytest.mark.slow
def test_a_build_with_kernels_puts_them_in(tiny_model: Path, tmp_path: Path) -> None:
    """So it refuses a model that has no place for them, which without kernels it would build."""
    shutil.copytree(tiny_model, tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"act_fn": "gelu"}))
    with pytest.raises(PartitionError, match="got branch 0: its activation is GELU"):
        fastcache.build_engines(
            tmp_path / "model", output=tmp_path / "bundle", backend="inductor", device="cpu", kernels=True
        )


def test_a_backend_without_kernels_says_so(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"graphs can hold kernels \(inductor\), got onnxruntime$"):
        fastcache.build_engines(tiny_model, output=tmp_path / "bundle", backend="onnxruntime", kernels=True)
    assert not (tmp_path / "bundle").exists()
