"""What tool-call formats share: which text is a call, which is content, and when either is let out.

The rules, for every format:

- Only a call to a declared tool is a call. All other text is content, character by character, undeclared and malformed
  calls with their markers included. After a fault the search for calls goes on at the character that was at fault.
- A call starts (`CallStart`) once its name is known and its arguments have begun with ``{``. Until then it can still
  become content. Arguments then leave as they come and as the model wrote them; nothing in them is judged but strings
  and brackets. When they break off, or a bracket does not match, what has left stays, and the text from the fault on
  is content.
- Arguments before the name are kept until it comes. Absent, null and empty arguments are ``{}``. Arguments written as a
  string that holds an object (encoded twice) come decoded, in one piece.
- Whitespace before a call is dropped. After a call its closing tag is, and whitespace and separators when another call
  or the end comes next; before text they stay. What a call's object holds besides name and arguments is dropped.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from lightllm import CallArguments, CallStart, Text, grammar
from lightllm.grammar import Fixed, Grammar, Joined, Repeated
from lightllm_builtin.tool_parsers.scan import JSON, SPACE, Fault, Machine, Scanner, Steps

Event = Text | CallStart | CallArguments

COMMAS = re.compile(r"[, \t\r\n]+")


class CallParser(Machine[Event]):
    """A `lightllm.ToolParser`. A format says where calls begin (``markers``) and reads one with the methods below.

    Text that is undecided is held: `release` makes it content, `drop` forgets it, `start` a call drops it too.
    """

    markers: ClassVar[re.Pattern[str]]
    syntax: ClassVar[re.Pattern[str]] = JSON

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self.tools = tools
        self.declared = frozenset(tool["function"]["name"] for tool in tools)
        self.called = False
        """Whether a call is the last thing that came; else it is content, or nothing yet."""
        self._held: list[str] = []
        self._count = 0
        super().__init__(self.syntax)

    # --- for a format to fill in

    @abstractmethod
    def read_call(self, marker: str) -> Steps[None]:
        """Read on after a marker, which is held. Raises `Fault`."""

    def read_end(self) -> Steps[None]:
        """Read what may follow a call and is no content."""
        yield from ()

    # --- for a format to use

    def hold(self, text: str) -> None:
        self._held.append(text)

    def drop(self) -> None:
        self._held.clear()

    def release(self) -> None:
        text = "".join(self._held)
        self._held.clear()
        self.content(text)

    def content(self, text: str) -> None:
        """What is held, and this. Whitespace at the end is held until it is known what follows."""
        body = text.rstrip(" \t\r\n")
        if body:
            if self.called:
                self._flush()
                self.called = False
            self._pieces += self._held
            self._pieces.append(body)
            self._held.clear()
        if len(body) < len(text):
            self._held.append(text[len(body) :])

    def start(self, name: str, arguments: str = "") -> None:
        self._held.clear()
        self._flush()
        self._events.append(CallStart(self._count, name))
        self._count += 1
        self.called = True
        self.arguments(arguments)

    def arguments(self, fragment: str) -> None:
        self._pieces.append(fragment)

    def literal(self, word: str) -> Steps[bool]:
        return self.source.literal(word, self.hold)

    def expect(self, word: str) -> Steps[None]:
        if not (yield from self.literal(word)):
            raise Fault

    def run(self, characters: re.Pattern[str]) -> Steps[bool]:
        return self.source.run(characters, self.hold)

    def space(self) -> Steps[bool]:
        return self.run(SPACE)

    def value(self) -> Steps[None]:
        return self.source.value(self.hold)

    def text_of(self, steps: Steps[Any]) -> Steps[str]:
        """Take ``steps``; the text they held, which stays held."""
        before = len(self._held)
        yield from steps
        return "".join(self._held[before:])

    def read_list(self, read_item: Callable[[], Steps[None]]) -> Steps[None]:
        """What is between ``[``, just read, and ``]``: one or several calls."""
        while True:
            yield from self.space()
            yield from read_item()
            yield from self.run(COMMAS)
            if not self.called:
                self.release()
            if (yield from self.literal("]")):
                break
        if self.called:
            self.drop()

    def read_object(self, *, bare: bool = False) -> Steps[None]:
        """The object whose ``{`` was just read: a call if it names a declared tool; else all of it is content.

        ``bare``: no marker says that this is a call, so it must give its arguments, be it null.
        """
        name = arguments = None
        started = False
        while True:
            yield from self.space()
            if (yield from self.literal("}")):
                break
            if (yield from self.source.peek()) != '"':
                raise Fault
            key = _decoded((yield from self.text_of(self.value())))
            yield from self.space()
            yield from self.expect(":")
            yield from self.space()
            if started or key not in ("name", "arguments", "parameters"):
                yield from self.value()
            elif key == "name":
                name = _decoded((yield from self.text_of(self.value())))
                if name not in self.declared:
                    return (yield from self._no_call())
            elif name is not None and (yield from self.source.peek()) == "{":
                self.start(name)
                started = True
                yield from self.source.nested(self.arguments)
            else:
                arguments = _object((yield from self.text_of(self.value())))
                if arguments is None:
                    return (yield from self._no_call())
            if name is not None and arguments is not None and not started:
                self.start(name, arguments)
                started = True
            yield from self.space()
            if not (yield from self.literal(",")):
                yield from self.expect("}")
                break
        if started:
            self.drop()
        elif name is not None and not bare:
            self.start(name, "{}")
        else:
            self.release()

    def _no_call(self) -> Steps[None]:
        """The rest of an object, as content: what looks like a call in there is none."""
        self.release()
        yield from self.source.nested(self.content, "}")

    # --- the machine

    def _read(self) -> Steps[None]:
        while marker := (yield from self.source.find(self.markers, self.content)):
            self.hold(marker)
            try:
                yield from self.read_call(marker)
            except Fault:
                self.release()
            if self.called:
                yield from self.read_end()
            else:
                self.release()
        if not self.called:
            self._pieces += self._held

    def _event(self, text: str) -> Event:
        return CallArguments(self._count - 1, text) if self.called else Text(text)


# ---------------------------------------------------------------------------------------------------------------------
# Calls as grammars


def schema_of(tool: Mapping[str, Any], *, required: bool) -> dict[str, Any]:
    """What a tool's arguments are held to (`lightllm.CallGrammar`). A tool without parameters takes none."""
    function = tool["function"]
    if not (required or function.get("strict")):
        return {"type": "object"}
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"properties": {}, "additionalProperties": False}
    kind = parameters.get("type", "object")
    return {**parameters, "type": "object" if isinstance(kind, list) and "object" in kind else kind}


def arguments_of(tool: Mapping[str, Any], *, required: bool) -> Grammar:
    return grammar.json(schema_of(tool, required=required))


def call_object(tool: Mapping[str, Any], key: str, *, required: bool) -> Grammar:
    """``{"name": "...", "<key>": {...}}``, spaced as the models' templates show it."""
    head = f'{{"name": {json.dumps(tool["function"]["name"], ensure_ascii=False)}, "{key}": '
    return Joined((Fixed(head), arguments_of(tool, required=required), Fixed("}")))


def several(call: Grammar, separator: Grammar, *, parallel: bool) -> Grammar:
    """One call, or more where they may be ``parallel``."""
    return Joined((call, Repeated(Joined((separator, call))))) if parallel else call


def _decoded(string: str) -> str | None:
    """What a JSON string says; None if it is none, or has an escape that JSON does not know."""
    if not string.startswith('"'):
        return None
    try:
        return without_surrogates(json.loads(string, strict=False))
    except ValueError:
        return None


def _object(value: str) -> str | None:
    """Arguments that were read before they could leave, as the object they are; None if they are none."""
    if value == "null":
        return "{}"
    text = _decoded(value)
    if text is None:
        text = value
    elif not text.strip():
        return "{}"
    return text if _is_object(text.strip()) else None


def _is_object(text: str) -> bool:
    """Whether it is one from its first character to its last, by its strings and brackets."""
    parts: list[str] = []
    source = Scanner()
    source.ended = True
    source.feed(text)
    try:
        next(source.value(parts.append), None)
    except Fault:
        return False
    return text.startswith("{") and sum(map(len, parts)) == len(text)


def without_surrogates(text: str) -> str:
    """Halves of a character, which UTF-8 cannot say, as the escapes they came from."""
    return text.encode("utf-8", "backslashreplace").decode()
