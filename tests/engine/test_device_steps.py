"""What a device's steps do differently, on a CPU: begun before the last one's tokens are known, replayed at padded
sizes. A request gets the same answer all the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from checkpoints import write_checkpoint
from traffic import run, same, traffic

from lightllm.assemble import build_engine
from lightllm.config import Config
from lightllm.engine.engine import Engine
from lightllm.engine.graphs import batch_sizes
from lightllm.engine.request import Generate, SamplingParams
from lightllm.engine.runner import Entries
from lightllm.grammar import Regex
from lightllm.plugins import Plugins
from lightllm.testing.checkpoints import write_tiny_llama

Build = Callable[..., Engine]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, "llama-gqa")
    plugins = Plugins.discover(quiet=True)

    def build(overlap: bool = False, **options: Any) -> Engine:
        engine = build_engine(Config(device="cpu", dtype="float32", **options), plugins, folder)
        engine.executor.ready = msgspec.structs.replace(engine.ready, overlap=overlap)
        return engine

    return build


def replayed(engine: Engine, sizes: list[int]) -> list[int]:
    """Have decodes replayed; grows by the size of each replay. In place of a CUDA graph the step itself is done again:
    with the lists it was captured with, and the numbers that lie in its tensors now."""
    replays: list[int] = []
    next_size = iter(sorted(sizes, reverse=True))

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        step()
        size = next(next_size)
        return lambda: (replays.append(size), step())[1]

    progress: list[tuple[int, int]] = []
    engine.executor._worker.capture(sizes, capture, lambda done, total: progress.append((done, total)))  # type: ignore[attr-defined]
    assert progress == [(i, len(sizes)) for i in range(len(sizes) + 1)]
    return replays


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slots", [2000, 130])
def test_steps_begun_before_the_last_ones_tokens_are_known(build: Build, seed: int, slots: int) -> None:
    """The smaller pool is too small for all at once: sequences are preempted while their step is under way."""
    options = {"max_total_tokens": slots, "max_model_len": 80, "max_batch_tokens": 24}
    expected = run(build(**options), traffic(seed))
    overlapped = build(overlap=True, **options)
    same(run(overlapped, traffic(seed)), expected)
    stats = overlapped.scheduler.stats()
    assert (stats.preemptions > 0) == (slots == 130)
    assert stats.free_slots == slots and not overlapped.busy


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"presence_penalty": 1.0, "repetition_penalty": 1.1}, [1, 2, 2]),
        ({"prompt_logprobs": 0}, [3, 2, 2]),  # its own, and the one of the other's that was under way
    ],
    ids=["runs ahead", "looks back"],
)
def test_two_steps_are_under_way_until_a_request_looks_back(
    build: Build, params: dict[str, Any], expected: list[int]
) -> None:
    engine = build(overlap=True, max_total_tokens=500)
    engine.add(Generate(id="free", prompt=[1, 2, 3], params=SamplingParams(max_tokens=9, temperature=0.0)))
    assert engine.step().outputs == []
    assert [len(output.tokens) for output in engine.step().outputs] == [1]
    other = SamplingParams(max_tokens=3, temperature=0.0, **params)
    engine.add(Generate(id="other", prompt=[4, 5], params=other))
    assert [sum(len(output.tokens) for output in engine.step().outputs) for _ in range(3)] == expected


def test_a_step_that_is_not_needed_is_not_planned(build: Build) -> None:
    engine = build(overlap=True, max_total_tokens=500)
    counted = []
    start = engine.executor.start
    engine.executor.start = lambda plan: counted.append(plan) or start(plan)  # type: ignore[method-assign, func-returns-value]
    engine.generate(Generate(id="", prompt=[1, 2], params=SamplingParams(max_tokens=4, ignore_eos=True)))
    assert len(counted) == 4


def test_a_grammar_is_kept_amid_sequences_that_run_ahead(build: Build, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    plugins = Plugins.discover(quiet=True)
    free = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    held = msgspec.structs.replace(free, grammar=Regex(pattern="(ab|ba){4}"))
    requests = [Generate(id="free", prompt=[65, 66], params=free), Generate(id="held", prompt=[67], params=held)]
    answers = []
    for overlap in (False, True):
        engine = build_engine(Config(device="cpu", dtype="float32", max_total_tokens=500), plugins, tmp_path)
        engine.executor.ready = msgspec.structs.replace(engine.ready, overlap=overlap)
        answers.append({key: answer.tokens for key, answer in engine.generate(*requests).items()})
    assert answers[0] == answers[1]
    assert set(bytes(answers[0]["held", 0])) == set(b"ab") and len(answers[0]["held", 0]) == 8


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_failed_step_is_mended_or_told(build: Build, overlap: bool, late: bool) -> None:
    """It fails once, at its beginning or when its results are asked for: by then the next may have begun."""
    requests = [r for r in traffic(0) if r.params.prompt_logprobs is None]
    expected = run(build(max_total_tokens=2000), requests)
    engine = build(overlap=overlap, max_total_tokens=2000)
    start, begun = engine.executor.start, 0

    def failing(plan: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun != 6:
            return start(plan)
        assert len(plan.items) > 1
        if not late:
            raise ConnectionError("the worker is gone")
        start(plan)
        return gone

    def gone() -> Any:
        raise ConnectionError("the worker went")

    engine.executor.start = failing  # type: ignore[method-assign]
    found = run(engine, requests)
    lost = {key for key, output in found.items() if output.finish == "error"}
    assert bool(lost) == (overlap and late)
    assert all("ConnectionError: the worker went" in (found[key].error or "") for key in lost)
    same({key: found[key] for key in found.keys() - lost}, {key: expected[key] for key in found.keys() - lost})
    assert engine.scheduler.stats().free_slots == 2000


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_fails_once_it_has_its_tokens_is_done_again(
    build: Build, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tokens it began with, and not with those that it chose."""
    requests = [r for r in traffic(0) if r.params.prompt_logprobs is None]
    expected = run(build(max_total_tokens=2000), requests)
    engine, calls, of = build(overlap=overlap, max_total_tokens=2000), itertools.count(), Entries.of

    def out_of_memory(*arguments: Any) -> Entries:
        if next(calls) in (3, 9):
            raise torch.OutOfMemoryError("no room for log-probabilities")
        return of(*arguments)

    monkeypatch.setattr(Entries, "of", out_of_memory)
    same(run(engine, requests), expected)
    assert next(calls) > 9


def test_decodes_replayed_at_padded_sizes(build: Build) -> None:
    options = {
        "max_total_tokens": 300,
        "max_model_len": 80,
        "max_batch_tokens": 40,
        "attention_backend": "triton",
        "operators": "triton",
    }
    requests = traffic(1, most=7)[:9]
    expected = run(build(max_total_tokens=300, max_model_len=80, max_batch_tokens=40), requests)
    engine = build(overlap=True, **options)
    engine.executor._worker.warm()  # type: ignore[attr-defined]
    replays = replayed(engine, [1, 2, 4, 7])
    same(run(engine, requests), expected)
    assert {4, 7} <= set(replays)


def test_sizes_that_are_captured() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(256)[:6] == [1, 2, 4, 8, 16, 24]
    assert batch_sizes(256)[-3:] == [192, 224, 256]
    for size in range(9, 257):
        padded = min(s for s in batch_sizes(256) if s >= size)
        assert padded < 2 * size
