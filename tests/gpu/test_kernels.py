"""Triton's kernels on a CUDA device: the same checks as in the interpreter, in the dtypes that matter there."""

from __future__ import annotations

import pytest

from lightllm.testing import check_attention_backend, check_operators, check_sampler
from lightllm_builtin.sampling.sampler import StandardSampler
from lightllm_builtin.triton_attention import backend
from lightllm_builtin.triton_operators.operators import TritonOperators
from lightllm_builtin.triton_sampling.sampler import TritonSampler

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_attention(dtype: str) -> None:
    check_attention_backend(backend.TritonAttention, device="cuda", dtype=dtype)


def test_decodes_of_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "SMALLEST_PART", 16)
    check_attention_backend(backend.TritonAttention, device="cuda", dtype="float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_operators(dtype: str) -> None:
    check_operators(TritonOperators, device="cuda", dtype=dtype)


@pytest.mark.parametrize("sampler", [TritonSampler, StandardSampler])
def test_samplers(sampler: type) -> None:
    check_sampler(sampler, device="cuda")
