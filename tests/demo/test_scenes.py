"""Scenes, their captions and their reader; and the bundled model as it lies on the disk."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from fastcache.demo import MODEL_DIRECTORY
from fastcache.demo.reader import matches, read_scene
from fastcache.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    OPPOSITE,
    PLACES,
    RADII,
    SHAPES,
    Object,
    Scene,
    describe,
    draw_scene,
    held_out_scenes,
    render,
    training_scenes,
)

PHRASE = rf"an? ({'|'.join(RADII)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) at the ({'|'.join(PLACES)})"
CAPTION = re.compile(rf"{PHRASE}( and {PHRASE})? on a ({'|'.join(BACKGROUNDS)}) background")


def random_scenes(count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw_scene(rng) for _ in range(count)]


def test_the_reader_reads_true_renders(record_property: pytest.RecordProperty) -> None:
    rng = np.random.default_rng(1)
    wholly, objects, right = 0, 0, Counter[str]()
    scenes = random_scenes(500, seed=0)
    for scene in scenes:
        read = read_scene(render(scene, rng))
        wholly += matches(read, scene)
        right["background"] += read.background == scene.background
        right["count"] += len(read.objects) == len(scene.objects)
        found = {o.place: o for o in read.objects}
        for o in scene.objects:
            objects += 1
            for attribute in ("size", "colour", "shape", "place"):
                right[attribute] += getattr(found.get(o.place), attribute, None) == getattr(o, attribute)
    shares = {name: n / (len(scenes) if name in ("background", "count") else objects) for name, n in right.items()}
    for name, share in shares.items():
        record_property(name, share)
    assert wholly / len(scenes) >= 0.98, shares
    assert min(shares.values()) >= 0.98, shares


def test_matching_wants_every_attribute_and_no_further_object() -> None:
    red = Object("large", "red", "circle", "left")
    blue = Object("small", "blue", "ring", "right")
    wanted = Scene((red, blue), "white")
    assert matches(Scene((blue, red), "white"), wanted)
    for other in (
        Scene((red, blue), "gray"),
        Scene((red,), "white"),
        Scene((red, blue, blue), "white"),
        *(
            Scene((red, Object(**{**vars(blue), name: value})), "white")
            for name, value in {"size": "large", "colour": "red", "shape": "cross", "place": "top"}.items()
        ),
    ):
        assert not matches(other, wanted)


def test_an_empty_image_has_no_objects() -> None:
    assert read_scene(np.full((64, 64, 3), 160, np.uint8)) == Scene((), "gray")


def test_scenes_are_one_or_two_objects_at_opposite_places() -> None:
    scenes = random_scenes(300, seed=2)
    assert {len(scene.objects) for scene in scenes} == {1, 2}
    for scene in scenes:
        if len(scene.objects) == 2:
            first, second = scene.objects
            assert OPPOSITE[first.place] == second.place


def test_held_out_scenes_are_not_trained_on() -> None:
    held_out = held_out_scenes(200)
    assert len(set(held_out)) == 200
    assert all(scene.held_out for scene in held_out)
    trained = set(islice(training_scenes(np.random.default_rng(3)), 5000))
    assert not trained & set(held_out)
    share = np.mean([scene.held_out for scene in random_scenes(4000, seed=4)])
    assert 0.04 < share < 0.09  # one in sixteen


def test_the_order_of_the_objects_does_not_decide_what_is_held_out() -> None:
    for scene in random_scenes(200, seed=5):
        assert Scene(scene.objects[::-1], scene.background).held_out == scene.held_out


def test_a_seed_draws_the_same_scenes_and_the_same_pixels() -> None:
    assert random_scenes(50, seed=6) == random_scenes(50, seed=6) != random_scenes(50, seed=7)
    assert held_out_scenes(20) == held_out_scenes(20) != held_out_scenes(20, seed=1)
    (scene,) = held_out_scenes(1)
    first, again, other = (render(scene, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_captions_follow_their_grammar() -> None:
    for scene in random_scenes(300, seed=8):
        assert CAPTION.fullmatch(scene.caption())
    scene = Scene((Object("small", "orange", "ring", "top"), Object("large", "cyan", "cross", "bottom")), "gray")
    assert scene.caption() == "a small orange ring at the top and a large cyan cross at the bottom on a gray background"
    assert describe(scene, sizes=False, places=False, background=False) == "an orange ring and a cyan cross"


def test_partial_captions_leave_out_a_tenth_of_each_kind() -> None:
    rng = np.random.default_rng(9)
    captions = [scene.partial_caption(rng) for scene in random_scenes(2000, seed=9)]
    for words in (RADII, ["at the"], ["background"]):
        missing = np.mean([not any(word in caption for word in words) for caption in captions])
        assert 0.07 < missing < 0.13


def test_the_bundled_model_loads_in_diffusers() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL_DIRECTORY)
    assert pipe.unet.config.sample_size == 16
    assert 2 ** (len(pipe.vae.config.block_out_channels) - 1) == 4
    ids = pipe.tokenizer(held_out_scenes(1)[0].caption()).input_ids
    assert pipe.tokenizer.unk_token_id not in ids[1:-1]


def test_the_bundled_model_is_small_and_all_fp16() -> None:
    files = sorted(MODEL_DIRECTORY.rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["text_encoder", "unet", "vae"]
    assert sum(file.stat().st_size for file in files) < 24e6
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
            assert dtypes == {"F16"}, file
    assert not [file for pattern in ("*.bin", "*.pt", "*.pkl", "*.ckpt") for file in MODEL_DIRECTORY.rglob(pattern)]
