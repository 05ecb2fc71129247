"""The torch backend, held to the kit's rules in every dtype it is used with."""

from __future__ import annotations

import pytest

from lightllm.testing import check_attention_backend
from lightllm_builtin.torch_attention import lightllm_attention_backends

(RECORD,) = lightllm_attention_backends()


@pytest.mark.parametrize(("dtype", "cases"), [("float32", 150), ("bfloat16", 40), ("float16", 40)])
def test_it_is_attention(dtype: str, cases: int) -> None:
    check_attention_backend(RECORD, dtype=dtype, cases=cases)
