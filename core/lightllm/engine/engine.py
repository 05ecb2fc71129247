"""The engine: one `step` after another, each schedule, run, update. Knows no socket and no text."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from lightllm.checks import INTERRUPTS, Wrong, culprit, describe
from lightllm.engine.grammars import Grammars
from lightllm.engine.request import Abort, Generate, Output, Ready, Step, joined
from lightllm.engine.scheduler import Plan, Result, Scheduler
from lightllm.grammar import GrammarError
from lightllm.interfaces import Executor, GrammarMatcher, UserError, WorkerLost

log = logging.getLogger("lightllm.engine")


IDLE = 0.01
"""Seconds to wait for a grammar when there is nothing else to do."""


@dataclass(frozen=True)
class Flight:
    """A step under way. ``results`` waits for it."""

    plan: Plan
    results: Callable[[], list[Result]]


class Engine:
    """Continuous batching over one model. A request with a grammar joins when that is compiled, beside the steps."""

    def __init__(self, scheduler: Scheduler, executor: Executor, grammars: Grammars, executor_name: str) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self._names = {type(executor): executor_name}
        self._grammars = grammars
        self._compiling: dict[str, tuple[Generate, Future[list[GrammarMatcher]]]] = {}
        self._pending: list[Output] = []
        self._flying: Flight | None = None

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
            _, future = self._compiling.pop(request.id)
            future.cancel()
        self.scheduler.abort(request.id, request.index)

    @property
    def ready(self) -> Ready:
        return self.executor.ready

    @property
    def busy(self) -> bool:
        return bool(self._pending or self._compiling or self._flying) or self.scheduler.busy

    def close(self) -> None:
        self.executor.close()

    def warm(self) -> None:
        """Make the grammar backend, which stops everything for a moment when it must be made amid requests."""
        self._grammars.warm()

    def step(self) -> Step:
        """Advance every running sequence by a chunk of prompt or one token. Where a device computes and nothing hangs
        on the tokens it chooses, they are read when it has got the next step to do, and come a call later. Raises
        `WorkerLost`."""
        if self._compiling:
            self._join()
        outputs, self._pending = self._pending, []
        plan = self.scheduler.schedule()
        outputs += plan.outputs
        flying, self._flying = self._flying, self._start(plan) if plan.items else None
        if flying:
            outputs += self._land(flying)
        if self._flying and not (self.ready.overlap and not plan.looks_back):
            flying, self._flying = self._flying, None
            outputs += self._land(flying)
        return Step(outputs=outputs, stats=self.scheduler.stats())

    def _start(self, plan: Plan) -> Flight:
        try:
            return Flight(plan, self.executor.start(plan))
        except INTERRUPTS:
            raise
        except BaseException as error:
            results = self._failed(plan, error, again=True)
            return Flight(plan, lambda: results)

    def _land(self, flight: Flight) -> list[Output]:
        try:
            results = flight.results()
        except INTERRUPTS:
            raise
        except BaseException as error:
            # with the next step under way it is too late for another try
            results = self._failed(flight.plan, error, again=self._flying is None)
        return self.scheduler.update(flight.plan, results)

    def _failed(self, plan: Plan, error: BaseException, again: bool) -> list[Result]:
        """A step that fails is done again sequence by sequence: only those whose fault it is get an error. Raises what
        says that there is no worker to do it."""
        if isinstance(error, WorkerLost):
            raise error
        log.error("a step of %d sequences failed", len(plan.items), exc_info=error)
        if again and len(plan.items) > 1:
            return [result for item in plan.items for result in self._run(Plan(items=[item]))]
        name = None if isinstance(error, Wrong) else culprit(error, self._names)
        message = f"{name} failed: {describe(error)}" if name else describe(error)
        return [Result(error=message) for _ in plan.items]

    def _run(self, plan: Plan) -> list[Result]:
        try:
            return self.executor.start(plan)()
        except INTERRUPTS:
            raise
        except BaseException as error:
            return self._failed(plan, error, again=True)

    def _join(self) -> None:
        """Give the scheduler the requests whose grammar is compiled."""
        if not self.scheduler.busy:
            wait([future for _, future in self._compiling.values()], IDLE, FIRST_COMPLETED)
        for request, future in [pair for pair in self._compiling.values() if pair[1].done()]:
            del self._compiling[request.id]
            try:
                self._pending += self.scheduler.add(request, future.result())
            except INTERRUPTS:
                raise
            except BaseException as error:
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
