"""Drawing a token from a row of logits: a program for every row.

Top-k and top-p both keep the tokens whose logit is at least some value. It is found digit by digit, sixteen
possibilities at a time, in a pass over the row each; nothing is sorted. Tokens that are as likely as the last one kept
are kept too. Weights are summed in float32 within a block, and in float64 from block to block: in float32 a whole
vocabulary of equal weights would lose their last digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIGN = tl.constexpr(-2147483648)
"""What tells int32 from uint32 of the same order."""


@triton.jit
def _block(logits, at, scale, top, floor, SIZE: tl.constexpr, B: tl.constexpr):
    """The next B tokens of a row: their ids, logits over the temperature, -inf beyond the row's end, and weights, which
    are 1 for the likeliest token and 0 below ``floor``."""
    i = at + tl.arange(0, B)
    x = tl.load(logits + i, mask=i < SIZE, other=float("-inf")) * scale
    return i, x, tl.where(x >= floor, tl.exp(x - top), 0.0)


@triton.jit
def _cut(logits, scale, top, floor, target, SIZE: tl.constexpr, B: tl.constexpr, COUNT: tl.constexpr):
    """The largest value such that the tokens from it on reach ``target`` in number (``COUNT``) or weight, -inf where
    all of them do not."""
    digits = tl.arange(0, 16)
    found = tl.full([], 0, tl.int32)  # the leading digits of the value's rank among all floats
    value = tl.full([], float("-inf"), tl.float32)
    for step in range(8):
        shift = 28 - 4 * step
        # A float's bits have the order of floats once those of negative ones are turned round. Ranks beyond the
        # infinities are those of NaN, which nothing reaches.
        bits = (found | (digits << shift)) ^ SIGN
        least = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
        reached = tl.zeros([16], tl.float64)
        for at in range(0, SIZE, B):
            _, x, weight = _block(logits, at, scale, top, floor, SIZE, B)
            if COUNT:
                weight = tl.where(x > float("-inf"), 1.0, 0.0)
            reached += tl.sum(tl.where(x[:, None] >= least[None, :], weight[:, None], 0.0), 0).to(tl.float64)
        enough = (reached >= target) & (reached > 0)
        found |= tl.max(tl.where(enough, digits, 0), 0) << shift
        value = tl.maximum(value, tl.max(tl.where(enough, least, float("-inf")), 0))
    return value


@triton.jit
def _weight(logits, scale, top, floor, SIZE: tl.constexpr, B: tl.constexpr):
    """The weights' sum."""
    total = tl.full([], 0.0, tl.float64)
    for at in range(0, SIZE, B):
        _, _, weight = _block(logits, at, scale, top, floor, SIZE, B)
        total += tl.sum(weight, 0).to(tl.float64)
    return total


@triton.jit
def draw(logits, row_size, scales, top_ks, top_ps, log_min_ps, uniforms, tokens, SIZE: tl.constexpr, B: tl.constexpr):
    """``scales``: 1 / temperature; ``top_ks``: SIZE where there is none; ``log_min_ps``: of a part of the likeliest
    token's probability, -inf where there is none; ``uniforms`` in [0, 1), float64: where in the distribution, its
    tokens in the order of their ids, the draw falls."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_size
    scale = tl.load(scales + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    floor = tl.full([], float("-inf"), tl.float32)
    top = floor
    for at in range(0, SIZE, B):
        i = at + tl.arange(0, B)
        top = tl.maximum(top, tl.max(tl.load(logits + i, mask=i < SIZE, other=float("-inf")) * scale, 0))

    if top_k < SIZE:
        floor = _cut(logits, scale, top, floor, top_k, SIZE, B, COUNT=True)
    if top_p < 1:
        target = top_p * _weight(logits, scale, top, floor, SIZE, B)
        floor = tl.maximum(floor, _cut(logits, scale, top, floor, target, SIZE, B, COUNT=False))
    floor = tl.maximum(floor, top + tl.load(log_min_ps + row))

    target = tl.load(uniforms + row) * _weight(logits, scale, top, floor, SIZE, B)
    before = tl.full([], 0.0, tl.float64)
    chosen = tl.full([], SIZE, tl.int32)
    last = tl.full([], 0, tl.int32)
    for at in range(0, SIZE, B):
        i, _, weight = _block(logits, at, scale, top, floor, SIZE, B)
        past = (tl.cumsum(weight, 0) > (target - before).to(tl.float32)) & (weight > 0)
        chosen = tl.minimum(chosen, tl.min(tl.where(past, i, SIZE), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, i, 0), 0))
        before += tl.sum(weight, 0).to(tl.float64)
    # rounding may leave the target just beyond the sum
    tl.store(tokens + row, tl.where(chosen < SIZE, chosen, last).to(tl.int64))
