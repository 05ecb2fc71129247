"""JSON Schemas as llguidance should see them: what it gets wrong refused, what it refuses without need taken out.

Reference: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from lightllm.grammar import GrammarError

OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ",",
    "key_separator": ":",
    # no \\uXXXX: a key could be spelt so that it is not recognised
    "json_allowed_escapes": 'nrbtf\\"',
}

LONGEST = 5000
"""Characters of one literal (an enum's entry, a name): a mask inside a longer one takes too long."""

EXACT = 2**53
"""Beyond this llguidance computes with rounded integers."""

FORMATS = frozenset(
    {
        "date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6",
        "uri", "uri-reference", "iri", "iri-reference", "uri-template", "json-pointer", "relative-json-pointer",
        "regex", "uuid",
    }
)  # fmt: skip
"""JSON Schema's own; any other is only a remark."""

_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_VALUES = frozenset({"const", "enum"})
_REMARKS = frozenset({"title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"})


def prepared(schema: str) -> str:
    """Raises `GrammarError`."""
    value = _clean(json.loads(schema))
    if value is False:
        raise GrammarError("the schema false allows nothing")
    if not isinstance(value, dict):
        raise GrammarError("a JSON Schema is an object, true or false")
    if "json-schema.org/draft" not in str(value.get("$schema")):
        value.pop("$schema", None)  # llguidance insists on knowing it
    return json.dumps({**value, "x-guidance": OPTIONS})


def _clean(schema: Any) -> Any:
    """A copy for llguidance."""
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        return schema
    out = {}
    for key, value in schema.items():
        if key in _REMARKS or (key == "uniqueItems" and value is False):
            continue
        if key == "format" and isinstance(value, str) and value not in FORMATS:
            continue
        if key in _VALUES:
            _check_literal(value if key == "const" else None, value if key == "enum" else ())
        elif key in _MAPS and isinstance(value, dict):
            for name in value:
                _check_literal(name)
            value = {name: _clean(inner) for name, inner in value.items()}
        elif key in _LISTS or isinstance(value, list):
            value = [_clean(inner) for inner in value] if isinstance(value, list) else value
        elif isinstance(value, dict):
            value = _clean(value)
        elif isinstance(value, int) and abs(value) > EXACT:
            raise GrammarError(f"{key} is beyond 2**53: that cannot be enforced exactly")
        out[key] = value
    return out


def _check_literal(const: Any, enum: Any = ()) -> None:
    for value in [const, *(enum if isinstance(enum, list) else ())]:
        if len(text := json.dumps(value)) > LONGEST:
            raise GrammarError(f"a literal of {len(text):,} characters is too long, {LONGEST:,} is the limit")
        if any(abs(number) > EXACT for number in _integers(value)):
            raise GrammarError("integers beyond 2**53 cannot be enforced exactly")


def _integers(value: Any) -> list[int]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for inner in value for number in _integers(inner)]
    return [value] if isinstance(value, int) else []


def modest(schema: str) -> bool:
    """Whether no text that must come can be very long: literals and repetitions are short."""
    return _modest(json.loads(schema))


_LONG = 64


def _modest(schema: Any) -> bool:
    if isinstance(schema, list):
        return all(map(_modest, schema))
    if not isinstance(schema, dict):
        return len(str(schema)) <= _LONG
    checks: dict[str, Callable[[Any], bool]] = {
        "pattern": lambda value: modest_pattern(str(value)),
        **dict.fromkeys(("minItems", "minLength", "minProperties"), lambda value: value <= _LONG),
        **dict.fromkeys((*_REMARKS, "$schema", "$id", "$ref"), lambda value: True),
    }
    return all(len(key) <= _LONG and checks.get(key, _modest)(value) for key, value in schema.items())


def modest_pattern(pattern: str) -> bool:
    return len(pattern) <= 4 * _LONG and all(int(count) <= _LONG for count in re.findall(r"\d+", pattern))
