"""The tables that a bundle keeps are those that the schedulers make, number for number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastcache.bundle.bundle import MANIFEST, Bundle, open_bundle, seal
from fastcache.errors import BundleError
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.sampler import stored
from fastcache.sampler.scheduler import SAMPLERS, make_scheduler, own_sampler, step_arguments
from fastcache.sampler.stored import TABLES, Samplers, tables_file
from fastcache.sampler.table import SamplerTable, compile_sampler

pytestmark = pytest.mark.filterwarnings("ignore:.*__array__:DeprecationWarning")

CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "prediction_type": "v_prediction",
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Samplers:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "USUAL_STEPS", (4, 7))
        return written(tmp_path_factory.mktemp("tables"), CONFIG, usual=6)


def written(folder: Path, config: dict[str, Any], usual: int = 4) -> Samplers:
    file = folder / TABLES
    file.write_bytes(tables_file(config, usual))
    return Samplers(config, file)


def check_equal(got: SamplerTable, expected: SamplerTable) -> None:
    for name in ("timesteps", "input_scale", "x", "eps", "noise"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
        assert getattr(got, name).dtype is getattr(expected, name).dtype
    for name in ("init_noise_sigma", "noise_drawn", "stepwise", "sigmas"):
        assert getattr(got, name) == getattr(expected, name), name
    assert got.recursion() == expected.recursion()
    assert (got.recursion() is got.stepwise) == (expected.recursion() is expected.stepwise)


@pytest.mark.parametrize("steps", [4, 6, 7])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_kept_table_is_the_one_that_is_made(kept: Samplers, name: str, steps: int) -> None:
    scheduler = make_scheduler(name, CONFIG)
    found = kept.table(name, steps)
    assert found is not None
    check_equal(found, compile_sampler(scheduler, steps, **step_arguments(scheduler, 0.0)))


def test_what_is_not_kept_is_made_by_whoever_asks(kept: Samplers) -> None:
    assert kept.table("ddim", 5) is None
    assert kept.table("no such", 4) is None
    assert Samplers(CONFIG).table("ddim", 4) is None


def test_the_models_own_sampler_and_how_many_steps_make_so_many_calls(kept: Samplers) -> None:
    assert kept.own == own_sampler(CONFIG) == Samplers(CONFIG).own == "ddim"
    assert kept.prediction_type == "v_prediction"
    assert (kept.steps_for("ddim", 7), kept.steps_for("plms", 7), kept.steps_for("heun", 7)) == (7, 6, 4)
    assert kept.steps_for("ddim", 5) is None


def test_a_scheduler_without_a_name_is_kept_by_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "USUAL_STEPS", (4,))
    config = {**CONFIG, "_class_name": "DEISMultistepScheduler"}
    kept = written(tmp_path, config)
    assert kept.own == "DEISMultistepScheduler"
    found = kept.table("DEISMultistepScheduler", 4)
    assert found is not None
    check_equal(found, compile_sampler(make_scheduler("DEISMultistepScheduler", config), 4))


def test_a_sampler_without_a_table_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "USUAL_STEPS", (4,))
    kept = written(tmp_path, {**CONFIG, "clip_sample": True})
    assert kept.own == "DDIMScheduler"
    assert kept.table("DDIMScheduler", 4) is None
    assert kept.table("ddim", 4) is not None


def test_more_steps_than_a_model_was_trained_with_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "USUAL_STEPS", (4, 30))
    kept = written(tmp_path, {**CONFIG, "num_train_timesteps": 20})
    assert kept.table("ddim", 4) is not None
    assert kept.table("ddim", 30) is None


def test_tables_of_another_scheduler_are_none_of_the_models(kept: Samplers) -> None:
    other = Samplers({**CONFIG, "beta_end": 0.02}, kept._path)
    assert other.table("ddim", 4) is None
    assert other.own == "ddim"


@pytest.mark.parametrize("damage", ["empty", "text", "shape", "lookback", "nan", "missing"])
def test_a_file_that_holds_no_tables_is_refused(kept: Samplers, tmp_path: Path, damage: str) -> None:
    """It is the one that was built, or the bundle would not have been opened; whether an honest build made it."""
    file = tmp_path / TABLES
    with safe_open(kept._path, "pt") as whole:
        said = whole.metadata()
    fields = load_file(kept._path)
    if damage == "shape":
        fields["ddim/4/eps"] = fields["ddim/4/eps"][:3]
    elif damage == "lookback":
        fields["ddim/4/first"] = fields["ddim/4/first"] - 1
    elif damage == "nan":
        fields["ddim/4/x"] = fields["ddim/4/x"] * float("nan")
    elif damage == "missing":
        del fields["ddim/4/x"]
    save_file(fields, file, said)
    if damage in ("empty", "text"):
        file.write_bytes(b"" if damage == "empty" else json.dumps(CONFIG).encode() * 9)
    with pytest.raises(BundleError, match=r"expected (a table for ddim, 4 steps|samplers' tables)"):
        Samplers(CONFIG, file).table("ddim", 4)


def test_a_bundle_keeps_the_usual_tables(tiny_bundle: Bundle) -> None:
    """Of the usual counts the store builds with 4 alone (`build_store.py`)."""
    samplers, model = tiny_bundle.samplers, tiny_bundle.manifest.model
    for name in SAMPLERS:
        for steps in (4, model.defaults.num_inference_steps):
            assert samplers.table(name, steps) is not None, (name, steps)
    expected = compile_sampler(make_scheduler("ddim", model.scheduler), 4, eta=0.0)
    found = samplers.table("ddim", 4)
    assert found is not None
    check_equal(found, expected)


def test_a_bundle_without_tables_draws_the_same(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """As bundles of earlier builds are."""
    folder = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    (folder / TABLES).unlink()
    (folder / MANIFEST).unlink()
    seal(folder, {**tiny_bundle.manifest.to_json(), "files": [], "bundle_sha256": ""})
    bare = open_bundle(folder)
    assert bare.samplers.table("ddim", 4) is None
    common: dict[str, Any] = {"num_inference_steps": 4, "cache_interval": 2, "seed": 1, "output_type": "latent"}
    drawn = [FastCachePipeline(bundle)("a cat", **common).images for bundle in (tiny_bundle, bare)]
    assert torch.equal(*drawn)
