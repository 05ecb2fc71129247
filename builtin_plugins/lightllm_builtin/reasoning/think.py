"""``<think>...</think>`` at the beginning of an answer is thought; all else is content, later tags included.

A thought is opened by its tag, by the prompt, or taken for granted (DeepSeek R1); its closing tag or the end of the
text ends it. Whitespace next to the tags is dropped, as the chat templates put it there; nothing else is lost.
"""

from __future__ import annotations

import re
from typing import ClassVar

from lightllm import Reasoning, Text
from lightllm.grammar import Grammar, Joined, Marker, OneOf, Regex, Repeated, Trigger, Triggered
from lightllm_builtin.tool_parsers.scan import SPACE, Machine, Steps, first_of

_CLOSE = first_of("</think>")
_REST = re.compile(r".+", re.DOTALL)
_FORMAT = re.compile(r"<[|｜]|</s>|<(?:start|end)_of_turn>|\[/[A-Z_]+\]")
"""A special token of a chat format: tags before the last one were a part of somebody's message."""
_OPENED = re.compile(r"(?:^|[>\]:\n])[ \t]*<think>|<think>\s*\Z")
"""A tag that begins a message or ends the prompt; else it is spoken of."""


class ThinkParser(Machine[Text | Reasoning]):
    """A `lightllm.ReasoningParser`. Time is linear; what waits is whitespace and the beginning of a tag."""

    always_thinks: ClassVar[bool]
    """Whether an answer begins in thought though neither it nor the prompt opens one."""

    def __init__(self, prompt: str) -> None:
        _, closed, rest = prompt.rpartition("</think>")
        *before, last = _FORMAT.split(rest)
        opened = _OPENED.search(last)
        over = bool(closed) and not before
        begun = last[opened.end() :] if opened else rest if over else ""
        self._opened = opened is not None
        self._continues = bool(begun.strip())
        self._thinks = self._opened or (self.always_thinks and not over)
        self._kind: type[Text] | type[Reasoning] = Reasoning if self._thinks else Text
        self._held: list[str] = []  # whitespace that may be next to a tag
        super().__init__()

    def grammar(self, answer: Grammar) -> Grammar:
        begin, end = Marker("<think>"), Marker("</think>")
        thought = Triggered((Trigger(end, Joined((Regex(r"\n{0,2}"), answer))),), least=1, most=1)
        if self._opened:
            return thought
        if self._thinks:
            return Joined((Repeated(begin, most=1), thought))
        return answer if self._continues else OneOf((Joined((begin, thought)), answer))

    def _read(self) -> Steps[None]:
        source = self.source
        if not self._continues:
            yield from source.run(SPACE, self._held.append)
            if (yield from source.literal("<think>", _drop)):
                self._thinks = True
                yield from source.run(SPACE, _drop)
            if self._thinks:
                self._held.clear()
        if self._thinks:
            self._kind = Reasoning
            if (yield from source.find(_CLOSE, self._thought)):
                self._held.clear()
                yield from source.run(SPACE, _drop)
        self._pieces += self._held
        self._flush()
        self._kind = Text
        yield from source.run(_REST, self._pieces.append)

    def _thought(self, text: str) -> None:
        body = text.rstrip(" \t\r\n")
        if body:
            self._pieces += self._held
            self._pieces.append(body)
            self._held.clear()
        self._held.append(text[len(body) :])

    def _event(self, text: str) -> Text | Reasoning:
        return self._kind(text)


def _drop(text: str) -> None:
    pass


class DeepSeekR1Parser(ThinkParser):
    always_thinks = True


class Qwen3Parser(ThinkParser):
    always_thinks = False
