"""One worker, in the engine's process, and a clock beside it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from lightllm import ExecutorJob, Worker

if TYPE_CHECKING:
    from lightllm.engine.scheduler import Plan, Result

# below "lightllm", so that --log-level is for these lines, too
log = logging.getLogger("lightllm.example_plugin")


class ExamplePluginExecutor:
    """`lightllm.Executor`. One that runs workers elsewhere would call ``build`` there, and send plans and results."""

    slow: ClassVar[float] = 0.5
    """Seconds from which on a step is logged."""

    def __init__(self, job: ExecutorJob, build: Callable[[], Worker]) -> None:
        self.worker = build()
        self.ready = self.worker.ready
        self.steps = 0

    def start(self, plan: Plan) -> Callable[[], list[Result]]:
        begin = time.perf_counter()
        wait = self.worker.start(plan)

        def results() -> list[Result]:
            found = wait()
            seconds = time.perf_counter() - begin
            self.steps += 1
            if seconds >= self.slow:
                tokens = sum(item.count for item in plan.items)
                log.warning("a step of %d sequences, %d tokens took %.2f s", len(plan.items), tokens, seconds)
            return found

        return results

    def close(self) -> None:
        log.info("the model ran %d steps", self.steps)
