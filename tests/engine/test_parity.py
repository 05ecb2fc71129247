"""Every log-probability equals Hugging Face transformers', however the work was batched, cached or interrupted."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CASES, write_checkpoint
from transformers import DynamicCache

from lightllm.assemble import build_engine
from lightllm.config import Config
from lightllm.engine.engine import Engine
from lightllm.engine.request import Generate, Output, SamplingParams
from lightllm.plugins import Plugins

TOLERANCE = 1e-3
LONGEST = 120


@pytest.fixture(scope="module", params=list(CASES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, write_checkpoint(folder, request.param)


def engine(folder: Path, **settings: Any) -> Engine:
    return build_engine(
        Config(dtype="float32", device="cpu", **{"max_total_tokens": 4096} | settings), Plugins.discover(), folder
    )


def reference(model: Any, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [len(tokens), vocabulary]; row i is of what follows token i.

    Dynamic RoPE is fed token by token, which is how transformers itself generates.
    """
    with torch.no_grad():
        if model.config.rope_parameters["rope_type"] != "dynamic":
            return model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        rows, cache = [], DynamicCache()
        for token in tokens:
            with warnings.catch_warnings():  # newer transformers renames the argument
                warnings.simplefilter("ignore", FutureWarning)
                out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            rows.append(out.logits[0, -1].log_softmax(-1))
        return torch.stack(rows)


def check(model: Any, request: Generate, output: Output) -> None:
    assert output.error is None
    assert len(output.tokens) == request.params.max_tokens
    expected = reference(model, request.prompt + output.tokens)
    start = len(request.prompt)
    assert output.logprobs is not None
    entries = list(enumerate(output.logprobs, start))
    if request.params.prompt_logprobs is not None:
        assert output.prompt_logprobs is not None
        entries += enumerate(output.prompt_logprobs, 1)
        assert len(output.prompt_logprobs) == len(request.prompt) - 1
    sequence = request.prompt + output.tokens
    for position, entry in entries:
        row = expected[position - 1]
        assert entry.token == sequence[position]
        assert abs(entry.logprob - row[entry.token].item()) < TOLERANCE
        best = row.topk(len(entry.top)).values
        assert (torch.tensor([value for _, value in entry.top]) - best).abs().max() < TOLERANCE
        for token, value in entry.top:
            assert abs(row[token].item() - value) < TOLERANCE


def make_requests(count: int, seed: int, **params: Any) -> list[Generate]:
    draw = random.Random(seed)
    settings: dict[str, Any] = {"logprobs": 3, "prompt_logprobs": 2, "ignore_eos": True} | params
    return [
        Generate(
            id=str(i),
            prompt=[draw.randrange(199) for _ in range(draw.choice([1, 2, 7, 15, 16, 17, 40, 90]))],
            params=SamplingParams(
                max_tokens=draw.randint(1, 30), temperature=draw.choice([0.0, 0.8, 1.3]), seed=i, **settings
            ),
        )
        for i in range(count)
    ]


def run(engine: Engine, requests: list[Generate]) -> dict[str, Output]:
    return {id: output for (id, _), output in engine.generate(*requests).items()}


def test_alone(checkpoint: tuple[Path, Any]) -> None:
    folder, model = checkpoint
    one = engine(folder)
    for request in make_requests(4, seed=1):
        check(model, request, run(one, [request])[request.id])


def test_in_a_mixed_batch_of_32(checkpoint: tuple[Path, Any]) -> None:
    folder, model = checkpoint
    requests = make_requests(32, seed=2)
    one = engine(folder, max_batch_tokens=200)
    outputs = run(one, requests)
    for request in requests:
        check(model, request, outputs[request.id])


def test_with_prefill_chunked_to_16_tokens(checkpoint: tuple[Path, Any]) -> None:
    folder, model = checkpoint
    requests = make_requests(6, seed=3)
    outputs = run(engine(folder, max_batch_tokens=16), requests)
    for request in requests:
        check(model, request, outputs[request.id])


def test_after_a_prefix_cache_hit(checkpoint: tuple[Path, Any]) -> None:
    folder, model = checkpoint
    one = engine(folder)
    draw = random.Random(4)
    shared = [draw.randrange(199) for _ in range(50)]
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3)
    first = Generate(id="first", prompt=shared, params=params)
    answer = run(one, [first])["first"]
    check(model, first, answer)
    again = Generate(id="again", prompt=shared, params=params)
    turn = Generate(id="turn", prompt=shared + answer.tokens + [5, 6, 7], params=params)
    fork = Generate(id="fork", prompt=[*shared[:31], 9, 9, 9], params=params)
    outputs = run(one, [again, turn, fork])
    assert outputs["again"].cached_tokens == len(shared) - 1
    assert outputs["turn"].cached_tokens >= len(shared) + len(answer.tokens) - 1
    assert outputs["fork"].cached_tokens == 31
    for request in (again, turn, fork):
        check(model, request, outputs[request.id])


def test_after_a_forced_preemption(checkpoint: tuple[Path, Any]) -> None:
    folder, model = checkpoint
    requests = make_requests(12, seed=5)
    one = engine(folder, max_total_tokens=160, max_batch_tokens=64)
    outputs = run(one, requests)
    assert one.scheduler.stats().preemptions > 0
    for request in requests:
        check(model, request, outputs[request.id])
