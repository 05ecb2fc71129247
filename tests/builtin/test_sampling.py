"""The standard sampler, held to the kit's rules, and against transformers' logits warpers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightllm.engine.request import SamplingParams
from lightllm.nn.batch import History
from lightllm.testing import check_sampler
from lightllm.testing.rows import Row
from lightllm.testing.samplers import unlike
from lightllm_builtin.sampling.sampler import StandardSampler, uniform

VOCABULARY = 500


def logits(seed: int, rows: int = 1, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def draw(row_logits: torch.Tensor, count: int, **params: Any) -> torch.Tensor:
    """How often each token is drawn in ``count`` draws."""
    rows = [Row(SamplingParams(**params), seed=i) for i in range(count)]
    tokens = StandardSampler().sample(row_logits.repeat(count, 1), rows, History.of(rows, "cpu"))
    return torch.bincount(tokens, minlength=row_logits.shape[-1])


def test_it_keeps_the_rules_of_samplers() -> None:
    check_sampler(StandardSampler)


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
    ids=["plain", "temperature", "top-k", "top-p", "min-p", "all", "flat"],
)
def test_draws_follow_the_distribution_transformers_describes(params: dict[str, Any], warpers: list[Any]) -> None:
    row = logits(1)
    expected = row.clone()
    for warper in warpers:
        expected = warper(None, expected)
    assert unlike(draw(row, 20_000, **params), expected.softmax(-1)[0]) is None


def test_top_k_one_and_tiny_top_p_are_greedy() -> None:
    row = logits(3)
    for params in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert draw(row, 50, **params).argmax() == row.argmax()
        assert draw(row, 50, **params).max() == 50


def test_presence_and_frequency_penalties_are_openais() -> None:
    # https://platform.openai.com/docs/api-reference: mu[j] -= c[j] * frequency + (c[j] > 0) * presence
    values = torch.zeros(1, VOCABULARY)
    row = Row(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), prompt=[9, 9], output=[3, 3, 4])
    expected = torch.zeros(VOCABULARY)
    expected[3], expected[4] = -1.0, -0.75
    StandardSampler().sample(values, [row], History.of([row], "cpu"))
    assert torch.allclose(values[0], expected)


def test_repetition_penalty_is_transformers() -> None:
    values = logits(4)
    row = Row(SamplingParams(repetition_penalty=1.7), prompt=[1, 2, 3], output=[4, 4])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 2, 3, 4, 4]]), values.clone())
    StandardSampler().sample(values, [row], History.of([row], "cpu"))
    assert torch.allclose(values, expected)


def test_penalties_count_each_rows_own_tokens_wherever_the_table_has_them() -> None:
    """Rows of a table that is kept: in any order, with what earlier sequences left beyond their ends."""
    random = torch.Generator().manual_seed(7)
    table = torch.randint(VOCABULARY, (9, 30), generator=random).int()
    places, ends, prompts = [5, 0, 8, 3], [0, 1, 17, 30], [0, 1, 9, 30]
    rows = []
    for place, end, prompt in zip(places, ends, prompts, strict=True):
        tokens = table[place, :end].tolist()
        params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25)
        rows.append(Row(params, prompt=tokens[:prompt], unknown=end - prompt))  # what came out is only in the table
    values = logits(6, rows=4)
    expected = values.clone()
    for i, (place, end, prompt) in enumerate(zip(places, ends, prompts, strict=True)):
        output = table[place, prompt:end].tolist()
        for token in {*output}:
            expected[i, token] -= output.count(token) * 0.25 + 0.5
        ids = table[place : place + 1, :end].long()
        expected[i : i + 1] = RepetitionPenaltyLogitsProcessor(1.3)(ids, expected[i : i + 1].clone())
    StandardSampler().sample(values, rows, History(table, torch.tensor(places)))
    assert torch.allclose(values, expected)


def test_seeds_choices_and_positions_draw_independently() -> None:
    draws = {uniform(s, c, p) for s in range(20) for c in range(20) for p in range(20)}
    assert len(draws) == 8000
    assert abs(sum(draws) / 8000 - 0.5) < 0.02
    assert min(draws) >= 0 and max(draws) < 1
