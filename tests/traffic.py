"""Requests of every kind that meet in an engine, and what they should get whatever the engine does."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lightllm.engine.engine import Engine
from lightllm.engine.request import Generate, Output, SamplingParams, joined


def traffic(seed: int, most: int = 40) -> list[Generate]:
    draw = random.Random(seed)
    shared = [draw.randrange(199) for _ in range(21)]
    menu: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 6, "logprobs": 3},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 8, "stop_token_ids": tuple(range(0, 199, 9)), "min_tokens": 3},
        {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 0},
        {"temperature": 0.0, "max_tokens": 1},
    ]
    requests = []
    for i, extra in enumerate(menu * 2):
        own = [draw.randrange(199) for _ in range(draw.randint(1, 30))]
        params = SamplingParams(**{"max_tokens": draw.randint(2, most), "ignore_eos": True} | extra)
        n = 3 if i == 1 else 1
        requests.append(Generate(id=str(i), prompt=[*shared, *own] if i % 2 else own, n=n, params=params))
    return requests


def run(engine: Engine, requests: list[Generate]) -> dict[tuple[str, int], Output]:
    """Half of them come while the others are under way."""
    half = len(requests) // 2
    for request in requests[half:]:
        engine.add(request)
    pieces: list[Output] = []
    for _ in range(3):
        pieces += engine.step().outputs
    rest = engine.generate(*requests[:half])
    for piece in reversed(pieces):
        key = piece.id, piece.index
        later = rest.get(key)
        rest[key] = piece if later is None else joined(piece, later)
    return rest


def same(found: dict[tuple[str, int], Output], expected: dict[tuple[str, int], Output]) -> None:
    assert found.keys() == expected.keys()
    for key, right in expected.items():
        answer = found[key]
        assert (answer.tokens, answer.finish, answer.stop_token) == (right.tokens, right.finish, right.stop_token), key
        for kind in ("logprobs", "prompt_logprobs"):
            ours, theirs = getattr(answer, kind) or [], getattr(right, kind) or []
            assert [entry.token for entry in ours] == [entry.token for entry in theirs]
            assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], abs=1e-4)
