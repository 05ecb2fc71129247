"""Products with packed weights on a CUDA device: by the kit, by int4_cases.py, and at the sizes of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_cases import check, exact, products, random_weights
from quantized import awq, gptq, rounded

from lightllm.testing import check_linear_method
from lightllm_builtin.int4.method import Int4
from lightllm_builtin.int4.product import Product

pytestmark = pytest.mark.gpu

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}


# two units of the dtype: what two ranks sum is rounded three times, by half a unit of what is largest
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-7), ("float16", 2**-10), ("float32", 1e-4)])
@pytest.mark.parametrize(("config", "write"), [(GPTQ, gptq), (AWQ, awq)], ids=["gptq", "awq"])
def test_layers(config: Any, write: Any, dtype: str, tolerance: float) -> None:
    def pack(weight: torch.Tensor) -> Any:
        order = torch.randperm(weight.shape[1]).numpy() if write is gptq else None
        held = rounded(weight, order=order)
        return {name: t.to(weight.device) for name, t in write(held).items()}, held.weight.to(weight.device)

    quantization = {"quantization_config": config}
    check_linear_method(Int4, config=quantization, pack=pack, tolerance=tolerance, device="cuda", dtype=dtype)


# few examples: the kernels are compiled for each size
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: Any) -> None:
    products(Product, data, "cuda")


@pytest.mark.parametrize("rows", [1, 16, 17, 100, 1000])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 6144), (4096, 28672), (14336, 4096), (896, 1152)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_sizes(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weights = random_weights(outputs, torch.arange(inputs) // 128, 4, "cuda", seed=rows)
    x = torch.randn(rows, inputs, dtype=dtype, device="cuda")
    check(Product(weights, dtype)(x, None), x, exact(weights, outputs), None)
