"""`fastcache analyze`: its measures against plain formulas, its experiments, and its report as a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from fastcache.analysis import dit as dits
from fastcache.analysis.experiments import LATENTS, guide_in_intervals, switch_prompt
from fastcache.analysis.measure import AnalysisSettings, SimilarityFacts, share_alike
from fastcache.analysis.probes import held_out_accuracy, probe
from fastcache.analysis.recorder import FeatureRecorder, Tap
from fastcache.analysis.subject import Subject, find_subject
from fastcache.analysis.taps import unet_taps
from fastcache.cli import main
from fastcache.compile import models
from fastcache.compile.presets import Preset
from fastcache.demo.scenes import Object, Scene, held_out_scenes
from fastcache.planning.calibration import Calibration
from small_unets import example, small_unet
from tiny_model import TEXT_WIDTH

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def demo() -> Subject:
    return find_subject("demo", num_prompts=2)


def analyze(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fastcache", "analyze", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def report(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of the command on the tiny model, with every option that it takes."""
    folder = tmp_path_factory.mktemp("report")
    prompts = folder / "prompts.txt"
    prompts.write_text("abc\n\nde\n")
    options = ["--prompts", prompts, "--seeds", 2, "--batch", 3, "--gains", "--branch-id", 0, "--branch-id", 1]
    experiments = ["--switch-prompt-at", 2, "--guidance-interval", "1:3"]
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--model", tiny_model, "--steps", 5, "--sampler", "pndm", *options, *experiments]
        assert analyze(patch, *arguments, "--output", folder) == 0
    return folder


def test_similarity_and_change_are_their_formulas() -> None:
    unet = small_unet("one-layer")
    taps = unet_taps(unet, [1])
    kept: dict[str, list[torch.Tensor]] = {tap.name: [] for tap in taps}
    recorder = FeatureRecorder(taps, num_calls=3, images=2)
    (sample, _, text), _ = example(unet, batch=4)
    consumer = unet.up_blocks[-1].resnets[0]  # of skip connection 1, as one layer a block leaves two to each
    blocks = {tap.name: tap.module for tap in taps}
    for step, timestep in enumerate([900, 500, 100]):
        hooks = [
            module.register_forward_hook(lambda _, inputs, out, name=name: kept[name].append((*inputs[:1], out)))
            for name, module in blocks.items()
        ]
        with recorder, torch.no_grad():
            unet(sample * (1 + step), timestep, text)
        for hook in hooks:
            hook.remove()
    recorded = recorder.recorded()
    assert blocks["cached feature, branch 1"] is consumer
    channels = consumer.in_channels - unet.conv_in.out_channels
    features = {
        "up 0": [out for (out,) in kept["up 0"]],
        "cached feature, branch 1": [joined[:, :channels] for joined, _ in kept["cached feature, branch 1"]],
    }
    for name, (first, second, _) in features.items():
        by_row = cosine_similarity(first.flatten(1), second.flatten(1))
        wanted = by_row.unflatten(0, (2, 2)).mean(0).numpy()
        np.testing.assert_allclose(recorded.similarity[name][:, 0, 1], wanted, rtol=1e-4)
        np.testing.assert_allclose(recorded.similarity[name][:, 1, 0], wanted, rtol=1e-4)
        np.testing.assert_allclose(np.diagonal(recorded.similarity[name], axis1=1, axis2=2), 1, rtol=1e-5)
    for name in ("down 0 resnet 0", "up 1 transformer 0"):
        first, second, _ = (out.flatten(1) for _, out in kept[name])
        by_row = (second - first).abs().sum(1) / second.abs().sum(1)
        np.testing.assert_allclose(recorded.change[name][:, 1], by_row.unflatten(0, (2, 2)).mean(0), rtol=1e-4)
        assert np.isnan(recorded.change[name][:, 0]).all()


def test_a_residual_is_what_a_block_adds() -> None:
    unet = small_unet("one-layer")
    taps = {tap.name: tap for tap in unet_taps(unet, [])}
    found: dict[str, torch.Tensor] = {}
    for name, block in (
        ("mid resnet 0", unet.mid_block.resnets[0]),
        ("mid transformer 0", unet.mid_block.attentions[0]),
    ):
        tap = taps[name].module
        tap.register_forward_hook(lambda _, __, out: found.update(residual=out))
        block.register_forward_hook(lambda _, inputs, out: found.update(input=inputs[0], output=out))
    (sample, timestep, text), _ = example(unet)
    with torch.no_grad():
        unet(sample, timestep, text)
        output = found["output"] if isinstance(found["output"], torch.Tensor) else found["output"][0]
    torch.testing.assert_close(output - found["input"], found["residual"], atol=1e-4, rtol=1e-4)


def test_a_recorder_holds_no_hooks_between_passes_and_misses_no_module() -> None:
    unet = small_unet("one-layer")
    (sample, timestep, text), _ = example(unet)
    recorder = FeatureRecorder(unet_taps(unet, [0]), num_calls=2, images=2)
    with recorder, torch.no_grad():
        unet(sample, timestep, text)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    idle = FeatureRecorder([Tap("idle", "block", "similarity", torch.nn.Linear(1, 1))], num_calls=1, images=1)
    with pytest.raises(RuntimeError, match="expected the pass to run idle"), idle:
        pass


def test_the_command_has_help_with_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze(monkeypatch, "--help") == 0
    assert "Example: fastcache analyze" in capsys.readouterr().out


def test_similarity_in_figures() -> None:
    matrix = np.array([[[1, 0.99, 0.5], [0.99, 1, 0.96], [0.5, 0.96, 1]]])
    facts = SimilarityFacts.of(matrix)
    assert facts.mean == pytest.approx((0.99 + 0.5 + 0.96) / 3)
    assert facts.share_above == pytest.approx(2 / 3)
    assert (facts.dip, facts.dip_step, facts.adjacent_mean) == pytest.approx((0.96, 2, 0.975))
    np.testing.assert_allclose(share_alike(matrix), [[0.5, 1, 0.5]])


def test_the_command_writes_all_numbers(report: Path) -> None:
    document = json.loads((report / "report.json").read_text())
    calls = document["conditions"]["num_calls"]
    assert calls == 6  # pndm calls once more than it has steps
    assert document["samples"] == [f"{p} (seed {k})" for k, p in enumerate(["abc", "abc", "de", "de"])]
    assert not document["random_weights"]
    names = ["up 0", "cached feature, branch 1", "cached feature, branch 0", "up 1"]
    assert list(document["similarity"]) == names
    feature = document["similarity"]["cached feature, branch 0"]
    pairs = np.array(feature["pairs"]["mean"])
    assert pairs.shape == (calls, calls)
    assert feature["dip"] == pytest.approx(np.diagonal(pairs, 1).min(), rel=1e-4)
    assert {row["kind"] for row in document["change"].values()} == {"resnet", "transformer"}
    assert document["change"]["down 0 resnet 0"]["mean"][0] is None
    calibration = Calibration.from_json((report / "calibration.json").read_text())
    assert calibration.branch_ids == (0, 1)
    assert calibration.has_gains
    error = np.array(document["relative_error"]["1"]["mean"], dtype=float)
    np.testing.assert_allclose(error, calibration.relative_error[1], rtol=1e-3, atol=1e-6)
    (switch,) = document["switch_prompt"]
    assert switch["at"] == 2
    assert switch["followed"]["latents"][1:3] == [0, 0]
    assert [(i["start"], i["stop"]) for i in document["guidance_interval"]] == [(0, calls), (1, 3), (0, 0)]


def test_the_report_needs_no_network_and_shows_every_figure(report: Path) -> None:
    page = (report / "report.html").read_text()
    pictures = {file.stem for file in report.glob("*.png")}
    assert pictures == {"similarity", "similarity-by-step", "change", "errors", "gains", "switch-prompt"}
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:|#)", page)
    assert not re.search(r"@import|url\(|<script", page)
    assert "Random weights" not in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium), which is not here")
def test_the_report_opens_offline_in_a_browser(report: Path, tmp_path: Path) -> None:
    counting = (
        "<script>onload = () => document.title = [...document.images].filter(i => i.naturalWidth > 300).length</script>"
    )
    page = tmp_path / "page.html"
    page.write_text((report / "report.html").read_text().replace("</body>", f"{counting}</body>"))
    shot = tmp_path / "shot.png"
    browser = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1150,1600"]
    dump = subprocess.run(
        [*browser, *offline, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "<title>6</title>" in dump.stdout, dump.stderr
    subprocess.run([*browser, *offline, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120)
    picture = np.asarray(Image.open(shot).convert("RGB"))
    assert picture.shape == (1600, 1150, 3)
    # A heat map's colours and a page's white: neither a blank page nor an error.
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 500
    assert (picture == 255).all(-1).mean() > 0.3


def test_random_weights_are_said_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unet = {
        "sample_size": 8,
        "block_out_channels": (32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
    }
    monkeypatch.setitem(models.PRESETS, "sd15", Preset(unet, models.PRESETS["sd15"].scheduler))
    options = ["--model", "sd15", "--random-weights", "--steps", 2, "--num-prompts", 1, "--output", tmp_path]
    assert analyze(monkeypatch, *options) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.index("Random weights.") < page.index("<img")
    assert json.loads((tmp_path / "report.json").read_text())["random_weights"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--branch-id", "9"], "expected a branch_id from 0 to 3"),
        (["--switch-prompt-at", "4"], "expected --switch-prompt-at from 1 to 3, got 4"),
        (["--guidance-interval", "3"], "expected --guidance-interval A:B"),
        (["--guidance-interval", "2:9"], "expected --guidance-interval A:B, 0 <= A < B <= 4, got 2:9"),
        (["--probes"], "expected --model demo for --probes"),
        (["--dit"], "expected --model demo for --dit"),
        (["--height", "33"], "expected a height and width divisible by 4, got (33, 32)"),
        (["--prompts", "/nowhere"], "expected a file of prompts"),
        (["--num-prompts", "99"], "expected at most 8 prompts"),
        (["--device", "tpu"], "expected --device cpu or cuda"),
        (["--model", "svd-xt", "--random-weights"], "expected a model of pictures, got svd-xt"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tmp_path: Path,
    options: list[str],
    says: str,
) -> None:
    assert analyze(monkeypatch, "--model", tiny_model, "--steps", 4, "--output", tmp_path, *options) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_features_follow_a_switched_prompt_before_the_latents(demo: Subject) -> None:
    first, second = switch_prompt(demo, AnalysisSettings(steps=8, guidance_scale=4.0), [2, 6])
    assert (first.at, second.at) == (2, 6)
    for switch in (first, second):
        assert set(switch.followed) == {LATENTS, "up 0", "up 1", "up 2", "up 3"}
        for name, curve in switch.followed.items():
            before = switch.at + (name == LATENTS)
            np.testing.assert_allclose(curve[:, 1:before], 0, atol=1e-5)
            assert curve[:, -1].mean() > 0.1, name
        assert switch.followed["up 1"][:, switch.at].mean() > 0.3  # in the very step, when no latent has moved
    # An early switch draws the second prompt's scene, a late one does not.
    assert first.followed[LATENTS][:, -1].mean() > 0.7 > second.followed[LATENTS][:, -1].mean()
    assert first.shows_a == 0.0


def test_guidance_in_an_interval(demo: Subject) -> None:
    everywhere, early, nowhere = guide_in_intervals(demo, AnalysisSettings(steps=6, guidance_scale=4.0), [(0, 3)])
    assert (everywhere.start, everywhere.stop, everywhere.rows_share) == (0, 6, 1.0)
    assert np.isinf(everywhere.psnr_db)
    assert (early.rows_share, nowhere.rows_share) == (0.75, 0.5)
    assert early.psnr_db > nowhere.psnr_db > 10


def test_probes_tell_what_can_be_told_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    classes = np.array(["a", "b", "c"])[rng.integers(0, 3, 240)]
    told = np.concatenate([np.eye(3)[np.unique(classes, return_inverse=True)[1]], rng.normal(size=(240, 400))], 1)
    told[:, 3:] *= 0.2
    assert held_out_accuracy(told.astype(np.float32), classes) > 0.75
    # 240 coin tosses of chance 1/3: within 0.12 of it but once in ten thousand times
    assert abs(held_out_accuracy(rng.normal(size=(240, 400)), classes) - 1 / 3) < 0.12


def test_probes_on_the_bundled_model(demo: Subject) -> None:
    found = probe(demo, AnalysisSettings(steps=5), 64, lambda _: None, most_steps=2)
    assert found.steps == (0, 4)
    assert found.pictures["number of objects"] > 50
    place = found.accuracy["place"]
    assert set(place) == {LATENTS, "up 0", "up 1", "up 2", "up 3"}
    assert place["up 2"][-1] > found.chance["place"] + 0.3
    with pytest.raises(ValueError, match="ask for more --probe-images"):
        probe(demo, AnalysisSettings(steps=2), 4, lambda _: None, most_steps=1)


def test_a_random_transformer_is_measured_and_said_to_be_random(demo: Subject) -> None:
    study = dits.study_dit(None, demo, AnalysisSettings(steps=3, guidance_scale=4.0, batch=2), 3, lambda _: None)
    assert not study.trained
    assert study.latents.shape == (3, 4, 16, 16)
    assert list(study.recorded.similarity) == [f"block {i}" for i in range(8)]
    assert study.recorded.similarity["block 7"].shape == (3, 3, 3)
    assert {study.kinds[name] for name in study.recorded.change} == {"attention", "feed-forward"}
    assert (study.recorded.change["block 0 attention"][:, 1:] > 0).all()


def test_trained_transformers_are_loaded_and_others_refused(demo: Subject, tmp_path: Path) -> None:
    dits.build_dit(seed=1).save_pretrained(tmp_path / "dit")
    loaded = dits.load_dit(tmp_path / "dit")
    assert not torch.equal(loaded.pos_embed.proj.weight, dits.load_dit(None).pos_embed.proj.weight)
    assert dits.study_dit(tmp_path / "dit", demo, AnalysisSettings(steps=2), 1, lambda _: None).trained
    with pytest.raises(ValueError, match=r"expected a transformer that tools/train_dit\.py trained"):
        dits.load_dit(tmp_path)


def test_classes_are_colour_and_shape() -> None:
    assert dits.CLASSES[dits.class_of(Scene((Object("small", "cyan", "ring", "top"),), "black"))] == "cyan ring"
    assert {dits.class_of(scene) for scene in held_out_scenes(300)} <= set(range(len(dits.CLASSES)))


@pytest.mark.gpu
def test_a_gpu_measures_what_the_cpu_does(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        options = ["--steps", 4, "--num-prompts", 2, "--batch", 2, "--gains", "--device", device]
        assert analyze(monkeypatch, "--model", tiny_model, *options, "--output", tmp_path / device) == 0
    cpu, gpu = (Calibration.from_json((tmp_path / d / "calibration.json").read_text()) for d in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu.errors, cpu.errors, rtol=0.05, atol=1e-4)
    np.testing.assert_allclose(gpu.gains, cpu.gains, rtol=0.1)


@pytest.mark.slow
def test_the_transformers_trainer_writes_what_analyze_reads(tmp_path: Path) -> None:
    tool = Path(__file__).parents[2] / "tools" / "train_dit.py"
    options: list[Any] = ["--output", tmp_path / "dit", "--iterations", 2, "--batch", 4, "--images", 256]
    subprocess.run([sys.executable, tool, *map(str, options)], check=True, capture_output=True, timeout=300)
    assert dits.load_dit(tmp_path / "dit").config.num_layers == 8
