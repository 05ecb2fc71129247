"""What a decode step costs beside the model: scheduling, its numbers, taking in the tokens, and the message about it.

    python benchmarks/host_step.py

A device computes a step meanwhile; where that takes less time than this, it waits. There is no model here.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from lightllm.engine.engine import Engine
from lightllm.engine.inputs import Inputs, Rows
from lightllm.engine.kvcache import KVCache
from lightllm.engine.request import Generate, Ready, SamplingParams
from lightllm.engine.scheduler import Plan, Result, Scheduler

CONTEXT, LONGEST, STEPS = 1000, 2048, 200
DEVICE = torch.device("cpu")


class Chooser:
    """An executor that always chooses the same token."""

    def __init__(self, sequences: int, slots: int) -> None:
        self.ready = Ready(max_model_len=LONGEST, total_slots=slots, vocab_size=1000, overlap=True)
        self.rows = Rows(sequences, LONGEST, slots, DEVICE)
        self.seconds = 0.0

    def start(self, plan: Plan) -> Callable[[], list[Result]]:
        began = time.perf_counter()
        inputs = Inputs.of(plan.items)
        self.rows.prepare(plan.items)
        if inputs.decodes:
            inputs = inputs.padded(len(plan.items) + 1, self.rows)
        inputs.send(DEVICE)
        self.seconds = time.perf_counter() - began
        results = [Result(token=5) for _ in plan.items]
        return lambda: results

    def close(self) -> None: ...


def step_seconds(sequences: int) -> tuple[float, float]:
    """Of a whole step, and of that for its numbers: medians."""
    slots = sequences * LONGEST
    scheduler = Scheduler(KVCache(slots), max_batch_tokens=8192, max_running=sequences, max_model_len=LONGEST)
    executor: Any = Chooser(sequences, slots)
    engine, encoder = Engine(scheduler, executor, None, "none"), msgspec.msgpack.Encoder()  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=LONGEST - CONTEXT, ignore_eos=True)
    for i in range(sequences):
        prompt = [(7 * position + i) % 1000 for position in range(CONTEXT)]
        engine.add(Generate(id=f"request-{i}", prompt=prompt, params=params))
    while scheduler.stats().generated_tokens < 2 * sequences:
        engine.step()
    whole, numbers = [], []
    for _ in range(STEPS):
        began = time.perf_counter()
        encoder.encode(engine.step())
        whole.append(time.perf_counter() - began)
        numbers.append(executor.seconds)
    return statistics.median(whole), statistics.median(numbers)


def main() -> None:
    sys.stdout.write(f"| sequences of {CONTEXT:,} tokens | step ms | of it its numbers ms |\n| --- | --- | --- |\n")
    for sequences in (1, 16, 64, 256):
        whole, numbers = step_seconds(sequences)
        sys.stdout.write(f"| {sequences} | {whole * 1e3:.2f} | {numbers * 1e3:.2f} |\n")


if __name__ == "__main__":
    main()
