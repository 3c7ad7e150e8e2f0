"""FastCacheHelper in diffusers' own pipeline classes (the rows of tools/parity.py), and with ControlNets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import parity
import parity_pipelines as pipelines
import parity_subjects as subjects
import pytest
import torch
from DeepCache import DeepCacheSDHelper

import fastcache
from fastcache import FastCacheHelper
from live_pipelines import agreement_db, calls, draw, full_calls, helped, switch
from repeats import mostly_slow

# numpy's word to diffusers, and transformers' to diffusers' text encoder of LDM, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning", "ignore::FutureWarning")


QUICK = ("SD, inpaint, 9 channels", "SDXL, ControlNet and IP-Adapter", "T2I-Adapter", "LoRA", "AnimateDiff")


@pytest.mark.parametrize("name", mostly_slow(pipelines.PIPELINES, lambda name: name in QUICK))
def test_pipelines_draw_as_without_a_helper_and_as_with_the_old_one(name: str) -> None:
    subject = pipelines.PIPELINES[name]()
    subject.pipe.set_progress_bar_config(disable=True)
    unet, steps = subject.pipe.unet, {"num_inference_steps": 4}
    plain = subject.draw(**steps)
    with FastCacheHelper(subject.pipe):
        assert torch.equal(subject.draw(**steps), plain)
    with helped(subject.pipe, interval=3, branch_id=1):
        cached = subject.draw(**steps)
    assert subject.pipe.unet is unet
    assert not torch.equal(cached, plain)
    if not subject.old_fault:
        with helped(subject.pipe, DeepCacheSDHelper, interval=3, branch_id=1):
            assert agreement_db(cached, subject.draw(**steps)) >= 60


def test_base_and_refiner_hand_over() -> None:
    base, arguments = pipelines.sdxl("StableDiffusionXLPipeline")
    refiner, more = pipelines.sdxl("StableDiffusionXLImg2ImgPipeline", refiner=True, scores=5)

    def hand_over() -> torch.Tensor:
        steps = {"num_inference_steps": 8}  # four for each
        first = subjects.Subject(base, arguments | {"denoising_end": 0.5}).draw(**steps)
        return subjects.Subject(refiner, more | {"image": first, "denoising_start": 0.5}).draw(**steps)

    plain = hand_over()
    with FastCacheHelper(base), FastCacheHelper(refiner):
        assert torch.equal(hand_over(), plain)
    with helped(base, interval=2), helped(refiner, interval=2):
        cached = hand_over()
        with calls(base.unet) as of_base, calls(refiner.unet) as of_refiner:
            assert torch.equal(hand_over(), cached)
        assert of_base == of_refiner == [True, False] * 2


@pytest.mark.parametrize("make", [pipelines.control_net, pipelines.two_control_nets])
@pytest.mark.parametrize("branch_id", [0, 4])
def test_a_shallow_step_runs_only_the_control_net_that_it_uses(branch_id: int, make: Callable[[], Any]) -> None:
    subject = make()
    pipe, net = subject.pipe, subject.pipe.controlnet
    nets = list(getattr(net, "nets", [net]))
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
        for one in nets
        for index, block in enumerate([*one.controlnet_down_blocks, one.controlnet_mid_block])
    ]
    with helped(pipe, interval=3, branch_id=branch_id):
        assert type(pipe.controlnet).__name__ == type(net).__name__
        assert isinstance(pipe.controlnet, type(net))
        drawn = subject.draw()
    assert pipe.controlnet is net
    full, shallow = 2, 4  # of six steps
    every = len(nets[0].controlnet_down_blocks) + 1
    assert len(ran) == len(nets) * (full * every + shallow * (branch_id + 1))
    for hook in hooks:
        hook.remove()
    with helped(pipe, DeepCacheSDHelper, interval=3, branch_id=branch_id):
        assert agreement_db(drawn, subject.draw()) >= 60


def test_a_control_nets_end_makes_its_step_full() -> None:
    subject = pipelines.control_net()
    unet = subject.pipe.unet
    with helped(subject.pipe, interval=3):
        assert full_calls(unet, subject.draw) == [0, 3]
        assert full_calls(unet, lambda: subject.draw(control_guidance_end=0.7)) == [0, 3, 4]
        assert full_calls(unet, lambda: subject.draw(controlnet_conditioning_scale=0.5)) == [0, 3]


def test_a_changed_control_net_makes_its_step_full() -> None:
    subject = pipelines.control_net()
    pipe, own = subject.pipe, subject.pipe.controlnet

    def change(pipe: Any, tensors: dict[str, Any]) -> None:
        with torch.no_grad():
            own.controlnet_mid_block.weight.mul_(0.5)

    with helped(pipe, interval=4):
        assert full_calls(pipe.unet, lambda: subject.draw(num_inference_steps=4, **switch(1, change))) == [0, 2]
        assert full_calls(pipe.unet, lambda: subject.draw(num_inference_steps=4)) == [0]
        with pytest.raises(ValueError, match="controlnet to be left alone"):
            pipe.controlnet = own


def test_views_of_a_panorama_reuse_nothing_of_each_other() -> None:
    """They take turns at each timestep, under one prompt."""
    pipe = subjects.bundled()
    panorama: Any = diffusers.StableDiffusionPanoramaPipeline(**pipe.components, requires_safety_checker=False)
    panorama.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        return draw(panorama, num_inference_steps=3, height=64, width=160, view_batch_size=1)

    plain = run()
    with helped(panorama):
        assert torch.equal(run(), plain)


def test_a_control_net_of_another_class_runs_whole() -> None:
    subject = pipelines.control_net()
    net = subject.pipe.controlnet
    net.__class__ = type("OtherControlNet", (type(net),), {})
    with helped(subject.pipe):
        assert subject.pipe.controlnet is net
        drawn = subject.draw()
    with helped(subject.pipe, DeepCacheSDHelper):
        assert agreement_db(drawn, subject.draw()) >= 60


def test_the_parity_table_measures_what_it_says() -> None:
    """One row of tools/parity.py, and the invariant at a wrong feature."""
    row = parity.measure("DDPM", pipelines.PIPELINES["DDPM"])
    assert row.branches == 12
    assert row.all_full_db == float("inf")
    assert row.shallow_vs_full < 1e-5
    assert row.deepcache_db is not None
    assert row.deepcache_db >= 60
    assert "`DDPMPipeline`" in row.markdown()
    assert row.to_json()["all_full_db"] == "inf"
    subject = pipelines.PIPELINES["DDPM"]()
    with parity.first_call(subject.pipe) as arguments:
        subject.draw(num_inference_steps=1)
    assert arguments.keys() == {"sample", "timestep"}
    cut = fastcache.partition_unet(subject.pipe.unet, 1)
    noise_pred, feature = cut.full(**arguments)
    wrong = cut.shallow(**arguments, cached_feature=feature * 2)
    assert parity.relative_error(wrong, noise_pred) > 1e-2
