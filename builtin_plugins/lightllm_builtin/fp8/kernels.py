"""A program for every row, which it reads once and writes once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize(x, out, scales, x_row, LARGEST: tl.constexpr, FLOOR: tl.constexpr, SIZE: tl.constexpr, B: tl.constexpr):
    """``scales`` = the largest magnitude of the row / LARGEST, at least FLOOR; ``out`` = row / scale."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)
    mask = i < SIZE
    wide = tl.load(x + row * x_row + i, mask=mask, other=0.0).to(tl.float32)
    # correctly rounded, as in PyTorch: both give the same numbers
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(wide), 0), LARGEST), FLOOR)
    tl.store(scales + row, scale)
    tl.store(out + row * SIZE + i, (wide * tl.div_rn(1.0, scale)).to(out.dtype.element_ty), mask=mask)
