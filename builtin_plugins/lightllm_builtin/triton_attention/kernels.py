"""Attention over keys and values that lie in a pool of slots, one slot a token, where a table says.

All accumulate in float32 and take softmax(scores) by its running maximum (Milakov and Gimelshein, 2018). Scores are in
units of log2(e), so that exp2 does for exp. Names of sizes: ``D`` head size, ``BD`` that rounded up to a power of
two, ``BN`` keys and ``BM`` queries that are held at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightllm_builtin.triton_product import product

LOG2E = tl.constexpr(1.4426950408889634)


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
def rotate_and_write(
    qkv,
    cos,
    sin,
    q,
    pool_k,
    pool_v,
    slots,
    qkv_token,
    qkv_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Of qkv [tokens, HEADS + 2 KV_HEADS, D] the query heads, rotated, into q [tokens, HEADS, D], the key heads,
    rotated, and the value heads into their slots of the pool. Rotated is x * cos + roll(x, ROTATED / 2) * sin in the
    first ROTATED dimensions, cos and sin [tokens, ROTATED]. A program takes a head of a token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    i = tl.arange(0, BD)
    mask = i < D
    at = qkv + token * qkv_token + head * qkv_head
    x = tl.load(at + i, mask=mask, other=0.0)
    if head >= HEADS + KV_HEADS:
        tl.store(pool_v + (slot * KV_HEADS + head - HEADS - KV_HEADS) * D + i, x, mask=mask)
    else:
        turns = i < ROTATED
        other = tl.load(at + (i + ROTATED // 2) % ROTATED, mask=turns, other=0.0).to(tl.float32)
        c = tl.load(cos + token * ROTATED + i, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + token * ROTATED + i, mask=turns, other=0.0).to(tl.float32)
        turned = (x.to(tl.float32) * c + other * s).to(q.dtype.element_ty)
        if head < HEADS:
            tl.store(q + (token * HEADS + head) * D + i, turned, mask=mask)
        else:
            tl.store(pool_k + (slot * KV_HEADS + head - HEADS) * D + i, turned, mask=mask)


@triton.jit
def _part(length, window, BN: tl.constexpr, PARTS: tl.constexpr, LEAST: tl.constexpr):
    """The first key that a decode sees, and how many there are in each of its parts but the last."""
    first = tl.maximum(length - window, 0)
    return first, tl.maximum(tl.cdiv(tl.cdiv(length - first, PARTS), BN) * BN, LEAST)


@triton.jit
def _scores(q, keys, scale, SOFTCAP: tl.constexpr):
    """q [rows, BD] by keys [BN, BD] -> scaled, capped scores [rows, BN] in units of log2(e)."""
    scores = product(q, tl.trans(keys))
    if SOFTCAP > 0.0:  # a bool: compiled, unlike interpreted, `if` takes no float
        # tanh, which Triton has for some devices only
        return (SOFTCAP * LOG2E) * (2 * tl.sigmoid(scores * (2 * scale / SOFTCAP)) - 1)
    return scores * (scale * LOG2E)


@triton.jit
def _take_in(scores, values, top, total, sums):
    """The next keys' scores [rows, BN] and values [BN, BD] into the running maximum, denominator and weighted sum."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    # a row that has seen nothing yet has no maximum, and -inf - -inf is no number
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - safe_top[:, None])
    shrink = tl.exp2(top - safe_top)
    total = total * shrink + tl.sum(weights, 1)
    sums = sums * shrink[:, None] + product(weights.to(values.dtype), values)
    return new_top, total, sums


# a batch's decodes may begin anywhere in a tensor, which is no reason to compile anew
@triton.jit(do_not_specialize_on_alignment=["queries", "rows", "lengths"])
def decode(
    q,
    pool_k,
    pool_v,
    table,
    queries,
    rows,
    lengths,
    out,
    partial,
    logsum,
    q_token,
    q_head,
    table_row,
    scale,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One new token a sequence: flash decoding (Dao, Haziza, Massa and Sizov, 2023).

    ``queries``, ``rows``, ``lengths``: of each sequence, its token's row in q and out, its row in the table, how many
    tokens it has. A program is given a sequence, a kv head and one of up to ``PARTS`` equal parts of the keys, of
    ``LEAST`` of them at least. The query heads that share the kv head are the rows of one matrix (``BH`` rows, some of
    them nobody's), so keys are read once. With several parts, each leaves its result in ``partial``
    [sequences, HEADS, PARTS, D] and the logarithm of its denominator in ``logsum`` [sequences, HEADS, PARTS], for
    `combine`.
    """
    sequence, kv_head, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    token = tl.load(queries + sequence)
    slots = table + tl.load(rows + sequence) * table_row
    length = tl.load(lengths + sequence).to(tl.int32)
    first, part = _part(length, window, BN, PARTS, LEAST)
    begin = first + number * part
    end = tl.minimum(begin + part, length)

    h, d = tl.arange(0, BH), tl.arange(0, BD)
    head = kv_head * GROUP + h
    ours = (h[:, None] < GROUP) & (d[None, :] < D) & (begin < length)
    query = tl.load(q + token * q_token + head[:, None] * q_head + d[None, :], mask=ours, other=0.0)
    top = tl.full([BH], float("-inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    sums = tl.zeros([BH, BD], tl.float32)
    for at in range(begin, end, BN):
        n = at + tl.arange(0, BN)
        there = n < end
        slot = tl.load(slots + n, mask=there, other=0).to(tl.int64)
        place = (slot[:, None] * KV_HEADS + kv_head) * D + d[None, :]
        mask = there[:, None] & (d[None, :] < D)
        keys = tl.load(pool_k + place, mask=mask, other=0.0)
        values = tl.load(pool_v + place, mask=mask, other=0.0)
        scores = tl.where(there[None, :], _scores(query, keys, scale, SOFTCAP), float("-inf"))
        top, total, sums = _take_in(scores, values, top, total, sums)

    total = tl.where(total == 0.0, 1.0, total)  # there may be nothing to do
    result = sums / total[:, None]
    if PARTS == 1:
        tl.store(out + (token * HEADS + head[:, None]) * D + d[None, :], result.to(out.dtype.element_ty), mask=ours)
    else:
        place = (sequence.to(tl.int64) * HEADS + head) * PARTS + number
        tl.store(partial + place[:, None] * D + d[None, :], result, mask=ours)
        tl.store(logsum + place, top + tl.log2(total), mask=(h < GROUP) & (begin < length))


@triton.jit(do_not_specialize_on_alignment=["queries", "lengths"])
def combine(
    partial,
    logsum,
    queries,
    lengths,
    out,
    window,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """The parts of `decode`, each weighted by its denominator. One program a sequence and head."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(queries + sequence)
    length = tl.load(lengths + sequence).to(tl.int32)
    first, part = _part(length, window, BN, PARTS, LEAST)
    s, d = tl.arange(0, PARTS), tl.arange(0, BD)
    there = first + s * part < length
    place = (sequence.to(tl.int64) * HEADS + head) * PARTS + s
    logs = tl.load(logsum + place, mask=there, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    mask = there[:, None] & (d[None, :] < D)
    parts = tl.load(partial + place[:, None] * D + d[None, :], mask=mask, other=0.0)
    result = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + (token * HEADS + head) * D + d, result.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _walk(
    query,
    pool_k,
    pool_v,
    slots,
    begin,
    end,
    kv_head,
    position,
    window,
    scale,
    top,
    total,
    sums,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take in the keys from ``begin`` to ``end``. Not ``MASKED``: whole blocks of keys that all queries see."""
    m, d = tl.arange(0, BM), tl.arange(0, BD)
    for at in range(begin, end, BN):
        n = at + tl.arange(0, BN)
        there = n < end if MASKED else n >= 0
        slot = tl.load(slots + n, mask=there, other=0).to(tl.int64)
        place = (slot[:, None] * KV_HEADS + kv_head) * D + d[None, :]
        mask = there[:, None] & (d[None, :] < D)
        keys = tl.load(pool_k + place, mask=mask, other=0.0)
        values = tl.load(pool_v + place, mask=mask, other=0.0)
        scores = _scores(query, keys, scale, SOFTCAP)
        if MASKED:
            behind = (position + m)[:, None] - n[None, :]
            scores = tl.where((behind >= 0) & (behind < window) & there[None, :], scores, float("-inf"))
        top, total, sums = _take_in(scores, values, top, total, sums)
    return top, total, sums


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
    table_row,
    scale,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Several new tokens a sequence, after any number that are in the pool: FlashAttention-2 (Dao, 2023).

    A program is given a query head and ``BM`` queries of one sequence. ``blocks`` [blocks, 4]: the first query's row in
    q, how many there are, the first one's position, and the sequence's row in the table. All keys, the new ones too,
    are read from the pool. A query sees the keys up to its own position, the last ``window`` of them: in the middle
    all queries see all keys, at the ends of the walk there is something to mask.
    """
    # the last queries of a sequence have the most keys: they begin first, so that all end at about the same time
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    row = tl.load(blocks + block * 4).to(tl.int64)
    count = tl.load(blocks + block * 4 + 1)
    position = tl.load(blocks + block * 4 + 2)
    slots = table + tl.load(blocks + block * 4 + 3).to(tl.int64) * table_row

    m, d = tl.arange(0, BM), tl.arange(0, BD)
    ours = (m[:, None] < count) & (d[None, :] < D)
    query = tl.load(q + (row + m[:, None]) * q_token + head * q_head + d[None, :], mask=ours, other=0.0)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, BD], tl.float32)
    begin, end = 0, position + count
    middle_end = (position + 1) // BN * BN
    if WINDOWED:
        first = tl.maximum(position - window + 1, 0) // BN * BN  # what no query's window reaches is skipped
        begin = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), BN) * BN, middle_end)
        top, total, sums = _walk(
            query, pool_k, pool_v, slots, first, begin, kv_head, position, window, scale, top, total, sums,
            KV_HEADS, D, BD, BM, BN, SOFTCAP, MASKED=True,
        )  # fmt: skip
    top, total, sums = _walk(
        query, pool_k, pool_v, slots, begin, middle_end, kv_head, position, window, scale, top, total, sums,
        KV_HEADS, D, BD, BM, BN, SOFTCAP, MASKED=False,
    )  # fmt: skip
    top, total, sums = _walk(
        query, pool_k, pool_v, slots, middle_end, end, kv_head, position, window, scale, top, total, sums,
        KV_HEADS, D, BD, BM, BN, SOFTCAP, MASKED=True,
    )  # fmt: skip
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + ((row + m[:, None]) * HEADS + head) * D + d[None, :], result.to(out.dtype.element_ty), mask=ours)
