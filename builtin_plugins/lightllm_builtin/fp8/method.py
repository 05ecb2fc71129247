"""Linear layers whose weights and inputs are float8, a scale for each output and each token."""

from __future__ import annotations

import torch
from torch import Tensor

from lightllm import ModelInfo
from lightllm.nn.layers import Inputs, Linear, Outputs
from lightllm_builtin.fp8 import rounding
from lightllm_builtin.linear.dense import Dense
from lightllm_builtin.triton_support import why_not

MULTIPLE = 16
"""What PyTorch's product of float8 matrices wants sizes to be of."""


class Fp8:
    """`lightllm.LinearMethod` and `lightllm.LinearSummary`. Heads, and layers whose sizes do not fit, stay as they
    are."""

    dense: Dense | None = None
    """What holds a layer that stays as it is."""
    weight: Tensor
    """[out, in] float8"""
    scales: Tensor
    """[out, 1] float32"""

    def __init__(self, info: ModelInfo) -> None:
        self.info = info

    def create(self, layer: Linear) -> None:
        if layer.head or layer.inputs % MULTIPLE or layer.outputs % MULTIPLE:
            self.dense = Dense(self.info)
            self.dense.create(layer)
            return
        # In the host's memory: a device need not have room for all the weights as the checkpoint has them.
        layer.hold("weight", Outputs(), Inputs(), device=torch.device("cpu"))

    def finish(self, layer: Linear) -> None:
        if self.dense:
            self.dense.finish(layer)
            return
        native = multiplies_float8(layer.device)
        fused = native and why_not(layer.device.type) is None
        self.quantize = rounding.quantize_fused if fused else rounding.quantize
        self.multiply = rounding.multiply if native else rounding.multiply_emulated
        self.weight, self.scales = self.quantize(layer.get_parameter("weight").data.to(layer.device))
        layer.register_parameter("weight", None)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        if self.dense:
            return self.dense.apply(layer, x)
        y = self.multiply(*self.quantize(x.reshape(-1, layer.inputs)), self.weight, self.scales, x.dtype)
        if layer.bias is not None:
            y += layer.bias
        return y.view(*x.shape[:-1], layer.outputs)

    def summary(self, layer: Linear) -> str:
        if self.dense:
            return "plain (the head)" if layer.head else f"plain (sizes that are no multiples of {MULTIPLE})"
        if multiplies_float8(layer.device):
            return "float8"
        return "emulated float8 (slower than plain: this device cannot multiply float8)"


def multiplies_float8(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)
