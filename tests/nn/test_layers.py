"""Layers against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightllm import ModelInfo
from lightllm.nn.layers import Make
from lightllm.nn.rope import context_length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("offset", "reference"), [(0.0, LlamaRMSNorm), (1.0, Gemma3RMSNorm)], ids=["plain", "offset"])
def test_norms_and_their_residuals(dtype: torch.dtype, offset: float, reference: Any) -> None:
    torch.manual_seed(0)
    theirs = reference(20, eps=1e-5).to(dtype)
    theirs.weight.data.uniform_(-0.1, 0.1)
    make = Make(dtype=dtype, device="cpu", linear_method=lambda: pytest.fail("there is no linear layer"))
    ours = make.norm(20, 1e-5, offset=offset)
    ours.load("weight", theirs.weight.detach(), None)
    x, residual = torch.randn(2, 7, 3, 20).to(dtype)
    # bfloat16: Llama's rounds once more, between norm and weight
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    with torch.no_grad():
        normed, kept = ours(x)
        torch.testing.assert_close(normed, theirs(x), rtol=tolerance, atol=tolerance)
        assert torch.equal(kept, x)
        normed, kept = ours(x, residual)
        torch.testing.assert_close(normed, theirs(x + residual), rtol=tolerance, atol=tolerance)
        assert torch.equal(kept, x + residual)


def test_an_offset_is_added_without_rounding_the_sum() -> None:
    """1 + 0.001 is 1 in bfloat16."""
    theirs = Gemma3RMSNorm(64).to(torch.bfloat16)
    theirs.weight.data.fill_(0.003).add_(torch.arange(64) * 1e-5)
    make = Make(dtype=torch.bfloat16, device="cpu", linear_method=lambda: pytest.fail("there is no linear layer"))
    ours = make.norm(64, 1e-6, offset=1.0)
    ours.load("weight", theirs.weight.detach(), None)
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(ours(x)[0], theirs(x))
        without = torch.nn.functional.rms_norm(x, (64,), (1 + theirs.weight), 1e-6)
        assert not torch.equal(without, theirs(x))


@pytest.mark.parametrize(
    ("scaling", "reach"),
    [
        ({"rope_type": "yarn"}, 256),  # the factor is what lies between the two lengths
        ({"rope_type": "yarn", "factor": 8.0}, 512),
        ({"rope_type": "linear", "factor": 2.0}, 512),
        ({"rope_type": "llama3", "factor": 8.0}, 256),
    ],
)
def test_positions_reach_as_far_as_they_were_stretched(scaling: dict[str, Any], reach: int) -> None:
    parameters = {"original_max_position_embeddings": 64, **scaling}
    config = {"max_position_embeddings": 256, "rope_parameters": parameters}
    assert context_length(ModelInfo(path="", architecture="", config=config)) == reach
