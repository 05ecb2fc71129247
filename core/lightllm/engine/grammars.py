"""Compiling grammars, in both processes: the server to check what clients send, the engine to hold answers to it."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable

from lightllm.grammar import Grammar, GrammarError
from lightllm.interfaces import GrammarBackend, GrammarMatcher, UserError

KEPT = 64
"""Grammars remembered: clients send the same few again and again."""


class Grammars:
    """A grammar backend, made when it is first needed, and what it compiled lately. May be used by several threads."""

    def __init__(self, make: Callable[[], GrammarBackend]) -> None:
        self._make = make
        self._backend: GrammarBackend | None = None
        self._making = threading.Lock()
        self._kept: OrderedDict[Grammar, GrammarMatcher] = OrderedDict()

    @property
    def backend(self) -> GrammarBackend:
        with self._making:
            if self._backend is None:
                self._backend = self._make()
            return self._backend

    def warm(self) -> None:
        """Make the backend now. What is wrong with it is said to those who need it."""
        with contextlib.suppress(Exception):
            self.backend  # noqa: B018

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the beginning, to be forked, not to be used. Takes too long for an event loop or between steps.

        Raises `GrammarError`, also for what the backend should not have raised.
        """
        matcher = self._kept.pop(grammar, None)
        if matcher is None:
            try:
                matcher = self.backend.compile(grammar)
            except (GrammarError, UserError) as error:
                raise GrammarError(str(error)) from None
            except Exception as error:
                raise GrammarError(f"the grammar backend failed: {type(error).__name__}: {error}") from error
        self._kept[grammar] = matcher
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return matcher
