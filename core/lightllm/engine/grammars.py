"""Compiling grammars beside the steps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from lightllm.grammar import Grammar
from lightllm.interfaces import GrammarBackend, GrammarMatcher

STACK_BYTES = 256 << 20
"""Of the threads that compile: compilers are recursive. More than the server's checker gives its own."""


class Grammars:
    """A grammar backend, made when it is first needed. ``make`` gives it and whom to blame for what it raises."""

    def __init__(self, make: Callable[[], tuple[GrammarBackend, str]], threads: int = 2) -> None:
        self.name = "the grammar backend"
        self._make = make
        self._backend: GrammarBackend | None = None
        self._making = threading.Lock()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="grammar")

    @property
    def backend(self) -> GrammarBackend:
        with self._making:
            if self._backend is None:
                self._backend, self.name = self._make()
            return self._backend

    def warm(self) -> None:
        """Make the backend now. What is wrong with it is said to those who need it."""
        with contextlib.suppress(BaseException):  # a panic in Rust is no Exception
            self.backend  # noqa: B018

    def compile(self, grammar: Grammar, count: int) -> Future[list[GrammarMatcher]]:
        """``count`` matchers, each at the beginning."""
        before = threading.stack_size(STACK_BYTES)
        try:
            return self._threads.submit(lambda: [self.backend.compile(grammar) for _ in range(count)])
        finally:
            threading.stack_size(before)
