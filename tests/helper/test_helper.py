"""FastCacheHelper on a live pipeline: what DeepCacheSDHelper draws, and a U-Net that is exchanged and put back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcache import CachePlan, FastCacheHelper, PartitionError, partition_unet
from fastcache.demo import MODEL_DIRECTORY
from live_pipelines import PROMPT, STEPS, agreement_db, draw, full_calls, helped
from small_unets import example, small_unet

# numpy's word to diffusers, not to us
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")


@pytest.mark.parametrize("branch_id", [0, 1, 3])
def test_draws_what_deepcache_draws(branch_id: int, pipe: StableDiffusionPipeline) -> None:
    drawn: dict[int, Tensor] = {}
    for interval in (2, 3, 5):
        with helped(pipe, FastCacheHelper, interval, branch_id):
            drawn[interval] = draw(pipe)
    for interval in drawn:
        with helped(pipe, DeepCacheSDHelper, interval, branch_id):
            expected = draw(pipe)
        assert agreement_db(drawn[interval], expected) >= 60
        assert all(agreement_db(drawn[other], expected) < 55 for other in drawn if other != interval)


def test_one_import_moves_over_deepcaches_readme() -> None:
    """The README's lines, but for the model's name and the GPU."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32)

    from fastcache import FastCacheHelper as DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(
        cache_interval=3,
        cache_branch_id=0,
    )
    helper.enable()

    deepcache_image = pipe(PROMPT, output_type="pt", num_inference_steps=4).images[0]
    helper.disable()
    assert deepcache_image.shape == (3, 64, 64)


def test_all_full_is_the_plain_pipeline_bit_for_bit(pipe: StableDiffusionPipeline) -> None:
    expected = draw(pipe)
    with FastCacheHelper(pipe):
        assert torch.equal(draw(pipe), expected)


def test_the_unet_is_exchanged_and_the_very_same_put_back(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    unet, state = pipe.unet, dict(vars(pipe.unet))
    forwards = {name: module.forward for name, module in unet.named_modules()}
    with FastCacheHelper(pipe) as helper:
        assert helper.enabled
        assert pipe.unet is not unet
        assert isinstance(pipe.unet, UNet2DConditionModel)
        assert pipe.unet.config is unet.config
        assert pipe.config.unet == ("diffusers", "UNet2DConditionModel")
        assert all(a is b for a, b in zip(pipe.unet.parameters(), unet.parameters(), strict=True))
        assert {name: module.forward for name, module in unet.named_modules()} == forwards
        pipe.unet.save_config(tmp_path)
        assert UNet2DConditionModel.load_config(tmp_path)["_class_name"] == "UNet2DConditionModel"
    assert pipe.unet is unet
    assert not helper.enabled
    assert vars(unet) == state


def test_enable_and_disable_twice(pipe: StableDiffusionPipeline) -> None:
    unet = pipe.unet
    with helped(pipe) as helper:
        once = draw(pipe)
        helper.enable()
        assert torch.equal(draw(pipe), once)
        helper.disable()
        assert pipe.unet is unet
    old = DeepCacheSDHelper(pipe)
    old.set_params(3, 0)
    old.enable()
    old.enable()
    with pytest.raises(RecursionError):
        draw(pipe)


def test_parameters_may_change_while_enabled(pipe: StableDiffusionPipeline) -> None:
    with helped(pipe, interval=5) as helper:
        helper.set_params(cache_interval=2, cache_branch_id=1)
        changed = draw(pipe)
        with pytest.raises(PartitionError, match="from 0 to 11"):
            helper.set_params(cache_branch_id=12)
        assert torch.equal(draw(pipe), changed)
    with helped(pipe, interval=2, branch_id=1):
        assert torch.equal(draw(pipe), changed)


def test_a_unet_that_something_else_holds_is_refused(pipe: StableDiffusionPipeline) -> None:
    with helped(pipe), pytest.raises(ValueError, match="another has enabled"):
        FastCacheHelper(pipe).enable()
    with helped(pipe, DeepCacheSDHelper), pytest.raises(ValueError, match="DeepCacheSDHelper"):
        FastCacheHelper(pipe).enable()
    with helped(pipe):
        assert draw(pipe).isfinite().all()
        with pytest.raises(ValueError, match="left alone"):
            pipe.unet.forward = lambda *args: None


def test_a_compiled_unet_is_refused(own_pipe: StableDiffusionPipeline) -> None:
    own_pipe.unet.compile(backend="eager")
    with pytest.raises(ValueError, match="not compiled"):
        FastCacheHelper(own_pipe).enable()


class _Operators(TorchDispatchMode):
    """Counts the calls of fastcache's own operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "fastcache"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_draw_what_torchs_own_norm_does(device: str, own_pipe: StableDiffusionPipeline) -> None:
    pipe = own_pipe.to(device)
    plain = draw(pipe).cpu()
    with helped(pipe), _Operators() as mode:
        expected = draw(pipe).cpu()
    assert mode.count == 0
    helper = FastCacheHelper(pipe, kernels=True)
    helper.set_params(3)
    with helper, _Operators() as mode:
        assert agreement_db(draw(pipe).cpu(), expected) >= 60
    assert mode.count == STEPS
    assert torch.equal(draw(pipe).cpu(), plain)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_hooks_of_accelerate_run(when: str, own_pipe: StableDiffusionPipeline) -> None:
    """What `enable_model_cpu_offload` puts on a U-Net, and takes off and puts on again after each image."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            Counting.calls += 1
            return args, kwargs

    unet, expected = own_pipe.unet, draw(own_pipe)
    if when == "before":
        add_hook_to_module(unet, Counting())
    with helped(own_pipe) as helper:
        if when == "meanwhile":
            add_hook_to_module(own_pipe.unet, Counting())
        assert full_calls(own_pipe.unet, lambda: draw(own_pipe)) == [0, 3, 6]
        assert Counting.calls == STEPS
        remove_hook_from_module(own_pipe.unet, recurse=True)
        helper.disable()
    assert own_pipe.unet is unet
    assert torch.equal(draw(own_pipe), expected)
    with helped(own_pipe):
        assert full_calls(own_pipe.unet, lambda: draw(own_pipe)) == [0, 3, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip_mode": "non-uniform"}, "plan="),
        ({"cache_interval": 0}, ">= 1"),
        ({"cache_interval": 2.5}, ">= 1"),
        ({"cache_interval": 2, "plan": CachePlan.all_full(3)}, "got both"),
    ],
)
def test_wrong_parameters_are_refused(arguments: Any, message: str, pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match=message):
        FastCacheHelper(pipe).set_params(**arguments)


def test_the_old_helper_has_no_other_skip_mode(pipe: StableDiffusionPipeline) -> None:
    helper = DeepCacheSDHelper(pipe)
    helper.set_params(3, 0, "non-uniform")
    helper.enable()
    with pytest.raises(KeyError):
        draw(pipe)


@pytest.mark.parametrize("structure", ["one-layer", "uneven-layers", "sd15"])
def test_a_branch_id_is_a_skip_connection_whatever_the_layers_a_block(structure: str) -> None:
    """The old helper divides by 3, the layers of an up block of Stable Diffusion, and checks no range."""
    pipe = bare_pipe(small_unet(structure))
    last = partition_unet(pipe.unet).num_branches - 1

    def up_layers(helper_class: Any, branch_id: int) -> int:
        """How many a SHALLOW step computes; the old helper calls them all, but not what is in them."""
        ran: list[int] = []
        resnets = [resnet for block in pipe.unet.up_blocks for resnet in block.resnets]
        with helped(pipe, helper_class, interval=2, branch_id=branch_id):
            loop(pipe, 1)
            hooks = [resnet.conv1.register_forward_hook(lambda *_: ran.append(1)) for resnet in resnets]
            loop(pipe, 2, first=1)
        for hook in hooks:
            hook.remove()
        return len(ran)

    assert [up_layers(FastCacheHelper, branch_id) for branch_id in range(last + 1)] == list(range(1, last + 2))
    with pytest.raises(PartitionError, match=f"from 0 to {last}"):
        up_layers(FastCacheHelper, last + 1)
    assert up_layers(DeepCacheSDHelper, last + 1) <= last + 1
    assert (up_layers(DeepCacheSDHelper, 2) == 3) == (structure == "sd15")  # the others' last block has two layers


def bare_pipe(unet: torch.nn.Module) -> Any:
    """The two components that a helper looks at."""
    pipe = SimpleNamespace(unet=unet, scheduler=DDIMScheduler())
    pipe.scheduler.set_timesteps(STEPS)
    return pipe


def loop(pipe: Any, end: int, first: int = 0) -> None:
    """U-Net calls of one run."""
    (sample, _, text), _ = example(pipe.unet)
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps[first:end]:
            pipe.unet(sample, timestep, encoder_hidden_states=text)


def test_what_cannot_be_cut_is_refused(own_pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="expected pipe with a U-Net, got"):
        FastCacheHelper(object())
    helper = FastCacheHelper(own_pipe)
    helper.set_params(cache_branch_id=12)
    unet = own_pipe.unet
    with pytest.raises(PartitionError, match="from 0 to 11"):
        helper.enable()
    assert own_pipe.unet is unet
    helper.set_params()
    own_pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(PartitionError, match="FreeU"):
        helper.enable()
