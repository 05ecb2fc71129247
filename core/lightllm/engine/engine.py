"""The engine: one `step` after another, each schedule, run, update. Knows no socket and no text."""

from __future__ import annotations

import logging
from concurrent.futures import FIRST_COMPLETED, Future, wait

from lightllm.checks import Wrong, culprit, describe
from lightllm.engine.grammars import Grammars
from lightllm.engine.request import Abort, Generate, Output, Ready, Step, joined
from lightllm.engine.scheduler import Plan, Result, Scheduler
from lightllm.grammar import GrammarError
from lightllm.interfaces import Executor, GrammarMatcher, UserError

log = logging.getLogger("lightllm.engine")


IDLE = 0.01
"""Seconds to wait for a grammar when there is nothing else to do."""


class Engine:
    """Continuous batching over one model. A request with a grammar joins when that is compiled, beside the steps."""

    def __init__(self, scheduler: Scheduler, executor: Executor, grammars: Grammars, executor_name: str) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self._names = {type(executor): executor_name}
        self._grammars = grammars
        self._compiling: dict[str, tuple[Generate, Future[list[GrammarMatcher]]]] = {}
        self._pending: list[Output] = []

    def add(self, request: Generate) -> None:
        """Queue a request. One that cannot be served ends with an error output in a later step."""
        grammar = request.params.grammar
        if grammar is None:
            self._pending += self.scheduler.add(request)
        else:
            self._compiling[request.id] = request, self._grammars.compile(grammar, request.n)

    def abort(self, request: Abort) -> None:
        """Forget a request, or one choice of it, and free its cache at once. No output follows."""
        if request.id in self._compiling and request.index is None:
            del self._compiling[request.id]
        self.scheduler.abort(request.id, request.index)

    @property
    def ready(self) -> Ready:
        return self.executor.ready

    @property
    def busy(self) -> bool:
        return bool(self._pending or self._compiling) or self.scheduler.busy

    def close(self) -> None:
        self.executor.close()

    def warm(self) -> None:
        """Make the grammar backend, which stops everything for a moment when it must be made amid requests."""
        self._grammars.warm()

    def step(self) -> Step:
        """Advance every running sequence by a chunk of prompt or one token."""
        if self._compiling:
            self._join()
        outputs, self._pending = self._pending, []
        plan = self.scheduler.schedule()
        outputs += plan.outputs
        if plan.items:
            outputs += self.scheduler.update(plan, self._run(plan))
        return Step(outputs=outputs, stats=self.scheduler.stats())

    def _run(self, plan: Plan) -> list[Result]:
        """A step that fails is done again sequence by sequence: only those whose fault it is get an error."""
        try:
            return self.executor.run(plan)
        except Exception as error:
            log.exception("a step of %d sequences failed", len(plan.items))
            if len(plan.items) == 1:
                name = None if isinstance(error, Wrong) else culprit(error, self._names)
                return [Result(error=f"{name} failed: {describe(error)}" if name else describe(error))]
        return [result for item in plan.items for result in self._run(Plan(items=[item]))]

    def _join(self) -> None:
        """Give the scheduler the requests whose grammar is compiled."""
        if not self.scheduler.busy:
            wait([future for _, future in self._compiling.values()], IDLE, FIRST_COMPLETED)
        for request, future in [pair for pair in self._compiling.values() if pair[1].done()]:
            del self._compiling[request.id]
            try:
                self._pending += self.scheduler.add(request, future.result())
            except BaseException as error:  # a plugin's, too; a panic in Rust is no Exception
                known = isinstance(error, (GrammarError, UserError))
                reason = str(error) if known else f"{self._grammars.name} failed: {describe(error)}"
                self._pending += [Output(request.id, i, [], finish="error", error=reason) for i in range(request.n)]

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
