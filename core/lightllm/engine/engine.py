"""The engine: one `step` after another, each schedule, run, update. Knows no socket and no text."""

from __future__ import annotations

import logging

from lightllm.engine.request import Abort, Generate, Output, Ready, Step, joined
from lightllm.engine.runner import Runner
from lightllm.engine.scheduler import Scheduler

log = logging.getLogger("lightllm.engine")


class Engine:
    """Continuous batching over one model."""

    def __init__(self, scheduler: Scheduler, runner: Runner, ready: Ready) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.ready = ready
        self._pending: list[Output] = []

    def add(self, request: Generate) -> None:
        """Queue a request. One that cannot be served ends with an error output in the next step."""
        self._pending += self.scheduler.add(request)

    def abort(self, request: Abort) -> None:
        """Forget a request, or one choice of it, and free its cache at once. No output follows."""
        self.scheduler.abort(request.id, request.index)

    @property
    def busy(self) -> bool:
        return bool(self._pending) or self.scheduler.busy

    def step(self) -> Step:
        """Advance every running sequence by a chunk of prompt or one token."""
        outputs, self._pending = self._pending, []
        plan = self.scheduler.schedule()
        outputs += plan.outputs
        if plan.items:
            try:
                results = self.runner.run(plan)
            except Exception as error:
                # The engine outlives a failing step: its requests are told, all others go on.
                log.exception("a step of %d sequences failed", len(plan.items))
                outputs += self._fail(plan.request_ids(), f"{type(error).__name__}: {error}")
            else:
                outputs += self.scheduler.update(plan, results)
        return Step(outputs=outputs, stats=self.scheduler.stats())

    def _fail(self, ids: set[str], message: str) -> list[Output]:
        outputs = []
        for request in sorted(ids):
            for index in self.scheduler.abort(request):
                outputs.append(Output(request, index, [], finish="error", error=message))
        return outputs

    def generate(self, *requests: Generate) -> dict[tuple[str, int], Output]:
        """Run requests to their end, in this process: for tests and scripts. (id, choice) -> its outputs as one."""
        for request in requests:
            self.add(request)
        done: dict[tuple[str, int], Output] = {}
        while self.busy:
            for new in self.step().outputs:
                old = done.get((new.id, new.index))
                done[new.id, new.index] = new if old is None else joined(old, new)
        return done
