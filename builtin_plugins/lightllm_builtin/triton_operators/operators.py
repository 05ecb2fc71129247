"""The kernels, called."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lightllm_builtin.triton_operators import kernels

BLOCK = 1024
"""Elements of a row that a program gates or copies."""


class TritonOperators:
    """`lightllm.Operators`."""

    def rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        size = x.shape[-1]
        rows = _rows(x)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        total = x if residual is None else torch.empty_like(out)
        other = rows if residual is None else _rows(residual)
        if len(rows):
            kernels.rms_norm[(len(rows),)](
                rows, other, weight, out, total, rows.stride(0), other.stride(0), eps,
                SIZE=size, B=triton.next_power_of_2(size), ADD=residual is not None, num_warps=_warps(size),
            )  # fmt: skip
        return out, total

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._gate(gate_up, gelu=False)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        return self._gate(gate_up, gelu=True)

    def _gate(self, gate_up: Tensor, gelu: bool) -> Tensor:
        rows, size = _rows(gate_up), gate_up.shape[-1] // 2
        out = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype, device=gate_up.device)
        if len(rows):
            kernels.gate[(len(rows), triton.cdiv(size, BLOCK))](
                rows, out, rows.stride(0), SIZE=size, B=BLOCK, GELU=gelu
            )
        return out

    def rotate(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        if x.stride(-1) != 1:
            x = x.contiguous()
        cos, sin = (t.contiguous() for t in cos_sin)
        tokens, heads, dim = x.shape
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if tokens:
            kernels.rotate[(tokens, heads)](
                x, cos, sin, out, x.stride(0), x.stride(1),
                HEADS=heads, D=dim, ROTATED=cos.shape[-1], B=triton.next_power_of_2(dim), num_warps=1,
            )  # fmt: skip
        return out

    def gather(self, x: Tensor, rows: Tensor) -> Tensor:
        x, size = _rows(x), x.shape[-1]
        out = torch.empty(len(rows), size, dtype=x.dtype, device=x.device)
        if len(rows):
            kernels.gather[(len(rows), triton.cdiv(size, BLOCK))](x, rows, out, x.stride(0), SIZE=size, B=BLOCK)
        return out


def _rows(x: Tensor) -> Tensor:
    """[..., size] as [rows, size], the last dimension without gaps; a copy only where there is no such view."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _warps(size: int) -> int:
    return min(max(triton.next_power_of_2(size) // 512, 1), 16)
