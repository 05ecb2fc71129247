"""A product with few rows: what counts there is how fast the weight is read."""

from __future__ import annotations

import triton
import triton.language as tl

from lightllm_builtin.triton_product import product


@triton.jit(do_not_specialize=["M"])  # it changes from step to step
def multiply(
    x, weight, bias, out, M, N, K, x_row, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr
):
    """``out`` [M, N] = x [M, K] by weight [N, K], transposed, and ``bias`` [N]; M is at most BM. A program takes BN
    outputs, and BK inputs at a time: no number of the weight is read twice, and every output is one program's."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    total = tl.zeros([BM, BN], tl.float32)
    for at in range(0, K, BK):
        k = at + tl.arange(0, BK)
        xs = tl.load(x + m[:, None] * x_row + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        mask = (n < N)[:, None] & (k < K)[None, :]
        w = tl.load(weight + n[:, None] * K + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        total += product(xs, tl.trans(w))
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    place = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
