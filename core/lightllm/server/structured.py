"""Which grammar an answer is held to: response_format and vLLM's fields for its text, tools for its calls."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightllm import grammar as g
from lightllm.checks import blamed
from lightllm.grammar import Grammar, GrammarError
from lightllm.interfaces import CallGrammar, ReasoningGrammar, ReasoningParser, ToolParser
from lightllm.server.protocol import ApiError, Generating
from lightllm.server.schemas import check_schema, check_size
from lightllm.server.state import ServerState
from lightllm.server.tools import Tools

ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Wish:
    """A grammar and the request field that it came from."""

    grammar: Grammar
    param: str


def answer_wish(request: Generating) -> Wish | None:
    """How the answer's text is to look. Raises `ApiError`, also where a request says it in two ways."""
    wishes = list(_wishes(request))
    if len(wishes) > 1:
        names = " and ".join(wish.param for wish in wishes)
        raise ApiError(f"Only one of {names} may be given.", param=wishes[1].param)
    return wishes[0] if wishes else None


async def grammar_of(state: ServerState, wish: Wish | None) -> Grammar | None:
    """Of a request without tools. Raises `ApiError` where it cannot be compiled."""
    if wish is not None:
        await _compile(state, wish.grammar, [wish])
    return wish.grammar if wish else None


async def chat_grammar(
    state: ServerState,
    wish: Wish | None,
    tools: Tools,
    tool_parser: ToolParser | None,
    reasoning_parser: ReasoningParser | None,
) -> Grammar | None:
    """Raises `ApiError` where it cannot be compiled, or a parser cannot do what is asked."""
    parts = [wish] if wish else []
    options = [wish.grammar] if wish and not tools.required else []
    if tools.required or tools.strict or (wish and isinstance(tool_parser, CallGrammar)):
        forced = tools.required or wish is not None
        options.append(_calls(state, tools, tool_parser, required=forced))
        parts += [
            Wish(g.json(tool["function"].get("parameters") or {}), f"tools[{i}].function.parameters")
            for tool, i in zip(tools.callable, tools.indices, strict=True)
            if forced or tool["function"].get("strict")
        ]
    if not options:
        return None
    grammar = options[0] if len(options) == 1 else g.OneOf(tuple(options))
    if reasoning_parser is not None:
        if not isinstance(reasoning_parser, ReasoningGrammar):
            raise ApiError("This server's reasoning parser cannot tell where the answer begins.", param=parts[0].param)
        with blamed(state.reasoning_parser_name):
            grammar = reasoning_parser.grammar(grammar)
    await _compile(state, grammar, parts)
    return grammar


def _calls(state: ServerState, tools: Tools, parser: ToolParser | None, *, required: bool) -> Grammar:
    param = "tool_choice" if tools.required else "tools"
    if isinstance(parser, CallGrammar):
        try:
            with blamed(state.tool_parser_name):
                return parser.grammar(required=required, parallel=tools.parallel)
        except GrammarError as error:
            raise ApiError(f"These tools cannot be held to their schemas: {error}.", param="tools") from None
    what = "forced calls" if tools.required else "strict tools"
    if parser is None:
        raise ApiError(
            f"This server was started without a tool parser (--tool-call-parser), {what} need one.", param=param
        )
    raise ApiError(f"This server's tool parser cannot write a grammar, {what} need one.", param=param)


async def _compile(state: ServerState, grammar: Grammar, parts: Sequence[Wish]) -> None:
    """See that it can be compiled. What cannot is looked for in ``parts``, to name the field at fault."""
    try:
        await state.checker.check(grammar)
    except GrammarError as error:
        for part in parts:
            try:
                await state.checker.check(part.grammar)
            except GrammarError as reason:
                raise ApiError(f"Invalid value for {part.param!r}: {reason}", param=part.param) from None
        raise ApiError(f"The answer cannot be held to this: {error}", param=parts[0].param) from None


# ---------------------------------------------------------------------------------------------------------------------
# The fields


def _wishes(request: Generating) -> Iterator[Wish]:
    if (format := request.response_format) is not None:
        at = "response_format"
        if format.type == "json_object":
            yield Wish(g.json(ANY_OBJECT), at)
        elif format.type == "json_schema":
            if format.json_schema is None or format.json_schema.schema is None:
                raise ApiError("response_format.json_schema.schema is required.", param=f"{at}.json_schema")
            yield _json(format.json_schema.schema, f"{at}.json_schema.schema")
        elif format.type != "text":
            raise ApiError(
                f"response_format {format.type!r} is not supported, only text, json_object and json_schema.", param=at
            )
    if (outputs := request.structured_outputs) is not None:
        at = "structured_outputs"
        for name in ("structural_tag", "whitespace_pattern", "disable_additional_properties"):
            if getattr(outputs, name):
                raise ApiError(f"{at}.{name} is not supported by this server.", param=f"{at}.{name}")
        yield from _guided(outputs.json, outputs.regex, outputs.choice, outputs.grammar, f"{at}.")
        if outputs.json_object:
            yield Wish(g.json(ANY_OBJECT), f"{at}.json_object")
    if request.guided_whitespace_pattern is not None:
        at = "guided_whitespace_pattern"
        raise ApiError(f"{at} is not supported by this server: JSON comes without whitespace.", param=at)
    yield from _guided(
        request.guided_json, request.guided_regex, request.guided_choice, request.guided_grammar, "guided_"
    )


def _guided(
    json: Any, regex: str | None, choice: Sequence[str] | None, grammar: str | None, prefix: str
) -> Iterator[Wish]:
    if json is not None:
        yield _json(_loaded(json, f"{prefix}json"), f"{prefix}json")
    if regex is not None:
        yield _sized(Wish(g.Regex(regex), f"{prefix}regex"), len(regex))
    if choice is not None:
        if not choice:
            raise ApiError(f"{prefix}choice needs at least one choice.", param=f"{prefix}choice")
        yield _sized(Wish(g.OneOf(tuple(map(g.Fixed, choice))), f"{prefix}choice"), sum(map(len, choice)))
    if grammar is not None:
        yield _sized(Wish(g.Rules(grammar), f"{prefix}grammar"), len(grammar))


def _json(schema: Any, param: str) -> Wish:
    check_schema(schema, param)
    return Wish(g.json(schema), param)


def _sized(wish: Wish, size: int) -> Wish:
    check_size(size, wish.param)
    return wish


def _loaded(schema: Any, param: str) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return jsonlib.loads(schema)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"Invalid value for {param!r}: it is not JSON: {error}", param=param) from None
