"""Live diffusers pipelines for the tests of FastCacheHelper: draw with them, and see which U-Net calls were FULL."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from fastcache import FastCacheHelper
from fastcache.demo import MODEL_DIRECTORY
from fastcache.evaluate.quality import psnr_db

PROMPT = "a large red circle at the left on a white background"
STEPS = 8
NATIVE = 16  # the side of the bundled model's latents, which its engines are built for


def load_pipe(side: int = NATIVE // 2) -> StableDiffusionPipeline:
    """The bundled model's pipeline, with latents of a side where it is told no size."""
    pipe = StableDiffusionPipeline.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32)
    pipe.unet.register_to_config(sample_size=side)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: str | None = PROMPT, *, seed: int = 0, **arguments: Any) -> Tensor:
    """Latents that the pipeline draws."""
    generator = torch.Generator().manual_seed(seed)
    arguments = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator, **arguments}
    return pipe(prompt, **arguments).images


def agreement_db(a: Tensor, b: Tensor) -> float:
    """PSNR of latents over the range of the second."""
    low, span = b.min(), b.max() - b.min()
    return psnr_db((a - low) / span, (b - low) / span)


@contextmanager
def helped(pipe: Any, helper_class: Any = FastCacheHelper, interval: int = 3, branch_id: int = 0) -> Generator[Any]:
    helper = helper_class(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch_id)
    helper.enable()
    try:
        yield helper
    finally:
        helper.disable()


@contextmanager
def calls(unet: Any) -> Generator[list[bool]]:
    """For each U-Net call, whether it was FULL: whether a layer of the middle block ran."""
    seen: list[bool] = []
    hooks = [
        unet.register_forward_pre_hook(lambda *_: seen.append(False)),
        unet.mid_block.resnets[0].register_forward_pre_hook(lambda *_: seen.__setitem__(-1, True)),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def full_calls(unet: Any, run: Callable[[], object]) -> list[int]:
    with calls(unet) as seen:
        run()
    return [index for index, full in enumerate(seen) if full]


def switch(step: int, change: Callable[[Any, dict[str, Any]], dict[str, Any] | None]) -> dict[str, Any]:
    """Arguments of a pipeline that make a change after a step."""

    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return (change(pipe, tensors) or tensors) if index == step else tensors

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


def add_lora(unet: Any, name: str, *targets: str) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=list(targets)), name)
