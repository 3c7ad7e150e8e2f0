"""A model's graphs in float32 -> the inputs that each pass meets on runs of the model's own: what 8 bits are fitted to.

The runs are cached ones, so that the shallow pass meets the features that it will be given. Knows prompts and steps;
knows nothing about how numbers are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastcache_engines
from fastcache.bundle.manifest import EngineEntry, ModelInfo, Role
from fastcache.bundle.parity import place
from fastcache.compile import components
from fastcache.compile.export import Inputs
from fastcache.compile.models import SourceModel
from fastcache.cut.names import FULL
from fastcache.demo.scenes import training_scenes
from fastcache.sampler.scheduler import make_scheduler
from fastcache_engines import LoadOptions

# For real models, from single things to scenes and styles.
PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a red bicycle leaning against a brick wall",
    "a portrait of an old fisherman, oil painting",
    "a bowl of fruit on a wooden table, morning light",
    "a city street at night in the rain, neon signs",
    "a fox in a snowy forest",
    "a mountain lake under a clear sky, wide angle",
    "a watercolour of a lighthouse on a cliff",
)
_INTERVAL = 3  # from one full step to the next


@dataclass(frozen=True)
class Length:
    """How many pictures a calibration draws, and in how many steps of DDIM."""

    pictures: int
    steps: int


TRAINED, RANDOM = Length(8, 20), Length(1, 6)  # of random weights nothing but the time is asked


def calibration_runs(
    model: SourceModel,
    info: ModelInfo,
    folder: Path,
    engines: Mapping[Role, EngineEntry],
    shallow: Role,
    examples: Inputs,
) -> dict[Role, list[Inputs]]:
    """What the full pass and one shallow pass take, call by call, of a picture under guidance: two rows.

    `engines` are graphs in float32 in `folder`; `examples` are inputs of the full pass, whose conditioning is taken
    where the model reads no text. Each picture's full steps lie one further than the last one's, so that all steps are
    met by both.
    """
    length = RANDOM if model.random_weights else TRAINED
    backend = fastcache_engines.backend(fastcache_engines.REFERENCE)
    loaded = {role: backend.load(folder / engines[role].file, LoadOptions()) for role in (FULL, shallow)}
    tensors, found = dict[str, Tensor](), {role: list[Inputs]() for role in loaded}
    for engine in loaded.values():
        place(tensors, {spec.name: spec for spec in (*engine.inputs, *engine.outputs)}, examples, "cpu")
    bound = {role: engine.bind(tensors) for role, engine in loaded.items()}
    taken = {role: [spec.name for spec in engine.inputs] for role, engine in loaded.items()}
    sampler: Any = make_scheduler("ddim", info.scheduler)
    for k, prompt in enumerate(prompts(model, length.pictures)):
        for name, value in (_conditioning(model, info, examples, prompt) or {}).items():
            tensors[name].copy_(value)
        sampler.set_timesteps(length.steps)
        x = torch.randn(1, *examples["sample"].shape[1:], generator=torch.Generator().manual_seed(k))
        for step, timestep in enumerate(sampler.timesteps):
            role = FULL if step == 0 or (step + k) % _INTERVAL == 0 else shallow
            tensors["sample"].copy_(sampler.scale_model_input(x, timestep).expand_as(tensors["sample"]))
            tensors["timestep"].fill_(float(timestep))
            found[role].append({name: tensors[name].clone() for name in taken[role]})
            bound[role].run()
            unguided, prompted = tensors["noise_pred"].chunk(2)
            guided = unguided + info.defaults.guidance_scale * (prompted - unguided)
            x = sampler.step(guided, timestep, x).prev_sample
    return found


def prompts(model: SourceModel, count: int) -> Sequence[str]:
    """Prompts that no measurement of quality uses."""
    if model.name == "demo":
        return [scene.caption() for scene in islice(training_scenes(np.random.default_rng(7)), count)]
    return PROMPTS[:count]


def token_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """What a text encoder is given for some texts. Shapes: returns (texts, the tokenizer's length), int64."""
    options = {"padding": "max_length", "max_length": int(tokenizer.model_max_length), "truncation": True}
    return tokenizer(list(texts), return_tensors="pt", **options).input_ids


def _conditioning(model: SourceModel, info: ModelInfo, examples: Inputs, prompt: str) -> Inputs | None:
    """What the U-Net is told beside the sample: without the prompt, and with it. None for a model without a text part.

    Source: `encode_prompt` of diffusers' StableDiffusionPipeline and StableDiffusionXLPipeline.
    """
    if "text" not in model.components:
        return None
    states, pooled = list[Tensor](), None
    for name in model.text_encoders:
        tokenizer = model.load_tokenizer(name)
        length = int(tokenizer.model_max_length)
        part = components.exportable_text_encoder(model.load_text_encoder(name), length, name, model.family)
        with torch.no_grad():
            made = part.module({"input_ids": token_ids(tokenizer, ["", prompt])})
        states.append(made[0][:, 0])
        pooled = made[1] if len(made) > 1 else pooled
    told = {"encoder_hidden_states": torch.cat(states, dim=-1)}
    if pooled is not None and "text_embeds" in examples:
        told["text_embeds"] = pooled
    if info.zero_negative:
        for value in told.values():
            value[0] = 0
    if "time_ids" in examples:
        told["time_ids"] = examples["time_ids"][:1].expand(2, -1)
    return told
