"""What steers a U-Net's passes, ControlNet, T2I-Adapter and IP-Adapter, joined to them: one engine call a step still.

The shallow pass gets no more of it than its layers read. Knows tensors by their ONNX names; how networks are found and
loaded is `controls.py`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import MultiControlNetModel
from torch import nn

from fastcache.compile.export import Exportable, Inputs
from fastcache.cut.controlnet import shallow_controlnet
from fastcache_engines import DType, torch_dtype

EMBEDDING = "controlnet_embedding"  # of several ControlNets the first's, the others numbered from 2
CONDITIONING_SCALE = "conditioning_scale"
IP_ADAPTER_INPUTS = ("ip_tokens", "ip_adapter_scale")
RESIDUAL = "adapter_residual_"  # of a T2I-Adapter, numbered from the largest


class Steering(nn.Module):
    """A pass's inputs, by their ONNX names -> what diffusers gives the U-Net, of which `controlnet` makes residuals."""

    def __init__(self, controlnet: nn.Module | None) -> None:
        super().__init__()
        self.controlnet = controlnet

    def forward(self, inputs: Inputs) -> dict[str, Any]:
        given: dict[str, Any] = {name: value for name, value in inputs.items() if not _is_steering(name)}
        adapter = [value for name, value in inputs.items() if name.startswith(RESIDUAL)]
        if adapter:
            given["down_intrablock_additional_residuals"] = adapter
        if "ip_tokens" in inputs:
            tokens, scale = inputs["ip_tokens"], inputs["ip_adapter_scale"].view(-1, 1, 1)
            given["image_embeds"] = [torch.cat([tokens, scale.expand(-1, tokens.shape[1], 1)], dim=-1)]
        return given if self.controlnet is None else given | self._residuals(self.controlnet, inputs)

    def _residuals(self, nets: Any, inputs: Inputs) -> dict[str, Any]:
        whole = isinstance(nets, MultiControlNetModel)
        first: Any = (nets.nets if whole else nets.controlnets)[0]
        dtype, channels = first.conv_in.weight.dtype, first.conv_in.in_channels
        embeddings = [value.to(dtype) for name, value in inputs.items() if name.startswith(EMBEDDING)]
        added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
        found = nets(
            inputs["sample"][:, :channels].to(dtype),  # of an inpainting model's, the latents alone
            inputs["timestep"],
            inputs["encoder_hidden_states"].to(dtype),
            embeddings,
            inputs[CONDITIONING_SCALE].view(-1, len(embeddings), 1, 1, 1).to(dtype).unbind(1),
            added_cond_kwargs=added or None,
            **({"return_dict": False} if whole else {}),
        )
        down, middle = found if whole else (found, None)
        return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}


def _is_steering(name: str) -> bool:
    return name in (CONDITIONING_SCALE, *IP_ADAPTER_INPUTS) or name.startswith((EMBEDDING, RESIDUAL))


class _SteeredPass(nn.Module):
    def __init__(self, unet: nn.Module, steering: Steering) -> None:
        super().__init__()
        self.unet, self.steering = unet, steering

    def forward(self, inputs: Inputs) -> Any:
        return self.unet(self.steering(inputs))


@dataclass
class Controls:
    """What was loaded beside a U-Net, if anything.

    `inputs` are examples of what the passes take of it, `strides` as `Exportable` has them, and `parts` the engines
    that run once a picture. `adapted` are the layers that a T2I-Adapter adds to (`UNetParts`).
    """

    inputs: Inputs = field(default_factory=dict)
    strides: dict[str, int] = field(default_factory=dict)
    parts: list[Exportable] = field(default_factory=list)
    controlnet: MultiControlNetModel | None = None
    adapted: tuple[int, ...] = ()

    def given(self, inputs: Inputs) -> dict[str, Any]:
        """What diffusers would give the plain U-Net."""
        with torch.no_grad():
            return Steering(self.controlnet)(inputs)

    def steer(self, passes: Sequence[Exportable], branches: Sequence[int]) -> tuple[Exportable, ...]:
        """The full pass, and the shallow ones at `branches`, with what steers them."""
        if not self.inputs:
            return tuple(passes)
        return tuple(self._steer(part, branch) for part, branch in zip(passes, (None, *branches), strict=True))

    def _steer(self, part: Exportable, branch_id: int | None) -> Exportable:
        net, unread = self.controlnet, set[str]()
        if branch_id is not None:
            net = None if net is None else shallow_controlnet(net, branch_id)
            unread = self._unread(branch_id)
        return replace(
            part,
            module=_SteeredPass(part.module, Steering(net)),
            inputs={name: value for name, value in part.inputs.items() if name not in unread},
            strides=part.strides | self.strides,
        )

    def _unread(self, branch_id: int) -> set[str]:
        """Residuals of layers that the shallow pass at a branch does not run; one beyond the blocks is the middle's."""
        names = [name for name in self.inputs if name.startswith(RESIDUAL)]
        return {name for i, name in enumerate(names) if i >= len(self.adapted) or self.adapted[i] >= branch_id}

    def lower(self, dtype: DType) -> None:
        """Bring what joins the passes to a dtype; IP-Adapter's layers are the U-Net's."""
        if self.controlnet is not None:
            nn.Module.to(self.controlnet, torch_dtype(dtype))
