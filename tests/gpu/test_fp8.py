"""float8 layers on a CUDA device: the kernel's rounding, and `torch._scaled_mm` against its emulation."""

from __future__ import annotations

from typing import Any

import float8
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import tensors

from lightllm.testing import check_linear_method
from lightllm_builtin.fp8 import rounding
from lightllm_builtin.fp8.method import Fp8, multiplies_float8

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = [(4096, 6144), (4096, 28672), (14336, 4096), (896, 1152), (64, 48)]
"""(inputs, outputs): Llama 3 8B's, one of Qwen2.5 0.5B's, a small one."""


@pytest.fixture(scope="module")
def native() -> None:
    if not multiplies_float8(torch.device("cuda")):
        pytest.skip("the device cannot multiply float8")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_layers_multiply(dtype: str) -> None:
    """tests/builtin/test_fp8.py derives the bound."""
    check_linear_method(Fp8, device="cuda", dtype=dtype, tolerance=1.5 / 27)


@pytest.mark.parametrize("block", [None, (16, 32)])
def test_layers_of_a_checkpoint_multiply(block: tuple[int, int] | None) -> None:
    """tests/builtin/test_fp8_checkpoints.py derives the bounds."""
    settings = {"weight_block_size": list(block)} if block else {}
    check_linear_method(
        Fp8,
        config={"quantization_config": {"quant_method": "fp8", **settings}},
        pack=lambda weight: float8.packed(weight, block, "weight_scale_inv"),
        device="cuda",
        dtype="bfloat16",
        tolerance=1.5 / (27 if block else 38),
    )


# few examples: the kernel is compiled for each size
@pytest.mark.usefixtures("native")
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_rows_of_any_size_and_stride_are_rounded(data: Any, dtype: torch.dtype) -> None:
    x = data.draw(tensors((data.draw(st.sampled_from((0, 1, 7))), data.draw(st.integers(1, 300))), dtype, "cuda"))
    x *= data.draw(st.sampled_from((0.0, 1.0, 1e-6, 300.0)))
    found, scales = rounding.quantize_fused(x)
    expected, expected_scales = float8.quantized(x.float().cpu())
    assert torch.equal(scales.double().cpu(), expected_scales)
    assert torch.equal(found.double().cpu(), expected)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("size", [896, 14336, 53248])
def test_long_rows_are_rounded(size: int) -> None:
    x = torch.randn(33, size + 8, device="cuda").bfloat16()[:, 8:]
    for found, expected in zip(rounding.quantize_fused(x), rounding.quantize(x), strict=True):
        assert torch.equal(found.float(), expected.float())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(wrong: float) -> None:
    x, weight = torch.randn(3, 64, device="cuda"), torch.randn(32, 64, device="cuda")
    x[1, 9] = wrong
    y = rounding.multiply(*rounding.quantize_fused(x), *rounding.quantize_fused(weight), torch.bfloat16)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 5, 16, 257])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_products_equal_the_emulation(inputs: int, outputs: int, rows: int, dtype: torch.dtype) -> None:
    """Which is computed in float64. A tensor core of capability 8.9 or 9.0 adds float8 products up with some 13 bits
    between its own steps, whose sums go to float32: of all that is added up, 2^-13 may be lost."""
    random = torch.Generator("cuda").manual_seed(rows)
    x = torch.randn(rows, inputs, device="cuda", generator=random).to(dtype)
    weight = torch.randn(outputs, inputs, device="cuda", generator=random).to(dtype) / 64
    a, a_scales = rounding.quantize_fused(x)
    b, b_scales = rounding.quantize_fused(weight)
    found = rounding.multiply(a, a_scales, b, b_scales, dtype).double()
    exact = rounding.multiply_emulated(a, a_scales, b, b_scales, torch.float64)
    terms = rounding.multiply_emulated(a.double().abs(), a_scales, b.double().abs(), b_scales, torch.float64)
    assert ((found - exact).abs() <= exact.abs() * 2**-8 + terms * 2**-13).all()
