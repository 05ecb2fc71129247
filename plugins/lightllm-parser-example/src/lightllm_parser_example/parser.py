"""DeepSeek V3.1: text, ``BEGIN``, for each call ``CALL name ARGUMENTS {...} CALL_END``, then ``END``.

Only a call to a declared tool is a call; what else looks like one is content, as it was written.
Reference: the chat template of deepseek-ai/DeepSeek-V3.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightllm import CallArguments, CallStart, Text
from lightllm.grammar import Fixed, Grammar, Joined, Marker, OneOf, Repeated, Trigger, Triggered, json

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, ARGUMENTS, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
MARKS = (BEGIN, END, CALL, ARGUMENTS, CALL_END)
ANY_MARK = re.compile("|".join(MARKS))

Event = Text | CallStart | CallArguments


class DeepSeekV31Parser:
    """`lightllm.ToolParser` and `lightllm.CallGrammar`."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._tools = tools
        self._names = [tool["function"]["name"] for tool in tools]
        self._rest = ""  # the end of what was pushed, where a mark may begin
        self._held = ""  # what may begin a call, else it is content
        self._name: str | None = None  # what has come of a call's name
        self._in_arguments = False
        self._called = False  # whether a call is the last thing that came
        self._count = 0

    def push(self, text: str) -> list[Event]:
        return list(self._read(self._rest + text))

    def close(self) -> list[Event]:
        return [*self._text(self._rest), *self._release()]

    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        call = OneOf(tuple(_call(tool, required=required) for tool in self._tools))
        calls = Joined((call, Repeated(call), Marker(END))) if parallel else Joined((call, Marker(END)))
        return Joined((Marker(BEGIN), calls)) if required else Triggered((Trigger(Marker(BEGIN), calls),), most=1)

    def _read(self, text: str) -> Iterator[Event]:
        """Marks, and text between them. What later text may make a mark waits."""
        at = 0
        for mark in ANY_MARK.finditer(text):
            yield from self._text(text[at : mark.start()])
            yield from self._mark(mark[0])
            at = mark.end()
        last = text.rfind("<", at)
        end = last if last >= 0 and any(mark.startswith(text[last:]) for mark in MARKS) else len(text)
        self._rest = text[end:]
        yield from self._text(text[at:end])

    def _text(self, text: str) -> Iterator[Event]:
        if not text:
            return
        if self._in_arguments:
            yield CallArguments(self._count - 1, text)
        elif self._name is not None and any(name.startswith(self._name + text) for name in self._names):
            self._name += text
            self._held += text
        else:
            yield from self._release(text)

    def _mark(self, mark: str) -> Iterator[Event]:
        if self._in_arguments and mark == CALL_END:
            self._in_arguments, self._called = False, True
        elif self._in_arguments:
            yield CallArguments(self._count - 1, mark)
        elif mark == ARGUMENTS and self._name is not None and self._name in self._names:
            yield CallStart(self._count, self._name)
            self._held, self._name, self._in_arguments = "", None, True
            self._count += 1
        elif mark in (BEGIN, CALL):
            if not (mark == CALL and self._held == BEGIN):
                yield from self._release()
            self._held += mark
            self._name = "" if mark == CALL else None
        elif not (mark == END and self._called and not self._held):
            yield from self._release(mark)

    def _release(self, text: str = "") -> Iterator[Event]:
        """What is held, and this, is content."""
        text, self._held, self._name = self._held + text, "", None
        if text:
            self._called = False
            yield Text(text)


def _call(tool: Mapping[str, Any], *, required: bool) -> Grammar:
    function = tool["function"]
    held = required or function.get("strict")  # to its schema; else any object will do
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"additionalProperties": False}
    arguments = json({"type": "object", **parameters} if held else {"type": "object"})
    return Joined((Marker(CALL), Fixed(function["name"]), Marker(ARGUMENTS), arguments, Marker(CALL_END)))
