"""Sampling, one row of logits after the other: penalties and bias, temperature, what is left to choose from, the draw.

Every parameter of a request that is a sampler's business is kept here. Answers of one request stay the same whatever
else is in the batch, and after they were interrupted: a draw depends on nothing but the row's seed, its choice and how
many tokens it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import ClassVar

import torch
from lightllm import SamplingRow
from lightllm.nn.batch import History
from torch import Tensor


class ExamplePluginSampler:
    """`lightllm.Sampler`."""

    overlaps: ClassVar[bool] = True  # `row.output` may lack the last tokens then; `history` has them all

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], history: History) -> Tensor:
        return torch.stack(
            [
                _choose(one, row, tokens[: len(row.prompt) + row.generated])
                for one, row, tokens in zip(logits, rows, history.table[history.rows], strict=True)
            ]
        )


def _choose(logits: Tensor, row: SamplingRow, tokens: Tensor) -> Tensor:
    """logits: [vocabulary], tokens: [prompt and output] -> a token, []."""
    params = row.params
    _penalize(logits, row, tokens)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if row.generated < params.min_tokens:
        logits[list(row.stop_ids)] = float("-inf")
    if params.temperature < 1e-5:
        return logits.argmax()
    logits, tokens = (logits / params.temperature).sort(descending=True)
    if params.top_k:
        logits[params.top_k :] = float("-inf")
    probabilities = logits.softmax(-1)
    # a token stays as long as those before it have not reached top_p together; so the first one always does
    before = probabilities.cumsum(-1) - probabilities
    logits[(before >= params.top_p) & (before > 0)] = float("-inf")
    logits[probabilities < params.min_p * probabilities[0]] = float("-inf")
    # Gumbel-max: with this noise added the largest logit is a draw from their softmax
    noise = -torch.log(-torch.log(_uniform(row, len(logits))))
    return tokens[(logits + noise.to(logits)).argmax()]


def _penalize(logits: Tensor, row: SamplingRow, tokens: Tensor) -> None:
    """Presence and frequency (OpenAI) are about the answer, repetition (Keskar et al., 2019) about the prompt, too."""
    params = row.params
    if params.repetition_penalty != 1:
        seen = tokens.unique()
        chosen, penalty = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = tokens[len(row.prompt) :].bincount(minlength=len(logits))
        logits -= counts * params.frequency_penalty + (counts > 0) * params.presence_penalty


def _uniform(row: SamplingRow, count: int) -> Tensor:
    """Numbers between 0 and 1, neither of them included, that only this draw gets."""
    draw = f"{row.seed} {row.index} {row.generated}".encode()
    seed = int.from_bytes(hashlib.blake2b(draw, digest_size=7).digest(), "big")
    numbers = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return numbers.clamp(min=2.0**-60)
