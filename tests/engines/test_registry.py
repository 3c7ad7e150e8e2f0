"""A backend is found by its name and says what it can do; a new one is a file and a line."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import fastcache
import fastcache_engines
from fastcache.bench.arms import Defaults
from fastcache.bench.lineup import line_up
from fastcache.bundle.bundle import open_bundle
from fastcache.bundle.recipe import recipe_from
from fastcache.compile import worker
from fastcache.compile.builder import resolve
from fastcache.health.doctor import examine
from fastcache.health.verify import verify_bundle
from fastcache.loop.streams import load_streams
from fastcache_engines import BACKENDS, BackendUnavailable, Capabilities, TensorSpec
from fastcache_engines.tensors import agreed

ROOT = Path(__file__).resolve().parents[2]
ROOMS = sorted(path for room in (ROOT / "fastcache", ROOT / "engines") for path in room.rglob("*.py"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line that registers a backend."""
    monkeypatch.setitem(BACKENDS, "small", "small_backend")
    return "small"


@pytest.fixture
def small_bundle(small: str, tiny_model: Path, tmp_path: Path) -> fastcache.Bundle:
    """The tiny model built with it; in this process, for a child would not know of it."""
    wishes: dict[str, Any] = {"model": str(tiny_model), "backend": small, "dtype": "fp32", "batch": "1:1:2"}
    job = resolve(recipe_from({**wishes, "components": ("unet",)}))
    worker.build(job, tmp_path, lambda message: None)
    return open_bundle(tmp_path)


@pytest.mark.slow
def test_a_new_backend_is_a_file_and_a_line(small_bundle: fastcache.Bundle, tiny_model: Path) -> None:
    """Built, checked, served in threads, drawn with, and known to `doctor` and `bench`, with no other line changed."""
    manifest = small_bundle.manifest
    assert (manifest.backend, manifest.parity.measured_on) == ("small", "small")
    assert not verify_bundle(small_bundle.path).problems
    plain = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    embeds = plain.encode_prompt("a b", "cpu", 1, True)
    given: dict[str, Any] = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    given |= {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 3.0}
    expected = plain(generator=torch.Generator().manual_seed(0), **given).images
    drawn = fastcache.load(small_bundle.path)(generator=torch.Generator().manual_seed(0), **given).images
    torch.testing.assert_close(torch.as_tensor(drawn), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert load_streams(small_bundle, threads=2) is not None
    (row,) = (row for row in examine()["backends"] if row["name"] == "small")
    assert (row["device"], row["dtypes"], row["can_run"], row["can"]) == ("cpu", ["fp32", "bf16"], True, ["typed"])
    assert {"engine:small", "engine:small:fp32"} & {arm.name for arm in line_up(None, Defaults(), "cpu").arms}


def test_what_it_cannot_do_is_refused_by_what_it_says(small: str) -> None:
    for wish, expected in (
        ({"max_tokens": 154}, "expected a backend whose engines serve several prompt lengths, got small"),
        ({"kernels": True}, r"expected a backend whose graphs can hold kernels \(inductor\), got small"),
        ({"onnx_only": True}, "expected a backend that builds from ONNX for --onnx-only, got small"),
        ({"dtype": "fp16"}, "expected dtype fp32 or bf16, which small has on a CPU, got fp16"),
        ({"device": "cuda"}, "expected device cpu, which small runs on, got cuda"),
    ):
        with pytest.raises(BackendUnavailable, match=f"^{expected}"):
            resolve(recipe_from({"model": "demo", "backend": small, **wish}))
    with pytest.raises(ValueError, match=r"^expected no compute capability, .* got 8\.9; use tensorrt-rtx$"):
        resolve(recipe_from({"model": "demo", "backend": small, "compute_capability": ("8.9",)}))


def test_a_name_that_nobody_registered() -> None:
    with pytest.raises(ValueError, match=r"^backend: expected auto or a backend out of onnxruntime, .*, got 'small'$"):
        recipe_from({"backend": "small"})


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_declares_itself(name: str) -> None:
    module = fastcache_engines.backend(name)
    can = module.CAPABILITIES
    assert can.name == name
    assert set(can.concurrent) <= set(can.dtypes) <= {"cpu", "cuda"}
    assert all(can.dtypes.values())
    assert can.computes("cuda:1") == can.computes("cuda")
    with pytest.raises(dataclasses.FrozenInstanceError):
        can.name = "other"  # pyright: ignore[reportAttributeAccessIssue]
    if not can.layers:
        with pytest.raises(BackendUnavailable, match=r"layers can be compared \(onnxruntime, openvino\)"):
            module.evaluate(Path("full.engine"), {})


def test_capabilities_are_off_unless_a_backend_says_so() -> None:
    can = Capabilities(name="some", source="onnx", dtypes={"cpu": ("fp32",)})
    assert (can.named, can.concurrent) == (("typed",), ())
    switches = {field.name for field in dataclasses.fields(can) if field.type == "bool"}
    assert dataclasses.replace(can, **dict.fromkeys(switches, True)).named == tuple(
        field.name for field in dataclasses.fields(can) if field.name in switches
    )
    assert can.computes("cuda") == ()


@pytest.mark.parametrize("file", ROOMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nobody_compares_the_names_of_backends(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):  # `name == "a"`, `"a" == name`, `name in ("a", "b")`
            member = isinstance(node.ops[0], ast.In | ast.NotIn)
            sides = node.comparators if member else [node.left, *node.comparators]
            values = [value for side in sides for value in getattr(side, "elts", [side])]
            assert not {value.value for value in values if isinstance(value, ast.Constant)} & set(BACKENDS), node.lineno


def test_the_registry_imports_no_library_and_not_even_torch() -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx'}"
    code = f"import fastcache_engines, sys; print(*sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


FOUND = (TensorSpec("sample", "float32", ("batch", 4, 8, "sample[3]")), TensorSpec("level", "float32", ("batch",)))


def test_a_caller_may_name_sizes_that_a_file_does_not() -> None:
    assert agreed("full.onnx", FOUND, ()) == FOUND
    told = (TensorSpec("level", "float32", ("batch",)), TensorSpec("sample", "float32", ("batch", 4, "h/8", "w/8")))
    assert agreed("full.onnx", FOUND, told) == told


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([TensorSpec("other", "float32", ("batch",))], r"to have 'other' of float32 \['batch'\], got none; "),
        ([TensorSpec("level", "float16", ("batch",))], r"'level' of float16 \['batch'\], got float32 \['batch'\]; "),
        ([TensorSpec("level", "float32", ("batch", 1))], r"'level' of float32 \['batch', 1\], got float32 \['batch'\]"),
        ([TensorSpec("sample", "float32", ("batch", 5, 8, 8)), FOUND[1]], r"'sample' .* got float32 \['batch', 4, 8"),
        ([FOUND[1]], "to have level, got sample besides; "),
    ],
)
def test_a_caller_who_is_wrong_about_a_file(told: list[TensorSpec], expected: str) -> None:
    with pytest.raises(ValueError, match=rf"^expected full\.onnx .*{expected}") as caught:
        agreed("full.onnx", FOUND, told)
    assert str(caught.value).endswith("build it again")
