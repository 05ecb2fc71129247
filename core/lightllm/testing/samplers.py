"""Samplers against distributions worked out by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from lightllm.engine.request import SamplingParams
from lightllm.nn.batch import History
from lightllm.testing.rows import Row
from lightllm.testing.rules import broken, resolve, shown

VOCABULARY = 200
DRAWS = 8000

SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.6},
    {"temperature": 3.0},
    {"top_k": 7},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.4, "top_k": 40, "top_p": 0.8, "min_p": 0.03},
)
"""Parameters whose distribution is tested."""

MENU: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"top_p": 0.9},
    {"top_k": 30},
    {"min_p": 0.05},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.3, "top_k": 5},
    {"logit_bias": {3: 5.0}, "temperature": 20.0, "top_p": 0.99},
)
"""Parameters that meet in one batch."""

PENALTIES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "presence_penalty": 1.0},
    {"temperature": 0.0, "frequency_penalty": 1.0},
    {"temperature": 0.0, "repetition_penalty": 2.0},
)
"""Parameters by which the likeliest token is not taken again where another is about as likely."""


def check_sampler(sampler: Any, *, without: Collection[str] = (), device: str = "cpu", draws: int = DRAWS) -> None:
    """It draws from the distribution that a request's parameters describe, and a draw depends on its own row only.

    ``sampler``: the class, or its record. ``without``: parameters it does not have (``"min_p"``, ``"logit_bias"``,
    ``"min_tokens"``, ...). ``draws``: of each distribution. Temperature, top-k, top-p (the fewest likeliest tokens that
    reach it) and min-p (a part of the likeliest's probability) are applied in this order, each to what the one before
    left.
    """
    target = resolve(sampler)
    unknown = {*without} - {*SamplingParams.__struct_fields__}
    if unknown:
        raise ValueError(f"without={sorted(unknown)}: there are no such parameters")
    check = _Check(target, device, draws)
    check.form()
    check.greedy()
    for params in SHAPES:
        if not params.keys() & {*without}:
            check.distribution(params)
    menu = [params for params in MENU if not params.keys() & {*without}]
    check.independence(menu)
    if target.overlaps:
        check.overlap([params for params in (*menu, *PENALTIES) if not params.keys() & {*without}])
    if "logit_bias" not in without:
        check.logit_bias()
    if "min_tokens" not in without:
        check.min_tokens()


class _Check:
    def __init__(self, target: Any, device: str, draws: int) -> None:
        self.target = target
        self.device = device
        self.draws = draws

    def sample(self, logits: Tensor, rows: Sequence[Row]) -> list[int]:
        history = History.of(rows, self.device)
        tokens: list[int] = self.target().sample(logits.clone().to(self.device), rows, history).tolist()
        return tokens

    def logits(self, seed: int, rows: int = 1) -> Tensor:
        return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2

    def form(self) -> None:
        if not isinstance(getattr(self.target, "overlaps", None), bool):
            raise broken("a sampler says on its class whether steps may overlap", "overlaps: it is no bool")
        logits = self.logits(0, rows=3).to(self.device)
        rows = [Row(SamplingParams(), seed=i) for i in range(3)]
        tokens = self.target().sample(logits, rows, History.of(rows, self.device))
        what = (
            f"{list(tokens.shape)} {tokens.dtype} on {tokens.device}" if isinstance(tokens, Tensor) else shown(tokens)
        )
        right = isinstance(tokens, Tensor) and (tokens.dtype, tokens.device) == (torch.int64, logits.device)
        if not right or tokens.shape != (3,):
            raise broken("sample gives a token a row: [rows] int64 on the logits' device", f"of 3 rows it gave {what}")

    def greedy(self) -> None:
        logits = self.logits(2, rows=5)
        for seed in range(3):
            tokens = self.sample(logits, [Row(SamplingParams(temperature=0.0), seed=seed)] * 5)
            best = logits.argmax(-1).tolist()
            if tokens != best:
                raise broken("temperature 0 takes the likeliest token", f"the likeliest: {best}", f"it took: {tokens}")

    def distribution(self, params: dict[str, Any]) -> None:
        """Over seeds, choices and positions, each of which must give a new draw."""
        logits = self.logits(1)
        expected = wanted(logits[0], **params)
        given = SamplingParams(**params)
        for what, rows in (
            ("seed", [Row(given, seed=i) for i in range(self.draws)]),
            ("index (which of n choices)", [Row(given, seed=7, index=i) for i in range(self.draws // 4)]),
            ("position (row.generated)", [Row(given, seed=7, output=[0] * i) for i in range(self.draws // 16)]),
        ):
            counts = torch.bincount(torch.tensor(self.sample(logits.expand(len(rows), -1), rows)), minlength=VOCABULARY)
            fault = unlike(counts, expected)
            if fault:
                raise broken(
                    "draws follow the distribution that the parameters describe",
                    f"parameters: {params or 'the defaults'}",
                    f"{len(rows)} draws that differ in their {what}",
                    fault,
                )

    def independence(self, menu: Sequence[dict[str, Any]]) -> None:
        draw = random.Random(0)
        for trial in range(40):
            kinds = [draw.choice(menu) for _ in range(draw.randint(1, 12))]
            seed = draw.getrandbits(64)
            rows = [
                Row(SamplingParams(**kind), prompt=[1, 2], output=[3] * i, index=i, seed=seed)
                for i, kind in enumerate(kinds)
            ]
            logits = self.logits(trial, rows=len(rows))
            alone = [self.sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
            order = draw.sample(range(len(rows)), len(rows))
            together = self.sample(logits[order], [rows[i] for i in order])
            for place, i in enumerate(order):
                if together[place] != alone[i]:
                    raise broken(
                        "a draw is decided by (seed, index, generated), the row's parameters and its logits: it is "
                        "the same whenever it is made and whatever else is in the batch",
                        f"row: {kinds[i] or 'the defaults'}, seed={seed}, index={i}, generated={i}",
                        f"alone it drew {alone[i]}; as row {place} of {len(rows)} it drew {together[place]}",
                    )

    def overlap(self, menu: Sequence[dict[str, Any]]) -> None:
        """What a row has generated may not be known in full."""
        for trial, kind in enumerate([*menu, *menu, *menu]):
            params, logits = SamplingParams(**kind), self.logits(trial)
            best, second = logits[0].topk(2).indices.tolist()
            logits[0, second] = logits[0, best] - 0.1
            known = Row(params, prompt=[1, 2], output=[3, 4, best], seed=trial)
            unknown = Row(params, prompt=[1, 2], output=[3, 4], seed=trial, unknown=1)
            history = History.of([known], self.device)
            tokens = [
                int(self.target().sample(logits.clone().to(self.device), [row], history)) for row in (known, unknown)
            ]
            if tokens[0] != tokens[1]:
                raise broken(
                    "a sampler that overlaps counts by row.generated, and finds the tokens in history, not in "
                    "row.output",
                    f"row: {kind or 'the defaults'}, generated=3",
                    f"with output=[3, 4, {best}] it drew {tokens[0]}, with output=[3, 4] {tokens[1]}",
                )

    def logit_bias(self) -> None:
        logits = self.logits(5)
        first, second = logits[0].topk(2).indices.tolist()
        other = (first + 1) % VOCABULARY
        for bias, expected in (({other: 100.0}, other), ({first: -100.0}, second)):
            (token,) = self.sample(logits, [Row(SamplingParams(temperature=0.0, logit_bias=bias))])
            if token != expected:
                raise broken(
                    "logit_bias is added before the choice", f"logit_bias={bias}: expected {expected}, drew {token}"
                )

    def min_tokens(self) -> None:
        logits = self.logits(6)
        stop = int(logits.argmax())
        for done in (0, 2, 3):
            row = Row(SamplingParams(temperature=0.0, min_tokens=3), output=[1] * done, stop_ids=(stop,))
            (token,) = self.sample(logits, [row])
            if (token == stop) != (done >= 3):
                raise broken(
                    "a row's stop_ids wait until it has min_tokens, and no longer",
                    f"min_tokens=3, {done} tokens so far, the likeliest token {stop} is a stop id: drew {token}",
                )


def wanted(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The distribution over the vocabulary, written out in float64."""
    probabilities = (logits.double() / temperature).softmax(-1).tolist()
    ranked = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    kept = ranked[: top_k or len(ranked)]
    total, reached, nucleus = sum(probabilities[token] for token in kept), 0.0, []
    for token in kept:
        if reached < top_p * total:
            nucleus.append(token)
        reached += probabilities[token]
    kept = [token for token in nucleus if probabilities[token] >= min_p * probabilities[ranked[0]]]
    total = sum(probabilities[token] for token in kept)
    result = torch.zeros(len(probabilities), dtype=torch.float64)
    for token in kept:
        result[token] = probabilities[token] / total
    return result


def unlike(counts: Tensor, expected: Tensor) -> str | None:
    """Chi-square at five standard deviations; a token of probability 0 must never come."""
    never = (counts * (expected == 0)).nonzero().flatten().tolist()
    if never:
        return f"drawn, though their probability is 0: {shown(never, 100)}"
    total = counts.sum()
    common = expected * total >= 5
    chi = ((counts - expected * total)[common] ** 2 / (expected * total)[common]).sum().item()
    freedom = int(common.sum())
    limit = freedom + 5 * math.sqrt(2 * freedom) + 10
    if chi < limit:
        return None
    worst = int(((counts / total - expected).abs()).argmax())
    return (
        f"chi-square {chi:.0f}, at most {limit:.0f} is expected; token {worst} came in {counts[worst] / total:.1%} of "
        f"the draws, its probability is {expected[worst]:.1%}"
    )
