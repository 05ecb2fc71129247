"""Triton's attention kernels on a CUDA device: steps as in the interpreter, and shapes of real models."""

from __future__ import annotations

import pytest
from attention_steps import Step, check, steps
from hypothesis import given, settings

from lightllm.testing import check_attention_backend
from lightllm_builtin.triton_attention import backend

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_decodes_and_prefills_are_attention(dtype: str) -> None:
    check_attention_backend(backend.TritonAttention, device="cuda", dtype=dtype)


@settings(max_examples=200, deadline=None)
@given(step=steps(("bfloat16", "float16"), longest=300))
def test_any_step(step: Step) -> None:
    check(backend.TritonAttention, step, device="cuda")


@settings(max_examples=100, deadline=None)
@given(step=steps(("bfloat16", "float16", "float32"), longest=300))
def test_any_step_in_small_parts(step: Step) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "SMALLEST_PART", 16)
        check(backend.TritonAttention, step, device="cuda")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (28, 4), (32, 32)])
def test_long_contexts_of_real_models(heads: int, kv_heads: int, window: int | None, dtype: str) -> None:
    """A decode of many parts, a chunk after a long prefix, a whole prompt, and what is short beside them."""
    sizes = ((8191, 1), (0, 1), (500, 1), (6000, 512), (0, 2048), (100, 3))
    check(backend.TritonAttention, Step(heads, kv_heads, 128, sizes, window=window, dtype=dtype), device="cuda")


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_a_full_batch_of_decodes(head_dim: int) -> None:
    sizes = tuple((17 * i, 1) for i in range(256))
    check(backend.TritonAttention, Step(8, 2, head_dim, sizes, dtype="bfloat16"), device="cuda")
