"""Products with integers that stay packed: what is read of a weight are its bits, a scale and a zero for each group.

Names of sizes: ``M`` rows of x, ``N`` outputs, ``K`` inputs; ``BM``, ``BN``, ``BK`` those that are held at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightllm_builtin.triton_product import product

# The bits of a float32 of 2**23; an integer below 2**23 in its lowest bits is added to it. Conversions of integers have
# a fraction of the throughput of such an `or`.
MAGIC_BITS = tl.constexpr(0x4B000000)
MAGIC = tl.constexpr(8388608.0)


@triton.jit(do_not_specialize=["M"])  # it changes from step to step
def multiply(
    x, words, scales, zeros, bias, out, M, N, K, x_row, part, group,
    BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """``out`` [parts, M, N] = x [M, K] by (q - zero) * scale. A program sums over ``part`` inputs, a multiple of BK.

    ``words`` [ceil(K / PER), N] hold q, PER values along the inputs; ``scales``, ``zeros`` [groups, N]. A group has
    ``group`` inputs, a multiple of BK unless there is one only. x is multiplied by the integers q - zero, which all
    dtypes hold exactly, and sums of BK products by the scale.
    """
    PER: tl.constexpr = 32 // BITS
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    begin = tl.program_id(2) * part
    shifts = (tl.arange(0, PER) * BITS)[None, :, None]
    rows = x + m.to(tl.int64)[:, None] * x_row
    total = tl.zeros([BM, BN], tl.float32)
    for at in range(begin, tl.minimum(begin + part, K), BK):
        k = at + tl.arange(0, BK)
        xs = tl.load(rows + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        word = at // PER + tl.arange(0, BK // PER)
        there = (word * PER < K)[:, None] & (n < N)[None, :]
        several = tl.load(words + word.to(tl.int64)[:, None] * N + n[None, :], mask=there, other=0)
        q = tl.reshape((several[:, None, :] >> shifts) & ((1 << BITS) - 1), (BK, BN))
        place = (at // group) * N + n
        zero = tl.load(zeros + place, mask=n < N, other=0).to(tl.float32)
        scale = tl.load(scales + place, mask=n < N, other=0.0).to(tl.float32)
        w = ((q | MAGIC_BITS).to(tl.float32, bitcast=True) - (zero + MAGIC)[None, :]).to(xs.dtype)
        total += product(xs, w) * scale[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    row = tl.program_id(2).to(tl.int64) * M + m
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + row[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])  # it changes from step to step
def add(partial, bias, out, M, N, PARTS: tl.constexpr, B: tl.constexpr, BIAS: tl.constexpr):
    """``out`` [M, N] = the sum of ``partial`` [PARTS, M, N], and ``bias`` [N]. A program takes B of a row."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * B + tl.arange(0, B)
    total = tl.zeros([B], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partial + (part * M + row) * N + n, mask=n < N, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, total.to(out.dtype.element_ty), mask=n < N)
