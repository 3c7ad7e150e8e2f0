"""Bundles with shallow engines at several branches: built, verified, and run through plans that choose a depth."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import fastcache
from build_store import BuildStore
from eager_engines import eager_engines, plain_run
from fastcache import Bundle, CachePlan, Forecast, compile_sampler
from fastcache.bundle.recipe import recipe_from
from fastcache.cli import main
from fastcache.compile import passes
from fastcache.cut.partition import partition_branches
from fastcache.health.verify import verify_bundle
from fastcache.loop.lane import Lane
from fastcache.pipeline.request import Request
from fastcache.sampler.scheduler import make_scheduler
from small_unets import small_unet

pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")

STEPS = 8
PLAN = CachePlan.from_branches((None, 2, 0, 0, 2, 0, None, 0))


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, builds: BuildStore) -> Bundle:
    return builds.bundle(tiny_model, branch_id=[0, 2], components=("unet",))


def test_the_manifest_names_every_branch(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert (manifest.branch_id, manifest.branches) == (0, (0, 2))
    passes = manifest.passes
    assert list(passes) == list(manifest.engines) == ["full", "shallow-0", "shallow-2"]
    assert all(entry.engines == (name,) for name, entry in passes.items())
    assert passes["full"].takes == ()
    assert (
        set(passes["full"].stores) == {*passes["shallow-0"].takes, *passes["shallow-2"].takes} == {*manifest.features}
    )
    assert all(name.endswith("_2") for name in passes["shallow-2"].takes)
    assert passes["shallow-2"].stores == passes["shallow-0"].takes
    assert passes["shallow-0"].stores == ()
    costs = [passes[name].multiply_adds for name in ("shallow-0", "shallow-2", "full")]
    assert 0 < costs[0] < costs[1] < costs[2]


def test_verify_checks_every_branch(bundle: Bundle) -> None:
    found = verify_bundle(bundle.path)
    assert found.problems == []
    assert found.parity is not None
    assert found.parity.shallow_vs_full <= found.parity.tolerance


class OffByAPercent(nn.Module):
    """A deeper pass whose refreshed feature is not what the full pass stored."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        noise_pred, *refreshed = self.module(inputs)
        return noise_pred, *(feature * 1.01 for feature in refreshed)


def test_what_a_deeper_pass_refreshes_is_checked_too() -> None:
    unet = small_unet("sd15")
    inputs = passes.unet_inputs(unet, 2, 16, 16, 7)
    cuts = partition_branches(unet, (0, 4), "auto")
    expected = inputs | passes.reference(unet, cuts, inputs)
    full, shallow, deeper = passes.exportable_unet(cuts, inputs)
    right = passes.module_parity([full, shallow, deeper], expected, "fp32")
    assert max(right.full_vs_model, right.shallow_vs_full) < 1e-5
    off = replace(deeper, module=OffByAPercent(deeper.module))
    wrong = passes.module_parity([full, shallow, off], expected, "fp32")
    assert wrong.shallow_vs_full == pytest.approx(0.01, rel=1e-3)


def through_eager(bundle: Bundle, model: Path, plan: CachePlan, embeds: Tensor, latents: Tensor) -> Tensor:
    """The same run on the PyTorch passes."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").eval()
    cuts = partition_branches(unet, (0, 2), "auto")
    table = compile_sampler(make_scheduler("ddim", bundle.manifest.model.scheduler), STEPS)
    lane = Lane(*eager_engines(cuts, latents, embeds[:1]), images=1, halves=2, channels=latents.shape[1])
    lane.set_inputs({"encoder_hidden_states": embeds})
    *_, last = plain_run(lane, table, plan, latents, guidance_scale=5.0).steps
    return last.latents.clone()


@pytest.mark.parametrize("forecast", [None, Forecast(1)], ids=["reuse", "forecast"])
def test_a_plan_chooses_a_depth_for_each_step(bundle: Bundle, tiny_model: Path, forecast: Forecast | None) -> None:
    pipe = fastcache.load(bundle.path)
    spec = {s.name: s.shape for s in bundle.manifest.engines["full"].inputs}
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, *(int(n) for n in spec["encoder_hidden_states"][1:]), generator=generator)
    latents = torch.randn(1, *(int(n) for n in spec["sample"][1:]), generator=generator)
    drawn: dict[CachePlan, Tensor] = {}
    for names in (PLAN.passes, CachePlan.from_refresh_steps(STEPS, (0, 6)).passes):
        plan = CachePlan(names, forecast=forecast)
        request = Request(num_inference_steps=STEPS, plan=plan, latents=latents, guidance_scale=5.0)
        run = pipe.start(request, {"encoder_hidden_states": embeds}, guided=True)
        *_, last = run.steps
        drawn[plan] = last.latents.clone()
        expected = through_eager(bundle, tiny_model, plan, embeds, latents)
        torch.testing.assert_close(drawn[plan], expected, rtol=1e-3, atol=1e-3)
    one, other = drawn.values()
    assert float((one - other).abs().max()) > 0.01


def test_a_branch_that_the_bundle_lacks_is_refused(bundle: Bundle) -> None:
    embeds = torch.zeros(2, 16, 16)
    request = Request(num_inference_steps=3, plan=CachePlan.from_branches((None, 0, 3)))
    with pytest.raises(ValueError, match=r"passes full, shallow-0, shallow-2, which .*, got one with shallow-3; build"):
        fastcache.load(bundle.path).start(request, {"encoder_hidden_states": embeds}, guided=True)


@pytest.mark.parametrize(
    ("given", "branches"), [(3, (3,)), ("3", (3,)), ("0,2", (0, 2)), ([2, 0], (2, 0)), ((1,), (1,))]
)
def test_a_recipe_takes_one_branch_id_or_several(given: object, branches: tuple[int, ...]) -> None:
    recipe = recipe_from({"branch_id": given})
    assert recipe.branches == branches
    assert recipe_from(recipe.model_dump()) == recipe


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0,0", "each branch once, got 0, 0"),
        ("0,x", "further_branch_ids.*'x'"),
        ("0,-1", "further_branch_ids.*-1"),
        ("", "branch_id.*''"),
        ([], r"branch_id.*\[\]"),
    ],
)
def test_bad_branch_ids_are_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        recipe_from({"branch_id": given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("--guidance-steps", "3:6", "--forecast", 2, "--forecast-by", "sigma", "--damping", 0.5), 0, ""),
        (("--guidance-steps", "4:6"), 2, "the guided step 4 (shallow-0) to reuse"),
        (("--guidance-steps", "3-6"), 2, "expected --guidance-steps as A:B"),
        (("--damping", 0.5), 2, "only with --forecast"),
    ],
)
def test_the_plan_command_takes_an_interval_and_a_forecast(
    flags: tuple[object, ...],
    code: int,
    says: str,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "plan.json"
    command = ("plan", "--engines", bundle.path, "--steps", STEPS, "--uniform", 3, "--output", output, *flags)
    monkeypatch.setattr(sys, "argv", ["fastcache", *map(str, command)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert int(stop.value.code or 0) == code
    assert says in " ".join(capsys.readouterr().err.split())
    if code == 0:
        plan = CachePlan.from_json(output.read_text())
        assert plan.unguided_steps == (0, 1, 2, 6, 7)
        assert plan.forecast == Forecast(2, 0.5, "sigma")
