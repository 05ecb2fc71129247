"""Attention over keys and values that lie in a pool of slots, one slot a token, where a table says.

All accumulate in float32 and take softmax(scores) by its running maximum (Milakov and Gimelshein, 2018). Scores are in
units of log2(e), so that exp2 does for exp. Names of sizes: ``D`` head size, ``BD`` that rounded up to a power of
two, ``BN`` keys and ``BM`` queries that are held at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightllm_builtin.triton_support import interpreted

LOG2E = tl.constexpr(1.4426950408889634)

# Triton's interpreter (3.7 to 3.9) would multiply the bits of bfloat16 numbers
WIDEN = tl.constexpr(interpreted())


@triton.jit
def _product(a, b):
    """a @ b in float32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def write_slots(
    k, v, pool_k, pool_v, slots, k_token, k_head, v_token, v_head, SIZE: tl.constexpr, D: tl.constexpr, B: tl.constexpr
):
    """New keys and values k, v [tokens, kv_heads, D] into their slots of the pool. One program a token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    for start in range(0, SIZE, B):
        i = start + tl.arange(0, B)
        head, dim = i // D, i % D
        mask = i < SIZE
        tl.store(pool_k + slot * SIZE + i, tl.load(k + token * k_token + head * k_head + dim, mask=mask), mask=mask)
        tl.store(pool_v + slot * SIZE + i, tl.load(v + token * v_token + head * v_head + dim, mask=mask), mask=mask)


@triton.jit
def _scores(q, keys, seen, scale, SOFTCAP: tl.constexpr):
    """q [rows, BD] by keys [BN, BD] -> scaled, capped, masked scores [rows, BN] in units of log2(e)."""
    scores = _product(q, tl.trans(keys)) * scale
    if SOFTCAP > 0.0:  # a bool: compiled, unlike interpreted, `if` takes no float
        # tanh, which Triton has for some devices only
        scores = SOFTCAP * (2 * tl.sigmoid(2 * scores / SOFTCAP) - 1)
    return tl.where(seen, scores * LOG2E, float("-inf"))


@triton.jit
def _take_in(scores, values, top, total, sums):
    """The next keys' scores [rows, BN] and values [BN, BD] into the running maximum, denominator and weighted sum."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    # a row that has seen nothing yet has no maximum, and -inf - -inf is no number
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - safe_top[:, None])
    shrink = tl.exp2(top - safe_top)
    total = total * shrink + tl.sum(weights, 1)
    sums = sums * shrink[:, None] + _product(weights.to(values.dtype), values)
    return new_top, total, sums


@triton.jit
def decode(
    q,
    pool_k,
    pool_v,
    table,
    rows,
    starts,
    lengths,
    out,
    partial,
    logsum,
    q_token,
    q_head,
    scale,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One new token a sequence: flash decoding (Dao, Haziza, Massa and Sizov, 2023).

    A program is given a sequence, a kv head and one of ``SPLITS`` equal parts of the keys. The query heads that share
    the kv head are the rows of one matrix (``BH`` rows, some of them nobody's), so keys are read once. With several
    parts, each leaves its result in ``partial`` [sequences, HEADS, SPLITS, D] and the logarithm of its denominator in
    ``logsum`` [sequences, HEADS, SPLITS], for `combine`.
    """
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    row = tl.load(rows + sequence).to(tl.int64)
    start = tl.load(starts + sequence)
    length = tl.load(lengths + sequence)
    first = tl.maximum(length - window, 0)
    part = tl.cdiv(tl.cdiv(length - first, SPLITS), BN) * BN
    begin = first + split * part
    end = tl.minimum(begin + part, length)

    h, d = tl.arange(0, BH), tl.arange(0, BD)
    head = kv_head * GROUP + h
    ours = (h[:, None] < GROUP) & (d[None, :] < D)
    query = tl.load(q + row * q_token + head[:, None] * q_head + d[None, :], mask=ours, other=0.0)
    top = tl.full([BH], float("-inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    sums = tl.zeros([BH, BD], tl.float32)
    for at in range(begin, end, BN):
        n = at + tl.arange(0, BN)
        there = n < end
        slot = tl.load(table + start + n, mask=there, other=0).to(tl.int64)
        place = (slot[:, None] * KV_HEADS + kv_head) * D + d[None, :]
        mask = there[:, None] & (d[None, :] < D)
        keys = tl.load(pool_k + place, mask=mask, other=0.0)
        values = tl.load(pool_v + place, mask=mask, other=0.0)
        scores = _scores(query, keys, there[None, :], scale, SOFTCAP)
        top, total, sums = _take_in(scores, values, top, total, sums)

    total = tl.where(total == 0.0, 1.0, total)  # a part may be empty
    result = sums / total[:, None]
    if SPLITS == 1:
        tl.store(out + (row * HEADS + head[:, None]) * D + d[None, :], result.to(out.dtype.element_ty), mask=ours)
    else:
        place = (sequence.to(tl.int64) * HEADS + head) * SPLITS + split
        tl.store(partial + place[:, None] * D + d[None, :], result, mask=ours)
        tl.store(logsum + place, top + tl.log2(total), mask=h < GROUP)  # of nothing, -inf


@triton.jit
def combine(
    partial,
    logsum,
    rows,
    out,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    SPLITS: tl.constexpr,
    BS: tl.constexpr,
):
    """The parts of `decode`, each weighted by its denominator. One program a sequence and head; ``BS`` >= SPLITS."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + sequence).to(tl.int64)
    s, d = tl.arange(0, BS), tl.arange(0, BD)
    place = (sequence.to(tl.int64) * HEADS + head) * SPLITS + s
    logs = tl.load(logsum + place, mask=s < SPLITS, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    mask = (s[:, None] < SPLITS) & (d[None, :] < D)
    parts = tl.load(partial + place[:, None] * D + d[None, :], mask=mask, other=0.0)
    result = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + (row * HEADS + head) * D + d, result.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def prefill(
    q,
    pool_k,
    pool_v,
    table,
    blocks,
    out,
    q_token,
    q_head,
    scale,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Several new tokens a sequence, after any number that are in the pool: FlashAttention-2 (Dao, 2023).

    A program is given a query head and ``BM`` queries of one sequence. ``blocks`` [blocks, 4]: the first query's row in
    q, how many there are, the first one's position, and where the sequence's slots begin in ``table``. All keys, the
    new ones too, are read from the pool. A query sees the keys up to its own position, the last ``window`` of them.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    row = tl.load(blocks + block * 4).to(tl.int64)
    count = tl.load(blocks + block * 4 + 1)
    position = tl.load(blocks + block * 4 + 2)
    start = tl.load(blocks + block * 4 + 3)

    m, d = tl.arange(0, BM), tl.arange(0, BD)
    ours = (m[:, None] < count) & (d[None, :] < D)
    query = tl.load(q + (row + m[:, None]) * q_token + head * q_head + d[None, :], mask=ours, other=0.0)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, BD], tl.float32)
    first = tl.maximum(position - window + 1, 0) // BN * BN  # what the first query's window does not reach is skipped
    end = position + count
    for at in range(first, end, BN):
        n = at + tl.arange(0, BN)
        there = n < end
        slot = tl.load(table + start + n, mask=there, other=0).to(tl.int64)
        place = (slot[:, None] * KV_HEADS + kv_head) * D + d[None, :]
        mask = there[:, None] & (d[None, :] < D)
        keys = tl.load(pool_k + place, mask=mask, other=0.0)
        values = tl.load(pool_v + place, mask=mask, other=0.0)
        behind = (position + m)[:, None] - n[None, :]
        scores = _scores(query, keys, (behind >= 0) & (behind < window) & there[None, :], scale, SOFTCAP)
        top, total, sums = _take_in(scores, values, top, total, sums)

    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + ((row + m[:, None]) * HEADS + head) * D + d[None, :], result.to(out.dtype.element_ty), mask=ours)
