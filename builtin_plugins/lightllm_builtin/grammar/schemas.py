"""JSON Schemas as llguidance should see them: what it gets wrong refused, what it refuses without need taken out.

Reference: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md
"""

from __future__ import annotations

import json
import re
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

LONG = 64
"""Characters of a literal, and repetitions, from which on text that must come is no longer `modest`."""

MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
"""Their keys are names, not keywords."""

REMARKS = frozenset({"title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"})
_REFERENCES = frozenset({"$schema", "$id", "$ref"})
_COUNTS = frozenset({"minItems", "minLength", "minProperties"})


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
    if isinstance(schema, list):
        return [_clean(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    _check_bounds(schema)
    out = {}
    for key, value in schema.items():
        if key in REMARKS or (key == "uniqueItems" and value is False):
            continue
        if key == "format" and isinstance(value, str) and value not in FORMATS:
            continue
        if key in ("const", "enum"):
            for literal in value if key == "enum" and isinstance(value, list) else [value]:
                _check_literal(literal)
        elif key in MAPS and isinstance(value, dict):
            for name in value:
                _check_literal(name)
            value = {name: _clean(inner) for name, inner in value.items()}
        elif isinstance(value, int) and abs(value) > EXACT:
            raise GrammarError(f"{key} is beyond 2**53: that cannot be enforced exactly")
        else:
            value = _clean(value)
        out[key] = value
    return out


def _check_literal(value: Any) -> None:
    if len(text := json.dumps(value)) > LONGEST:
        raise GrammarError(f"a literal of {len(text):,} characters is too long, {LONGEST:,} is the limit")
    if any(abs(number) > EXACT for number in _integers(value)):
        raise GrammarError("integers beyond 2**53 cannot be enforced exactly")


def _check_bounds(schema: dict[str, Any]) -> None:
    """llguidance lets an exclusive bound itself through where the other one is less than 1 away."""
    low, high = (
        [schema[key] for key in keys if isinstance(schema.get(key), (int, float))]
        for keys in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    )
    exclusive = "exclusiveMinimum" in schema or "exclusiveMaximum" in schema
    if low and high and exclusive and 0 < min(high) - max(low) < 1 and schema.get("type") != "integer":
        raise GrammarError("an exclusive bound less than 1 from the other bound cannot be enforced exactly")


def _integers(value: Any) -> list[int]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for inner in value for number in _integers(inner)]
    return [value] if isinstance(value, int) else []


def modest(schema: str) -> bool:
    """Whether no text that must come can be very long: literals and repetitions are short."""
    return _modest(json.loads(schema))


def _modest(schema: Any) -> bool:
    if isinstance(schema, list):
        return all(map(_modest, schema))
    if isinstance(schema, dict):
        return all(_modest_keyword(key, value) for key, value in schema.items())
    return _short(schema)


def _modest_keyword(key: str, value: Any) -> bool:
    if key in REMARKS or key in _REFERENCES:
        return True
    if key in _COUNTS:
        return isinstance(value, (int, float)) and value <= LONG
    if key == "pattern":
        return modest_pattern(str(value))
    if key == "const":
        return _short(value)
    if key == "enum" and isinstance(value, list):
        return all(map(_short, value))
    if key in MAPS and isinstance(value, dict):
        fits = modest_pattern if key == "patternProperties" else _short
        return all(fits(name) and _modest(inner) for name, inner in value.items())
    return _short(key) and _modest(value)


def _short(value: Any) -> bool:
    return len(json.dumps(value, ensure_ascii=False)) <= LONG


def modest_pattern(pattern: str) -> bool:
    return len(pattern) <= 4 * LONG and all(int(count) <= LONG for count in re.findall(r"\d+", pattern))
