"""Drawing a token from a row of logits: a program for every row.

Top-k and top-p both keep the tokens whose logit is at least some value. It is found digit by digit, sixteen
possibilities at a time, in a pass over the row each; nothing is sorted. Tokens that are as likely as the last one kept
are kept too.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _key(x):
    """float32 -> int64 in [0, 2**32) of the same order."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits, bits + 2147483648)


@triton.jit
def _load(logits, at, scale, SIZE: tl.constexpr, B: tl.constexpr):
    """The next B logits of a row, over the temperature; -inf beyond its end."""
    i = at + tl.arange(0, B)
    return i, tl.load(logits + i, mask=i < SIZE, other=float("-inf")) * scale


@triton.jit
def _cut(logits, scale, top, floor, target, SIZE: tl.constexpr, B: tl.constexpr, COUNT: tl.constexpr):
    """The largest key such that the tokens from it on, none below ``floor``, reach ``target`` in number or weight."""
    digits = tl.arange(0, 16).to(tl.int64)
    found = tl.sum(tl.zeros([1], tl.int64), 0)
    for digit in tl.static_range(8):
        shift = 28 - 4 * digit
        possible = found + (digits << shift)
        reached = tl.zeros([16], tl.float32)
        for at in range(0, SIZE, B):
            _, x = _load(logits, at, scale, SIZE, B)
            key = _key(x)
            weight = tl.exp(x - top)
            if COUNT:
                weight = tl.where(x > float("-inf"), 1.0, 0.0)
            weight = tl.where(key >= floor, weight, 0.0)
            reached += tl.sum(tl.where(key[:, None] >= possible[None, :], weight[:, None], 0.0), 0)
        found += tl.max(tl.where(reached >= target, digits, 0), 0) << shift
    return found


@triton.jit
def _weight(logits, scale, top, floor, SIZE: tl.constexpr, B: tl.constexpr):
    """The sum of the weights of the tokens that are kept."""
    total = tl.sum(tl.zeros([1], tl.float32), 0)
    for at in range(0, SIZE, B):
        _, x = _load(logits, at, scale, SIZE, B)
        total += tl.sum(tl.where(_key(x) >= floor, tl.exp(x - top), 0.0), 0)
    return total


@triton.jit
def draw(logits, row_size, scales, top_ks, top_ps, log_min_ps, uniforms, tokens, SIZE: tl.constexpr, B: tl.constexpr):
    """``scales``: 1 / temperature; ``top_ks``: SIZE where there is none; ``log_min_ps``: of a part of the likeliest
    token's probability, -inf where there is none; ``uniforms`` in [0, 1): where in the distribution, its tokens in the
    order of their ids, the draw falls."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_size
    scale = tl.load(scales + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    top = tl.max(tl.full([1], float("-inf"), tl.float32), 0)
    for at in range(0, SIZE, B):
        _, x = _load(logits, at, scale, SIZE, B)
        top = tl.maximum(top, tl.max(x, 0))

    floor = tl.sum(tl.zeros([1], tl.int64), 0)
    if top_k < SIZE:
        floor = tl.maximum(floor, _cut(logits, scale, top, floor, top_k.to(tl.float32), SIZE, B, COUNT=True))
    if top_p < 1:
        target = top_p * _weight(logits, scale, top, floor, SIZE, B)
        floor = tl.maximum(floor, _cut(logits, scale, top, floor, target, SIZE, B, COUNT=False))
    floor = tl.maximum(floor, _key(top + tl.load(log_min_ps + row)))

    target = tl.load(uniforms + row) * _weight(logits, scale, top, floor, SIZE, B)
    before = tl.sum(tl.zeros([1], tl.float32), 0)
    chosen = tl.sum(tl.zeros([1], tl.int32), 0) + SIZE
    last = tl.sum(tl.zeros([1], tl.int32), 0)
    for at in range(0, SIZE, B):
        i, x = _load(logits, at, scale, SIZE, B)
        weight = tl.where(_key(x) >= floor, tl.exp(x - top), 0.0)
        past = (before + tl.cumsum(weight, 0) > target) & (weight > 0)
        chosen = tl.minimum(chosen, tl.min(tl.where(past, i, SIZE), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, i, 0), 0))
        before += tl.sum(weight, 0)
    # rounding may leave the target just beyond the sum
    tl.store(tokens + row, tl.where(chosen < SIZE, chosen, last).to(tl.int64))
