"""What a plugin's part raises in a step: whose fault it was is said, and only its sequences fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint

from lightllm import (
    AttentionBackendRecord,
    ExecutorRecord,
    LinearMethodRecord,
    OperatorsRecord,
    SamplerRecord,
    SamplingRow,
    WorkerLost,
    hookimpl,
)
from lightllm.assemble import build_engine
from lightllm.config import Config
from lightllm.engine.engine import Engine
from lightllm.engine.request import Generate, SamplingParams
from lightllm.engine.scheduler import Plan
from lightllm.nn.batch import History
from lightllm.nn.operators import TorchOperators
from lightllm.plugins import Plugins
from lightllm_builtin.executor.local import LocalExecutor
from lightllm_builtin.linear.dense import Dense
from lightllm_builtin.sampling.sampler import StandardSampler
from lightllm_builtin.torch_attention.backend import TorchAttention

UNLUCKY = 13
SIZES = (3, 7, UNLUCKY, 20)
BATCHES = (UNLUCKY, sum(SIZES))
"""Tokens of a step with the unlucky prompt: alone, and in its batch."""


class Attention(TorchAttention):
    def plan(self, batch: Any) -> Any:
        self.unlucky = UNLUCKY in batch.context_lengths
        return super().plan(batch)

    def attend(self, *arguments: Any) -> torch.Tensor:
        if self.unlucky:
            raise IndexError("out of keys")
        return super().attend(*arguments)


class Sampler(StandardSampler):
    def sample(self, logits: torch.Tensor, rows: Sequence[SamplingRow], history: History) -> torch.Tensor:
        if any(len(row.prompt) + len(row.output) == UNLUCKY for row in rows):
            raise ZeroDivisionError("no chance")
        return super().sample(logits, rows, history)


class Operators(TorchOperators):
    def rotate(self, x: torch.Tensor, cos_sin: Any) -> torch.Tensor:
        if x.shape[0] in BATCHES:
            raise OverflowError("dizzy")
        return super().rotate(x, cos_sin)


class Linear(Dense):
    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] in BATCHES:
            raise FloatingPointError("not a product")
        return super().apply(layer, x)


class Executor(LocalExecutor):
    """Fails when it begins a step, and when it is asked for the results of another."""

    def start(self, plan: Plan) -> Any:
        ends = [item.start + item.count for item in plan.items]
        if UNLUCKY in ends:
            raise ConnectionError("the worker is gone")
        results = super().start(plan)
        return late if UNLUCKY + 1 in ends else results


def late() -> Any:
    raise ConnectionError("the worker went")


class Panic(BaseException):
    """Like pyo3's of a panic in Rust."""


class Panicking(StandardSampler):
    def sample(self, logits: torch.Tensor, rows: Sequence[SamplingRow], history: History) -> torch.Tensor:
        if any(len(row.prompt) + len(row.output) == UNLUCKY for row in rows):
            raise Panic("poisoned")
        return super().sample(logits, rows, history)


class Leaving(LocalExecutor):
    def start(self, plan: Plan) -> Any:
        ends = [item.start + item.count for item in plan.items]
        if UNLUCKY in ends:
            sys.exit("enough")
        return super().start(plan)


SAMPLERS = [("frail", "Sampler"), ("panicking", "Panicking")]
EXECUTORS = [("frail", "Executor"), ("leaving", "Leaving")]


class Provider:
    @hookimpl
    def lightllm_attention_backends(self) -> Any:
        return [AttentionBackendRecord(name="frail", target=f"{__name__}:Attention")]

    @hookimpl
    def lightllm_samplers(self) -> Any:
        return [SamplerRecord(name=n, target=f"{__name__}:{c}") for n, c in SAMPLERS]

    @hookimpl
    def lightllm_operators(self) -> Any:
        return [OperatorsRecord(name="frail", target=f"{__name__}:Operators")]

    @hookimpl
    def lightllm_linear_methods(self) -> Any:
        return [LinearMethodRecord(name="frail", target=f"{__name__}:Linear")]

    @hookimpl
    def lightllm_executors(self) -> Any:
        return [ExecutorRecord(name=n, target=f"{__name__}:{c}") for n, c in EXECUTORS]


FAULTS = {
    ("attention_backend", "frail"): "the attention backend mine/frail (extra) failed: IndexError: out of keys",
    ("sampler", "frail"): "the sampler mine/frail (extra) failed: ZeroDivisionError: no chance",
    ("sampler", "panicking"): "the sampler mine/panicking (extra) failed: Panic: poisoned",
    ("operators", "frail"): "the operators mine/frail (extra) failed: OverflowError: dizzy",
    ("quantization", "frail"): "the linear method mine/frail (extra) failed: FloatingPointError: not a product",
    ("executor", "frail"): "the executor mine/frail (extra) failed: ConnectionError: the worker is gone",
    ("executor", "leaving"): "the executor mine/leaving (extra) failed: SystemExit: enough",
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engine]:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, "llama-gqa")
    plugins = Plugins.discover(extra=[("mine", Provider())])
    return lambda **chosen: build_engine(Config(max_total_tokens=500, device="cpu", **chosen), plugins, folder)


@pytest.mark.parametrize(("part", "record"), FAULTS)
def test_it_is_named_and_the_other_sequences_go_on(engine: Callable[..., Engine], part: str, record: str) -> None:
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)

    def requests() -> list[Generate]:
        return [Generate(id=str(size), prompt=list(range(20, 20 + size)), params=params) for size in SIZES]

    expected = engine().generate(*requests())
    found = engine(**{part: f"mine/{record}"}).generate(*requests())
    assert found[str(UNLUCKY), 0].error == FAULTS[part, record]
    for size in set(SIZES) - {UNLUCKY}:
        assert found[str(size), 0].error is None
        assert found[str(size), 0].tokens == expected[str(size), 0].tokens


def test_a_step_without_a_worker_is_not_tried_again(engine: Callable[..., Engine]) -> None:
    lost = engine()
    tried: list[Plan] = []

    def start(plan: Plan) -> Any:
        tried.append(plan)
        raise WorkerLost("gone")

    lost.executor.start = start  # type: ignore[method-assign]
    for i in range(3):
        lost.add(Generate(id=str(i), prompt=[1, 2], params=SamplingParams()))
    with pytest.raises(WorkerLost, match="gone"):
        lost.step()
    assert len(tried) == 1
