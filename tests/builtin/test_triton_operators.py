"""Triton's fused operators, in its interpreter, by the kit: in float64 written out, memory poisoned."""

from __future__ import annotations

import pytest
import torch

from lightllm.testing import check_operators

pytest.importorskip("triton")
operators = pytest.importorskip("lightllm_builtin.triton_operators.operators")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does this on the device")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_they_compute_what_their_contract_says(dtype: str) -> None:
    check_operators(operators.TritonOperators, dtype=dtype)
