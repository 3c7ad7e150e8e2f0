"""Recipes: what is accepted, and the one line that says why something is not."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcache.bundle.recipe import Profile, Recipe, find_recipe, recipe_from, recipe_from_toml, recipe_names

BATCHES = st.lists(st.integers(1, 10**6), min_size=3, max_size=3).map(sorted)


@given(BATCHES)
def test_a_profile_reads_what_it_writes(sizes: list[int]) -> None:
    low, usual, high = sizes
    profile = Profile(min=low, opt=usual, max=high)
    assert recipe_from({"batch": str(profile)}).batch == profile


@given(st.integers(1, 10**6))
def test_one_number_is_a_profile(size: int) -> None:
    expected = Profile(min=size, opt=size, max=size)
    assert recipe_from({"batch": size}).batch == recipe_from({"batch": str(size)}).batch == expected


@given(st.text(max_size=12) | st.integers(max_value=0) | st.booleans() | st.none() | st.floats())
def test_any_other_batch_is_one_line(value: object) -> None:
    if isinstance(value, str) and re.fullmatch(r"\d+|\d+:\d+:\d+", value):
        return
    with pytest.raises(ValueError, match=r"^batch") as caught:
        recipe_from({"batch": value})
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


@given(st.builds(Recipe, branch_id=st.integers(0, 30), height=st.none() | st.integers(8, 8192)))
def test_a_recipe_survives_its_values(recipe: Recipe) -> None:
    assert recipe_from(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"batch": "4:2:8"}, "batch: expected MIN <= OPT <= MAX, got 4:2:8"),
        ({"batch": "1:2"}, "batch: expected N or MIN:OPT:MAX, got '1:2'"),
        ({"batch": "0"}, "batch.min: "),
        ({"backend": "cuda"}, "backend: .* onnxruntime-tensorrt, got 'cuda'"),
        ({"height": 4}, "height: .* 8, got 4"),
        ({"branch_id": -1}, "branch_id: .* 0, got -1"),
        ({"components": ["unet", "lora"]}, "components.1: .*got 'lora'"),
        ({"components": ["vae"]}, "recipe: expected components with 'unet' among them, got vae"),
        ({"components": []}, "recipe: expected components with 'unet' among them, got none"),
        ({"brunch_id": 1}, "brunch_id: Extra inputs are not permitted, got 1"),
        ({"model": ""}, "model: .*got ''"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=rf"^{expected}") as caught:
        recipe_from(values)
    assert "\n" not in str(caught.value)


def test_the_line_is_as_short_as_its_value(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^recipe: expected components with") as caught:
        recipe_from({"components": ["vae"], "model": "m" * 1000})
    assert len(str(caught.value)) < 200


def test_a_toml_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('model = "m"\nbatch = "1:2:4"\ncomponents = ["unet"]\n')
    assert recipe_from_toml(file) == Recipe(model="m", batch=Profile(min=1, opt=2, max=4), components=("unet",))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"model = ", "expected a TOML recipe in .*mine.toml: "),
        (b"\xff", "expected a TOML recipe in .*mine.toml: "),
        (b"height = 'tall'", "height: .*got 'tall'"),
        (b"[unet]\nheight = 8", "unet: Extra inputs"),
    ],
)
def test_a_toml_file_that_is_no_recipe(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{expected}") as caught:
        recipe_from_toml(tmp_path / "mine.toml")
    assert "\n" not in str(caught.value)


def test_a_recipe_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got .*none\.toml: No such file"):
        recipe_from_toml(tmp_path / "none.toml")
    with pytest.raises(ValueError, match=r"Is a directory"):
        recipe_from_toml(tmp_path)


def test_packaged_recipes_are_found_by_name_and_fit() -> None:
    assert {"demo", "sd15-cpu"} <= set(recipe_names())
    for name in recipe_names():
        assert recipe_from_toml(find_recipe(name)).model
    assert recipe_from_toml(find_recipe("demo")).model == "demo"
    assert recipe_from_toml(find_recipe("sd15-cpu")).random_weights


def test_a_path_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text('model = "mine"')
    assert recipe_from_toml(find_recipe("demo")).model == "mine"
    os.unlink("demo")
    assert find_recipe("demo").name == "demo.toml"


@pytest.mark.parametrize("name", ["dem", "demo.toml", "../recipes/demo", "*", ""])
def test_an_unknown_recipe_lists_the_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected a recipe file or one of demo, .*sd15-cpu"):
        find_recipe(name)
