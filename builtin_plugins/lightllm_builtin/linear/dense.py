"""Weights in the model's dtype. On a CPU they are packed once for oneDNN, which `F.linear` would redo at every call.
Measured on 2 cores of an EPYC with AVX-512, all of SmolLM2's layers in float32: 13 against 26 ms at 1 row, 124 against
320 ms at 256 rows. On a CUDA device products with few rows are by the kernel of `few_rows` where that is faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lightllm import ModelInfo
from lightllm.nn.layers import Inputs, Linear, Outputs
from lightllm_builtin.triton_support import why_not

if TYPE_CHECKING:
    from lightllm_builtin.linear.few_rows import Product


class Dense:
    """`lightllm.LinearMethod` and `lightllm.LinearSummary`."""

    packed: Tensor | None = None
    product: Product | None = None

    def __init__(self, info: ModelInfo) -> None: ...

    def create(self, layer: Linear) -> None:
        layer.hold("weight", Outputs(), Inputs())

    def finish(self, layer: Linear) -> None:
        if layer.device.type == "cpu":
            if _packable(layer.dtype):
                self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.data, 16)
                # The packed copy takes over: holding both would double the memory of the weights.
                layer.register_parameter("weight", None)
        elif layer.dtype != torch.float32 and why_not(layer.device.type) is None:
            from lightllm_builtin.linear.few_rows import fastest

            self.product = fastest(layer.outputs, layer.inputs, layer.dtype, layer.device)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        if self.packed is not None:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, layer.bias, "none", [], "")
            return y
        return (self.product or F.linear)(x, layer.get_parameter("weight"), layer.bias)

    def summary(self, layer: Linear) -> str:
        return "plain, few rows by a kernel" if self.product and any(self.product.tiles.values()) else ""


def _packable(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return True
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
