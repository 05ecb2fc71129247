"""A program for every row, which it reads once and writes once; all is computed in float32."""

from __future__ import annotations

import triton
import triton.language as tl

TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def rms_norm(
    x, residual, weight, out, total, x_row, residual_row, eps, SIZE: tl.constexpr, B: tl.constexpr, ADD: tl.constexpr
):
    """``out`` = norm(x + residual) * weight, ``total`` = x + residual, rows of SIZE. Not ``ADD``: of x alone."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)
    mask = i < SIZE
    wide = tl.load(x + row * x_row + i, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        wide += tl.load(residual + row * residual_row + i, mask=mask, other=0.0).to(tl.float32)
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + row * SIZE + i, rounded, mask=mask)
        wide = rounded.to(tl.float32)  # of what is stored, as without fusing
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    normed = wide * scale * tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + i, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gate(gate_up, out, gate_up_row, SIZE: tl.constexpr, B: tl.constexpr, GELU: tl.constexpr):
    """``out`` = activation(first half) * second half, rows of SIZE. A program takes B of a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * B + tl.arange(0, B)
    mask = i < SIZE
    x = tl.load(gate_up + row * gate_up_row + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_row + SIZE + i, mask=mask, other=0.0).to(tl.float32)
    if GELU:  # noqa: SIM108 - GELU is a constant: only one of the two is compiled
        # 0.5 x (1 + tanh(y)) is x sigmoid(2 y)
        active = x * tl.sigmoid((x + 0.044715 * x * x * x) * TWICE_SQRT_2_OVER_PI)
    else:
        active = x * tl.sigmoid(x)
    tl.store(out + row * SIZE + i, (active * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def rotate(
    x, cos, sin, out, x_token, x_head, HEADS: tl.constexpr, D: tl.constexpr, ROTATED: tl.constexpr, B: tl.constexpr
):
    """``out`` = x * cos + roll(x, ROTATED / 2) * sin in the first ROTATED of D dimensions, x in the others. A program
    takes a head of a token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, B)
    mask, turns = i < D, i < ROTATED
    partner = tl.where(turns, (i + ROTATED // 2) % ROTATED, i)
    at = x + token * x_token + head * x_head
    value = tl.load(at + i, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(at + partner, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + token * ROTATED + i, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + token * ROTATED + i, mask=turns, other=0.0).to(tl.float32)
    tl.store(out + (token * HEADS + head) * D + i, (value * c + other * s).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gather(x, rows, out, x_row, SIZE: tl.constexpr, B: tl.constexpr):
    """``out`` = rows of x, each of SIZE. A program takes B of a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * B + tl.arange(0, B)
    mask = i < SIZE
    tl.store(out + row * SIZE + i, tl.load(x + tl.load(rows + row) * x_row + i, mask=mask), mask=mask)
