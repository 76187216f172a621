"""The kernels in Triton: what ``noise.c`` and ``weights.c`` do on a CPU, a program for each row of a weight. Imported where they run alone.

A row is ``count`` groups of ``block`` weights. It is worked on in tiles of GROUPS groups and SLOTS weights of each, of shape
(GROUPS, SLOTS / EACH, EACH). EACH is the largest of 1, 2, 4 and 8 that divides ``block``: so many weights lie in one word of noise,
which is hashed once for them, and are read at once.
"""

import triton
import triton.language as tl

from diffq_fx.functional.quantization import WIDEST_HALF

_LN_2 = tl.constexpr(0.69314718)
_WIDEST_HALF = tl.constexpr(WIDEST_HALF)


@triton.jit
def _noise(place, seed, table, EACH: tl.constexpr, GAUSSIAN: tl.constexpr):
    """Noise, in steps, of the EACH weights from each ``place`` (..., 1) on: the same hash as in ``noise.c`` and ``draws.py``."""
    word = seed + (place >> 3).to(tl.uint64) * 0x9E3779B97F4A7C15
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    word = word ^ (word >> 31)
    shift = ((place & 7) * 8).to(tl.uint64) + (tl.arange(0, EACH) * 8).to(tl.uint64)[None, None, :]
    byte = ((word >> shift).to(tl.int32) & 0xFF) | 1  # odd bytes are symmetric about 0
    byte = byte - ((byte & 0x80) << 1)
    if GAUSSIAN:
        return tl.load(table + ((byte + 127) >> 1))
    return byte.to(tl.float32) * (1.0 / 256)


@triton.jit
def _places(row, group, first_slot, count, block, SLOTS: tl.constexpr, EACH: tl.constexpr):
    """The places in the weight of each EACH weights of a tile, shape (GROUPS, SLOTS / EACH, 1), and which of them are there."""
    if EACH > 1:  # a 1 is no value but a constant
        block = tl.multiple_of(block, EACH)
    slot = first_slot + tl.arange(0, SLOTS // EACH)[None, :, None] * EACH
    place = row * count * block + group * block + slot
    return tl.multiple_of(place, [1, 1, EACH]), (group < count) & (slot < block)


@triton.jit
def _share(logit, gain):
    return 1 / (1 + tl.exp2(-gain * 1.44269504 * logit))


@triton.jit
def _span(
    weight, logits, spans, row, count, length, min_bits, bits_range, gain, CLIPS: tl.constexpr, GRID: tl.constexpr,
    GROUPS: tl.constexpr, TILE: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The length of a row's range, and how fast its logarithm to base 2 grows with the bits: see ``range_of`` in ``inline.h``."""
    if EACH > 1:
        length = tl.multiple_of(length, EACH)
    inner = tl.arange(0, EACH)[None, :]
    zero = tl.zeros((TILE // EACH, EACH), tl.float32)
    low, high, total, square = zero + float("inf"), zero - float("inf"), zero, zero
    for left in range(0, length, TILE):
        column = left + tl.arange(0, TILE // EACH)[:, None] * EACH
        there = column < length
        value = tl.load(weight + (row * length + column + inner), mask=there, other=0).to(tl.float32)
        low, high = tl.where(there & (value < low), value, low), tl.where(there & (value > high), value, high)
        total, square = total + value, square + value * value
    low, high = tl.min(tl.min(low, 1), 0), tl.max(tl.max(high, 1), 0)
    total, square = tl.sum(tl.sum(total, 1), 0), tl.sum(tl.sum(square, 1), 0)
    if GRID == "symmetric":
        high = tl.maximum(-low, high)
        low = -high
    if GRID == "affine" or GRID == "half":
        low, high = tl.minimum(low, 0), tl.maximum(high, 0)
    growth = 0.0
    if CLIPS:
        widest = tl.full((1,), float("-inf"), tl.float32)
        for left in range(0, count, GROUPS):
            group = left + tl.arange(0, GROUPS)
            widest = tl.maximum(widest, tl.max(tl.load(logits + row * count + group, mask=group < count, other=float("-inf")), 0))
        mean = total / length
        mean = mean * 0 if GRID == "symmetric" else mean
        up = tl.max(min_bits + bits_range * _share(widest, gain), 0) - 1
        whole = tl.minimum(tl.maximum(tl.floor(up), 0), 14)
        part = tl.minimum(tl.maximum(up - whole, 0), 1)
        below, above = tl.load(spans + whole.to(tl.int32)), tl.load(spans + whole.to(tl.int32) + 1)
        half_std = tl.sqrt(tl.maximum(square / length - mean * mean, 0)) / 2
        reach = half_std * (below + part * (above - below))
        low_moves, high_moves = mean - reach > low, mean + reach < high
        low, high = tl.maximum(low, mean - reach), tl.minimum(high, mean + reach)
        if GRID == "affine" or GRID == "half":
            low_moves, high_moves = low_moves & (low < 0), high_moves & (high > 0)
            low, high = tl.minimum(low, 0), tl.maximum(high, 0)
        ends = low_moves.to(tl.float32) + high_moves.to(tl.float32)
        growth = 1.44269504 * ends * half_std * (above - below) / (high - low)
        growth = tl.where((high > low) & (up >= 0) & (up <= 15), growth, 0.0)
    return tl.where(square == square, high - low, float("nan")), growth


@triton.jit
def add_noise(
    weight, of_group, spans, seed, table, out, span_out, count, block, row_stride, min_bits, bits_range, gain,
    LOGITS: tl.constexpr, CLIPS: tl.constexpr, GRID: tl.constexpr, GAUSSIAN: tl.constexpr,
    GROUPS: tl.constexpr, SLOTS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """``out = w + step n``. ``of_group`` holds steps; with LOGITS the logits that steps are made of, as in ``diffq_fx_noisy``."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(seed).to(tl.uint64)
    span = 1.0
    if LOGITS:
        span, growth = _span(
            weight, of_group, spans, row, count, count * block, min_bits, bits_range, gain, CLIPS, GRID, GROUPS, GROUPS * SLOTS, EACH
        )
        tl.store(span_out + row, span)
        tl.store(span_out + tl.num_programs(0) + row, growth)  # behind all lengths
    inner = tl.arange(0, EACH)[None, None, :]
    for first_group in range(0, count, GROUPS):
        group = first_group + tl.arange(0, GROUPS)[:, None, None]
        step = tl.load(of_group + row * row_stride + group, mask=group < count, other=0).to(tl.float32)
        if LOGITS:
            step = span / (tl.exp2(min_bits + bits_range * _share(step, gain)) - 1)
        for first_slot in range(0, block, SLOTS):
            place, there = _places(row, group, first_slot, count, block, SLOTS, EACH)
            value = tl.load(weight + (place + inner), mask=there).to(tl.float32)
            noisy = value + step * _noise(place, start, table, EACH, GAUSSIAN)
            tl.store(out + (place + inner), noisy.to(out.dtype.element_ty), mask=there)


@triton.jit
def reduce_noise(
    grad, logits, span, seed, table, sums, count, block, min_bits, bits_range, gain,
    LOGITS: tl.constexpr, GAUSSIAN: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Sum of ``grad n`` over each group; with LOGITS the gradient of the logits, as in ``diffq_fx_noisy_backward``."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(seed).to(tl.uint64)
    inner = tl.arange(0, EACH)[None, None, :]
    slope, grown, widest = (
        gain * bits_range * _LN_2,
        tl.zeros((GROUPS, 1, 1), tl.float32),
        tl.full((GROUPS, 1, 1), float("-inf"), tl.float32),
    )
    for first_group in range(0, count, GROUPS):
        group = first_group + tl.arange(0, GROUPS)[:, None, None]
        partial = tl.zeros((GROUPS, SLOTS // EACH, EACH), tl.float32)
        for first_slot in range(0, block, SLOTS):
            place, there = _places(row, group, first_slot, count, block, SLOTS, EACH)
            value = tl.load(grad + (place + inner), mask=there, other=0).to(tl.float32)
            partial += value * _noise(place, start, table, EACH, GAUSSIAN)
        found = tl.sum(tl.sum(partial, 2), 1)[:, None, None]
        if LOGITS:
            logit = tl.load(logits + row * count + group, mask=group < count, other=float("-inf"))
            share = _share(logit, gain)
            levels = tl.exp2(min_bits + bits_range * share)
            grown, widest = grown + tl.where(group < count, found / (levels - 1), 0), tl.maximum(widest, logit)
            found *= slope * levels * (share * (share - 1)) / ((levels - 1) * (levels - 1)) * tl.load(span + row)
        tl.store(sums + row * count + group, found, mask=group < count)
    if LOGITS:
        growth = tl.load(span + tl.num_programs(0) + row)
        if growth != 0:  # the widest bits lengthen all steps of the range; of several that are widest each gets its share
            most, equal = tl.max(tl.max(tl.max(widest, 2), 1), 0), tl.zeros((GROUPS, 1, 1), tl.float32)
            for first_group in range(0, count, GROUPS):
                group = first_group + tl.arange(0, GROUPS)[:, None, None]
                equal += (tl.load(logits + row * count + group, mask=group < count, other=float("nan")) == most).to(tl.float32)
            share, alike = _share(most, gain), tl.maximum(tl.sum(tl.sum(tl.sum(equal, 2), 1), 0), 1)
            added = tl.sum(tl.sum(tl.sum(grown, 2), 1), 0) * growth * tl.load(span + row) * slope * share * (1 - share) / alike
            for first_group in range(0, count, GROUPS):
                group = first_group + tl.arange(0, GROUPS)[:, None, None]
                is_widest = tl.load(logits + row * count + group, mask=group < count, other=float("nan")) == most
                place = sums + row * count + group
                tl.store(place, tl.load(place, mask=is_widest) + added, mask=is_widest)


@triton.jit
def _nearest(x):
    """The nearest whole number, of two the even one; right within what a grid holds. A sum of this size has no room for a fraction."""
    x = tl.minimum(tl.maximum(x, -1048576.0), 1048576.0)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _grid_of(low, high, width, GRID: tl.constexpr):
    """Scale, zero point and top level: the operations of ``functional.quant_params``, each rounded as IEEE says, so the same bits."""
    top = ((1 << width) - 1).to(tl.float32)
    scale = tl.div_rn(high - low, top)
    scale = tl.where(scale > 1.1754943508222875e-38, scale, 1.0)
    if GRID == "symmetric":
        zero_point = (1 << (width - 1)).to(tl.float32)
    else:
        exact = tl.div_rn(0 - low, scale)
        zero_point = _nearest(exact)
        if GRID == "half":
            zero_point = tl.where(width <= _WIDEST_HALF, _nearest(2 * exact) / 2, zero_point)
        zero_point = tl.minimum(tl.maximum(zero_point, 0), top)
    return scale, zero_point, top


@triton.jit
def _rounded(value, scale, zero_point, top):
    half = zero_point - tl.floor(zero_point)
    level = _nearest(tl.div_rn(value, scale) + half) + (zero_point - half)
    return (tl.minimum(tl.maximum(level, 0), top) - zero_point) * scale


@triton.jit
def round_in_range(
    weight, low, high, factor, width, out, count, block, width_row, width_group,
    GRID: tl.constexpr, LEARNED: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The nearest weights on the grid of each row's range, times ``factor`` where it is LEARNED, with the width of each group."""
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, EACH)[None, None, :]
    moved = tl.load(factor + row) if LEARNED else 1.0
    least, most = tl.load(low + row) * moved, tl.load(high + row) * moved
    for first_group in range(0, count, GROUPS):
        group = first_group + tl.arange(0, GROUPS)[:, None, None]
        bits = _nearest(tl.load(width + row * width_row + group * width_group, mask=group < count, other=1)).to(tl.int32)
        scale, zero_point, top = _grid_of(least, most, bits, GRID)
        for first_slot in range(0, block, SLOTS):
            place, there = _places(row, group, first_slot, count, block, SLOTS, EACH)
            value = tl.load(weight + (place + inner), mask=there, other=0).to(tl.float32)
            rounded = _rounded(value, scale, zero_point, top)
            tl.store(out + (place + inner), rounded.to(out.dtype.element_ty), mask=there)


@triton.jit
def slope_of_clip(
    grad, weight, low, high, factor, width, slope, count, block, width_row, width_group, reach, clip_gain,
    GRID: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The gradient of ``clip``, of which ``factor`` is made: see ``RoundInRange``."""
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, EACH)[None, None, :]
    moved = tl.load(factor + row)
    least, most = tl.load(low + row) * moved, tl.load(high + row) * moved
    total, largest = tl.zeros((GROUPS, SLOTS // EACH, EACH), tl.float32), tl.zeros((GROUPS, 1, 1), tl.float32)
    for first_group in range(0, count, GROUPS):
        group = first_group + tl.arange(0, GROUPS)[:, None, None]
        bits = _nearest(tl.load(width + row * width_row + group * width_group, mask=group < count, other=16)).to(tl.int32)
        scale, zero_point, top = _grid_of(least, most, bits, GRID)
        largest = tl.maximum(largest, tl.where(group < count, scale, 0))
        for first_slot in range(0, block, SLOTS):
            place, there = _places(row, group, first_slot, count, block, SLOTS, EACH)
            value = tl.load(weight + (place + inner), mask=there, other=0).to(tl.float32)
            upstream = tl.load(grad + (place + inner), mask=there, other=0).to(tl.float32)
            rounded = _rounded(value, scale, zero_point, top)
            error = rounded - value
            total += upstream * tl.where(tl.abs(error) > reach * scale, rounded, error)
    found, step = tl.sum(tl.sum(tl.sum(total, 2), 1), 0), tl.max(tl.max(tl.max(largest, 2), 1), 0)
    steps_in_range = tl.maximum((most - least) / step, 1)
    lsq_scale = 1 / tl.sqrt(steps_in_range * (count * block))
    tl.store(slope + row, found * lsq_scale / (step * step * clip_gain))
