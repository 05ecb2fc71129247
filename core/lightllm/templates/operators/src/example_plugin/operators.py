"""What a model computes between its matrix products, rounded once, at the end."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class ExamplePluginOperators:
    """`lightllm.Operators`. Faster ones fuse these steps, so that a tensor is read and written once."""

    def rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if residual is not None:
            x = x + residual
        wide = x.double()
        scale = (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        return (wide * scale * weight.double()).to(x.dtype), x

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.double().chunk(2, -1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.double().chunk(2, -1)
        return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)

    def rotate(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = cos_sin
        rotated = cos.shape[-1]
        turning = x[..., :rotated].double()
        turned = turning * cos.double() + turning.roll(rotated // 2, -1) * sin.double()
        return torch.cat((turned.to(x.dtype), x[..., rotated:]), -1)

    def gather(self, x: Tensor, rows: Tensor) -> Tensor:
        return x[rows]
