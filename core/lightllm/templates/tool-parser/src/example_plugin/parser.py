"""Text comes in pieces, as the model writes it, and leaves as early as it can: what may still become a call is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightllm import CallArguments, CallStart, Text
from lightllm.grammar import Fixed, Grammar, Joined, Json, Marker, OneOf, Repeated, Trigger, Triggered, json

END = ">>"


class ExamplePluginParser:
    """`lightllm.ToolParser` and `lightllm.CallGrammar`. A call of a tool that nobody declared is text."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self.tools = {f"<<{tool['function']['name']} ": tool["function"] for tool in tools}
        """What a call begins with -> the tool."""
        self.unread = ""
        self.calls = 0
        self.state = "text"  # then "arguments" of a call, then its "end"
        self.depth = 0  # brackets that are open in the arguments
        self.quoted = self.escaped = False  # inside a string of the arguments; after a backslash there

    def push(self, text: str) -> list[Text | CallStart | CallArguments]:
        self.unread += text
        return self._read(ended=False)

    def close(self) -> list[Text | CallStart | CallArguments]:
        return self._read(ended=True)

    def _read(self, ended: bool) -> list[Text | CallStart | CallArguments]:
        """What the unread text decides. Nothing depends on where a piece of it ended."""
        events: list[Text | CallStart | CallArguments] = []
        text = ""
        while self.unread:
            if self.state == "text":
                if any(self.unread.startswith(begin + "{") for begin in self.tools):
                    if text:
                        events.append(Text(text))
                        text = ""
                    begin = self.unread[: self.unread.index("{")]
                    events.append(CallStart(self.calls, self.tools[begin]["name"]))
                    self.unread = self.unread[len(begin) :]
                    self.calls += 1
                    self.state = "arguments"
                elif not ended and any((begin + "{").startswith(self.unread) for begin in self.tools):
                    break  # more text will tell
                else:
                    # up to where a call could begin
                    end = self.unread.find("<", 1)
                    end = len(self.unread) if end < 0 else end
                    text += self.unread[:end]
                    self.unread = self.unread[end:]
            elif self.state == "arguments":
                end = self._end_of_arguments()
                events.append(CallArguments(self.calls - 1, self.unread[:end]))
                self.unread = self.unread[end:]
            elif not ended and END.startswith(self.unread) and self.unread != END:
                break
            else:
                self.unread = self.unread.removeprefix(END)
                self.state = "text"
        if text:
            events.append(Text(text))
        return events

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
        """How calls look, for requests that force them."""
        most = None if parallel else 1
        if required:
            calls = [
                Joined((Fixed(begin), _arguments(tool, strict=True), Fixed(END))) for begin, tool in self.tools.items()
            ]
            return Repeated(OneOf(tuple(calls)), least=1, most=most)
        triggers = [
            Trigger(Marker(begin), Joined((_arguments(tool, strict=bool(tool.get("strict"))), Fixed(END))))
            for begin, tool in self.tools.items()
        ]
        return Triggered(tuple(triggers), most=most)


def _arguments(tool: Mapping[str, Any], *, strict: bool) -> Json:
    if not strict:
        return json({"type": "object"})
    nothing = {"properties": {}, "additionalProperties": False}
    return json({**(tool.get("parameters") or nothing), "type": "object"})
