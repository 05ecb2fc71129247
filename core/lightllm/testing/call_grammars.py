"""Parsers and the grammars they write: what a grammar allows is what its parser reads."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jsonschema_rs

from lightllm.chat import TOOL_EVENTS
from lightllm.grammar import Fixed, Grammar, GrammarError
from lightllm.interfaces import CallGrammar, Event, ReasoningGrammar, Text, ToolParser
from lightllm.testing.grammars import markers, matchers_for
from lightllm.testing.parsers import calls_of, how, joined, pieces_at
from lightllm.testing.rules import broken, resolve, shown

NONE = {"type": "object", "maxProperties": 0}
"""The arguments of a tool without ``parameters``."""

PLAIN = ("", "Hi 天\n", "{", "a <b> {c} [d]")


def check_call_grammar(parser: Any, tools: Sequence[Mapping[str, Any]], *, walks: int = 25) -> None:
    """The parser is a `CallGrammar`, and whatever its grammar lets a model write, it reads.

    ``required``: calls to these tools and nothing else, with arguments that their schemas allow; otherwise any text,
    and calls that keep to the schemas of ``strict`` tools; not ``parallel``: one call at most.

    Texts are drawn from the grammar, the same ones each time: ``walks`` for each of its forms.
    """
    target = resolve(parser)

    def make() -> ToolParser:
        made: ToolParser = target(tools)
        return made

    if not isinstance(made := make(), CallGrammar):
        raise broken(
            "a parser whose calls can be forced has a method grammar(*, required, parallel)", f"parser: {parser}"
        )
    for required in (True, False):
        for parallel in (True, False):
            grammar = _grammar(made, required=required, parallel=parallel)
            for kind, matcher in matchers_for(grammar).items():
                form = f"grammar(required={required}, parallel={parallel}), its markers being {kind}"
                _compiles(lambda g=grammar, m=matcher: m.compile(g), form)  # type: ignore[misc]
                for text in PLAIN:
                    if matcher.fits(grammar, text) is required:
                        rule = "allows nothing but calls" if required else "allows any text"
                        raise broken(f"grammar(required={required}) {rule}", form, f"text: {text!r}")
                draw = random.Random(0)
                for _ in range(walks):
                    text = matcher.walk(grammar, draw)
                    _check_reading(make, tools, text, form, required, parallel, draw)


def _grammar(parser: CallGrammar, *, required: bool, parallel: bool) -> Grammar:
    return parser.grammar(required=required, parallel=parallel)


def _compiles(compile: Callable[[], object], form: str) -> None:
    try:
        compile()
    except GrammarError as error:
        raise broken("a parser's grammar compiles with llguidance", form, f"error: {error}") from error


def _check_reading(
    make: Callable[[], ToolParser],
    tools: Sequence[Mapping[str, Any]],
    text: str,
    form: str,
    required: bool,
    parallel: bool,
    draw: random.Random,
) -> None:
    events = joined(make, TOOL_EVENTS, [text])
    facts = [form, f"it allows: {shown(text)}", f"the parser reads: {shown(events)}"]
    for pieces in (list(text), pieces_at(text, draw.choices(range(len(text) + 1), k=10))):
        again = joined(make, TOOL_EVENTS, pieces)
        if again != events:
            rule = "every way of cutting the text gives the same events when joined"
            raise broken(rule, *facts, f"pushed {how(pieces)}: {shown(again)}")
    found = calls_of(events)
    if required and (not found or any(isinstance(event, Text) for event in events)):
        raise broken("grammar(required=True) allows nothing but what the parser reads as calls", *facts)
    if not parallel and len(found) > 1:
        raise broken("grammar(parallel=False) allows one call at most", *facts)
    if not found and _text(events) != text:
        raise broken("a text in which the parser finds no call is all content", *facts)
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    for name, arguments in found:
        if name not in functions:
            raise broken("a grammar allows calls to the parser's tools only", *facts, f"called: {name!r}")
        try:
            value = json.loads(arguments, parse_float=_finite)
        except ValueError as error:
            raise broken("the arguments that a grammar allows are JSON", *facts, f"{error}: {arguments!r}") from None
        bound = required or functions[name].get("strict")
        schema = functions[name].get("parameters", NONE) if bound else {}
        if not isinstance(value, dict) or not jsonschema_rs.is_valid(schema, value):
            rule = (
                "a grammar allows the arguments that the tool's schema allows" if bound else "arguments are an object"
            )
            raise broken(rule, *facts, f"arguments of {name}: {shown(arguments)}", f"schema: {json.dumps(schema)}")


def _finite(number: str) -> float:
    """JSON has larger numbers than Python's, which become infinite: no JSON any more."""
    return max(-1e308, min(1e308, float(number)))


def _text(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def check_text_is_allowed(
    parser: Any, tools: Sequence[Mapping[str, Any]], text: str, calls: Sequence[tuple[str, str]]
) -> None:
    """``text``, which is these calls, is what grammar(required=True) allows; unless their schemas forbid it."""
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    compact = text
    for name, arguments in calls:
        try:
            value = json.loads(arguments, parse_float=_finite)
        except ValueError:  # the text breaks off
            return
        if name not in functions or not jsonschema_rs.is_valid(functions[name].get("parameters", NONE), value):
            return
        compact = compact.replace(arguments, json.dumps(value, ensure_ascii=False, separators=(",", ":")), 1)
    for parallel in {True, len(calls) > 1}:
        grammar = _grammar(parser, required=True, parallel=parallel)
        form = f"grammar(required=True, parallel={parallel})"
        _check_fits(grammar, (text, compact), form, "these calls", "".join(arguments for _, arguments in calls))


def check_thought_is_allowed(parser: ReasoningGrammar, text: str, content: str) -> None:
    """``text``, which ends in this content, is what the grammar for just this content allows."""
    form = f"grammar(Fixed({content!r}))"
    _check_fits(parser.grammar(Fixed(content)), (text,), form, "the thought and the content", content)


def _check_fits(grammar: Grammar, texts: Sequence[str], form: str, what: str, payload: str) -> None:
    for kind, matcher in matchers_for(grammar).items():
        if kind != "text" and any(name in payload for name in markers(grammar)):
            continue  # a model writes this with the letters of the name, which cannot be told here from the token
        where = f"{form}, its markers being {kind}"
        _compiles(lambda m=matcher: m.compile(grammar), where)  # type: ignore[misc]
        if not any(matcher.fits(grammar, text) for text in texts):
            raise broken(
                "a parser's grammar allows what the parser reads (grammar=False: not this text)",
                where,
                f"the parser reads {what} in: {shown(texts[0])}",
                *([f"nor does it allow: {shown(texts[-1])}"] if texts[-1] != texts[0] else []),
            )
