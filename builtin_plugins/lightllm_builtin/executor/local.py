"""One worker, where the engine is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lightllm import ExecutorJob, Worker

if TYPE_CHECKING:
    from lightllm.engine.scheduler import Plan, Result


class LocalExecutor:
    """`lightllm.Executor`."""

    def __init__(self, job: ExecutorJob, build: Callable[[], Worker]) -> None:
        self._worker = build()
        self.ready = self._worker.ready

    def start(self, plan: Plan) -> Callable[[], list[Result]]:
        return self._worker.start(plan)

    def close(self) -> None:
        """The worker ends with the process."""
