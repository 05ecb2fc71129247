"""Text comes in pieces, as the model writes it, and leaves as early as it can: what may still become a call is kept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightllm import CallArguments, CallStart, Text
from lightllm.grammar import Fixed, Grammar, Joined, Json, Marker, OneOf, Repeated, Trigger, Triggered, json

Event = Text | CallStart | CallArguments

END = ">>"


class ExamplePluginParser:
    """`lightllm.ToolParser` and `lightllm.CallGrammar`. A call of a tool that nobody declared is text."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self.tools = {tool["function"]["name"]: tool["function"] for tool in tools}
        names = "|".join(map(re.escape, self.tools)) or "(?!)"  # which is never found
        self.begin = re.compile(rf"<<({names}) (?=\{{)")
        self.unread = ""
        self.calls = 0
        self.state = "text"  # then the "arguments" of a call, then its "end"
        self.depth = 0  # brackets that are open in the arguments
        self.quoted = self.escaped = False  # inside a string of the arguments; after a backslash there

    def push(self, text: str) -> list[Event]:
        self.unread += text
        return list(self._read(ended=False))

    def close(self) -> list[Event]:
        return list(self._read(ended=True))

    def _read(self, ended: bool) -> Iterator[Event]:
        """What the unread text decides. Nothing depends on where a piece of it ended."""
        while self.unread:
            if self.state == "text":
                call = self.begin.search(self.unread)
                end = call.start() if call else len(self.unread) - (0 if ended else self._undecided())
                if end:
                    yield Text(self.unread[:end])
                if call is None:
                    self.unread = self.unread[end:]
                    return
                yield CallStart(self.calls, call[1])
                self.unread = self.unread[call.end() :]
                self.calls += 1
                self.state = "arguments"
            elif self.state == "arguments":
                end = self._end_of_arguments()
                yield CallArguments(self.calls - 1, self.unread[:end])
                self.unread = self.unread[end:]
            elif not ended and len(self.unread) < len(END) and END.startswith(self.unread):
                return
            else:
                self.unread = self.unread.removeprefix(END)
                self.state = "text"

    def _undecided(self) -> int:
        """How many of the last characters may be the beginning of a call."""
        start = self.unread.rfind("<<")
        if start >= 0 and any(f"<<{name} {{".startswith(self.unread[start:]) for name in self.tools):
            return len(self.unread) - start
        return int(self.unread.endswith("<"))

    def _end_of_arguments(self) -> int:
        """How much of the unread text is arguments: up to the bracket that closes the first, if it is there yet."""
        for i, character in enumerate(self.unread):
            if self.escaped:
                self.escaped = False
            elif self.quoted:
                self.escaped = character == "\\"
                self.quoted = character != '"'
            elif character == '"':
                self.quoted = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth == 0:
                    self.state = "end"
                    return i + 1
        return len(self.unread)

    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        """How answers look that call the tools, for requests that force or check them."""
        calls = [
            (f"<<{name} ", Joined((_arguments(tool, strict=required or bool(tool.get("strict"))), Fixed(END))))
            for name, tool in self.tools.items()
        ]
        most = None if parallel else 1
        if required:
            return Repeated(OneOf(tuple(Joined((Fixed(begin), rest)) for begin, rest in calls)), least=1, most=most)
        return Triggered(tuple(Trigger(Marker(begin), rest) for begin, rest in calls), most=most)


def _arguments(tool: Mapping[str, Any], *, strict: bool) -> Json:
    if not strict:
        return json({"type": "object"})
    parameters = tool.get("parameters")
    if parameters is None:
        parameters = {"properties": {}, "additionalProperties": False}
    return json({**parameters, "type": "object"})
