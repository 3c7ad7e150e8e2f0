"""Triton kernels: a step's noise prediction -> the next latents and the model's next input, in one pass.

Nothing here is a number of the host's: which step it is lies in device memory, and its coefficients in tables, so that
one captured launch serves every step. `guidance.py` launches these and says what they take.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportArgumentType=false
# A kernel's parameters are Triton's: it types them itself, anew for each call.

import triton
import triton.language as tl


@triton.jit
def guided(noise_pred, guidance_scale, sample, samples, size, halves, offsets, mask):
    """A sample's conditional and its guided prediction, in float32; both the only one there is without guidance."""
    place = noise_pred + sample * size + offsets
    conditional = tl.load(place, mask=mask, other=0).to(tl.float32)
    value = conditional
    if halves == 2:
        conditional = tl.load(place + samples * size, mask=mask, other=0).to(tl.float32)
        value += guidance_scale * (conditional - value)
    return conditional, value


@triton.jit
def merged_block(mean, m2, count, values, mask, block_count):
    """Mean and sum of squared deviations with a block more. Source: Chan, Golub, LeVeque 1983, equation 2.1."""
    block_mean = tl.sum(values, 0) / block_count
    deviation = tl.where(mask, values - block_mean, 0.0)
    delta = block_mean - mean
    share = block_count / (count + block_count)
    return mean + delta * share, m2 + tl.sum(deviation * deviation, 0) + delta * delta * count * share


@triton.jit(do_not_specialize=["size", "chunk"])
def guidance_statistics(noise_pred, guidance, step, partials, size, chunk, BLOCK: tl.constexpr):
    """Mean and sum of squared deviations of a guided pair's conditional half and of its guided prediction.

    Grid: (chunks, samples); `partials` (samples, chunks, 4).
    """
    first = tl.program_id(0) * chunk
    sample = tl.program_id(1)
    samples = tl.num_programs(1)
    guidance_scale = tl.load(guidance + tl.load(step))
    end = tl.minimum(first + chunk, size)
    conditional_mean = 0.0
    conditional_m2 = 0.0
    guided_mean = 0.0
    guided_m2 = 0.0
    for start in range(first, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < end
        conditional, value = guided(noise_pred, guidance_scale, sample, samples, size, 2, offsets, mask)
        count = (start - first) * 1.0
        block_count = tl.minimum(end - start, BLOCK).to(tl.float32)
        conditional_mean, conditional_m2 = merged_block(
            conditional_mean, conditional_m2, count, conditional, mask, block_count
        )
        guided_mean, guided_m2 = merged_block(guided_mean, guided_m2, count, value, mask, block_count)
    place = partials + 4 * (sample * tl.num_programs(0) + tl.program_id(0))
    tl.store(place, conditional_mean)
    tl.store(place + 1, conditional_m2)
    tl.store(place + 2, guided_mean)
    tl.store(place + 3, guided_m2)


@triton.jit
def squared_deviations(partials, counts, size):
    """The sum of squared deviations of a whole sample, out of those of its chunks."""
    means = tl.load(partials, mask=counts > 0, other=0.0)
    m2s = tl.load(partials + 1, mask=counts > 0, other=0.0)
    deviation = tl.where(counts > 0, means - tl.sum(means * counts, 0) / size, 0.0)
    return tl.sum(m2s + counts * deviation * deviation, 0)


@triton.jit(
    do_not_specialize=[
        "size",
        "chunk",
        "ring_calls",
        "num_steps",
        "noise_rows",
        "noise_stride",
        "input_stride",
        "halves",
    ]
)
def guidance_step(  # noqa: PLR0915 (as its docstring says)
    noise_pred,
    ring,
    noise,
    model_input,
    timestep,
    weights,
    guidance,
    input_scales,
    timesteps,
    step,
    partials,
    size,
    chunk,
    ring_calls,
    num_steps,
    noise_rows,
    noise_stride,
    input_stride,
    halves,
    rescale,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Guidance, the sampler's update and the next model input. Grid: (blocks of a sample, samples).

    `ring` (ring_calls, 3, samples, size) holds x, e and z of the last calls, `weights` (num_steps, ring_calls, 3) what
    each row counts. A row of weight 0 is not read: what lies there may be anything, and memory is spared.
    One long function, for its parts share masks and registers.
    """
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sample = tl.program_id(1)
    samples = tl.num_programs(1)
    mask = offsets < size
    call = tl.load(step)
    _, value = guided(noise_pred, tl.load(guidance + call), sample, samples, size, halves, offsets, mask)
    if rescale > 0:
        chunks = tl.arange(0, CHUNKS)
        counts = tl.minimum(tl.maximum(size - chunks * chunk, 0), chunk).to(tl.float32)
        place = partials + 4 * (sample * CHUNKS + chunks)
        ratio = tl.sqrt(squared_deviations(place, counts, size) / squared_deviations(place + 2, counts, size))
        value *= rescale * ratio + (1.0 - rescale)
    row_size = samples * size
    column = sample * size + offsets
    own = 3 * (call % ring_calls)
    tl.store(ring + (own + 1) * row_size + column, value, mask=mask)
    rows = tl.arange(0, ROWS)
    row_weights = tl.load(weights + call * 3 * ring_calls + rows, mask=rows < 3 * ring_calls, other=0.0)
    wanted = (row_weights != 0) & (rows != own + 1)
    update = tl.load(weights + (call * 3 * ring_calls + own + 1)) * value
    if noise_rows > 0:
        drawn = tl.load(noise + (call % noise_rows) * noise_stride + column, mask=mask, other=0.0)
        tl.store(ring + (own + 2) * row_size + column, drawn, mask=mask)
        update += tl.load(weights + (call * 3 * ring_calls + own + 2)) * drawn
        wanted = wanted & (rows != own + 2)
    places = ring + rows[:, None] * row_size + column[None, :]
    history = tl.load(places, mask=wanted[:, None] & mask[None, :], other=0.0)
    update += tl.sum(history * row_weights[:, None], 0)
    # Every row read has gone into the sum by now, so the oldest call's x may be the one that is overwritten.
    following = call + 1
    tl.store(ring + 3 * (following % ring_calls) * row_size + column, update, mask=mask)
    if following < num_steps:
        scaled = (update * tl.load(input_scales + following)).to(model_input.dtype.element_ty)
        place = model_input + sample * input_stride + offsets
        tl.store(place, scaled, mask=mask)
        if halves == 2:
            tl.store(place + samples * input_stride, scaled, mask=mask)
        if tl.program_id(0) == 0:
            time = tl.load(timesteps + following)
            tl.store(timestep + sample, time)
            if halves == 2:
                tl.store(timestep + samples + sample, time)
