"""Oracle: a bundle with a ControlNet, a T2I-Adapter and an IP-Adapter against diffusers' pipelines of each, and of two.

One bundle holds all three, of random weights; a network whose scale is 0 is as good as not there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)
from PIL import Image
from torch import Tensor

import fastcache
from build_store import BuildStore
from controlled import STEPS, command, latents, live, picture, pil, seeded, texts
from fastcache import CachePlan, FastCacheHelper, FastCachePipeline
from fastcache.bench.lineup import Wishes, of_bundle
from fastcache.health.verify import verify_bundle
from fastcache.loop.drivers import Guidance
from fastcache.loop.drivers.cudagraph import CapturedRun
from fastcache.loop.steps import PlainRun
from fastcache.pipeline.request import Request
from list_recorder import ListRecorder
from live_pipelines import agreement_db
from tiny_controls import save_controlnet, save_ip_adapter, save_t2i_adapter

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")]

OFF: dict[str, Any] = {"controlnet_conditioning_scale": 0.0, "adapter_conditioning_scale": 0.0, "ip_adapter_scale": 0.0}


@pytest.fixture(scope="module")
def files(builds: BuildStore, tiny_model: Path) -> dict[str, Path]:
    def save(folder: Path) -> None:
        save_controlnet(folder / "controlnet", tiny_model)
        save_t2i_adapter(folder / "t2i")
        save_ip_adapter(folder / "ip", tiny_model)

    folder = builds.model("tiny-controls", save)
    return {
        "controlnet": folder / "controlnet",
        "t2i_adapter": folder / "t2i",
        "ip_adapter": folder / "ip" / "ip-adapter.safetensors",
    }


@pytest.fixture(scope="module")
def pipe(builds: BuildStore, tiny_model: Path, files: dict[str, Path]) -> FastCachePipeline:
    output = builds.bundle(tiny_model, branch_id=(0, 2), **{kind: str(path) for kind, path in files.items()}).path
    flags = ["--model", tiny_model, "--output", output, "--branch-id", "0,2", "--dtype", "fp32"]
    flags += [text for kind, path in files.items() for text in (f"--{kind.replace('_', '-')}", path)]
    with pytest.MonkeyPatch.context() as patch:
        command("build-engines", *flags, patch=patch)  # finds that these flags' bundle is there
    return fastcache.load(output)


@pytest.fixture(scope="module")
def reference(tiny_model: Path, files: dict[str, Path]) -> Callable[..., Any]:
    """A pipeline of diffusers, by its class; IP-Adapter changes the U-Net of its own."""

    def make(kind: Any, *, ip_adapter_scale: float | None = None, **modules: Any) -> Any:
        loaded = live(kind, tiny_model, **modules)
        if ip_adapter_scale is not None:
            file = files["ip_adapter"]
            loaded.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name)
            loaded.set_ip_adapter_scale(ip_adapter_scale)
        return loaded

    return make


@pytest.fixture(scope="module")
def controlnet(files: dict[str, Path]) -> ControlNetModel:
    return ControlNetModel.from_pretrained(files["controlnet"])


def others(**own: Any) -> dict[str, Any]:
    """The arguments of the networks that a test leaves out."""
    return {**OFF, "control_image": picture(1), "adapter_image": picture(2), "ip_adapter_image": pil(3), **own}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"controlnet_conditioning_scale": 0.4},
        {"guidance_scale": 1.0},
        {"control_guidance_start": 0.2, "control_guidance_end": 0.7},
        {"num_images_per_prompt": 2, "seeds": (1, 2)},
        {"image": pil(8), "height": 32, "width": 32},
        {"image": picture(8, rows=2), **texts(2), "seeds": (1, 2)},
    ],
    ids=lambda arguments: ",".join(arguments),
)
def test_controlnet_arguments_mean_what_they_mean_in_diffusers(
    arguments: dict[str, Any], pipe: FastCachePipeline, reference: Callable[..., Any], controlnet: ControlNetModel
) -> None:
    given = {"controlnet_conditioning_scale": 1.0, "image": picture(7), **arguments}
    ours = {**given, "control_image": given["image"]}
    del ours["image"]
    expected = latents(reference(StableDiffusionControlNetPipeline, controlnet=controlnet), **given)
    drawn = latents(pipe, **others(**ours))
    assert agreement_db(drawn, expected) >= 50
    without = latents(pipe, **others(**{**ours, "controlnet_conditioning_scale": 0.0}))
    assert agreement_db(without, expected) < 40


def test_controlnet_with_image_to_image(
    pipe: FastCachePipeline, reference: Callable[..., Any], controlnet: ControlNetModel
) -> None:
    start = torch.randn(1, 4, 8, 8, generator=seeded(4))
    given = {"image": start, "control_image": picture(7), "controlnet_conditioning_scale": 1.0, "strength": 0.6}
    size = {"height": 32, "width": 32}
    expected = latents(reference(StableDiffusionControlNetImg2ImgPipeline, controlnet=controlnet), **given, **size)
    assert agreement_db(latents(pipe, **others(**given)), expected) >= 50


@pytest.mark.parametrize("end", [1.0, 0.4])
@pytest.mark.parametrize("branch_id", [0, 2])
def test_cached_runs_draw_what_the_helper_draws(
    branch_id: int, end: float, pipe: FastCachePipeline, reference: Callable[..., Any], controlnet: ControlNetModel
) -> None:
    """A step at which the ControlNet's scale changes is FULL in both."""
    given = {"control_guidance_end": end, "controlnet_conditioning_scale": 1.0}
    live = reference(StableDiffusionControlNetPipeline, controlnet=controlnet)
    with FastCacheHelper(pipe=live) as helper:
        helper.set_params(cache_interval=4, cache_branch_id=branch_id)
        expected = latents(live, image=picture(7), **given)
    plan = CachePlan.uniform(STEPS, 4, branch_id)
    run = pipe(
        **texts(),
        **others(control_image=picture(7), **given),
        plan=plan,
        num_inference_steps=STEPS,
        output_type="latent",
        generator=seeded(),
    )
    assert [i for i in range(STEPS) if run.plan.is_full(i)] == ([0, 4] if end == 1.0 else [0, 3, 4])
    assert agreement_db(run.images, expected) >= 50
    assert agreement_db(latents(pipe, **others(control_image=picture(7), **given)), expected) < 50


@pytest.mark.parametrize(
    "arguments",
    [{}, {"adapter_conditioning_scale": 0.4}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2, "seeds": (1, 2)}],
    ids=lambda arguments: ",".join(arguments),
)
def test_t2i_adapter_arguments_mean_what_they_mean_in_diffusers(
    arguments: dict[str, Any], pipe: FastCachePipeline, reference: Callable[..., Any], files: dict[str, Path]
) -> None:
    given = {"adapter_conditioning_scale": 1.0, **arguments}
    adapter = T2IAdapter.from_pretrained(files["t2i_adapter"])
    expected = latents(reference(StableDiffusionAdapterPipeline, adapter=adapter), image=picture(7), **given)
    drawn = latents(pipe, **others(**given, adapter_image=picture(7)))
    assert agreement_db(drawn, expected) >= 50
    assert agreement_db(latents(pipe, **others(**{**given, "adapter_conditioning_scale": 0.0})), expected) < 40


@pytest.mark.parametrize(
    "arguments",
    [
        {"ip_adapter_image": pil(9)},
        {"ip_adapter_image": [pil(9)], "guidance_scale": 1.0},
        {"ip_adapter_image": pil(9), "num_images_per_prompt": 2, "seeds": (1, 2)},
        {"ip_adapter_image_embeds": [torch.randn(2, 1, 12, generator=seeded(5))]},
    ],
    ids=lambda arguments: ",".join(arguments),
)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_ip_adapter_arguments_mean_what_they_mean_in_diffusers(
    scale: float, arguments: dict[str, Any], pipe: FastCachePipeline, reference: Callable[..., Any]
) -> None:
    expected = latents(reference(StableDiffusionPipeline, ip_adapter_scale=scale), **arguments)
    given = others(**arguments)
    if "ip_adapter_image_embeds" in arguments:
        del given["ip_adapter_image"]
    assert agreement_db(latents(pipe, **{**given, "ip_adapter_scale": scale}), expected) >= 50
    assert agreement_db(latents(pipe, **given), expected) < 45


def test_two_networks_at_once(
    pipe: FastCachePipeline, reference: Callable[..., Any], controlnet: ControlNetModel
) -> None:
    live = reference(StableDiffusionControlNetPipeline, ip_adapter_scale=0.6, controlnet=controlnet)
    expected = latents(live, image=picture(7), ip_adapter_image=pil(9), controlnet_conditioning_scale=0.8)
    given = others(control_image=picture(7), ip_adapter_image=pil(9), controlnet_conditioning_scale=0.8)
    assert agreement_db(latents(pipe, **{**given, "ip_adapter_scale": 0.6}), expected) >= 50


def test_invariant_2_holds_at_both_branches(pipe: FastCachePipeline) -> None:
    found = verify_bundle(pipe.bundle.path)
    assert not found.problems
    for parity in (pipe.bundle.manifest.parity, found.parity):
        assert parity is not None
        assert max(parity.full_vs_model, parity.shallow_vs_full) < 1e-4


def test_shallow_engines_take_no_more_than_their_layers_read(pipe: FastCachePipeline) -> None:
    engines = pipe.bundle.manifest.engines
    taken = {role: {spec.name for spec in engines[role].inputs} for role in ("full", "shallow-0", "shallow-2")}
    residuals = {role: {name for name in names if "residual" in name} for role, names in taken.items()}
    assert residuals["full"] == {"adapter_residual_0", "adapter_residual_1"}
    assert residuals["shallow-0"] <= {"cached_residual"}
    assert residuals["shallow-2"] - {"cached_residual_2"} == {"adapter_residual_0"}
    assert all({"controlnet_embedding", "conditioning_scale", "ip_tokens"} <= names for names in taken.values())


def test_the_manifest_names_what_was_built_in(pipe: FastCachePipeline) -> None:
    entries = pipe.bundle.manifest.model.controls
    assert [(entry.kind, entry.name) for entry in entries] == [
        ("controlnet", "controlnet"),
        ("t2i_adapter", "t2i"),
        ("ip_adapter", "ip-adapter.safetensors"),
    ]


def test_a_benchmark_times_no_other_networks_than_controlnets(pipe: FastCachePipeline) -> None:
    with pytest.raises(ValueError, match="steered by ControlNets or nothing, got one with t2i-adapter, ip-adapter"):
        of_bundle(pipe.bundle.path, Wishes(), {})


def test_generate_takes_pictures_that_steer(
    pipe: FastCachePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, image in (("pose", pil(7, 32)), ("sketch", pil(8, 32)), ("style", pil(9))):
        image.save(tmp_path / f"{name}.png")
    flags = ["--control-image", tmp_path / "pose.png", "--controlnet-conditioning-scale", 0.8]
    flags += ["--control-guidance-start", 0.2, "--control-guidance-end", 0.7]
    flags += ["--adapter-image", tmp_path / "sketch.png", "--ip-adapter-image", tmp_path / "style.png"]
    common = ["generate", "--engines", pipe.bundle.path, "--prompt", "a cat", "--steps", STEPS, "--num-images", 2]
    command(*common, *flags, "--ip-adapter-scale", 0.5, "--output", tmp_path / "out", patch=monkeypatch)
    expected = pipe(
        ["a cat"] * 2,
        control_image=pil(7, 32),
        controlnet_conditioning_scale=0.8,
        control_guidance_start=0.2,
        control_guidance_end=0.7,
        adapter_image=pil(8, 32),
        ip_adapter_image=pil(9),
        ip_adapter_scale=0.5,
        num_inference_steps=STEPS,
        generator=[seeded(0), seeded(1)],
    ).images
    for seed, image in enumerate(expected):
        with Image.open(tmp_path / "out" / f"{seed:05d}.png") as drawn:
            assert drawn.tobytes() == image.tobytes()
            assert (drawn.info["control_image"], drawn.info["ip_adapter_scale"]) == ("pose.png", "0.5")
            assert drawn.info["control_guidance_end"] == "0.7"
    capsys.readouterr()
    command(*common, "--output", tmp_path / "out", patch=monkeypatch, code=2)
    assert "expected control_image for a bundle with the ControlNet controlnet, got none" in capsys.readouterr().err
    command("inspect", pipe.bundle.path, patch=monkeypatch)
    said = " ".join(capsys.readouterr().out.split())
    assert "with controlnet controlnet with t2i-adapter t2i with ip-adapter ip-adapter.safetensors" in said


@pytest.mark.parametrize("stepwise", [False, True])
def test_a_scale_that_changes_is_in_the_recorded_loop(stepwise: bool, pipe: FastCachePipeline) -> None:
    """The same recording runs with other scales; steps without guidance have a row of their own."""
    plan = CachePlan.from_branches((None, 0, None, None, 0, None, 0, 0)).guided_within(0, 5)
    table = pipe.schedule("ddim", STEPS).sampler
    recorder = ListRecorder(anything=True)
    results: list[Tensor] = []
    for scales in ([1.0] * 3 + [0.0] * 5, [0.0] * 3 + [0.7] * 5):
        given = {**texts(), **others(controlnet_conditioning_scale=1.0)}
        run = pipe.begin(Request(**given, num_inference_steps=STEPS))
        noise, drawn = torch.randn(1, 4, 8, 8, generator=seeded(6)), list[Tensor]()
        for kind in (PlainRun, partial(CapturedRun, recorder, stepwise=stepwise)):
            again = kind(run.lane, table, plan, Guidance(5.0), conditioning_scales=scales)
            again.latents.copy_(noise)
            drawn.append(list(again.steps)[-1].latents.clone())
        torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-4, atol=1e-4)
        results.append(drawn[0])
    assert not torch.allclose(results[0], results[1], atol=1e-2)


WITHOUT: list[tuple[dict[str, Any], str]] = [
    ({"control_image": picture(1)}, "no control_image for a bundle without ControlNet, got one; build with --control"),
    ({"adapter_conditioning_scale": 0.5}, "no adapter_conditioning_scale for a bundle without T2I-Adapter"),
    ({"ip_adapter_image": pil(1)}, "no ip_adapter_image for a bundle without IP-Adapter, .* --ip-adapter FILE"),
]


@pytest.mark.parametrize(("arguments", "message"), WITHOUT)
def test_a_bundle_without_them_refuses_their_arguments(
    arguments: dict[str, Any], message: str, tiny_bundle: fastcache.Bundle
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        fastcache.load(tiny_bundle.path)("a cat", **arguments)
    assert "\n" not in str(caught.value)


def test_guess_mode_off_asks_for_nothing(tiny_bundle: fastcache.Bundle) -> None:
    plain = fastcache.load(tiny_bundle.path)
    drawn = [
        plain("a cat", num_inference_steps=2, output_type="latent", generator=seeded(), **more).images
        for more in ({}, {"guess_mode": False})
    ]
    assert torch.equal(*drawn)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"control_image": None}, "expected control_image for a bundle with the ControlNet controlnet, got none"),
    ({"adapter_image": None}, "expected adapter_image for a bundle with the T2I-Adapter t2i, got none"),
    ({"ip_adapter_image": None}, "expected ip_adapter_image or ip_adapter_image_embeds .* got none"),
    ({"ip_adapter_image_embeds": [torch.zeros(2, 1, 12)]}, "ip_adapter_image or ip_adapter_image_embeds .* got both"),
    ({"guess_mode": True}, "guess_mode=False, which engines are built for, got True"),
    ({"control_guidance_start": 0.7, "control_guidance_end": 0.3}, "got 0.7 and 0.3"),
    ({"control_guidance_end": 1.5}, "control_guidance_end to be a finite number from 0 to 1, got 1.5"),
    ({"controlnet_conditioning_scale": float("nan")}, "controlnet_conditioning_scale to be a finite number, got nan"),
    ({"adapter_conditioning_scale": "much"}, "adapter_conditioning_scale to be a finite number, got 'much'"),
    ({"control_image": 3}, "control_image as PIL images, arrays or tensors"),
    ({"control_image": torch.rand(1, 1, 32, 32)}, r"control_image of 3 channels at 32x32, got \[1, 32, 32\]"),
    ({"control_image": picture(1)[..., :16]}, "an image of 32x32, which this bundle was built for, got 16x32"),
    ({"control_image": picture(1, rows=2)}, "one control_image, or as many as divide 1 pictures, got 2"),
    ({"ip_adapter_image": torch.zeros(1, 3, 8, 8)}, r"one ip_adapter_image, as a tensor of shape \[1, 3, 32, 32\]"),
    ({"ip_adapter_image": [pil(1), pil(2)]}, r"one ip_adapter_image, .* got \[2, 3, 32, 32\]"),
    ({"ip_adapter_image": "a path"}, r"ip_adapter_image as PIL images, arrays or tensors in \[0, 1\], got 'a path'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_are_refused_in_one_line(
    arguments: dict[str, Any], message: str, pipe: FastCachePipeline
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        latents(pipe, **others(**arguments))
    assert "\n" not in str(caught.value)


def test_inputs_that_are_missing_are_named(pipe: FastCachePipeline) -> None:
    inputs = {"encoder_hidden_states": texts()["prompt_embeds"]}
    with pytest.raises(ValueError, match=r"^expected the inputs .*conditioning_scale, controlnet_embedding"):
        pipe.start(Request(num_inference_steps=STEPS), inputs, guided=False)


def test_embeddings_need_no_image_encoder(pipe: FastCachePipeline) -> None:
    engines = {role: engine for role, engine in pipe.bundle.manifest.engines.items() if role != "image_encoder"}
    manifest = pipe.bundle.manifest.model_copy(update={"engines": engines})
    alone = FastCachePipeline(replace(pipe.bundle, manifest=manifest))
    with pytest.raises(ValueError, match="expected ip_adapter_image_embeds for a bundle without an image encoder"):
        latents(alone, **others())
    embeds = torch.randn(2, 1, 12, generator=seeded(5))
    given = {**others(), "ip_adapter_image": None, "ip_adapter_scale": 1.0}
    assert torch.equal(*(latents(each, **given, ip_adapter_image_embeds=[embeds]) for each in (alone, pipe)))
    with pytest.raises(ValueError, match=r"one tensor of shape \[2, 1, 12\], got \[\[2, 2, 12\]\]"):
        latents(alone, **given, ip_adapter_image_embeds=[embeds.expand(2, 2, 12)])
