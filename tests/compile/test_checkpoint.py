"""What a checkpoint must hold, in every component: each tensor, no other, finite numbers, safetensors alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

import fastcache
from fastcache.bundle.recipe import Recipe
from fastcache.compile.builder import resolve
from fastcache.compile.checkpoint import load, weight_files
from fastcache.compile.controls import load_controls
from fastcache.compile.models import find_model
from tiny_controls import save_controlnet, save_ip_adapter, save_t2i_adapter
from tiny_model import save_tiny_sdxl

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every component that a bundle may be made of, in folders of one parent."""
    folder = tmp_path_factory.mktemp("components")
    shutil.copytree(tiny_model, folder / "sd")
    save_tiny_sdxl(folder / "sdxl")
    save_controlnet(folder / "controlnet", tiny_model)
    save_t2i_adapter(folder / "t2i_adapter")
    save_ip_adapter(folder / "ip_adapter", tiny_model)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def _ip_adapter(root: Path) -> None:
    found = find_model(str(root / "sd"), controls={"ip_adapter": [str(root / "ip_adapter/ip-adapter.safetensors")]})
    load_controls(found.controls, found.load_unet(), torch.zeros(2, 4, 8, 8), 4)


# Where its weights lie, and what loads them.
COMPONENTS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "unet": ("sd/unet", lambda root: find_model(str(root / "sd")).load_unet()),
    "vae": ("sd/vae", lambda root: find_model(str(root / "sd")).load_vae()),
    "text_encoder": ("sd/text_encoder", lambda root: find_model(str(root / "sd")).load_text_encoder()),
    "text_encoder_2": (
        "sdxl/text_encoder_2",
        lambda root: find_model(str(root / "sdxl")).load_text_encoder("text_encoder_2"),
    ),
    "controlnet": ("controlnet", lambda root: load(ControlNetModel, root / "controlnet")),
    "t2i_adapter": ("t2i_adapter", lambda root: load(T2IAdapter, root / "t2i_adapter")),
    "image_encoder": (
        "ip_adapter/image_encoder",
        lambda root: load(CLIPVisionModelWithProjection, root / "ip_adapter/image_encoder"),
    ),
    "ip_adapter": ("ip_adapter", _ip_adapter),
}


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file, {"format": "pt"})


def refused(load_it: Callable[[], Any]) -> str:
    with pytest.raises(ValueError, match=r"expected|cannot load") as caught:
        load_it()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _without(index: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensors[name] for i, name in enumerate(sorted(tensors)) if i != index}


def _spoiled(value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        first = min(tensors)
        spoiled = tensors[first].clone()
        spoiled.view(-1)[-1] = value
        return tensors | {first: spoiled}

    return change


@pytest.mark.parametrize("component", COMPONENTS)
def test_whole_weights_load(saved: Path, component: str) -> None:
    COMPONENTS[component][1](saved)


@pytest.mark.parametrize("index", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_missing_tensor_is_named(copy: Path, component: str, index: int) -> None:
    folder, load_it = COMPONENTS[component]
    names = sorted(load_file(next((copy / folder).glob("*.safetensors"))))
    edit(copy / folder, _without(index % len(names)))
    message = refused(lambda: load_it(copy))
    assert names[index].removeprefix("ip_adapter.").removeprefix("image_proj.") in message or (
        component == "ip_adapter"  # its projection's tensors decide which class it is
    )


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_tensor_of_another_model_is_named(copy: Path, component: str) -> None:
    folder, load_it = COMPONENTS[component]
    name = "ip_adapter.99.to_k_ip.weight" if component == "ip_adapter" else "somewhere.else.weight"
    edit(copy / folder, lambda tensors: tensors | {name: torch.zeros(2)})
    assert name.removeprefix("ip_adapter.") in refused(lambda: load_it(copy))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("component", COMPONENTS)
def test_what_is_no_number_is_named(copy: Path, component: str, value: float) -> None:
    folder, load_it = COMPONENTS[component]
    edit(copy / folder, _spoiled(value))
    message = refused(lambda: load_it(copy))
    assert "expected finite weights in" in message
    first = min(load_file(next((copy / folder).glob("*.safetensors"))))
    assert f"in {first.removeprefix('image_proj.')};" in message  # the adapter's two groups are read apart


@pytest.mark.slow
def test_a_build_of_a_text_encoder_that_lacks_half_is_refused(copy: Path, tmp_path: Path) -> None:
    """It used to be filled with random numbers, others at each load, and built with a parity of 4e-7."""
    edit(copy / "sd/text_encoder", lambda tensors: {k: v for k, v in tensors.items() if "layers.1" not in k})
    with pytest.raises(ValueError, match=r"expected every tensor of the model in .*text_encoder, got none for .* more"):
        fastcache.build_engines(copy / "sd", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def sharded(folder: Path) -> Path:
    """A folder's weights in two files and an index. Returns the index."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    stem, names = file.name.removesuffix(".safetensors"), sorted(tensors)
    half = len(names) // 2
    places: dict[str, str] = {}
    for i, part in enumerate((names[:half], names[half:])):
        shard = f"{stem}-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
        places |= dict.fromkeys(part, shard)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    return index


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_index_is_part_of_the_key_and_of_the_weights(copy: Path, part: str) -> None:
    whole = COMPONENTS[part][1](copy).state_dict()
    index = sharded(copy / "sd" / part)
    assert index in weight_files(index.parent)
    read = COMPONENTS[part][1](copy).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in whole.items())
    recipe = Recipe(model=str(copy / "sd"))
    key = resolve(recipe).key
    index.write_text(index.read_text() + "\n")
    assert resolve(recipe).key != key


@pytest.mark.parametrize("name", ["model.bin", "../unet.safetensors", "missing.safetensors", "", 3, None])
def test_an_index_names_safetensors_beside_it(copy: Path, name: object) -> None:
    index = sharded(copy / "sd/unet")
    (index.parent / "model.bin").write_bytes(b"pickle")
    content = json.loads(index.read_text())
    content["weight_map"]["conv_in.bias"] = name
    index.write_text(json.dumps(content))
    message = refused(lambda: resolve(Recipe(model=str(copy / "sd"))))
    assert f"got {name!r} for conv_in.bias" in message


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none(copy: Path, content: str) -> None:
    index = sharded(copy / "sd/unet")
    index.write_text(content)
    assert str(index) in refused(lambda: resolve(Recipe(model=str(copy / "sd"))))


def test_an_adapter_in_the_folder_is_not_loaded_with_the_model(copy: Path) -> None:
    (copy / "sd/text_encoder/adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    assert "got adapter_config.json; use --lora" in refused(lambda: resolve(Recipe(model=str(copy / "sd"))))


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("unet/config.json", {"time_cond_proj_dim": 8}, "expected a U-Net without time_cond_proj_dim"),
        ("text_encoder/config.json", {"use_attention_mask": True}, "a text encoder without use_attention_mask"),
    ],
)
def test_what_a_bundle_would_not_heed_is_refused(copy: Path, file: str, values: Any, expected: str) -> None:
    config = copy / "sd" / file
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    assert expected in refused(lambda: resolve(Recipe(model=str(copy / "sd"))))


def test_sdxl_does_not_look_at_the_mask(copy: Path) -> None:
    config = copy / "sdxl/text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_attention_mask": True}))
    resolve(Recipe(model=str(copy / "sdxl")))


def test_a_single_file_is_refused_with_how_to_convert_it(copy: Path) -> None:
    file = copy / "sd/unet/diffusion_pytorch_model.safetensors"
    message = refused(lambda: find_model(str(file)))
    assert f"got the file {file}; convert it" in message
    assert f"from_single_file({str(file)!r}).save_pretrained(" in message


def test_a_damaged_tokenizer_is_one_line(copy: Path) -> None:
    (copy / "sd/tokenizer/tokenizer.json").write_text("{")
    assert "cannot load the tokenizer of" in refused(lambda: find_model(str(copy / "sd")).load_tokenizer())
