"""Oracle: a bundle built with LoRAs draws what diffusers draws with them fused; their files decide the bundle's key."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastcache
from build_store import BuildStore
from fastcache import BackendUnavailable, Bundle, FastCachePipeline
from fastcache.bundle.recipe import Lora, Recipe
from fastcache.compile.builder import resolve
from fastcache.compile.models import find_model
from fastcache.evaluate.quality import psnr_db
from fastcache.files import sha256_of

pytestmark = [pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning"), pytest.mark.slow]

WEIGHTS = (0.8, -0.5)


def loaded(model: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_lora(model: Path, file: Path, seed: int, text: bool) -> Path:
    """A LoRA of random weights for the U-Net's attention, and the text encoder's."""
    torch.manual_seed(seed)
    pipe = loaded(model)
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_q", "to_v"])
    pipe.unet.add_adapter(config)
    layers = {"unet_lora_layers": pipe.unet}
    if text:
        pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
        layers["text_encoder_lora_layers"] = pipe.text_encoder
    for module in layers.values():
        for name, parameter in module.named_parameters():
            if "lora" in name:
                parameter.data.normal_(std=0.3)
    StableDiffusionPipeline.save_lora_weights(
        file.parent,
        weight_name=file.name,
        **{name: get_peft_model_state_dict(module) for name, module in layers.items()},
        **_collate_lora_metadata({name.removesuffix("_lora_layers"): module for name, module in layers.items()}),
    )
    return file


@pytest.fixture(scope="module")
def files(tiny_model: Path, builds: BuildStore) -> list[Path]:
    """Two LoRAs: one for the U-Net and the text encoder, one for the U-Net alone."""

    def save(folder: Path) -> None:
        for i in range(2):
            save_lora(tiny_model, folder / f"{i}.safetensors", i, text=i == 0)

    return sorted(builds.model("tiny-loras", save).iterdir())


@pytest.fixture(scope="module")
def merged(files: list[Path], tiny_model: Path, builds: BuildStore) -> FastCachePipeline:
    """The tiny model with both merged in."""
    given = [f"{file}:{weight}" for file, weight in zip(files, WEIGHTS, strict=True)]
    return fastcache.load(builds.bundle(tiny_model, lora=given, components=("unet", "text")).path)


def images(pipeline: Any, **arguments: Any) -> Tensor:
    own = torch.Generator().manual_seed(0)
    return pipeline("a cat", num_inference_steps=6, output_type="latent", generator=own, **arguments).images


def test_a_bundle_with_loras_draws_what_diffusers_draws_with_them_fused(
    files: list[Path], tiny_model: Path, merged: FastCachePipeline
) -> None:
    drawn, manifest = images(merged), merged.bundle.manifest
    reference = loaded(tiny_model)
    plain = images(reference)
    for i, file in enumerate(files):
        reference.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"a{i}")
    reference.set_adapters([f"a{i}" for i in range(len(files))], list(WEIGHTS))
    reference.fuse_lora()
    assert psnr_db(drawn, images(reference)) >= 50
    assert psnr_db(drawn, plain) < 40
    assert [(lora.name, lora.weight, lora.sha256) for lora in manifest.model.loras] == [
        (file.name, weight, sha256_of(file)) for file, weight in zip(files, WEIGHTS, strict=True)
    ]
    assert manifest.weights_sha256 != find_model(str(tiny_model)).weights_sha256


def test_merging_is_exact_in_every_part(files: list[Path], tiny_model: Path) -> None:
    """W + weight * alpha / rank * B A, computed here by hand."""
    lora, stored = Lora(path=str(files[0]), weight=0.7), load_file(files[0])
    plain, merged = find_model(str(tiny_model)), find_model(str(tiny_model), loras=[lora])
    for part, before, after, scale in (
        ("unet", plain.load_unet(), merged.load_unet(), 4 / 2),
        ("text_encoder", plain.load_text_encoder(), merged.load_text_encoder(), 2 / 2),
    ):
        assert type(before) is type(after)
        expected, changed = before.state_dict(), 0
        for name, weight in expected.items():
            down = f"{part}.{name.removesuffix('.weight')}.lora_A.weight"
            keys = [key for key in stored if key.replace("text_model.", "") == down.replace("text_model.", "")]
            for key in keys:
                weight += 0.7 * scale * stored[key.replace("lora_A", "lora_B")] @ stored[key]
                changed += 1
        assert changed == sum(key.startswith(f"{part}.") and "lora_A" in key for key in stored) > 0
        got = after.state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.allclose(got[name], expected[name], atol=1e-6) for name in expected)


def test_files_and_weights_decide_the_key(files: list[Path], tiny_model: Path) -> None:
    def key(*loras: str) -> str:
        return resolve(Recipe.model_validate({"model": str(tiny_model), "lora": loras})).key

    first, second = map(str, files)
    keys = [key(), key(first), key(f"{first}:0.5"), key(second), key(first, second), key(second, first)]
    assert len(set(keys)) == len(keys)
    assert key(first) == key(f"{first}:1.0")


def test_several_loras_are_several_bundles(merged: FastCachePipeline, tiny_bundle: Bundle) -> None:
    """Whoever holds the old pipeline goes on with it; a new name for the new one is all there is to a swap."""
    pipes = [fastcache.load(tiny_bundle.path), merged]
    alone = [images(pipe, cache_interval=2) for pipe in pipes]
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    streams = [stream(pipe) for pipe in pipes]
    results = [[step.latents.clone() for step in pair] for pair in zip(*streams, strict=True)][-1]
    assert all(torch.equal(a, b) for a, b in zip(alone, results, strict=True))


def stream(pipe: FastCachePipeline) -> Any:
    return pipe.stream("a cat", num_inference_steps=6, cache_interval=2, generator=torch.Generator().manual_seed(0))


def test_files_that_are_no_lora_for_the_model(files: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "pickled.bin").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors")
    save_file({"something.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    wide = {name: torch.zeros(*(n + 1 for n in tensor.shape)) for name, tensor in load_file(files[1]).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    for name in ("pickled.bin", "missing.safetensors"):
        with pytest.raises(ValueError, match=rf"expected a LoRA as PATH\[:WEIGHT\], .* got '.*{name}'"):
            find_model(str(tiny_model), loras=[Lora(path=str(tmp_path / name))])
    for name in ("broken", "other", "wide"):
        model = find_model(str(tiny_model), loras=[Lora(path=str(tmp_path / f"{name}.safetensors"))])
        with pytest.raises(ValueError, match=rf"^cannot merge .*{name}.safetensors into the unet: ") as caught:
            model.load_unet()
        assert "\n" not in str(caught.value)


def test_what_to_install_is_said(files: list[Path], tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"needs peft, .* pip install 'fastcache-diffusion\[lora\]'"):
        find_model(str(tiny_model), loras=[Lora(path=str(files[0]))])


def damaged_loras() -> dict[str, tuple[Any, dict[str, str], str]]:
    """What is done to the tensors, the file's metadata, and what is said of it."""
    down = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"

    def without(ending: str) -> Any:
        return lambda tensors: {k: v for k, v in tensors.items() if not (k.endswith(ending) and "attn1.to_q" in k)}

    def filled(value: float) -> Any:
        return lambda tensors: tensors | {down: torch.full_like(tensors[down], value)}

    def said(**values: Any) -> dict[str, str]:
        own = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_v"]} | values
        return {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in own.items()})}

    elsewhere = {"unet.no.such.lora_A.weight": torch.ones(2, 4), "unet.no.such.lora_B.weight": torch.ones(4, 2)}
    second = {name.replace("unet.", "text_encoder_2."): tensor for name, tensor in elsewhere.items()}
    return {
        "no A": (without("lora_A.weight"), {}, "got none for .*attn1.to_q.lora_A.weight"),
        "no B": (without("lora_B.weight"), {}, r"attn1\.to_q"),
        "no module": (lambda tensors: tensors | elsewhere, {}, r"no\.such"),
        "no part": (lambda tensors: tensors | second, {}, "of unet or text_encoder, got text_encoder_2.no.such"),
        "NaN": (filled(float("nan")), {}, f"NaN or infinity in {down}"),
        "infinite": (filled(float("inf")), {}, f"NaN or infinity in {down}"),
        "too large when merged": (lambda tensors: {k: v * 1e25 for k, v in tensors.items()}, {}, "infinity in .*to_q"),
        "huge rank": (dict, said(r=10**7), r"tensors' rank \[2\], got unet.r of 10000000"),
        "huge pattern": (dict, said(rank_pattern={"to_q": 10**7}), r"unet.rank_pattern of 10000000"),
        "changes the model": (dict, said(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
        "DoRA of kohya": (lambda tensors: tensors | {"unet.x.dora_scale": torch.ones(2)}, {}, "unet.x.dora_scale"),
    }


@pytest.mark.parametrize("case", damaged_loras())
def test_a_lora_that_would_not_be_merged_as_it_is(
    files: list[Path], tiny_model: Path, tmp_path: Path, case: str
) -> None:
    change, metadata, expected = damaged_loras()[case]
    file = tmp_path / "damaged.safetensors"
    save_file(change(load_file(files[1])), file, metadata)
    model = find_model(str(tiny_model), loras=[Lora(path=str(file))])
    with pytest.raises(ValueError, match=rf"^cannot merge .*damaged.safetensors into the unet: .*{expected}") as caught:
        model.load_unet()
    assert "\n" not in str(caught.value)


def test_a_lora_as_kohya_writes_it(tiny_model: Path, tmp_path: Path) -> None:
    """Names with underscores, down and up in place of A and B, and an alpha for each layer."""
    layers = {
        "unet": ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        "attention": ("text_encoder", "encoder.layers.0.self_attn.out_proj"),
        "mlp": ("text_encoder", "encoder.layers.1.mlp.fc1"),
    }
    plain = find_model(str(tiny_model))
    states = {"unet": plain.load_unet().state_dict(), "text_encoder": plain.load_text_encoder().state_dict()}
    stored, torch_seed = dict[str, Tensor](), torch.Generator().manual_seed(0)
    for part, layer in layers.values():
        weight = states[part][f"{layer}.weight"]
        down, up = (torch.randn(*shape, generator=torch_seed) for shape in ((2, weight.shape[1]), (weight.shape[0], 2)))
        prefix = "lora_unet_" if part == "unet" else "lora_te_text_model_"
        place = f"{prefix}{layer.replace('.', '_')}"
        stored |= {
            f"{place}.lora_down.weight": down,
            f"{place}.lora_up.weight": up,
            f"{place}.alpha": torch.tensor(1.0),
        }
        weight += 0.5 * 1.0 / 2 * up @ down
    save_file(stored, tmp_path / "kohya.safetensors")
    merged = find_model(str(tiny_model), loras=[Lora(path=str(tmp_path / "kohya.safetensors"), weight=0.5)])
    for part, got in (("unet", merged.load_unet()), ("text_encoder", merged.load_text_encoder())):
        assert all(torch.allclose(tensor, states[part][name], atol=1e-5) for name, tensor in got.state_dict().items())
