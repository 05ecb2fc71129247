"""The product of two blocks, as the kernels that multiply matrices have it."""

from __future__ import annotations

import triton
import triton.language as tl

from lightllm_builtin.triton_support import interpreted

# Triton's interpreter (3.7 to 3.9) would multiply the bits of bfloat16 numbers
WIDEN = tl.constexpr(interpreted())


@triton.jit
def product(a, b):
    """a @ b in float32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
