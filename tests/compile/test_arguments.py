"""Values of wrong types, ranges and shapes for `build_engines`: one line that names the argument, and nothing is left.

The build itself, which a value that is taken would begin, is not run.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import fastcache
from fastcache import BuildError, Recipe
from fastcache.compile.fields import RecipeFields
from odd_values import ODD, refusal

OWN = [name for name in inspect.signature(fastcache.build_engines).parameters if name != "fields"]
NAMES = [*OWN, *(name for name in Recipe.model_fields if name != "model")]
# What some arguments take, on another machine or in another place if not here.
MORE: dict[str, list[Any]] = {
    "backend": ["openvino", "inductor", "tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt"],
    "device": ["cpu", "cuda"],
    "dtype": ["auto", "fp16", "bf16", "int8"],
    "batch": ["1:2", "4:2:1", "0", "1:2:4", "1:2:4:8", {"min": 2, "opt": 1}],
    "branch_id": ["0,1", "0,0", "0,", ",", "1,x", [0, 1], [True]],
    "sizes": [("32x32",), ("32x32", "32x32"), ("32",), "32x32"],
    "lora": ["x.safetensors", ("x.safetensors:2",), ("x:nan",), ({"path": "x"},)],
    "components": [("unet",), ("vae",), ("unet", "unet"), "unet"],
    "compute_capability": [("8.9",), ("8.6.1",), "8.9"],
}
BEGINS = "here the build would begin"


@pytest.fixture
def asked(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of a build that gets as far as it is to get here."""

    def begin(*_: Any) -> None:
        raise BuildError(BEGINS)

    monkeypatch.setattr("fastcache.compile.builder._run_worker", begin)
    monkeypatch.chdir(tmp_path)
    given = {"model": str(tiny_model), "output": "out"}
    assert refusal(fastcache.build_engines, **given) == BEGINS
    return given


@pytest.mark.parametrize("name", NAMES)
def test_any_value_is_taken_or_refused_in_one_line_that_names_it(name: str, asked: dict[str, Any]) -> None:
    for value in (*ODD, *MORE.get(name, ())):
        if name == "progress" and callable(value):
            continue  # what is called may raise what it likes
        said = refusal(fastcache.build_engines, **{**asked, name: value})
        # A value that is taken begins a build; what it is told of comes before.
        assert said is not None
        assert said == BEGINS or names(said, name, value), said
        assert not list(Path().rglob("*")), said


def test_editors_are_told_every_field_of_a_recipe() -> None:
    assert RecipeFields.__annotations__.keys() == Recipe.model_fields.keys() - {"model"}


def names(said: str, name: str, value: Any) -> bool:
    """Whether a line names an argument, or else shows a value that only it can have."""
    plain = said.lower().replace("-", "_").replace(" ", "_")
    return name in plain or (isinstance(value, str) and len(value) > 3 and value in said)


@pytest.mark.parametrize("value", ["yes", 1, 0, None, []])
def test_what_is_no_switch_is_no_yes(value: Any, asked: dict[str, Any]) -> None:
    for name in ("force", "random_weights", "onnx_only", "kernels"):
        said = refusal(fastcache.build_engines, **{**asked, name: value})
        assert said is not None
        assert name in said


@pytest.mark.parametrize("name", ["branch_id", "height", "width", "max_tokens"])
def test_true_is_no_number(name: str, asked: dict[str, Any]) -> None:
    said = refusal(fastcache.build_engines, **{**asked, name: True})
    assert said is not None
    assert name in said
