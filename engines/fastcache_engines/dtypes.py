"""A dtype's name -> what it is in torch, and how far from float32 one U-Net call in it may come out.

The one place that says which dtypes and devices there are. Imports torch only when it is asked for torch's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

Device = Literal["cpu", "cuda"]
# fp32 is IEEE's float32 on every device and backend: TF32, which rounds factors to 10 bits, is off.
DType = Literal["fp32", "fp16", "bf16"]
DTYPES: tuple[DType, ...] = get_args(DType)

_TORCH: dict[DType, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# The largest error of one U-Net call. Eight bits of mantissa through some hundred layers leave 2 to 5% of bfloat16 in
# single values, on random weights; pictures agree far better than that (docs/measured.md).
TOLERANCE: dict[DType, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
# Of engines with 8-bit layers, whatever the dtype of the others. Of a small U-Net with random weights the worst value
# was 0.38 off, and of the bundled model 0.013.
INT8_TOLERANCE = 0.5
# Of such an engine from its own graph, node by node on ONNX Runtime: the bundled model's was 0.01 off.
INT8_GRAPH_TOLERANCE = 0.1


def torch_dtype(dtype: DType) -> torch.dtype:
    """A dtype as torch has it."""
    import torch

    return getattr(torch, _TORCH[dtype])


def dtype_of(dtype: torch.dtype) -> DType:
    """The name of torch's dtype. Raises: `ValueError` for one that engines do not compute in."""
    for name in DTYPES:
        if torch_dtype(name) == dtype:
            return name
    raise ValueError(f"expected float32, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}")
