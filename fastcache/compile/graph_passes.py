"""How torch operators become ONNX ones where a backend, or a precision, needs another form than the exporter's.

Knows graphs; knows nothing about what they compute for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from onnxscript import opset20
from onnxscript.values import Op, Opset

from fastcache.errors import BuildError
from fastcache_engines import Capabilities, DType

Translations = Mapping[Callable[..., Any], Callable[..., Any]]

# What the exporter must know of ONNX Runtime's operator: its inputs, attributes and the type they share.
_SCHEMA = onnx.defs.OpSchema(
    "MultiHeadAttention",
    "com.microsoft",
    1,
    inputs=[onnx.defs.OpSchema.FormalParameter(name, "T") for name in ("query", "key", "value")],
    outputs=[onnx.defs.OpSchema.FormalParameter("output", "T")],
    type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
    attributes=[
        onnx.defs.OpSchema.Attribute("num_heads", onnx.defs.OpSchema.AttrType.INT, required=True),
        onnx.defs.OpSchema.Attribute("scale", onnx.defs.OpSchema.AttrType.FLOAT, required=False),
    ],
)


def fused_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`scaled_dot_product_attention` as ONNX Runtime's `MultiHeadAttention`, which on a CPU is flash attention.

    Shapes: `query` (N, heads, tokens, width), `key` and `value` (N, heads, other tokens, width).
    Source: arXiv 2205.14135; ONNX Runtime's contributed operators.
    """
    if attn_mask is not None or is_causal or enable_gqa or dropout_p:
        raise BuildError("expected attention without mask, causality, shared heads or dropout; export it unfused")
    op: Any = opset20  # traced, so its arguments are symbols, not the arrays its annotations say
    heads = query.shape[1]

    def rows(x: Any) -> Any:  # (N, heads, tokens, width) -> (N, tokens, heads * width)
        return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))

    attributes = {} if scale is None else {"scale": scale}
    multi_head_attention = Op(Opset("com.microsoft", 1), "MultiHeadAttention", _SCHEMA)
    attended = multi_head_attention(rows(query), rows(key), rows(value), num_heads=heads, **attributes)
    split = op.Reshape(attended, op.Constant(value_ints=[0, 0, heads, -1]))
    return op.Transpose(split, perm=[0, 2, 1, 3])


FUSED_ATTENTION: Translations = {torch.ops.aten.scaled_dot_product_attention.default: fused_attention}


def group_norm_in_float32(
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """`group_norm` whose statistics are float32 whatever the graph's type: a float16 sum of squares overflows at 65504.

    Shapes: `input` (N, C, ...); `weight` and `bias` (C,). Source: arXiv 1803.08494, equation 1.
    """
    op: Any = opset20
    wide = _float32(op, input)
    grouped = op.Reshape(wide, op.Constant(value_ints=[0, num_groups, -1]))
    ones, zeros = (op.Constant(value_floats=[value] * num_groups) for value in (1.0, 0.0))
    normed = op.Reshape(op.InstanceNormalization(grouped, ones, zeros, epsilon=eps), op.Shape(input))
    a_channel = op.Constant(value_ints=[-1, *[1] * (len(input.shape) - 2)])
    for factor, apply in ((weight, op.Mul), (bias, op.Add)):
        if factor is not None:
            normed = apply(normed, op.Reshape(_float32(op, factor), a_channel))
    return op.CastLike(normed, input)


def _float32(op: Any, value: Any) -> Any:
    return op.Cast(value, to=onnx.TensorProto.FLOAT)


# ONNX's LayerNormalization has float32 statistics of itself (its stash_type).
NORMS_IN_FLOAT32: Translations = {torch.ops.aten.group_norm.default: group_norm_in_float32}


def translations(backend: Capabilities, dtype: DType) -> Translations:
    """What a backend's graphs of a dtype are exported with."""
    attention = FUSED_ATTENTION if backend.fused_attention else {}
    return {**attention, **(NORMS_IN_FLOAT32 if backend.typed and dtype != "fp32" else {})}
