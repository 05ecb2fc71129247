"""What an answer must look like, said without any library's language: the server and tool parsers write these, a
grammar backend compiles them. Plain data, so that it crosses to the engine and to plugins of any kind.

An answer matches as a whole: it can end only where its grammar can.
"""

from __future__ import annotations

from typing import Any

import msgspec


class _Node(msgspec.Struct, frozen=True, tag=True):
    pass


class Fixed(_Node, frozen=True):
    """This text."""

    text: str


class Marker(_Node, frozen=True):
    """The special token of this name (``[TOOL_CALLS]``); where the tokenizer has none, the text."""

    text: str


class Json(_Node, frozen=True):
    """One JSON value that its JSON Schema allows, without whitespace. ``schema``: the schema as JSON (see `json`)."""

    schema: str


class Regex(_Node, frozen=True):
    """A match of the whole pattern. Syntax: what Python's and Rust's regular expressions share; no look-around."""

    pattern: str


class Rules(_Node, frozen=True):
    """A context-free grammar in Lark's notation or llama.cpp's GBNF. It begins at its rule ``start`` or ``root``."""

    source: str


class Joined(_Node, frozen=True):
    """One after the other."""

    parts: tuple[Grammar, ...]


class OneOf(_Node, frozen=True):
    options: tuple[Grammar, ...]


class Repeated(_Node, frozen=True):
    """``least`` to ``most`` times; ``most`` None: any number of times."""

    part: Grammar
    least: int = 0
    most: int | None = None


class Trigger(msgspec.Struct, frozen=True):
    """``at``: what, once it has been written, must be followed by ``then``."""

    at: Marker | Regex
    then: Grammar


class Triggered(_Node, frozen=True):
    """Any text, in which every trigger is followed as it says; after ``most`` of them nothing more may come.

    ``least`` is 0, or 1: at least one trigger must come.
    """

    triggers: tuple[Trigger, ...]
    least: int = 0
    most: int | None = None


Grammar = Fixed | Marker | Json | Regex | Rules | Joined | OneOf | Repeated | Triggered


class GrammarError(ValueError):
    """This grammar cannot be compiled. The text is for the client who sent it."""


def json(schema: Any) -> Json:
    """``schema``: a JSON Schema as plain data."""
    return Json(msgspec.json.encode(schema).decode())
