"""Rows of numbers as float8 with a scale each, and their products.

float8 is e4m3 without infinities (Micikevicius et al., FP8 Formats for Deep Learning, 2022): 4 significant bits, from
2^-9 to 448 in magnitude. A row is divided by a scale that makes its largest magnitude 448, so nothing is clamped.
Where a row holds a NaN or an infinity, so do all of its products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
FLOOR = 2.0**-126
"""Of scales: the smallest whose inverse is a float32. A row of zeros has it."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, size] -> float8 [rows, size] and float32 scales [rows, 1]."""
    wide = x.float()
    scales = (wide.abs().amax(1, keepdim=True) / LARGEST).clamp(min=FLOOR)
    return (wide * (1 / scales)).to(FLOAT8), scales


def quantize_fused(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same by one Triton kernel. x may be a view."""
    import triton

    from lightllm_builtin.fp8 import kernels

    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, size = x.shape
    out = torch.empty(rows, size, dtype=FLOAT8, device=x.device)
    scales = torch.empty(rows, 1, device=x.device)
    if rows:
        block = triton.next_power_of_2(size)
        kernels.quantize[(rows,)](
            x, out, scales, x.stride(0),
            LARGEST=LARGEST, FLOOR=FLOOR, SIZE=size, B=block, num_warps=min(max(block // 1024, 1), 32),
        )  # fmt: skip
    return out, scales


def multiply(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """x [rows, in], weight [out, in], both float8 with their scales -> x W^T [rows, out], summed in float32. Of the
    dtypes row-wise scales can give on every device, bfloat16 is the only one: other dtypes pass through it."""
    y = torch._scaled_mm(x, weight.t(), x_scales, weight_scales.t(), out_dtype=torch.bfloat16)
    return y.to(dtype)


def multiply_emulated(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for devices that cannot multiply float8, of numbers in ``dtype``."""
    return F.linear(x.to(dtype).mul_(x_scales), weight.to(dtype).mul_(weight_scales))
