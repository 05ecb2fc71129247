"""The standard sampler against distributions worked out by hand, and against transformers' logits warpers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightllm.engine.request import SamplingParams
from lightllm_builtin.sampling.sampler import StandardSampler, uniform

VOCABULARY = 500


@dataclass
class Row:
    params: SamplingParams
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    index: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()


def logits(seed: int, rows: int = 1, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def draw(row_logits: torch.Tensor, count: int, **params: Any) -> torch.Tensor:
    """How often each token is drawn in ``count`` draws."""
    rows = [Row(SamplingParams(**params), seed=i) for i in range(count)]
    tokens = StandardSampler().sample(row_logits.repeat(count, 1), rows)
    return torch.bincount(tokens, minlength=row_logits.shape[-1])


def assert_follows(counts: torch.Tensor, expected: torch.Tensor) -> None:
    """Chi-square at five standard deviations; a token of probability 0 must never come."""
    assert counts[expected == 0].sum() == 0
    total = counts.sum()
    common = expected * total >= 5
    chi = ((counts - expected * total)[common] ** 2 / (expected * total)[common]).sum()
    freedom = int(common.sum())
    assert chi < freedom + 5 * math.sqrt(2 * freedom) + 10, (chi, freedom)


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({}, []),
        ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.4, "top_k": 40, "top_p": 0.8, "min_p": 0.03},
            [TemperatureLogitsWarper(1.4), TopKLogitsWarper(40), TopPLogitsWarper(0.8), MinPLogitsWarper(0.03)],
        ),
        # flat: top-p reaches far past the first candidates, and all have to be looked at
        ({"temperature": 50.0, "top_p": 0.95}, [TemperatureLogitsWarper(50.0), TopPLogitsWarper(0.95)]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution_transformers_describes(params: dict[str, Any], warpers: list[Any]) -> None:
    row = logits(1)
    expected = row.clone()
    for warper in warpers:
        expected = warper(None, expected)
    assert_follows(draw(row, 20_000, **params), expected.softmax(-1)[0])


def test_temperature_zero_takes_the_likeliest_token() -> None:
    row = logits(2, rows=5)
    assert torch.equal(
        StandardSampler().sample(row.clone(), [Row(SamplingParams(temperature=0.0))] * 5), row.argmax(-1)
    )


def test_top_k_one_and_tiny_top_p_are_greedy() -> None:
    row = logits(3)
    for params in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert draw(row, 50, **params).argmax() == row.argmax()
        assert draw(row, 50, **params).max() == 50


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 7), min_size=1, max_size=12), st.randoms())
def test_a_row_gets_the_same_token_whatever_else_is_in_the_batch(seed: int, kinds: list[int], order: Any) -> None:
    menu: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_p": 0.9},
        {"top_k": 300},
        {"min_p": 0.05},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.3, "top_k": 5},
        {"logit_bias": {3: 5.0}, "temperature": 20.0, "top_p": 0.99},
    ]
    rows = [
        Row(SamplingParams(**menu[k]), prompt=[1, 2], output=[3] * i, index=i, seed=seed) for i, k in enumerate(kinds)
    ]
    values = logits(seed % 1000, rows=len(rows))
    alone = [int(StandardSampler().sample(values[i : i + 1].clone(), [row])) for i, row in enumerate(rows)]
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    together = StandardSampler().sample(values[shuffled].clone(), [rows[i] for i in shuffled]).tolist()
    assert together == [alone[i] for i in shuffled]


def test_presence_and_frequency_penalties_are_openais() -> None:
    # https://platform.openai.com/docs/api-reference: mu[j] -= c[j] * frequency + (c[j] > 0) * presence
    values = torch.zeros(1, VOCABULARY)
    row = Row(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), prompt=[9, 9], output=[3, 3, 4])
    expected = torch.zeros(VOCABULARY)
    expected[3], expected[4] = -1.0, -0.75
    StandardSampler().sample(values, [row])
    assert torch.allclose(values[0], expected)


def test_repetition_penalty_is_transformers() -> None:
    values = logits(4)
    row = Row(SamplingParams(repetition_penalty=1.7), prompt=[1, 2, 3], output=[4, 4])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 2, 3, 4, 4]]), values.clone())
    StandardSampler().sample(values, [row])
    assert torch.allclose(values, expected)


def test_logit_bias_is_added_before_the_choice() -> None:
    row = Row(SamplingParams(temperature=0.0, logit_bias={17: 100.0}))
    assert StandardSampler().sample(logits(5), [row]).item() == 17
    banned = Row(SamplingParams(temperature=0.0, logit_bias={int(logits(5).argmax()): -100.0}))
    assert StandardSampler().sample(logits(5), [banned]).item() == logits(5)[0].topk(2).indices[1]


def test_stop_ids_wait_for_min_tokens() -> None:
    stop = int(logits(6).argmax())
    early = Row(SamplingParams(temperature=0.0, min_tokens=3), output=[1, 1], stop_ids=(stop,))
    late = Row(SamplingParams(temperature=0.0, min_tokens=3), output=[1, 1, 1], stop_ids=(stop,))
    assert StandardSampler().sample(logits(6), [early]).item() != stop
    assert StandardSampler().sample(logits(6), [late]).item() == stop


def test_seeds_choices_and_positions_draw_independently() -> None:
    draws = {uniform(s, c, p) for s in range(20) for c in range(20) for p in range(20)}
    assert len(draws) == 8000
    assert abs(sum(draws) / 8000 - 0.5) < 0.02
    assert min(draws) >= 0 and max(draws) < 1
