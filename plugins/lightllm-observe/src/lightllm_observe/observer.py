"""Listens to one server: counts every finished request, and logs it where that was asked for."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal

from lightllm import UserError
from lightllm_observe.log import LogFile, Writer
from lightllm_observe.redact import redact, redact_text
from lightllm_observe.totals import Totals, utc

Content = Literal["none", "redacted", "full"]

FIELDS = (
    "id",
    "endpoint",
    "model",
    "stream",
    "n",
    "status",
    "error",
    "finish_reasons",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "time_to_first_token",
    "duration",
)
CONTENT = ("request", "answers")

MAX_LINES = 10_000
MAX_CONTENT_BYTES = 64 << 20
"""What may wait to be written."""

LONGEST_ERROR = 500
CLOSE_SECONDS = 10


class Observer:
    """``path`` None: no log, only totals. Raises UserError where the log cannot be written."""

    def __init__(self, path: str | None, *, max_bytes: int, keep: int, content: Content) -> None:
        self._content = content
        self._totals = Totals()
        self._writer: Writer[dict[str, Any]] | None = None
        if path is not None:
            try:
                file = LogFile(path, max_bytes, keep)
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"--observe-log {path}: it cannot be written ({reason}); give another file") from None
            self._writer = Writer(file, self._line, max_items=MAX_LINES, max_weight=MAX_CONTENT_BYTES)

    def on_finish(self, facts: Mapping[str, Any]) -> None:
        """Called on the event loop: leaves all that takes time to the writer's thread."""
        self._totals.add(facts)
        if self._writer is None:
            return
        kept = {"time": utc(time.time())} | {name: facts[name] for name in FIELDS}
        if self._content == "none":
            self._writer.put(kept)
        else:
            content = {name: facts[name] for name in CONTENT}
            self._writer.put(kept | content, weight(content))

    def totals(self) -> dict[str, Any]:
        log = self._writer and {
            "written": self._writer.written,
            "dropped": self._writer.dropped,
            "lost": self._writer.lost,
        }
        return self._totals.show() | {"log": log}

    def lifespan(self) -> AbstractAsyncContextManager[None]:
        """The log is written while this is open."""
        return self._lifespan()

    @asynccontextmanager
    async def _lifespan(self) -> AsyncIterator[None]:
        if self._writer is None:
            yield
            return
        self._writer.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self._writer.close, CLOSE_SECONDS)

    def _line(self, kept: dict[str, Any]) -> bytes:
        line = dict(kept)
        for name in ("time_to_first_token", "duration"):
            if line[name] is not None:
                line[name] = round(line[name], 6)
        if line["error"] is not None and self._content != "full":
            line["error"] = redact_text(line["error"])[:LONGEST_ERROR]  # it may quote what the model wrote
        if self._content == "redacted":
            line |= {name: redact(line[name]) for name in CONTENT}
        # half of a character, which UTF-8 cannot say, becomes the escape that JSON has for it
        return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"


def weight(value: Any) -> int:
    """About how many bytes plain data takes. Lists of numbers, prompts as tokens, are not walked through."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + weight(item) for key, item in value.items())
    if isinstance(value, list) and value:
        return sum(map(weight, value)) if isinstance(value[0], (str, dict, list)) else 8 * len(value)
    return 8
