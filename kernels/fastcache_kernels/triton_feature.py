"""Triton kernel: a cached feature -> its slot of a pool in one byte a value, with a scale for each group of channels.

The inverse is in `triton_norm.py`, where the feature is read. `feature.py` launches this and says what it takes.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false
# A kernel's parameters are Triton's: it types them itself, anew for each call.

import triton
import triton.language as tl


@triton.jit
def to_int8(values):
    """The nearest integers, halves to even: adding 1.5 * 2^23 leaves float32 no digits after the point."""
    return ((values + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def to_e4m3(values):
    """e4m3's bits of values within +-448, rounded to nearest even in integers: GPUs before sm_89 lack e4m3.

    Source: OCP 8-bit floating point specification, revision 1.0, table 1.
    """
    size = tl.abs(values)
    bits = size.to(tl.uint32, bitcast=True)
    # 20 of 23 digits go; float32's exponent has a bias of 127, e4m3's of 7
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # below 2^-6 the digits stand for multiples of 2^-9, float32's last place at 2^14
    subnormal = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, subnormal, normal)
    return (code | ((values.to(tl.uint32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit(do_not_specialize=["slotted"])
def quantise(feature, values, scales, slots, size, slotted, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """Values over their greatest size, times LIMIT. Grid: (groups of channels, samples); `size` values a group.

    A group with a value that is not finite gets nan for its scale, so it is read as nan: never as a wrong number.
    """
    group = tl.program_id(0)
    sample = tl.program_id(1)
    groups = tl.num_programs(0)
    slot = sample
    if slotted != 0:
        slot = tl.load(slots + sample)
    source = feature + (sample * groups + group).to(tl.int64) * size
    target = values + (slot * groups + group).to(tl.int64) * size
    peak = 0.0
    spoiled = 0.0
    for start in range(0, size, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        row = tl.load(source + offsets, mask=offsets < size, other=0, eviction_policy="evict_last").to(tl.float32)
        peak = tl.maximum(peak, tl.max(tl.abs(row), 0))
        spoiled += tl.sum(row * 0.0, 0)
    # div_rn: the plain division of a GPU is off by up to two places
    scale = tl.where(peak > 0, tl.div_rn(peak, tl.full((), LIMIT, tl.float32)), 1.0)
    tl.store(scales + slot * groups + group, scale + spoiled)
    for start in range(0, size, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < size
        row = tl.load(source + offsets, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
        row = tl.minimum(tl.maximum(tl.div_rn(row, scale), -LIMIT), LIMIT)
        if values.dtype.element_ty == tl.int8:
            tl.store(target + offsets, to_int8(row), mask=mask)
        else:
            tl.store(target + offsets, to_e4m3(row), mask=mask)
