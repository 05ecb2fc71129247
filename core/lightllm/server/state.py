"""What the server process holds while it serves, filled in by the composition root."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lightllm.chat import ChatTemplate
from lightllm.checks import INTERRUPTS, describe
from lightllm.config import Config
from lightllm.engine.client import EngineUnavailable
from lightllm.engine.request import Ready
from lightllm.grammar import Grammar
from lightllm.interfaces import Listener, ModelInfo, ReasoningParser, ToolParser
from lightllm.server.protocol import ApiError
from lightllm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lightllm.engine.client import EngineClient

log = logging.getLogger("lightllm.server")

Validator = Callable[[Mapping[str, Any]], str | None]

LONG_TEXT = 20_000
"""Characters from which on a text is encoded in a thread, to keep the streams going meanwhile."""


class Checker(Protocol):
    """In practice a `lightllm.server.checker.GrammarChecker`."""

    async def check(self, grammar: Grammar) -> None:
        """Raises `lightllm.grammar.GrammarError` where it cannot be compiled."""


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """``claims``: extra request field -> the `LogitsProcessorRecord.validate` of the plugin that claims it.

    ``model_names``: what clients may call the model; the first is its name, the others are aliases.
    """

    config: Config
    engine: EngineClient
    tokenizer: Tokenizer
    info: ModelInfo
    checker: Checker
    model_names: tuple[str, ...]
    chat_template: ChatTemplate | None = None
    tool_parser: Callable[[Sequence[Mapping[str, Any]]], ToolParser] | None = None
    reasoning_parser: Callable[[str], ReasoningParser] | None = None
    tool_parser_name: str = "the tool parser"
    reasoning_parser_name: str = "the reasoning parser"
    claims: Mapping[str, Validator | None] = field(default_factory=dict)
    listeners: Sequence[Listener] = ()
    routes: Sequence[Any] = ()
    lifespans: Sequence[AbstractAsyncContextManager[None]] = ()
    started: int = field(default_factory=lambda: int(time.time()))

    def ready(self) -> Ready:
        """Raises `EngineUnavailable` while there is no engine that could answer."""
        if self.engine.ready is None or not self.engine.healthy:
            raise EngineUnavailable("the model is loading" if self.engine.ready is None else "the engine has died")
        return self.engine.ready

    def model_name(self, asked: str | None) -> str:
        """The name to answer under. Raises `ApiError` 404 for a model that is not served here."""
        if not asked:
            return self.model_names[0]
        if asked in self.model_names or self.config.any_model_name:
            return asked
        raise ApiError(
            f"The model `{asked}` does not exist. Served here: {', '.join(self.model_names)}.",
            status=404,
            param="model",
            code="model_not_found",
        )

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    def tell(self, event: str, facts: Mapping[str, Any]) -> None:
        """Call every listener's ``on_request`` or ``on_finish``."""
        for listener in self.listeners:
            call = getattr(listener, event)
            if call is not None:
                try:
                    call(facts)
                except INTERRUPTS:
                    raise
                except BaseException as error:
                    log.exception("%s failed in %s: %s", listener.name, event, describe(error))
