"""Weights as 8-bit integers and a scale for every output: rounded when they have been loaded, multiplied as floats."""

from __future__ import annotations

import torch
from lightllm import ModelInfo
from lightllm.nn.layers import Inputs, Linear, Outputs
from torch import Tensor
from torch.nn import functional as F


class ExamplePluginLinear:
    """`lightllm.LinearMethod`. Every layer has one of its own."""

    weight: Tensor
    """[out, in] int8"""
    scale: Tensor
    """[out], of the model's dtype"""

    def __init__(self, info: ModelInfo) -> None:
        """``info.config`` is config.json, where a checkpoint says how it is quantized: this one is for plain ones."""

    def create(self, layer: Linear) -> None:
        """What the checkpoint's tensors are copied into, be it in several parts."""
        layer.hold("weight", Outputs(), Inputs())

    def finish(self, layer: Linear) -> None:
        loaded = layer.get_parameter("weight").float()
        scale = loaded.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.weight = (loaded / scale[:, None]).round().to(torch.int8)
        self.scale = scale.to(layer.dtype)
        layer.register_parameter("weight", None)  # the memory is needed for the next layer's

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if layer.bias is None else y + layer.bias
