"""Triton kernels: a cached feature beside a skip connection -> SiLU(GroupNorm(concat)), the concat never in memory.

One program works on one channel of one sample, so each lies wholly on one side of the joint, and a group that straddles
it is no special case: groups are put together from the channels' statistics. `ops.py` launches these and says what
they take.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false
# A kernel's parameters are Triton's: it types them itself, anew for each call.

import triton
import triton.language as tl

MEMBERS = tl.constexpr(128)  # channels read at once: a group of SD 1.5 has at most 80


@triton.jit
def joined_row(
    cached, skip, sample, channel, cached_channels, skip_channels, plane, offsets, mask, SKIP_POLICY: tl.constexpr
):
    """One channel of one sample of the concat, in float32."""
    if channel < cached_channels:
        place = cached + (sample * cached_channels + channel).to(tl.int64) * plane
        # evict_last: the shallow steps until the next refresh read the same feature, and L2 holds it
        row = tl.load(place + offsets, mask=mask, other=0, eviction_policy="evict_last")
    else:
        place = skip + (sample * skip_channels + channel - cached_channels).to(tl.int64) * plane
        row = tl.load(place + offsets, mask=mask, other=0, eviction_policy=SKIP_POLICY)
    return row.to(tl.float32)


@triton.jit
def merged(mean, m2, count, other_mean, other_m2, other_count):
    """Mean and sum of squared deviations of two sets together. Source: Chan, Golub, LeVeque 1983, equation 2.1."""
    share = other_count / (count + other_count)
    delta = other_mean - mean
    return mean + delta * share, m2 + other_m2 + delta * delta * count * share


@triton.jit(do_not_specialize=["cached_channels", "skip_channels"])
def channel_statistics(cached, skip, statistics, cached_channels, skip_channels, plane, BLOCK: tl.constexpr):
    """Mean and sum of squared deviations of each channel. Grid: (channels, samples)."""
    channel = tl.program_id(0)
    sample = tl.program_id(1)
    mean = 0.0
    m2 = 0.0
    for start in range(0, plane, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < plane
        row = joined_row(
            cached, skip, sample, channel, cached_channels, skip_channels, plane, offsets, mask, "evict_last"
        )
        count = tl.minimum(plane - start, BLOCK).to(tl.float32)
        block_mean = tl.sum(row, 0) / count
        deviation = tl.where(mask, row - block_mean, 0.0)
        mean, m2 = merged(mean, m2, start * 1.0, block_mean, tl.sum(deviation * deviation, 0), count)
    place = statistics + 2 * (sample * (cached_channels + skip_channels) + channel)
    tl.store(place, mean)
    tl.store(place + 1, m2)


@triton.jit
def group_moments(statistics, sample, group, channels, channels_per_group, plane):
    """A group's mean and variance out of those of its channels."""
    mean = 0.0
    m2 = 0.0
    for start in range(0, channels_per_group, MEMBERS):
        members = start + tl.arange(0, MEMBERS)
        inside = members < channels_per_group
        place = statistics + 2 * (sample * channels + group * channels_per_group + members)
        means = tl.load(place, mask=inside, other=0.0)
        m2s = tl.load(place + 1, mask=inside, other=0.0)
        count = tl.minimum(channels_per_group - start, MEMBERS).to(tl.float32)
        block_mean = tl.sum(means, 0) / count
        deviation = tl.where(inside, means - block_mean, 0.0)
        block_m2 = tl.sum(m2s, 0) + plane * tl.sum(deviation * deviation, 0)
        mean, m2 = merged(mean, m2, start * 1.0 * plane, block_mean, block_m2, count * plane)
    return mean, m2 / (channels_per_group * 1.0 * plane)


@triton.jit(do_not_specialize=["cached_channels", "skip_channels", "channels_per_group", "joined_too"])
def normalise(
    cached,
    skip,
    statistics,
    weight,
    bias,
    out,
    joined,
    cached_channels,
    skip_channels,
    channels_per_group,
    plane,
    eps,
    joined_too,
    BLOCK: tl.constexpr,
):
    """SiLU(GroupNorm(concat)), and the concat itself on request. Grid: (blocks of a plane, channels, samples)."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.program_id(1)
    sample = tl.program_id(2)
    mask = offsets < plane
    channels = cached_channels + skip_channels
    row = joined_row(cached, skip, sample, channel, cached_channels, skip_channels, plane, offsets, mask, "evict_first")
    group = channel // channels_per_group
    mean, variance = group_moments(statistics, sample, group, channels, channels_per_group, plane)
    factor = tl.rsqrt(variance + eps) * tl.load(weight + channel).to(tl.float32)
    normed = (row - mean) * factor + tl.load(bias + channel).to(tl.float32)
    place = (sample * channels + channel).to(tl.int64) * plane + offsets
    tl.store(out + place, (normed / (1.0 + tl.exp(-normed))).to(out.dtype.element_ty), mask=mask)
    if joined_too != 0:
        tl.store(joined + place, row.to(joined.dtype.element_ty), mask=mask)
