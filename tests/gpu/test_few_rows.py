"""The kernel for few rows on a CUDA device, and the choice between it and PyTorch's library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from few_rows_cases import products
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_cases import check

from lightllm_builtin.linear.few_rows import CANDIDATES, ROWS, Product, fastest

pytestmark = pytest.mark.gpu


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: Any) -> None:
    products(data, "cuda")


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 6144), (4096, 28672), (14336, 4096), (3584, 4608)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_sizes(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, inputs, dtype=dtype, device="cuda")
    weight = torch.randn(outputs, inputs, dtype=dtype, device="cuda")
    for tiles in CANDIDATES:
        check(Product(dict.fromkeys(ROWS, tiles))(x, weight, None), x, weight.double(), None)


def test_the_choice_leaves_no_memory_behind() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    found = fastest(6144, 4096, torch.bfloat16, torch.device("cuda"))
    assert set(found.tiles) == set(ROWS)
    assert before - torch.cuda.mem_get_info()[0] < 128 << 20  # the library's own
