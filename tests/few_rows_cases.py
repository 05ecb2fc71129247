"""Products with few rows of any shape, within int4_cases.py's bound."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from int4_cases import check

from lightllm_builtin.linear.few_rows import CANDIDATES, ROWS, Product


def products(data: st.DataObject, device: str) -> None:
    dtype = data.draw(st.sampled_from((torch.bfloat16, torch.float16)))
    rows, outputs, inputs = data.draw(st.tuples(st.integers(0, 16), st.integers(1, 100), st.integers(1, 1200)))
    gaps = data.draw(st.sampled_from((1, 2)))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(rows, inputs * gaps, generator=random).to(device, dtype)[:, ::gaps]
    weight = torch.randn(outputs, inputs, generator=random).to(device, dtype)
    bias = torch.randn(outputs, generator=random).to(device, dtype) if data.draw(st.booleans()) else None
    product = Product(dict.fromkeys(ROWS, data.draw(st.sampled_from(CANDIDATES))))
    check(product(x, weight, bias), x, weight.double(), bias)
