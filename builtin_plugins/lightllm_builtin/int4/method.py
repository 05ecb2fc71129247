"""Layers of packed integers: multiplied as they are by a kernel on CUDA devices, dequantized once elsewhere, and for
models in float32, in which the kernel would be slow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightllm import ModelInfo, UserError
from lightllm.nn.layers import Inputs, Linear, Outputs
from lightllm_builtin.int4.formats import FORMATS
from lightllm_builtin.int4.settings import READERS, Scheme
from lightllm_builtin.linear.dense import Dense
from lightllm_builtin.quantization_config import read, scheme_of
from lightllm_builtin.triton_support import why_not

if TYPE_CHECKING:
    from lightllm_builtin.int4.product import Product


class Int4:
    """`lightllm.LinearMethod` and `lightllm.LinearSummary`. ``kernel``: whether to multiply by the kernel; in 16 bits
    on CUDA, unless given."""

    def __init__(self, info: ModelInfo, kernel: bool | None = None) -> None:
        self.path = info.path
        self.format, self.schemes = read(info, READERS)
        self.kernel = kernel
        self.dense = Dense(info)
        self.scheme: Scheme | None = None
        self.products: list[Product] = []

    def create(self, layer: Linear) -> None:
        if self.kernel is None:
            self.kernel = layer.device.type == "cuda" and layer.dtype != torch.float32
        if self.kernel and (reason := why_not(layer.device.type)):
            raise UserError(f"{self.path}: packed weights cannot be multiplied: {reason}")
        self.scheme = scheme_of(layer, self.path, self.schemes)
        if self.scheme is None:
            self.dense.create(layer)
        else:
            FORMATS[self.format].hold(layer, self.scheme)

    def finish(self, layer: Linear) -> None:
        if self.scheme is not None:
            weights = FORMATS[self.format].read(layer, self.scheme)
            if self.kernel:
                from lightllm_builtin.int4.product import Product

                self.products = [Product(each, layer.dtype) for each in weights]
                return
            layer.hold("weight", Outputs(), Inputs())
            layer.get_parameter("weight").copy_(torch.cat([each.dequantized() for each in weights]))
        self.dense.finish(layer)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        if not self.products:
            return self.dense.apply(layer, x)
        if len(self.products) == 1:
            return self.products[0](x, layer.bias)
        biases = [None] * len(layer.outs) if layer.bias is None else layer.bias.split(layer.outs)
        return torch.cat([each(x, bias) for each, bias in zip(self.products, biases, strict=True)], -1)

    def summary(self, layer: Linear) -> str:
        if self.scheme is None:
            return "plain (the head)" if layer.head else "plain"
        return f"{self.scheme.bits}-bit {self.format}" + ("" if self.kernel else " (dequantized when loaded)")
