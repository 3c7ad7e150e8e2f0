"""Triton kernels: a cached feature beside a skip connection -> SiLU(GroupNorm(concat)), the concat never in memory.

One program works on one channel of one sample, so each lies wholly on one side of the joint, and a group that straddles
it is no special case: groups are put together from the channels' statistics. Those are of the feature as stored, before
any adjustment, so the cached half's hold until the next refresh. `norm.py` launches these and says what they take.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false
# A kernel's parameters are Triton's: it types them itself, anew for each call.

import triton
import triton.language as tl

MEMBERS = tl.constexpr(128)  # channels read at once: a group of SD 1.5 has at most 80


@triton.jit
def dequantised(values):
    """Values as they lie in memory, in float32 and yet without their scale; bytes hold e4m3.

    e4m3's bits, moved to float16's places, are the number times 2^-8, subnormal ones too: GPUs before sm_89 lack e4m3.
    """
    if values.dtype == tl.uint8:
        bits = values.to(tl.uint16)
        return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        return values.to(tl.float32)


@triton.jit
def stored_row(values, scales, slot, channel, channels, channels_per_scale, plane, offsets, mask):
    """One channel of one slot, in float32."""
    place = values + (slot * channels + channel).to(tl.int64) * plane
    # evict_last: the shallow steps until the next refresh read the same feature, and L2 holds it
    row = dequantised(tl.load(place + offsets, mask=mask, other=0, eviction_policy="evict_last"))
    if values.dtype.element_ty == tl.uint8 or values.dtype.element_ty == tl.int8:
        row *= tl.load(scales + slot * (channels // channels_per_scale) + channel // channels_per_scale)
    return row


@triton.jit
def cached_row(
    cached,
    scales,
    previous,
    previous_scales,
    slots,
    weights,
    step,
    sample,
    channel,
    channels,
    channels_per_scale,
    plane,
    slotted,
    forecast,
    offsets,
    mask,
):
    """One channel of one sample's cached feature, or of its linear forecast: a + w (a - b)."""
    slot = sample
    if slotted != 0:
        slot = tl.load(slots + sample)
    row = stored_row(cached, scales, slot, channel, channels, channels_per_scale, plane, offsets, mask)
    if forecast != 0:
        before = stored_row(
            previous, previous_scales, slot, channel, channels, channels_per_scale, plane, offsets, mask
        )
        row += tl.load(weights + tl.load(step)) * (row - before)
    return row


@triton.jit
def merged(mean, m2, count, other_mean, other_m2, other_count):
    """Mean and sum of squared deviations of two sets together. Source: Chan, Golub, LeVeque 1983, equation 2.1."""
    share = other_count / (count + other_count)
    delta = other_mean - mean
    return mean + delta * share, m2 + other_m2 + delta * delta * count * share


@triton.jit(
    do_not_specialize=["first", "cached_channels", "skip_channels", "channels_per_scale", "slotted", "forecast"]
)
def channel_statistics(
    cached,
    scales,
    previous,
    previous_scales,
    slots,
    weights,
    step,
    skip,
    statistics,
    first,
    cached_channels,
    skip_channels,
    channels_per_scale,
    plane,
    slotted,
    forecast,
    BLOCK: tl.constexpr,
):
    """Mean and sum of squared deviations of each channel from `first` on. Grid: (channels - first, samples)."""
    channel = tl.program_id(0) + first
    sample = tl.program_id(1)
    mean = 0.0
    m2 = 0.0
    for start in range(0, plane, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < plane
        if channel < cached_channels:
            row = cached_row(
                cached,
                scales,
                previous,
                previous_scales,
                slots,
                weights,
                step,
                sample,
                channel,
                cached_channels,
                channels_per_scale,
                plane,
                slotted,
                forecast,
                offsets,
                mask,
            )
        else:
            place = skip + (sample * skip_channels + channel - cached_channels).to(tl.int64) * plane
            row = tl.load(place + offsets, mask=mask, other=0, eviction_policy="evict_last").to(tl.float32)
        count = tl.minimum(plane - start, BLOCK).to(tl.float32)
        block_mean = tl.sum(row, 0) / count
        deviation = tl.where(mask, row - block_mean, 0.0)
        mean, m2 = merged(mean, m2, start * 1.0, block_mean, tl.sum(deviation * deviation, 0), count)
    place = statistics + 2 * (sample * (cached_channels + skip_channels) + channel)
    tl.store(place, mean)
    tl.store(place + 1, m2)


@triton.jit
def group_moments(
    statistics, scale, shift, sample, group, cached_channels, channels, channels_per_group, plane, adjusted
):
    """A group's mean and variance out of those of its channels, the cached ones adjusted."""
    mean = 0.0
    m2 = 0.0
    for start in range(0, channels_per_group, MEMBERS):
        members = start + tl.arange(0, MEMBERS)
        inside = members < channels_per_group
        channel = group * channels_per_group + members
        place = statistics + 2 * (sample * channels + channel)
        means = tl.load(place, mask=inside, other=0.0)
        m2s = tl.load(place + 1, mask=inside, other=0.0)
        if adjusted != 0:
            own = inside & (channel < cached_channels)
            factor = tl.load(scale + sample * cached_channels + channel, mask=own, other=1.0)
            means = means * factor + tl.load(shift + sample * cached_channels + channel, mask=own, other=0.0)
            m2s *= factor * factor
        count = tl.minimum(channels_per_group - start, MEMBERS).to(tl.float32)
        block_mean = tl.sum(means, 0) / count
        deviation = tl.where(inside, means - block_mean, 0.0)
        block_m2 = tl.sum(m2s, 0) + plane * tl.sum(deviation * deviation, 0)
        mean, m2 = merged(mean, m2, start * 1.0 * plane, block_mean, block_m2, count * plane)
    return mean, m2 / (channels_per_group * 1.0 * plane)


@triton.jit(
    do_not_specialize=[
        "cached_channels",
        "skip_channels",
        "channels_per_scale",
        "channels_per_group",
        "slotted",
        "forecast",
        "adjusted",
        "joined_too",
    ]
)
def normalise(
    cached,
    scales,
    previous,
    previous_scales,
    slots,
    weights,
    step,
    skip,
    statistics,
    scale,
    shift,
    weight,
    bias,
    out,
    joined,
    cached_channels,
    skip_channels,
    channels_per_scale,
    channels_per_group,
    plane,
    eps,
    slotted,
    forecast,
    adjusted,
    joined_too,
    BLOCK: tl.constexpr,
):
    """SiLU(GroupNorm(concat)), and the concat itself on request. Grid: (blocks of a plane, channels, samples)."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.program_id(1)
    sample = tl.program_id(2)
    mask = offsets < plane
    channels = cached_channels + skip_channels
    if channel < cached_channels:
        row = cached_row(
            cached,
            scales,
            previous,
            previous_scales,
            slots,
            weights,
            step,
            sample,
            channel,
            cached_channels,
            channels_per_scale,
            plane,
            slotted,
            forecast,
            offsets,
            mask,
        )
        if adjusted != 0:
            place = sample * cached_channels + channel
            row = row * tl.load(scale + place) + tl.load(shift + place)
    else:
        place = skip + (sample * skip_channels + channel - cached_channels).to(tl.int64) * plane
        row = tl.load(place + offsets, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
    mean, variance = group_moments(
        statistics,
        scale,
        shift,
        sample,
        channel // channels_per_group,
        cached_channels,
        channels,
        channels_per_group,
        plane,
        adjusted,
    )
    factor = tl.rsqrt(variance + eps) * tl.load(weight + channel).to(tl.float32)
    normed = (row - mean) * factor + tl.load(bias + channel).to(tl.float32)
    place = (sample * channels + channel).to(tl.int64) * plane + offsets
    tl.store(out + place, (normed / (1.0 + tl.exp(-normed))).to(out.dtype.element_ty), mask=mask)
    if joined_too != 0:
        tl.store(joined + place, row.to(joined.dtype.element_ty), mask=mask)
