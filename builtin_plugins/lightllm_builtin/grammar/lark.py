"""`lightllm.grammar` written in llguidance's dialect of Lark.

Reference: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from lightllm.grammar import (
    Fixed,
    Grammar,
    GrammarError,
    Joined,
    Json,
    Marker,
    OneOf,
    Regex,
    Repeated,
    Rules,
    Triggered,
)
from lightllm_builtin.grammar import schemas

_ANY = "(?s:.*)"

MANY = 64
"""Texts to choose from, from which on they are better one lexeme than as many."""


def modest(grammar: Grammar) -> bool:
    """Whether no text that must come can be very long."""
    return all(
        schemas.modest(node.schema) if isinstance(node, Json)
        else schemas.modest_pattern(node.pattern) if isinstance(node, Regex)
        else not isinstance(node, Rules)
        for node in _nodes(grammar)
    )  # fmt: skip


def has_schema(grammar: Grammar) -> bool:
    return any(isinstance(node, Json) for node in _nodes(grammar))


def _nodes(node: Grammar) -> Iterator[Grammar]:
    yield node
    match node:
        case Joined(parts) | OneOf(parts):
            inner: Iterable[Grammar] = parts
        case Repeated(part):
            inner = (part,)
        case Triggered(triggers):
            inner = (trigger.then for trigger in triggers)
        case _:
            inner = ()
    for part in inner:
        yield from _nodes(part)


class Lark:
    """A grammar in Lark. ``special``: the id of a special token, None where there is no such. Raises `GrammarError`."""

    def __init__(self, grammar: Grammar, special: Callable[[str], int | None]) -> None:
        self._special = special
        self._rules: list[str] = []
        self._others: list[dict[str, str]] = []  # grammars of their own
        start = self._expression(grammar)
        self.body = "\n".join([f"start: {start}", *self._rules, ""])

    def source(self, *, forcing: bool) -> str:
        """What llguidance reads.

        ``forcing``: it looks ahead for text that has no alternative, and does so without an end in sight; only for
        `modest` grammars is the end near.
        """
        lark = f"%llguidance {json.dumps({'no_forcing': not forcing})}\n{self.body}"
        return json.dumps({"grammars": [{"name": "answer", "lark_grammar": lark}, *self._others]})

    def _expression(self, node: Grammar) -> str:
        match node:
            case Fixed(text):
                return _quoted(text)
            case Marker(text):
                token = self._special(text)
                return _quoted(text) if token is None else f"<[{token}]>"
            case Json(schema):
                return f"%json {schemas.prepared(schema)}"
            case Regex(pattern):
                return _regex(pattern) if pattern else '""'
            case Rules(source):
                return self._other(source)
            case Joined(parts):
                return f"( {' '.join(map(self._expression, parts))} )"
            case OneOf(options) if len(options) > MANY and all(isinstance(option, Fixed) for option in options):
                return self._rule(" | ".join(map(self._expression, options)), name="T")  # a terminal: one lexeme
            case OneOf(options):
                return f"( {' | '.join(map(self._expression, options))} )"
            case Repeated(_, _, 0):
                return '""'
            case Repeated(part, least, most):
                return f"( {self._expression(part)} ){{{least},{'' if most is None else most}}}"
            case Triggered():
                return self._triggered(node)

    def _other(self, source: str) -> str:
        lark = source
        if "::=" in source:
            try:
                lark = gbnf_to_lark(_convertible(source))
            except Exception as error:
                raise GrammarError(f"it is no GBNF: {error}") from None
        elif not re.search(r"^\s*\??start\b", source, re.MULTILINE):
            raise GrammarError("it is neither Lark, with a rule start, nor GBNF, with a rule root")
        name = f"g{len(self._others)}"
        self._others.append({"name": name, "lark_grammar": lark})
        return f"@{name}"

    def _triggered(self, node: Triggered) -> str:
        """Text is a lexeme that a trigger, being lazy, ends as soon as it has been read."""
        text = self._rule(f"/{_ANY}/")
        tags = []
        for trigger in node.triggers:
            at = re.escape(trigger.at.text) if isinstance(trigger.at, Marker) else trigger.at.pattern
            heads = [self._rule(_regex(f"{_ANY}(?:{at})"), "[lazy]")]
            token = self._special(trigger.at.text) if isinstance(trigger.at, Marker) else None
            if token is not None:  # the text may be spelt out as well
                heads.append(f"{text} <[{token}]>")
            tags.append(self._rule(f"( {' | '.join(heads)} ) {self._expression(trigger.then)}"))
        tag = f"( {' | '.join(tags)} )"
        if node.most is None:
            return f"( {tag}{{{node.least},}} {text} )"
        if node.least == node.most:
            return f"{tag}{{{node.most}}}"
        if node.most == 1:
            return f"( {text} | {tag} )"
        return f"( {tag}{{{node.least},{node.most - 1}}} {text} | {tag}{{{node.most}}} )"

    def _rule(self, body: str, options: str = "", name: str = "r") -> str:
        name += str(len(self._rules))
        self._rules.append(f"{name}{options}: {body}")
        return name


_GBNF = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^]\\]|\\.)*]|#[^\n]*|(?<![\w-])start(?![\w-])', re.DOTALL)
"""A literal, a class, a comment, or a rule that is called start."""
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


def _convertible(source: str) -> str:
    """GBNF that llguidance's converter reads rightly: it drops zeros of \\u and \\U, and calls the rule root start."""
    start = "start-"
    while start in source:
        start += "-"

    def character(escape: re.Match[str]) -> str:
        digits = escape[1] or escape[2]
        if digits is None:
            return escape[0]
        code = int(digits, 16)
        if code > sys.maxunicode or 0xD800 <= code < 0xE000:
            raise ValueError(f"{escape[0]} is no character")
        return f"\\x{code:02x}" if code < 256 else chr(code)

    def mended(part: re.Match[str]) -> str:
        text = part[0]
        return start if text == "start" else _ESCAPE.sub(character, text) if text[0] in '"[' else text

    return _GBNF.sub(mended, source)


def _regex(pattern: str) -> str:
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise GrammarError("the pattern ends with a backslash")
    return f"/{regex_to_lark(pattern, 'dw')}/"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
