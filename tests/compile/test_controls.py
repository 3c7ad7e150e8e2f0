"""ControlNet, T2I-Adapter and IP-Adapter joined to the passes: what these compute, and which files are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel, T2IAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastcache.bundle.recipe import ControlKind, Recipe
from fastcache.compile import export, passes
from fastcache.compile.builder import resolve
from fastcache.compile.controls import load_controls
from fastcache.compile.lower import prepare
from fastcache.compile.models import find_model
from fastcache.compile.steering import Controls
from fastcache.cut.partition import partition_branches
from tiny_controls import ip_adapter_weights, save_controlnet, save_ip_adapter, save_t2i_adapter
from tiny_model import TOKENS, save_tiny_model, save_tiny_sdxl

SCALE = 4  # pixels a latent of the tiny models
BRANCHES = (0, 2)


def loaded(model: Path, **controls: Path | Sequence[Path]) -> tuple[Any, Controls, dict[str, Tensor]]:
    """A model's U-Net, the networks beside it, and example inputs of its passes."""
    given = {kind: [paths] if isinstance(paths, Path) else paths for kind, paths in controls.items()}
    named: dict[Any, list[str]] = {kind: [str(path) for path in paths] for kind, paths in given.items()}
    found = find_model(str(model), controls=named)
    unet = found.load_unet()
    inputs = passes.unet_inputs(unet, 2, 8, 8, TOKENS)
    steering = load_controls(found.controls, unet, inputs["sample"], SCALE)
    return unet, steering, inputs | steering.inputs


@torch.no_grad()
def predicted(unet: Any, controls: Controls, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the full pass gives; the shallow ones are held to it."""
    cuts = partition_branches(unet, BRANCHES)
    full, *shallow = controls.steer(passes.exportable_unet(cuts, inputs, SCALE), BRANCHES)
    of_full = dict(zip(full.outputs, full.module({name: inputs[name] for name in full.inputs}), strict=True))
    for part in shallow:
        found = part.module({name: (inputs | of_full)[name] for name in part.inputs})
        for name, value in zip(part.outputs, found if isinstance(found, tuple) else (found,), strict=True):
            torch.testing.assert_close(value, of_full[name], rtol=1e-4, atol=1e-5)
    return of_full


def once(controls: Controls, role: str) -> export.Exportable:
    return next(part for part in controls.parts if part.role == role)


@pytest.mark.parametrize(
    ("count", "changes"),
    [(1, {}), (1, {"controlnet_conditioning_channel_order": "bgr"}), (2, {})],
    ids=["rgb", "bgr", "two"],
)
@pytest.mark.parametrize("save", [save_tiny_model, save_tiny_sdxl], ids=["sd", "sdxl"])
@torch.no_grad()
def test_a_pass_with_controlnets_is_all_models(
    save: Callable[..., Path], count: int, changes: Any, tmp_path: Path
) -> None:
    model = save(tmp_path / "model")
    folders = [save_controlnet(tmp_path / f"controlnet{seed}", model, seed, **changes) for seed in range(count)]
    unet, controls, inputs = loaded(model, controlnet=folders)
    noise_pred = predicted(unet, controls, inputs)["noise_pred"]

    plain, added = find_model(str(model)).load_unet(), {}
    if "time_ids" in inputs:
        added = {"added_cond_kwargs": {name: inputs[name] for name in ("text_embeds", "time_ids")}}
    args = inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]
    roles = ["controlnet_embedding", "controlnet_embedding_2"][:count]
    images = [once(controls, role).inputs["controlnet_cond"] for role in roles]
    nets = MultiControlNetModel([ControlNetModel.from_pretrained(folder) for folder in folders])
    rows = [  # diffusers has one scale for all rows
        nets(*args, images, scales, **added, return_dict=False)
        for scales in inputs["conditioning_scale"].view(-1, count).tolist()
    ]
    down = [torch.stack([residuals[0][i][k] for k, residuals in enumerate(rows)]) for i in range(len(rows[0][0]))]
    middle = torch.stack([residuals[1][k] for k, residuals in enumerate(rows)])
    expected = plain(*args, **added, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    torch.testing.assert_close(noise_pred, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(noise_pred, plain(*args, **added).sample, atol=1e-2)


@torch.no_grad()
def test_a_preset_has_tuples_where_a_file_has_lists(tmp_path: Path, tiny_model: Path) -> None:
    folder = save_controlnet(tmp_path / "controlnet", tiny_model)
    found = find_model(str(tiny_model), controls={"controlnet": [str(folder)]})
    unet: Any = found.load_unet()
    unet.register_to_config(block_out_channels=tuple(unet.config.block_out_channels))
    assert load_controls(found.controls, unet, torch.zeros(2, 4, 8, 8), SCALE).controlnet is not None


@torch.no_grad()
def test_a_controlnet_of_an_inpainting_model_takes_the_latents_alone(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", in_channels=9)
    folder = save_controlnet(tmp_path / "controlnet", model, in_channels=4)
    predicted(*loaded(model, controlnet=folder))


@torch.no_grad()
def test_layers_in_half_precision_are_near_those_in_single(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    files: dict[str, Path] = {
        "controlnet": save_controlnet(tmp_path / "controlnet", model),
        "t2i_adapter": save_t2i_adapter(tmp_path / "t2i"),
        "ip_adapter": save_ip_adapter(tmp_path / "ip", model),
    }
    expected = predicted(*loaded(model, **files))["noise_pred"]
    unet, controls, inputs = loaded(model, **files)
    cuts = partition_branches(unet, (0,))
    prepare(cuts.at.values(), "bf16")
    controls.lower("bf16")
    full, _ = controls.steer(passes.exportable_unet(cuts, inputs, SCALE), (0,))
    noise_pred, feature = full.module({name: inputs[name] for name in full.inputs})
    assert (noise_pred.dtype, feature.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(noise_pred, expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("plus", [False, True])
@torch.no_grad()
def test_a_pass_with_an_ip_adapter_is_the_adapted_unet(plus: bool, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    file = save_ip_adapter(tmp_path / "ip", model, plus=plus)
    unet, controls, inputs = loaded(model, ip_adapter=file)
    noise_pred = predicted(unet, controls, inputs)["noise_pred"]

    plain: Any = find_model(str(model)).load_unet()
    plain._load_ip_adapter_weights([ip_adapter_weights(plain, plus=plus)])
    embeds = once(controls, "ip_adapter").inputs["image_embeds"]
    assert embeds.ndim == (3 if plus else 2)
    for k, scale in enumerate(inputs["ip_adapter_scale"]):
        for processor in plain.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [float(scale)]
        args = (inputs[name][k : k + 1] for name in ("sample", "timestep", "encoder_hidden_states"))
        expected = plain(*args, added_cond_kwargs={"image_embeds": [embeds[k : k + 1, None]]}).sample
        torch.testing.assert_close(noise_pred[k : k + 1], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_residual_beyond_the_blocks_is_the_middles(tmp_path: Path) -> None:
    """T2I-Adapter-XL has one more residual than the U-Net has blocks; no shallow pass reads it."""
    model = save_tiny_model(
        tmp_path / "model",
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    folder = save_t2i_adapter(
        tmp_path / "t2i", channels=[16, 32, 32, 32], downscale_factor=8, adapter_type="full_adapter_xl"
    )
    unet, controls, inputs = loaded(model, t2i_adapter=folder)
    names = [name for name in inputs if name.startswith("adapter_residual")]
    assert len(names) == 4
    noise_pred = predicted(unet, controls, inputs)["noise_pred"]
    image = once(controls, "t2i_adapter").inputs["adapter_image"]
    residuals = T2IAdapter.from_pretrained(folder)(image)
    args = inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"]
    plain: Any = find_model(str(model)).load_unet()
    expected = plain(*args, down_intrablock_additional_residuals=residuals).sample
    torch.testing.assert_close(noise_pred, expected, rtol=1e-4, atol=1e-5)
    cuts = partition_branches(unet, (5,))
    _, shallow = controls.steer(passes.exportable_unet(cuts, inputs, SCALE), (5,))
    assert names[-1] not in shallow.inputs


def test_files_decide_the_key(tmp_path: Path, tiny_model: Path) -> None:
    folder = save_controlnet(tmp_path / "controlnet", tiny_model)
    file = save_ip_adapter(tmp_path / "ip", tiny_model)

    def key(**controls: Path) -> str:
        given = {kind: str(path) for kind, path in controls.items()}
        return resolve(Recipe.model_validate({"model": str(tiny_model), **given})).key

    keys = [key(), key(controlnet=folder), key(ip_adapter=file), key(controlnet=folder, ip_adapter=file)]
    shutil.rmtree(file.parent / "image_encoder")
    keys.append(key(ip_adapter=file))
    weights = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    keys.append(key(controlnet=folder))
    assert len(set(keys)) == len(keys)


def found(tiny_model: Path, kind: ControlKind, path: Path) -> None:
    loaded(tiny_model, **{kind: path})


def test_files_that_are_none_of_them_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = save_controlnet(tmp_path / "controlnet", tiny_model)
    (tmp_path / "pickled").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.bin").write_bytes(b"x")
    (tmp_path / "pickled.bin").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors")
    save_file({"something.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    cases: list[tuple[ControlKind, str, str]] = [
        ("controlnet", "missing", "expected controlnet to be a folder with a ControlNetModel, got "),
        ("controlnet", "pickled", "expected safetensors weights in .*pickled weights"),
        ("t2i_adapter", "controlnet", "expected a T2IAdapter in .*, got ControlNetModel"),
        ("ip_adapter", "pickled.bin", "expected ip_adapter to be a .safetensors file, got"),
        ("ip_adapter", "broken.safetensors", "cannot read the IP-Adapter"),
        ("ip_adapter", "other.safetensors", "expected image_proj and ip_adapter weights in .*got .*something"),
    ]
    for kind, name, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            found(tiny_model, kind, tmp_path / name)
        assert "\n" not in str(caught.value)


def test_networks_of_another_model_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    other = save_tiny_model(tmp_path / "model", cross_attention_dim=24)
    pooling = save_controlnet(tmp_path / "pooling", tiny_model)
    config = json.loads((pooling / "config.json").read_text())
    (pooling / "config.json").write_text(json.dumps(config | {"global_pool_conditions": True}))
    faces = tmp_path / "faces.safetensors"
    plain = load_file(save_ip_adapter(tmp_path / "plain", tiny_model))
    save_file({**plain, "ip_adapter.1.to_k_lora.down.weight": torch.zeros(2)}, faces)
    alone = save_ip_adapter(tmp_path / "alone", tiny_model, plus=True, encoder=False)
    cases: list[tuple[ControlKind, Path, str]] = [
        ("controlnet", save_controlnet(tmp_path / "c", other), "the U-Net's cross_attention_dim 16, got 24 in"),
        ("controlnet", pooling, "without global_pool_conditions, got .*; use the helper"),
        ("t2i_adapter", save_t2i_adapter(tmp_path / "t", channels=[16, 16]), r"rows \[\(16, 8\), \(32, 4\)\] .* got"),
        ("ip_adapter", save_ip_adapter(tmp_path / "i", other), "cannot load the IP-Adapter .* into this U-Net"),
        ("ip_adapter", faces, "got one of faces with a LoRA in"),
        ("ip_adapter", alone, "expected an image encoder in .*image_encoder"),
    ]
    for kind, path, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            found(tiny_model, kind, path)
        assert "\n" not in str(caught.value)
