"""Exported graphs compute what the PyTorch modules compute, at any batch size, and say nothing of the machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from fastcache import BuildError, partition_unet
from fastcache.bundle.parity import relative_error
from fastcache.compile import components, export, passes
from fastcache.compile.graph_passes import NORMS_IN_FLOAT32
from fastcache.cut.names import FULL, shallow_pass
from fastcache.cut.partition import Cut
from fastcache_engines import LoadOptions, onnxruntime, tensorrt_rtx
from small_unets import small_unet
from tensorrt_graphs import built, cuda, few_layers

TOLERANCE = 1e-5  # parity.TOLERANCE, 1e-3, is for engines of any size; these graphs are a hundred times nearer
CASES = [
    pytest.param(name, branch_id, marks=[pytest.mark.slow] * ((name, branch_id) != ("sd15", 0)))
    for name in ("sd15", "sdxl", "class-labels")
    for branch_id in (0, 2)
]
# Exporting takes seconds for each layer: two blocks of one layer each have every kind of layer that four have.
FEW_LAYERS: dict[str, dict[str, Any]] = {
    "sd15": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
    },
}
FEW_LAYERS["class-labels"] = FEW_LAYERS["sd15"]
NAMES = {
    "sd15": ["sample", "timestep", "encoder_hidden_states"],
    "sdxl": ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"],
    "class-labels": ["sample", "timestep", "encoder_hidden_states", "class_labels"],
}


def with_few_layers(name: str) -> UNet2DConditionModel:
    return small_unet(name, block_out_channels=(32, 64), layers_per_block=1, **FEW_LAYERS[name])


def inputs_of(cut_name: str, unet: torch.nn.Module, batch: int) -> export.Inputs:
    """Inputs whose rows all differ, timesteps and class labels among them."""
    inputs = passes.unet_inputs(unet, batch, 8, 8, 7)
    inputs["timestep"] = torch.tensor([981.0, 17.0, 400.5])[:batch]
    if cut_name == "class-labels":
        inputs["class_labels"] = torch.tensor([3, 9, 0])[:batch]
    if "time_ids" in inputs:
        inputs["time_ids"] = inputs["time_ids"] + torch.arange(batch)[:, None]
    return inputs


def save(cut: Cut, inputs: export.Inputs, folder: Path) -> int:
    parts = passes.exportable_unet(cut, inputs)
    models = [model for model, _ in export.export_parts(parts, parts[0], {})]
    for part, model in zip(parts, models, strict=True):  # a pass out of the full one's graph has its own layers alone
        layers = [layer for layer in part.module.modules() if isinstance(layer, torch.nn.Conv2d)]
        assert sum(node.op_type == "Conv" for node in model.graph) == len(layers)
    files = [f"{part.role}.onnx" for part in parts]
    return export.save_graphs([*zip(files, models, strict=True)], folder, "unet.weights")


@pytest.mark.parametrize(("name", "branch_id"), CASES)
@torch.no_grad()
def test_graphs_compute_what_the_model_computes(name: str, branch_id: int, tmp_path: Path) -> None:
    compare(name, with_few_layers(name), branch_id, tmp_path)


@pytest.mark.slow
@torch.no_grad()
def test_a_whole_unet(tmp_path: Path) -> None:
    compare("sd15", small_unet("sd15"), 5, tmp_path)


def compare(name: str, unet: UNet2DConditionModel, branch_id: int, tmp_path: Path) -> None:
    """Export, then compare both engines with the modules they came from at three batch sizes."""
    cut = partition_unet(unet, branch_id)
    duplicated_bytes = save(cut, inputs_of(name, unet, 2), tmp_path)
    full, shallow = (onnxruntime.load(tmp_path / f"{name}.onnx") for name in (FULL, shallow_pass(branch_id)))
    assert [spec.name for spec in full.inputs] == NAMES[name]
    assert [spec.name for spec in full.outputs] == ["noise_pred", "cached_feature"]
    assert [spec.name for spec in shallow.inputs] == [*NAMES[name], "cached_feature"]
    assert [spec.name for spec in shallow.outputs] == ["noise_pred"]
    for batch in (1, 2, 3):
        inputs = inputs_of(name, unet, batch)
        expected = passes.call_unet(unet, inputs).sample
        noise_pred, feature = passes.call_unet(cut.full, inputs)
        assert torch.equal(noise_pred, expected)
        tensors: dict[str, Tensor] = inputs | {
            "noise_pred": torch.full_like(expected, torch.nan),
            "cached_feature": torch.full_like(feature, torch.nan),
        }
        full.bind(tensors).run()
        of_full = tensors["noise_pred"].clone()
        assert relative_error(of_full, expected) < TOLERANCE
        assert relative_error(tensors["cached_feature"], feature) < TOLERANCE
        tensors["noise_pred"].fill_(torch.nan)
        shallow.bind(tensors).run()
        assert relative_error(tensors["noise_pred"], of_full) < TOLERANCE
    check_files(tmp_path, shallow_pass(branch_id), duplicated_bytes)


def check_files(folder: Path, shallow: str, duplicated_bytes: int) -> None:
    """Weights are beside the graphs, stored once, and the graphs hold no path and no name of this machine."""
    external: dict[str, list[tuple[int, int]]] = {}
    for role in (FULL, shallow):
        content = (folder / f"{role}.onnx").read_bytes()
        assert not re.search(rb"\.py\b|site-packages|File \"|/(home|root|tmp|usr|work|Users)/", content)
        model = onnx.load(folder / f"{role}.onnx", load_external_data=False)
        onnx.checker.check_model(str(folder / f"{role}.onnx"))
        places = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
        assert {place["location"] for place in places} == {"unet.weights"}
        external[role] = [(int(place["offset"]), int(place["length"])) for place in places]
    both = external[FULL] + external[shallow]
    assert set(external[shallow]) & set(external[FULL])
    assert duplicated_bytes == sum(n for _, n in both) - sum(n for _, n in set(both))
    assert duplicated_bytes > 0
    size = (folder / "unet.weights").stat().st_size
    assert size <= sum(-(-n // 4096) * 4096 for _, n in set(both))
    assert max(offset + length for offset, length in both) == size
    assert all(offset % 4096 == 0 for offset, _ in both)


FREE = export.Free(height=True, width=True, step=16, max_tokens=20)


def free_shapes(cut: Cut) -> dict[str, tuple[int | str, ...]]:
    """What the tensors of a cut at full resolution are called where sizes and prompts are free."""
    latents = ("height/8", "width/8")
    shapes: dict[str, tuple[int | str, ...]] = {
        "timestep": ("batch",),
        "encoder_hidden_states": ("batch", "tokens", 24),
        "noise_pred": ("batch", 4, *latents),
        "sample": ("batch", 4, *latents),
    }
    return shapes | {name: ("batch", channels, *latents) for name, channels in cut.cached.items()}


@pytest.mark.slow
@torch.no_grad()
def test_sizes_and_prompts_that_are_left_free(tmp_path: Path) -> None:
    unet = with_few_layers("sd15")
    cut = partition_unet(unet, 0, "auto")
    parts = passes.exportable_unet(cut, passes.unet_inputs(unet, 2, 8, 8, 7))
    graphs = export.export_parts(parts, parts[0], {}, free=FREE)
    named = [(f"{part.role}.onnx", model) for part, (model, _) in zip(parts, graphs, strict=True)]
    export.save_graphs(named, tmp_path, "unet.weights")
    for _, specs in graphs:
        assert all(spec.shape == free_shapes(cut)[spec.name] for side in specs for spec in side)
    full, shallow = (onnxruntime.load(tmp_path / f"{role}.onnx") for role in ("full", "shallow-0"))
    for batch, height, width, tokens in ((1, 8, 8, 7), (2, 12, 6, 20), (3, 4, 20, 2)):
        inputs = passes.unet_inputs(unet, batch, height, width, tokens)
        expected, *cached = cut.full(*inputs.values())
        tensors: dict[str, Tensor] = inputs | {"noise_pred": torch.empty_like(expected)}
        tensors |= {name: torch.empty_like(value) for name, value in zip(cut.cached, cached, strict=True)}
        for engine in (full, shallow):
            tensors["noise_pred"].fill_(torch.nan)
            engine.bind(tensors).run()
            assert relative_error(tensors["noise_pred"], expected) < TOLERANCE


@pytest.mark.slow
def test_one_size_that_is_left_free() -> None:
    unet = with_few_layers("sd15")
    part = passes.exportable_unet(partition_unet(unet, 0), passes.unet_inputs(unet, 2, 8, 8, 7))[1]
    _, (inputs, outputs) = export.export(part, free=export.Free(width=True, step=16))
    found = {spec.name: spec.shape for spec in (*inputs, *outputs)}
    assert found["sample"] == found["noise_pred"] == ("batch", 4, 8, "width/8")
    assert found["encoder_hidden_states"] == ("batch", 7, 24)


def test_a_refiner_is_told_one_thing_less() -> None:
    unet = small_unet("sdxl", **FEW_LAYERS["sdxl"], block_out_channels=(32, 64), layers_per_block=1)
    inputs = passes.unet_inputs(unet, 2, 8, 8, 7, time_ids=5)
    assert (inputs["text_embeds"].shape, inputs["time_ids"].shape) == ((2, 28), (2, 5))
    assert passes.call_unet(unet, inputs).sample.isfinite().all()


@pytest.mark.slow
@built
def test_tensorrt_builds_for_a_range_of_sizes(tmp_path: Path) -> None:
    unet = few_layers()
    part = passes.exportable_unet(partition_unet(unet, 0), passes.unet_inputs(unet, 2, 8, 8, 7))[1]
    model, _ = export.export(part, free=export.Free(height=True, width=True, step=8))
    export.save_graphs([("shallow.onnx", model)], tmp_path, "unet.weights")
    channels = {name: part.inputs[name].shape[1] for name in ("sample", "cached_feature")}
    shapes = {name: tuple((count, n, n) for n in (8, 8, 16)) for name, count in channels.items()}
    options = cuda(rows=(1, 2, 2), shapes=shapes)
    with pytest.raises(ValueError, match=r"expected shallow\.onnx to have no free size but its inputs. first, got"):
        tensorrt_rtx.build({"shallow": tmp_path / "shallow.onnx"}, tmp_path, cuda())
    assert tensorrt_rtx.build({"shallow": tmp_path / "shallow.onnx"}, tmp_path, options) == {
        "shallow": "shallow.engine"
    }
    found = {spec.name: spec.shape for spec in tensorrt_rtx.describe(tmp_path / "shallow.engine").inputs}
    assert found["sample"] == ("batch", 4, "sample[2]", "sample[3]")
    assert found["encoder_hidden_states"] == ("batch", 7, 24)


class _Norms(torch.nn.Module):
    """A norm of images, and one of rows of tokens, as attention in a U-Net without text has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.GroupNorm(2, 6)
        torch.nn.init.normal_(self.norm.weight)
        torch.nn.init.normal_(self.norm.bias)

    def forward(self, inputs: export.Inputs) -> tuple[Tensor, Tensor]:
        image = self.norm(inputs["image"])
        return image, self.norm(inputs["image"].flatten(2))


@pytest.mark.parametrize("batch", [1, 3])
def test_norms_in_float32_of_any_rank(batch: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    norms, image = _Norms().half(), torch.randn(batch, 6, 4, 5).half() * 300  # whose squares overflow in float16
    part = export.Exportable("full", norms, {"image": torch.zeros(2, 6, 4, 5).half()}, ("image_out", "tokens_out"))
    export.save_graphs([("norms.onnx", export.export(part, NORMS_IN_FLOAT32)[0])], tmp_path, "unet.weights")
    found = onnxruntime.evaluate(tmp_path / "norms.onnx", {"image": image})
    expected = norms.float()({"image": image.float()})[0]
    assert relative_error(found["image_out"].float(), expected) < 1e-3
    assert relative_error(found["tokens_out"].float(), expected.flatten(2)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("make", [components.exportable_vae_decoder, components.exportable_vae_encoder])
def test_vaes_in_float16_are_those_in_float32(make: Callable[..., export.Exportable], tmp_path: Path) -> None:
    """No build checks them; their attention normalises rows of tokens."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    part = make(vae, 8, 8, 1)
    with torch.no_grad():
        found = part.module(part.inputs)
        expected = dict(zip(part.outputs, found if isinstance(found, tuple) else (found,), strict=True))
        part.module.half()
    export.save_graphs([("vae.onnx", export.export(part, NORMS_IN_FLOAT32)[0])], tmp_path, "vae.weights")
    outputs = onnxruntime.evaluate(tmp_path / "vae.onnx", part.inputs, LoadOptions("cpu", "fp16"))
    for name, value in expected.items():
        assert relative_error(outputs[name], value) < 3e-3


def test_sizes_that_do_not_halve_are_refused() -> None:
    unet = small_unet("sd15")
    with pytest.raises(BuildError, match=r"expected latent sizes divisible by 4 at branch 6, got 8x10"):
        passes.exportable_unet(partition_unet(unet, 6), passes.unet_inputs(unet, 1, 8, 10, 7))


def test_conditioning_that_engines_do_not_take_is_refused() -> None:
    unet = small_unet("sd15")
    unet.register_to_config(addition_embed_type="image")
    with pytest.raises(BuildError, match=r"expected addition_embed_type None or 'text_time', got 'image'"):
        passes.unet_inputs(unet, 1, 8, 8, 7)
    unet.register_to_config(addition_embed_type=None, class_embed_type="projection")
    with pytest.raises(BuildError, match=r"got class_embed_type='projection'"):
        passes.unet_inputs(unet, 1, 8, 8, 7)


def test_what_cannot_be_exported_is_one_line() -> None:
    class Branching(torch.nn.Module):
        def forward(self, inputs: export.Inputs) -> Tensor:
            return inputs["x"] if inputs["x"].sum() > 0 else -inputs["x"]

    with pytest.raises(BuildError, match=r"^cannot export the full graph: ") as caught:
        export.export(export.Exportable("full", Branching(), {"x": torch.ones(2, 3)}, ("y",)))
    assert "\n" not in str(caught.value)
