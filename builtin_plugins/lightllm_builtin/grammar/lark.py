"""`lightllm.grammar` written in llguidance's dialect of Lark.

Reference: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

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

COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}

_ANY = "(?s:.*)"


def written(grammar: Grammar, special: Callable[[str], int | None]) -> str:
    """What llguidance reads. ``special``: the id of a special token, None where there is no such. Raises
    `GrammarError`."""
    return _Writer(special).write(grammar)


class _Writer:
    def __init__(self, special: Callable[[str], int | None]) -> None:
        self._special = special
        self._rules: list[str] = []
        self._others: list[dict[str, str]] = []  # grammars of their own

    def write(self, grammar: Grammar) -> str:
        start = self._expression(grammar)
        lark = "\n".join(["%llguidance {}", f"start: {start}", *self._rules, ""])
        return json.dumps({"grammars": [{"name": "answer", "lark_grammar": lark}, *self._others]})

    def _expression(self, node: Grammar) -> str:
        match node:
            case Fixed(text):
                return _quoted(text)
            case Marker(text):
                token = self._special(text)
                return _quoted(text) if token is None else f"<[{token}]>"
            case Json(schema):
                return f"%json {_compact(schema)}"
            case Regex(pattern):
                return f"/{regex_to_lark(pattern, 'dw')}/" if pattern else '""'
            case Rules(source):
                return self._other(source)
            case Joined(parts):
                return f"( {' '.join(map(self._expression, parts))} )"
            case OneOf(options):
                return f"( {' | '.join(map(self._expression, options))} )"
            case Repeated(part, least, most):
                return f"( {self._expression(part)} ){{{least},{'' if most is None else most}}}"
            case Triggered():
                return self._triggered(node)

    def _other(self, source: str) -> str:
        try:
            lark = any_to_lark(source)
        except Exception as error:
            raise GrammarError(f"it is neither Lark nor GBNF: {error}") from None
        name = f"g{len(self._others)}"
        self._others.append({"name": name, "lark_grammar": lark})
        return f"@{name}"

    def _triggered(self, node: Triggered) -> str:
        """Text is a lexeme that a trigger, being lazy, ends as soon as it has been read."""
        text = self._rule(f"/{_ANY}/")
        tags = []
        for trigger in node.triggers:
            token = self._special(trigger.at.text) if isinstance(trigger.at, Marker) else None
            if token is not None:
                head = f"{text} <[{token}]>"
            else:
                at = re.escape(trigger.at.text) if isinstance(trigger.at, Marker) else trigger.at.pattern
                head = self._rule(f"/{regex_to_lark(f'{_ANY}(?:{at})', 'dw')}/", "[lazy]")
            tags.append(self._rule(f"{head} {self._expression(trigger.then)}"))
        tag = f"( {' | '.join(tags)} )"
        if node.most is None:
            return f"( {tag}{{{node.least},}} {text} )"
        if node.least == node.most:
            return f"{tag}{{{node.most}}}"
        return f"( {tag}{{{node.least},{node.most - 1}}} {text} | {tag}{{{node.most}}} )"

    def _rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _compact(schema: str) -> str:
    value: Any = json.loads(schema)
    if value is False:
        raise GrammarError("the schema false allows nothing")
    if value is True:
        value = {}
    if not isinstance(value, dict):
        raise GrammarError("a JSON Schema is an object, true or false")
    if "json-schema.org/draft" not in str(value.get("$schema")):
        value.pop("$schema", None)  # llguidance insists on knowing it
    return json.dumps({"x-guidance": COMPACT, **value})
