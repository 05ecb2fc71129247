"""Triton's operators on a CUDA device: by the kit, by operator_cases.py, and at the sizes of real models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import close, gates, gathers, norms, rotations

from lightllm.nn.operators import TorchOperators
from lightllm.testing import check_operators
from lightllm_builtin.triton_operators.operators import TritonOperators

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_they_compute_what_their_contract_says(dtype: str) -> None:
    check_operators(TritonOperators, device="cuda", dtype=dtype)


# few examples: the kernels are compiled for each size
@pytest.mark.parametrize(("check", "longest"), [(norms, 300), (gates, 200), (rotations, 140), (gathers, 200)])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_shape_and_stride(check: Callable[..., None], longest: int, data: Any, dtype: torch.dtype) -> None:
    check(TritonOperators(), data, dtype, "cuda", longest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [896, 4096, 8192, 16384])
def test_real_sizes(size: int, dtype: torch.dtype) -> None:
    random = torch.Generator("cuda").manual_seed(size)
    x, residual = torch.randn(2, 257, size, dtype=dtype, device="cuda", generator=random)
    weight = torch.rand(size, device="cuda", generator=random) + 0.5
    normed, total = TritonOperators().rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)  # one sum, rounded once
    exact, _ = TorchOperators().rms_norm(total.double(), None, weight.double(), 1e-6)
    close(normed, exact, dtype, exact)
    gate, up = x.double().chunk(2, -1)
    close(TritonOperators().silu_mul(x), TorchOperators().silu_mul(x.double()), dtype, gate * up)
