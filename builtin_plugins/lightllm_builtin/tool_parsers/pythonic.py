"""Llama 3.2 (1B, 3B), Llama 4, ToolACE: ``[name(key='value', other=3), ...]``, a list of Python calls.

Arguments are Python literals (true, false and null pass too) and must become JSON, so they leave value by value, when
the comma or the bracket after it shows that a value is whole; one that is no literal is a fault. Text around the list
is content; ``<|python_start|>`` and ``<|python_end|>`` go.
Reference: https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_2/ and .../llama4/.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from lightllm import grammar
from lightllm.grammar import Fixed, Grammar, GrammarError, Joined, OneOf, Regex, Repeated, Trigger, Triggered
from lightllm_builtin.grammar import schemas
from lightllm_builtin.tool_parsers.calls import COMMAS, CallParser, schema_of, several, without_surrogates
from lightllm_builtin.tool_parsers.scan import PYTHON, Fault, Steps, first_of

_NAME = re.compile(r"[-.\w]+")
_AFTER = frozenset(",)")
_SIGN = re.compile("[-+]+")
_JOINED = frozenset("\"'rRuU")
"""What a string that is joined with what is before it, be it a prefix, begins with."""


class PythonicParser(CallParser):
    markers = first_of("[", "<|python_start|>")
    syntax = PYTHON

    def read_call(self, marker: str) -> Steps[None]:
        if marker != "[":
            yield from self.space()
            yield from self.expect("[")
        yield from self.read_list(self._call)

    def read_end(self) -> Steps[None]:
        yield from self.space()
        if (yield from self.literal("<|python_end|>")):
            self.drop()

    def _call(self) -> Steps[None]:
        name = yield from self.text_of(self.run(_NAME))
        yield from self.space()
        yield from self.expect("(")
        if name not in self.declared:
            self.release()
            return (yield from self.source.nested(self.content, ")"))
        separator = "{"
        while True:
            yield from self.run(COMMAS)
            if (yield from self.literal(")")):
                break
            key = yield from self.text_of(self.run(_NAME))
            if not key:
                raise Fault
            yield from self.space()
            yield from self.expect("=")
            yield from self.space()
            value = _json((yield from self.text_of(self._value())))
            if separator == "{":
                self.start(name)
            self.arguments(f'{separator}"{key}": {value}')
            separator = ", "
            self.drop()
        if separator == "{":
            self.start(name, "{")
        self.arguments("}")
        self.drop()

    def _value(self) -> Steps[None]:
        """A literal, and the space after it, up to a comma or the bracket. Strings may be several, to be joined."""
        if (yield from self.run(_SIGN)):
            yield from self.space()
        while True:
            yield from self.value()
            yield from self.space()
            char = yield from self.source.peek()
            if char in _AFTER:
                return
            if char not in _JOINED:
                raise Fault

    def grammar(self, *, required: bool, parallel: bool) -> Grammar:
        calls, triggers = [], []
        for tool in self.tools:
            name = tool["function"]["name"]
            rest = Joined((_arguments(name, schema_of(tool, required=required)), Fixed(")")))
            calls.append(Joined((Fixed(f"{name}("), rest)))
            triggers.append((Regex(re.escape(f"[{name}(")), rest))
        comma, end = Fixed(", "), Fixed("]")
        if required:
            return Joined((Fixed("["), several(OneOf(tuple(calls)), comma, parallel=parallel), end))
        more = Repeated(Joined((comma, OneOf(tuple(calls)))), most=None if parallel else 0)
        then = [Trigger(at, Joined((rest, more, end))) for at, rest in triggers]
        return Triggered(tuple(then), most=None if parallel else 1)


def _arguments(name: str, schema: Mapping[str, Any]) -> Grammar:
    """``key=value, ...``: first those that must be given, each in the schema's order. JSON's values are Python's."""
    if clash := schema.keys() - _UNDERSTOOD:
        raise GrammarError(f"{name}: {', '.join(sorted(clash))} cannot be kept to in calls of this model's form")
    properties, must = schema.get("properties", {}), schema.get("required", ())
    if absent := set(must) - properties.keys():
        raise GrammarError(f"{name}: required arguments need a schema: {', '.join(sorted(absent))}")
    value = _values(schema)
    if "properties" not in schema:
        others = schema.get("additionalProperties", True)
        if others is False:
            return Fixed("")
        one = Joined((Regex("[a-zA-Z_][a-zA-Z0-9_]*"), Fixed("="), value(others)))
        return Repeated(Joined((one, Repeated(Joined((Fixed(", "), one))))), most=1)
    given: dict[str, Grammar] = {}
    for key, inner in properties.items():
        if inner is False and key not in must:
            continue
        if not _NAME.fullmatch(key):
            raise GrammarError(f"{name}: an argument cannot be called {key!r} in calls of this model's form")
        given[key] = Joined((Fixed(f"{key}="), value(inner)))
    first = [part for key in given if key in must for part in (Fixed(", "), given[key])][1:]
    may = [Repeated(Joined((Fixed(", "), given[key])), most=1) for key in given if key not in must]
    if first:
        return Joined((*first, *may))
    # whichever comes first has no comma before it
    ways = [Joined((given[key], *may[i + 1 :])) for i, key in enumerate(given)]
    return Repeated(OneOf(tuple(ways)), most=1) if ways else Fixed("")


_UNDERSTOOD = schemas.REMARKS | {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "$defs",
    "definitions",
    "$schema",
    "$id",
}
"""Keywords of an object as a whole."""


def _values(schema: Mapping[str, Any]) -> Callable[[Any], Grammar]:
    """The grammar of a part of ``schema``, in which references lead to where they lead in the whole."""
    whole = {key: value for key, value in schema.items() if key not in ("$schema", "$id")}
    shared = {"$schema": schema["$schema"]} if "$schema" in schema else {}
    if (moved := _moved(whole)) != whole:
        shared["$defs"] = {_WHOLE: moved}
    return lambda part: grammar.json({**_moved(part), **shared} if isinstance(part, dict) else part)


_WHOLE = "arguments"


def _moved(schema: Any) -> Any:
    """A copy for below ``#/$defs/arguments``."""
    if isinstance(schema, list):
        return [_moved(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    out = {}
    for key, value in schema.items():
        if key == "$ref" and re.match("#(/|$)", str(value)):
            value = f"#/$defs/{_WHOLE}{value[1:]}"
        elif key in schemas.MAPS and isinstance(value, dict):
            value = {name: _moved(inner) for name, inner in value.items()}
        elif key not in ("const", "enum"):
            value = _moved(value)
        out[key] = value
    return out


class _Words(ast.NodeTransformer):
    """JSON's words for Python's."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        words = {"true": True, "false": False, "null": None}
        return ast.copy_location(ast.Constant(words[node.id]), node) if node.id in words else node


def _json(literal: str) -> str:
    """A Python literal as JSON. Raises `Fault`."""
    if "\\/" not in literal:  # which is "\\\\/" to Python
        with suppress(ValueError, RecursionError):
            json.loads(literal, parse_constant=_no_value)
            return literal.strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            tree = ast.parse(f"({literal})", mode="eval")  # in brackets: it may go over lines
        text = json.dumps(ast.literal_eval(_Words().visit(tree)), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise Fault from None
    return without_surrogates(text)


def _no_value(constant: str) -> None:
    raise ValueError(constant)
