"""`fastcache generate` from pictures: files in, files out, and one line for what does not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rich.progress
import torch
from PIL import Image
from safetensors.torch import save_file

import fastcache
from fastcache.bundle.bundle import Bundle
from fastcache.commands import watched
from fastcache.loop.steps import Run
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.sampler.table import SamplerTable


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Pictures to begin with, and files that are none."""
    rng = np.random.default_rng(0)
    found = {name: tmp_path / f"{name}.png" for name in ("photo", "large", "mask", "text")}
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(found["photo"])
    Image.fromarray(rng.integers(0, 255, (48, 80, 4), dtype=np.uint8)).save(found["large"])
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(found["mask"])
    found["text"].write_text("not a picture")
    return found


def pixels(path: str | Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_pictures_begin_with_a_picture(
    command: Any, tiny_bundle: Bundle, tmp_path: Path, files: dict[str, Path]
) -> None:
    common = ("generate", "--engines", tiny_bundle.path, "--prompt", "a cat", "--steps", 5, "--json")

    def drawn(*flags: object, output: Path) -> list[str]:
        result = command(*common, *flags, "--output", output)
        assert result.code == 0, result.err
        return [image["path"] for image in result.json["images"]]

    begun = ("--init-image", files["photo"], "--strength", 0.5, "--seed", 3)
    (one,) = drawn(*begun, output=tmp_path / "one.png")
    (noise,) = drawn("--seed", 3, output=tmp_path / "noise.png")
    assert not np.array_equal(pixels(one), pixels(noise))
    with Image.open(one) as image:
        image.load()
        text: dict[str, str] = image.text  # pyright: ignore[reportAttributeAccessIssue] (only PNG files have it)
    assert (text["init_image"], text["strength"]) == ("photo.png", "0.5")

    # A seed draws the same however many are drawn with it, for each begins with a sample of its own.
    several = drawn(*begun[:-1], 2, "--num-images", 3, output=tmp_path / "several")
    assert np.abs(pixels(one) - pixels(several[1])).max() <= 1

    masked = drawn(*begun, "--mask", files["mask"], "--cache-interval", 2, output=tmp_path / "masked.png")
    assert not np.array_equal(pixels(masked[0]), pixels(one))
    resized = drawn("--init-image", files["large"], "--height", 32, "--width", 32, output=tmp_path / "resized.png")
    assert pixels(resized[0]).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--init-image", "missing.png"), "expected a picture in missing.png: No such file"),
        (("--init-image", "text"), "expected a picture in"),
        (("--init-image", "large"), "expected an image of 32x32, .* got 80x48; give height and width to resize it"),
        (("--init-image", "photo", "--strength", 2), "expected strength to be a finite number from 0 to 1, got 2.0"),
        (("--strength", 0.5), "expected an image with strength, got none"),
        (("--mask", "mask"), "expected an image with mask_image, got none"),
        (("--height", 40), "expected 32x32, which this bundle was built for, got 32x40; build another with --sizes"),
        (("--clip-skip", 5), "expected clip_skip from 0 to 2, got 5"),
        (("--control-guidance-end", 0.5), "expected no control_guidance_end for a bundle without ControlNet"),
        (("--original-size", 64, 64), "expected no original_size, which only models of SDXL's kind are told"),
        (("--embeds", "text"), "expected --embeds to be a .safetensors file of embeddings, got .*text.png: "),
        (("--denoising-end", 0.5), "expected --refiner with --denoising-end, got none"),
        (("--refiner", "here"), "expected --refiner to be a bundle's folder, got here, which is not there"),
        (("--refiner", ".", "--plan", "p.json"), "expected --cache-interval with --refiner, .* got --plan"),
    ],
)
def test_what_does_not_fit_is_one_line(
    flags: tuple[object, ...],
    says: str,
    command: Any,
    monkeypatch: pytest.MonkeyPatch,
    tiny_bundle: Bundle,
    tmp_path: Path,
    files: dict[str, Path],
) -> None:
    monkeypatch.chdir(tmp_path)
    named = [files.get(str(flag), flag) for flag in flags]
    common = ("generate", "--engines", tiny_bundle.path, "--prompt", "a cat", "--output", tmp_path / "out.png")
    result = command(*common, *named)
    errors = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert (result.code, result.out, len(errors)) == (2, "", 1), result.err
    assert re.search(says, errors[0]), errors[0]


def test_the_bar_knows_how_many_steps_there_are(
    command: Any, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches of two steps, on a terminal."""
    counts: list[tuple[float, float | None]] = []

    class Watched(rich.progress.Progress):
        def update(self, *arguments: Any, **changes: Any) -> None:
            super().update(*arguments, **changes)
            counts.append((self.tasks[0].completed, self.tasks[0].total))

    monkeypatch.setattr("rich.progress.Progress", Watched)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    base = ("--engines", tiny_bundle.path, "--prompt", "a cat", "--sampler", "ddim", "--steps", 2)
    assert command("generate", *base, "--num-images", 6, "--output", tmp_path / "out").code == 0
    assert counts == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("sampler", ["ddim", "unipc"])
def test_a_picture_on_its_way_can_be_watched(
    sampler: str, command: Any, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file that is gone when the picture is there; the picture is the same, by the sampler's table."""
    seen, output = list[tuple[int, int]](), tmp_path / "own.png"
    preview = tmp_path / "own.preview.png"
    shown = FastCachePipeline.preview

    def look(pipe: FastCachePipeline, run: Run, step: int) -> Any:
        assert isinstance(run.sampler, SamplerTable)
        if seen:
            assert pixels(preview).shape == (32, 32, 3)
        seen.append((step, len(list(tmp_path.iterdir()))))
        return shown(pipe, run, step)

    monkeypatch.setattr(FastCachePipeline, "preview", look)
    monkeypatch.setattr(watched, "_SHARE", 1)  # every step
    flags = ("generate", "--engines", tiny_bundle.path, "--prompt", "a", "--steps", 4, "--sampler", sampler)
    said = command(*flags, "--output", output, "--watch")
    assert said.code == 0
    assert seen == [(0, 0), *((step, 1) for step in (1, 2, 3))]
    assert str(preview) in said.err.replace("\n", "")
    assert command(*flags, "--output", tmp_path / "other.png").code == 0
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["other.png", "own.png"]
    assert np.array_equal(pixels(output), pixels(tmp_path / "other.png"))
    preview.write_bytes(b"somebody's own")
    refused = command(*flags, "--output", output, "--watch")
    assert refused.code == 2
    assert f"expected no file {preview}" in refused.err.replace("\n", " ").replace("  ", " ")
    assert preview.read_bytes() == b"somebody's own"


def test_embeddings_in_a_file_take_the_place_of_a_prompt(command: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    pipe = fastcache.load(tiny_bundle.path)
    names = {"prompt_embeds": "a cat", "negative_prompt_embeds": "blue"}
    save_file({name: pipe.encode_prompt([text]) for name, text in names.items()}, tmp_path / "embeds.safetensors")
    save_file({"hidden": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"prompt_embeds": torch.zeros(2, 8, 16)}, tmp_path / "two.safetensors")
    common = ("generate", "--engines", tiny_bundle.path, "--steps", 3, "--json", "--eta", 0.5)
    texts = ("--prompt", "a cat", "--negative-prompt", "blue")
    drawn: list[Any] = []
    for name, flags in (("texts", texts), ("embeds", ("--embeds", tmp_path / "embeds.safetensors"))):
        result = command(*common, *flags, "--num-images", 2, "--output", tmp_path / name)
        assert result.code == 0, result.err
        drawn.append([pixels(image["path"]) for image in result.json["images"]])
    for one, other in zip(*drawn, strict=True):
        assert np.abs(one - other).max() <= 1
    assert not np.array_equal(*drawn[0])
    for flags, says in (
        ((*texts, "--embeds", tmp_path / "embeds.safetensors"), "expected either prompt or prompt_embeds, got both"),
        ((), "expected either prompt or prompt_embeds, got neither"),
        (("--embeds", tmp_path / "other.safetensors"), "negative_pooled_prompt_embeds, ip_adapter_image_embeds in"),
        (("--embeds", tmp_path / "two.safetensors"), "expected one row in prompt_embeds of"),
    ):
        refused = command(*common, *flags, "--output", tmp_path / "none")
        assert refused.code == 2
        assert says in " ".join(refused.err.split())


@pytest.mark.slow
def test_flags_of_build_engines_reach_the_recipe(command: Any, tiny_model: Path, tmp_path: Path) -> None:
    common = ("build-engines", "--model", tiny_model, "--output", tmp_path / "out")
    for flags, says in (
        (("--sizes", "32x32,33x32"), "expected a width divisible by 8 for"),
        (("--sizes", "32x32", "--height", 32), "expected either sizes or height and width, got both"),
        (("--max-tokens", 4), "expected max_tokens of 8 or more for"),
        (("--lora", "none.safetensors:0.5"), "expected a LoRA as PATH[:WEIGHT]"),
    ):
        refused = command(*common, *flags)
        assert refused.code == 2
        assert says in " ".join(refused.err.split())
