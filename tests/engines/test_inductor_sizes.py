"""AOTInductor at several sizes: a package for each under one engine, and a bundle that picks by the size asked for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

import fastcache
from build_store import BuildStore
from fastcache.compile.export import Exportable, Free, export_program
from fastcache_engines import Binding, BuildOptions, inductor
from live_pipelines import agreement_db

# numpy's word to diffusers, not to us
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")]

SIZES = ((32, 32), (64, 48))  # heights and widths in pixels
# Each of four programs takes a compiler 20 s with the tiny model's own layers.
FEW_LAYERS: dict[str, Any] = {
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}
BOTH_FREE = Free(height=True, width=True, step=8)


class Net(nn.Module):
    """A module whose result depends on the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.norm(self.conv(inputs["sample"])) * inputs["level"][:, None, None, None]


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sizes")
    example = {"sample": torch.randn(2, 4, 4, 4), "level": torch.rand(2)}
    part = Exportable("full", net, example, ("noise_pred",), {"sample": 8, "noise_pred": 8})
    program, (inputs, outputs) = export_program(part, BOTH_FREE, SIZES[1:])
    assert [spec.shape for spec in (*inputs, *outputs)] == [
        ("batch", 4, "height/8", "width/8"),
        ("batch",),
        ("batch", 8, "height/8", "width/8"),
    ]
    assert inductor.build({"full": program}, made, BuildOptions()) == {"full": "full.pt2"}
    return made


def bound(folder: Path, height: int, width: int, rows: int = 3) -> tuple[Binding, dict[str, Tensor]]:
    tensors = {"sample": torch.randn(rows, 4, height // 8, width // 8), "level": torch.rand(rows)}
    tensors["noise_pred"] = torch.full((rows, 8, height // 8, width // 8), torch.nan)
    return inductor.load(folder / "full.pt2").bind(tensors), tensors


@pytest.mark.parametrize("size", SIZES)
def test_every_size_computes_what_the_module_does(size: tuple[int, int], net: Net, folder: Path) -> None:
    binding, tensors = bound(folder, *size)
    binding.run()
    torch.testing.assert_close(tensors["noise_pred"], net(tensors))


def test_sizes_share_their_weights(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == {"full.pt2", "full.1.pt2", "full.weights.safetensors"}
    parameters = sum(parameter.nbytes for parameter in Net().parameters())
    assert parameters <= (folder / "full.weights.safetensors").stat().st_size < parameters + 16_384


def test_a_size_it_was_not_built_for_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"expected 'sample' to be .* \['batch', 4, 4, 4\] .* got .* \[3, 4, 8, 8\]"):
        bound(folder, 64, 64)


def test_a_bundle_picks_by_size(tiny_model: Path, builds: BuildStore) -> None:
    def save(folder: Path) -> None:
        shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
        config = UNet2DConditionModel.load_config(folder / "unet")
        torch.manual_seed(0)
        UNet2DConditionModel.from_config(dict(config) | FEW_LAYERS).save_pretrained(folder / "unet")

    model = builds.model("tiny-few-layers", save)
    recipe: dict[str, Any] = {"backend": "inductor", "device": "cpu", "sizes": ("32x32", "48x32")}
    bundle = builds.bundle(model, components=("unet",), **recipe)
    assert [str(size) for size in bundle.manifest.sizes] == ["32x32", "48x32"]
    plain, pipe = StableDiffusionPipeline.from_pretrained(model), fastcache.load(bundle.path, threads=1)
    embeds = plain.encode_prompt("a cat", "cpu", 1, True)
    given = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}

    def drawn(pipeline: Any, width: int) -> Tensor:
        own = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 4, "output_type": "latent"}
        return torch.as_tensor(pipeline(height=32, width=width, **own, **given).images)

    for width in (48, 32):
        assert agreement_db(drawn(pipe, width), drawn(plain, width)) >= 50
    with pytest.raises(ValueError, match=r"^expected 32x32, 48x32, .* got 64x32; build another with --sizes, or leave"):
        drawn(pipe, 64)
