"""What the rows of the parity table are made of: the bundled model, small random weights, and a pipeline to call.

Knows nothing about caching.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from fastcache.demo import MODEL_DIRECTORY

STEPS = 6
PIXELS = 64
PROMPT = "a large red circle at the left on a white background"


class Subject(NamedTuple):
    """A pipeline and the arguments of a call.

    `engines` where the helper's can be built; `bundle` where a bundle draws alone, by the names that its arguments have
    there; `old_fault` where DeepCacheSDHelper is wrong, so that nothing is compared.
    """

    pipe: Any
    arguments: dict[str, Any]
    weights: str = "random"
    engines: bool = False
    old_fault: str = ""
    bundle: dict[str, str] | None = None

    def draw(self, **more: Any) -> Tensor:
        arguments = {"generator": seeded(1), "num_inference_steps": STEPS, "output_type": "latent"}
        result = self.pipe(**{**arguments, **self.arguments, **more})[0]
        return torch.as_tensor(result).float()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def vary(module: nn.Module) -> Any:
    """Norms start as the identity, and a ControlNet's and a motion module's last layers at zero; all get a say."""
    generator = seeded(2)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return module.eval().requires_grad_(False)


def bundled() -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(MODEL_DIRECTORY, dtype=torch.float32)


def like_bundled(**changes: Any) -> Any:
    """A U-Net of the bundled one's structure, half its width and random weights."""
    torch.manual_seed(0)
    config = dict(bundled().unet.config) | {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 4}
    return vary(diffusers.UNet2DConditionModel.from_config(config | changes))


def of_sd(kind: str, unet: Any = None, **components: Any) -> Any:
    """A pipeline of Stable Diffusion's kind, the bundled model but for its U-Net."""
    parts = dict(bundled().components)
    parts |= {"unet": parts["unet"] if unet is None else unet, **components}
    parts |= {"requires_safety_checker": False}
    pipeline_class = getattr(diffusers, kind)
    if "image_encoder" not in pipeline_class.__init__.__annotations__:
        parts.pop("image_encoder")
    return pipeline_class(**parts)


def image(seed: int = 5) -> Tensor:
    return torch.rand(1, 3, PIXELS, PIXELS, generator=seeded(seed))


def mask() -> Tensor:
    half = torch.zeros(1, 1, PIXELS, PIXELS)
    half[..., PIXELS // 2 :] = 1
    return half


def control(unet: Any, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    # The condition is brought from pixels to latents by two halvings here, three in Stable Diffusion.
    channels = (16, 32, 64)
    return vary(diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels))


def ip_adapter_weights(unet: Any) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter of random weights, for image embeddings of width 8, in the published files' layout."""
    torch.manual_seed(0)
    width, state, key_id = unet.config.cross_attention_dim, dict[str, Tensor](), 1
    for name in unet.attn_processors:
        if not name.endswith("attn1.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            for kind in ("to_k_ip", "to_v_ip"):
                state[f"{key_id}.{kind}.weight"] = torch.randn(attention.to_k.out_features, width) / 4
            key_id += 2
    projection = diffusers.models.embeddings.ImageProjection(8, width, 4).state_dict()
    renamed = {name.replace("image_embeds", "proj"): value for name, value in projection.items()}
    return {"image_proj": renamed, "ip_adapter": state}


def load_ip_adapter(unet: Any) -> None:
    unet._load_ip_adapter_weights([ip_adapter_weights(unet)])
