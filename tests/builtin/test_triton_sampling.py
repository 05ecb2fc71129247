"""Triton's sampler, in its interpreter: distributions by the kit, and what a cut keeps, against a sort."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightllm.engine.request import SamplingParams
from lightllm.testing import check_sampler
from lightllm.testing.rows import Row
from lightllm.testing.samplers import wanted

pytest.importorskip("triton")
sampler = pytest.importorskip("lightllm_builtin.triton_sampling.sampler")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does this on the device")


def test_it_samples_as_requests_ask() -> None:
    check_sampler(sampler.TritonSampler, draws=96)  # the interpreter takes 20 ms for each


CUTS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 3, "temperature": 0.7},
    {"top_p": 0.4},
    {"top_p": 1e-6},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "temperature": 2.0},
    {"min_p": 0.3},
]


@pytest.mark.parametrize("params", CUTS, ids=str)
def test_the_tokens_that_are_kept_are_those_of_a_sort(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform numbers are set to where each kept token's part of the distribution begins and ends."""
    monkeypatch.setattr(sampler, "BLOCK", 32)  # a row is several blocks
    logits = torch.randn(1, 150, generator=torch.Generator().manual_seed(3)) * 2
    expected = wanted(logits[0], **params)
    cumulative = expected.cumsum(0)
    kept = expected.nonzero().flatten().tolist()
    inside = [float(cumulative[token] - expected[token] / 2) for token in kept]
    numbers = iter([*inside, 0.0, 1.0])
    monkeypatch.setattr(sampler, "uniform", lambda *_: next(numbers))
    rows = [Row(SamplingParams(**params)) for _ in range(len(kept) + 2)]
    found = sampler.TritonSampler().sample(logits.expand(len(rows), -1).clone(), rows).tolist()
    assert found == [*kept, kept[0], kept[-1]]


def test_tokens_as_likely_as_the_last_that_is_kept_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0, float("-inf")]])
    numbers = [0.01, 0.5, 0.99]
    monkeypatch.setattr(sampler, "uniform", lambda seed, *_: numbers[seed])
    rows = [Row(SamplingParams(top_k=2), seed=seed) for seed in range(3)]
    assert sampler.TritonSampler().sample(logits.expand(3, -1).clone(), rows).tolist() == [0, 1, 2]
