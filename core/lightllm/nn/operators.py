"""The small operations between the matrix products, in PyTorch: what runs where nobody has anything faster."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class TorchOperators:
    """`lightllm.Operators`."""

    def rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if residual is not None:
            x = x + residual
        if weight.dtype != x.dtype:
            return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype), x
        return F.rms_norm(x, weight.shape, weight, eps), x

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    def rotate(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = cos_sin
        rotated = cos.shape[-1]
        if x.shape[-1] == rotated:
            return torch.addcmul(x * cos, x.roll(rotated // 2, -1), sin)
        return torch.cat((self.rotate(x[..., :rotated], cos_sin), x[..., rotated:]), -1)

    def gather(self, x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(0, rows)
