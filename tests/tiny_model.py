"""A Stable Diffusion with random weights in diffusers' folder layout, small enough to build in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 8
TEXT_WIDTH = 16
_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.0",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
}


def save_tiny_model(folder: Path, **changes: Any) -> Path:
    """Save the model: latents 8 x 8, images 32 x 32, four skip connections. `changes` are the U-Net's."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    _save(
        folder, tokenizer, unet=UNet2DConditionModel(**(_UNET | changes)), text_encoder=CLIPTextModel(_text(tokenizer))
    )
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


def save_tiny_sdxl(folder: Path, *, refiner: bool = False) -> Path:
    """Save an SDXL of the same size: two text encoders and pooled text; the refiner has the second alone."""
    torch.manual_seed(1 + refiner)
    tokenizer, ids = _tokenizer(), 5 if refiner else 6
    unet = UNet2DConditionModel(
        **_UNET
        | {
            "cross_attention_dim": TEXT_WIDTH if refiner else 2 * TEXT_WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": TEXT_WIDTH + 8 * ids,
            "use_linear_projection": True,
        }
    )
    second = CLIPTextModelWithProjection(_text(tokenizer))
    first = {} if refiner else {"text_encoder": CLIPTextModel(_text(tokenizer))}
    _save(folder, tokenizer, unet=unet, text_encoder_2=second, **first)
    EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1).save_pretrained(
        folder / "scheduler"
    )
    nothing = [None, None]
    index = INDEX | {
        "_class_name": "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline",
        "text_encoder": nothing if refiner else INDEX["text_encoder"],
        "tokenizer": nothing if refiner else INDEX["tokenizer"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "requires_aesthetics_score": refiner,
        "force_zeros_for_empty_prompt": not refiner,
    }
    del index["safety_checker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _save(folder: Path, tokenizer: CLIPTokenizer, **modules: Any) -> None:
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=32,
    )
    for name, module in {**modules, "vae": vae}.items():
        vary(module).save_pretrained(folder / name)
        if name.startswith("text_encoder"):
            tokenizer.save_pretrained(folder / name.replace("text_encoder", "tokenizer"))


def _text(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def vary(module: nn.Module, by: float = 0.02) -> Any:
    """Norms start as the identity and biases as zero; give every weight a say."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * by)
    return module


def _tokenizer() -> CLIPTokenizer:
    """One token for each letter: no merges."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=TOKENS)
