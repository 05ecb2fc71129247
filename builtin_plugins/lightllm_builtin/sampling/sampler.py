"""The standard sampler: penalties, bias, temperature, top-k, top-p, min-p, in that order, vectorised over the batch.

A row's draw is one uniform number computed from (seed, choice, position), turned into a token by the inverse of its
own distribution: what else is in the batch never enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightllm import SamplingRow
from lightllm.nn.batch import History
from lightllm.nn.transfer import send

GREEDY = 1e-5
"""Temperatures below this mean: the likeliest token."""

CANDIDATES = 256
"""How many of the likeliest tokens top-p looks at first; all are sorted only where these do not suffice."""


class StandardSampler:
    """`lightllm.Sampler`."""

    overlaps: ClassVar[bool] = True

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], history: History) -> Tensor:
        penalize(logits, rows, history)
        add_bias(logits, rows)
        if all(row.params.temperature < GREEDY for row in rows):
            return logits.argmax(-1)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        greedy, plain, ranked = [], [], []
        for i, row in enumerate(rows):
            p = row.params
            if p.temperature < GREEDY:
                greedy.append(i)
            elif p.top_k == 0 and p.top_p >= 1:
                plain.append(i)
            else:
                ranked.append(i)
        for indices, draw in ((greedy, _greedy), (plain, _plain), (ranked, _ranked)):
            if indices:
                where = send(indices, torch.int64, logits.device)
                tokens[where] = draw(logits[where], [rows[i] for i in indices])
        return tokens


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return send(values, dtype, like.device).unsqueeze(1)


def _greedy(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    return logits.argmax(-1)


def _plain(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Temperature and min-p: no order needed."""
    probabilities = (logits / _column([r.params.temperature for r in rows], logits)).softmax(-1)
    if any(r.params.min_p > 0 for r in rows):
        least = _column([r.params.min_p for r in rows], logits) * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return _draw(probabilities, rows)


def _ranked(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Top-k, then top-p of what is left, then min-p, over the likeliest tokens in order."""
    logits = logits / _column([r.params.temperature for r in rows], logits)
    vocabulary = logits.shape[-1]
    top_k = _column([r.params.top_k or vocabulary for r in rows], logits, torch.int64)
    top_p = _column([r.params.top_p for r in rows], logits)
    min_p = _column([r.params.min_p for r in rows], logits)
    total = logits.logsumexp(-1, keepdim=True)
    count = max([CANDIDATES, *(r.params.top_k for r in rows if r.params.top_k)])
    while True:
        values, tokens = logits.topk(min(count, vocabulary), -1)
        probabilities = (values - total).exp()
        rank = torch.arange(values.shape[-1], device=logits.device)
        probabilities = probabilities.masked_fill(rank >= top_k, 0)
        # top-k renormalises before top-p counts; without it the mass is 1, whether or not all of it is in sight
        mass = torch.where(top_k < vocabulary, probabilities.sum(-1, keepdim=True), 1.0)
        before = probabilities.cumsum(-1) - probabilities
        enough = (top_k <= values.shape[-1]) | (before[:, -1:] >= top_p * mass)
        if count >= vocabulary or bool(enough.all()):
            break
        count *= 16
    keep = (before < top_p * mass) & (probabilities >= min_p * probabilities[:, :1])
    keep[:, 0] = True
    drawn = _draw(probabilities.masked_fill(~keep, 0), rows)
    return tokens.gather(1, drawn.unsqueeze(1)).squeeze(1)


def _draw(weights: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """One column a row with probability proportional to weights [rows, columns]; never one of weight 0."""
    # float64: u * total stays below total, so the search cannot run past the last positive weight
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    u = _column([uniform(r.seed, r.index, r.generated) for r in rows], weights, torch.float64)
    found = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).squeeze(1)
    return found.clamp_(max=weights.shape[-1] - 1)


_MASK = (1 << 64) - 1


def uniform(seed: int, choice: int, position: int) -> float:
    """A uniform number in [0, 1) from these three alone: SplitMix64 (Steele et al., 2014) chained over them."""
    state = 0
    for value in (seed, choice, position):
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


def penalize(logits: Tensor, rows: Sequence[SamplingRow], history: History) -> None:
    """Presence and frequency over the answer (OpenAI), repetition over all of it (CTRL, Keskar et al., 2019)."""

    def counts(which: Sequence[int], where: Tensor, starts: Sequence[int]) -> Tensor:
        ends = [len(rows[i].prompt) + rows[i].generated for i in which]
        return history.counts(where, starts, ends, logits.shape[-1])

    additive = [i for i, r in enumerate(rows) if r.params.presence_penalty or r.params.frequency_penalty]
    if additive:
        where = send(additive, torch.int64, logits.device)
        said = counts(additive, where, [len(rows[i].prompt) for i in additive])
        presence = _column([rows[i].params.presence_penalty for i in additive], logits)
        frequency = _column([rows[i].params.frequency_penalty for i in additive], logits)
        logits[where] -= said * frequency + (said > 0) * presence
    repetition = [i for i, r in enumerate(rows) if r.params.repetition_penalty != 1]
    if repetition:
        where = send(repetition, torch.int64, logits.device)
        seen = counts(repetition, where, [0] * len(repetition)) > 0
        penalty = _column([rows[i].params.repetition_penalty for i in repetition], logits)
        chosen = logits[where]
        logits[where] = torch.where(seen, torch.where(chosen > 0, chosen / penalty, chosen * penalty), chosen)


def add_bias(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """logit_bias is added; the ids that would end a row too early get -inf."""
    at, tokens, values = [], [], []
    for i, row in enumerate(rows):
        for token, bias in row.params.logit_bias.items():
            at.append(i)
            tokens.append(token)
            values.append(bias)
        if row.generated < row.params.min_tokens:
            for token in row.stop_ids:
                at.append(i)
                tokens.append(token)
                values.append(float("-inf"))
    if at:
        logits.index_put_(
            (send(at, torch.int64, logits.device), send(tokens, torch.int64, logits.device)),
            send(values, torch.float32, logits.device),
            accumulate=True,
        )
