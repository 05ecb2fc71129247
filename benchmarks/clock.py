"""An executor plugin whose device is a clock: a step takes the time that reading weights and keys and values, or
multiplying, would take, and chooses arbitrary tokens. For `host_http.py`, which says by the environment how fast."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lightllm import ExecutorJob, ExecutorRecord, Worker, hookimpl

if TYPE_CHECKING:
    from lightllm.engine.scheduler import Plan, Result

WEIGHT_BYTES, TOKEN_BYTES, TOKEN_OPERATIONS = 15.0e9, 131_072, 15.0e9
"""Of Llama-3-8B in bfloat16: what a step reads, once and for each token of context, and does for each new token."""
COPIES, PRODUCTS = 3.0e12, 4.0e14
"""Bytes and operations a second, unless ``CLOCK_COPIES`` says otherwise; 0: no step takes time."""
LONGEST, SLOTS, SEQUENCES = 8192, 1 << 19, 256
TOKENS = range(1000, 40_000)
"""Those it chooses from, of the demo model's."""


class Clock:
    """`lightllm.Executor`: as a device, it begins a step when the one before is done."""

    def __init__(self, job: ExecutorJob, build: Callable[[], Worker]) -> None:
        import torch

        from lightllm.engine.inputs import Rows
        from lightllm.engine.request import Ready

        self.ready = Ready(max_model_len=LONGEST, total_slots=SLOTS, vocab_size=49_152, overlap=True)
        self.copies = float(os.environ.get("CLOCK_COPIES", COPIES))
        self.done = 0.0
        self.draw = random.Random(0)
        self.device = torch.device("cpu")
        self.rows = Rows(SEQUENCES, LONGEST, SLOTS, self.device)

    def start(self, plan: Plan) -> Callable[[], list[Result]]:
        from lightllm.engine.inputs import Inputs
        from lightllm.engine.scheduler import Result

        inputs = Inputs.of(plan.items)
        self.rows.prepare(plan.items)
        inputs.send(self.device)
        seconds = 0.0
        if self.copies:
            reading = (WEIGHT_BYTES + TOKEN_BYTES * sum(inputs.lengths)) / self.copies
            seconds = max(reading, TOKEN_OPERATIONS * len(inputs.tokens) / PRODUCTS)
        self.done = done = max(self.done, time.perf_counter()) + seconds

        def results() -> list[Result]:
            time.sleep(max(done - time.perf_counter(), 0))
            return [Result(token=self.draw.choice(TOKENS) if item.samples else None) for item in plan.items]

        return results

    def close(self) -> None: ...


@hookimpl
def lightllm_executors() -> Sequence[ExecutorRecord]:
    return [ExecutorRecord(name="clock", target=f"{__name__}:Clock", priority=100, summary="a device that is a clock")]
