"""A size -> a drawn picture of that size, for networks that a picture steers: it costs what any other does."""

from __future__ import annotations

import torch
from torch import Tensor


def control_pattern(height: int, width: int) -> Tensor:
    """White rings on black, as an edge detector leaves of a target. Shapes: returns (1, 3, height, width) in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    rings = (torch.cos(8 * torch.pi * torch.hypot(x, y)) > 0.8).float()
    return rings.expand(1, 3, height, width).clone()
